"""Plain models of other families: what their pictures show and ask, that packed questions are worth what each is alone, and a run
that ends in a model that can be asked."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import uhr_bat
from copies import forked
from uhr_bat.training.tiny import plain, plain_pictures
from uhr_bat.training.tiny.plain_models import (
    AROUND,
    FORMS,
    MARKERS,
    image_processor_of,
    model_of,
    rows_of,
    tokenizer_of,
)

COUNTS = {"ordinary": 4, "native": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("pictures")
    for kind, number in COUNTS.items():
        for idx in range(number):
            plain_pictures._paint(kind, idx, found)
    return found


@pytest.fixture(scope="module")
def pictures(folder):
    return plain_pictures.Pictures(folder, COUNTS)


def test_a_picture_is_asked_only_what_it_shows(pictures):
    rng, asked = np.random.default_rng(0), 0
    for _ in range(12):
        view, picture = pictures.crop("ordinary", rng, (128, 96), (0.6, 2.0))
        assert picture.size == (128, 96)
        for question in view.questions(8, rng, whole=False):
            asked += 1
            places = view.place(np.reshape([thing.centre for thing in question.objects], (-1, 2)))
            assert ((places >= 0) & (places <= (128, 96))).all() and question.kind != "quadrant"
            assert all(thing.size * view.pixel_of_unit.min() >= 1 for thing in question.objects)
    assert asked > 20


def test_a_part_of_a_scene_with_native_objects_has_their_colours_where_they_lie(pictures):
    rng, seen = np.random.default_rng(1), 0
    for _ in range(20):
        view, picture = pictures.native(rng, (192, 192))
        for thing in view.scene.objects:
            x, y = view.place(thing.centre)
            if 3 < x < 189 and 3 < y < 189:  # its colour, under haze, or the pad's is next to the centre
                near = np.asarray(picture, int)[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4].reshape(-1, 3)
                distance = {name: np.abs(near - paint).sum(1).min() for name, paint in plain.PAINTS.items()}
                seen += 1
                assert min(distance, key=distance.get) == thing.colour
    assert seen


def test_strewn_objects_change_only_the_picture_around_them_and_are_told_of(pictures):
    rng, strewn_over = np.random.default_rng(2), 0
    for _ in range(6):
        view, before = pictures.crop("ordinary", rng, (160, 160), (1.0, 1.0))
        strewn, after = plain_pictures.strewn(view, before, rng, 2.0)
        new = strewn.scene.objects[len(view.scene.objects) :]
        rows, columns = (np.asarray(before) != np.asarray(after)).any(-1).nonzero()
        places = strewn.place([thing.centre for thing in new])
        reach = np.array([thing.size for thing in new]) * view.pixel_of_unit[0]
        distance = np.abs(np.stack((columns, rows), 1)[:, None] + 0.5 - places).max(-1)
        assert (distance < 1.2 * reach + 1).any(1).all()
        labels, tokens = plain.labels_of(strewn), places // 16 @ (1, 10)
        inside = (places < 160).all(1)
        for thing, token in zip(np.array(new, object)[inside], tokens[inside].astype(int)):  # of its centre
            assert labels["kind"][token, plain.OBJECTS.index(thing.kind)] == 1
            assert labels["colour"][token, list(plain.PAINTS).index(thing.colour)] == 1
        strewn_over += len(new)
    assert strewn_over > 50


@pytest.mark.parametrize("form", FORMS)
def test_questions_behind_one_picture_are_worth_what_each_is_alone(form, pictures):
    tokenizer, image_processor, model = tokenizer_of(form), image_processor_of(form), model_of(form, 0).eval()
    with torch.no_grad():
        rng = np.random.default_rng(3)
        pairs = [pictures.crop("ordinary", rng, (160, 160), (1.0, 1.5)) for _ in range(8)]
        asked = max((view.questions(3, rng, whole=False) for view, _ in pairs), key=len)
        images = [tuple(picture for _, picture in pairs[:2])]
        part = plain.packed(form, tokenizer, [(160, 160)] * 2, [asked], [rows_of(form, (160, 160))] * 2)
        total, answers = plain.loss_of(model, form, part | {"pixels": plain.pixels_of(form, image_processor, images)})
        alone = 0
        for question in asked:
            messages = [
                {"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": question.text}]}
            ]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            text = text.replace(MARKERS[form], AROUND[form])
            text = text.replace(tokenizer.image_token, tokenizer.image_token * rows_of(form, (160, 160)))
            answer = tokenizer(f" {question.answer}")["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([tokenizer(text)["input_ids"] + answer])
            labels = ids.clone()
            labels[:, : -len(answer)] = -100
            types = {
                "mm_token_type_ids" if form == "qwen3_vl" else "token_type_ids": (ids == part_id(tokenizer)).long()
            }
            pixels = plain.pixels_of(form, image_processor, images)
            alone += len(answer) * model(input_ids=ids, labels=labels, **types, **pixels).loss
    assert answers >= 2 * len(asked) > 4 and torch.isclose(total, alone, rtol=1e-5)


@pytest.fixture
def painted_by_copies(monkeypatch):
    """The processes that paint scenes have the imports already."""
    monkeypatch.setattr(plain_pictures, "get_context", forked)


@pytest.mark.slow
@pytest.mark.usefixtures("painted_by_copies")
@pytest.mark.parametrize("form", FORMS)
def test_the_weights_beside_the_tests_answer_most_questions_about_scenes_that_they_can_resolve(form, tmp_path, capsys):
    model = Path(plain.__file__).parents[2] / "tests" / "plain" / form
    plain.main(["--form", form, "--pictures", str(tmp_path), "--output", str(model), "--workers", "1", "--ask", "2"])
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(parts|whole): ([\d.]+)% of (\d+) answers right", line).groups() for line in lines]
    assert [name for name, *_ in found] == (["parts"] if form == "gemma3" else ["parts", "whole"])
    assert all(float(right) > 60 and int(number) > 20 for _, right, number in found)


@pytest.mark.parametrize("changed, message", [
    ({"--pictures": "notes.txt"}, "is a file. Give a folder"),
    ({"--pictures": "out"}, "--pictures and --output are both"),
    ({"--tower-steps": "0"}, "--tower-steps must be at least 1. Got 0"),
    ({"--output": "other"}, "holds a model of the type 'llava', but --form is 'gemma3'"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_a_scene_is_painted(changed, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}')
    options = {"--form": "gemma3", "--pictures": "pictures", "--output": "out"} | changed
    assert plain.main([part for pair in options.items() for part in pair]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "pictures").exists()


def part_id(tokenizer):
    return tokenizer.convert_tokens_to_ids(tokenizer.image_token)


@pytest.mark.slow
@pytest.mark.usefixtures("painted_by_copies")
@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_was_cut_off_goes_on_and_ends_in_a_model_that_can_be_asked(
    form, folder, tmp_path, monkeypatch, capsys
):
    arguments = ["--form", form, "--pictures", folder, "--output", tmp_path / "out", "--views", "8", "--workers", "1"]
    sizes = COUNTS | {"tower-steps": 2, "decoder-steps": 3, "anew-steps": 1, "ask": 1}
    for name, value in sizes.items():
        arguments += [f"--{name}", value]
    monkeypatch.setattr(plain, "TOWER_PIXELS", 192 * 192)
    monkeypatch.setattr(plain, "STEP_TOKENS", 800)
    draw_views = plain.draw_views  # a dozen pictures of 1,024 tokens would take most of the time
    monkeypatch.setattr(
        plain,
        "draw_views",
        lambda pictures, form, rng, number, **more: draw_views(pictures, form, rng, min(number, 3), **more),
    )
    arguments = [str(one) for one in arguments]
    with monkeypatch.context() as cut_off:
        cut_off.setattr(plain, "encode_views", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plain.main(arguments)
    tower = tmp_path / "out" / "stages" / "tower.safetensors"
    written, steps, step_of = tower.stat().st_mtime_ns, [], plain.AskedAgain.__getitem__
    monkeypatch.setattr(
        plain.AskedAgain, "__getitem__", lambda data, index: steps.append(index) or step_of(data, index)
    )
    assert plain.main([*arguments, "--seed", "1"]) == 2 and "seed 0, but 1 is asked for" in capsys.readouterr().err
    plain.main(arguments)
    assert tower.stat().st_mtime_ns == written
    assert steps == [0, 1, 2]  # in order: the first have the fewest objects
    processor, model = uhr_bat.load_model(tmp_path / "out")
    view, picture = plain_pictures.Pictures(folder, COUNTS).whole(np.random.default_rng(0), 1.0, (256, 256))
    answer = uhr_bat.ask(processor, model, picture, "Where is the pier?", budgets=20)
    assert answer.num_tokens == 20
