"""The stage that learns to point: what is right of a token, what is kept of a scene, and a run of it that learns and points."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from uhr_bat.common.asking import ask, compress, encode, write_prompts
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.scenes.layout import make_scene
from uhr_bat.scenes.native import native_scene
from uhr_bat.scenes.painting import paint
from uhr_bat.training.tiny import pointing

SEED = pointing.FIRST_SEED


@pytest.fixture(scope="module")
def tiny():
    return load_model(device_map=None)


@pytest.fixture(scope="module")
def encoded(tiny, tmp_path_factory):
    """A folder with what is kept of an ordinary scene and of one with native objects, few questions of each."""
    processor, model = tiny
    folder = tmp_path_factory.mktemp("encoded")
    collator = pointing.PointCollator(processor, model.config.grids, None, True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ALONE", 2), ("NATIVE_ALONE", 2), ("TOGETHER", 5), ("NATIVE_TILES", 40)):
            patch.setattr(pointing, name, value)
        for kind, seed in (("fixed", SEED), ("native", SEED), ("fixed", pointing.TOLD_SEED)):
            (folder / kind).mkdir(exist_ok=True)
            stored = pointing.encode_scene(model, processor, collator, seed, kind == "native")
            save_file(stored, folder / kind / f"{seed}.safetensors")
        (folder / "crowded").mkdir()
        seed = pointing.CROWDED_SEED
        save_file(pointing.encode_crowd(model, processor, seed), folder / "crowded" / f"{seed}.safetensors")
        yield folder


def test_a_token_shows_the_object_whose_middle_lies_in_it():
    scene = make_scene(5)
    side = np.repeat([8, 48], [64, 48 * 48])
    position = np.concatenate((np.arange(64), np.arange(48 * 48)))
    shown, pixels, near, around = pointing.label_tokens(scene, side, position, 8)
    for token in range(0, len(side), 7):
        top, left = (position[token] // side[token]) / side[token], (position[token] % side[token]) / side[token]
        inside = [
            idx for idx, thing in enumerate(scene.objects)
            if 0 <= scene.to_square(thing.centre)[0] - top < 1 / side[token]
            and 0 <= scene.to_square(thing.centre)[1] - left < 1 / side[token]
        ]  # fmt: skip
        largest = max(inside, key=lambda idx: scene.objects[idx].size, default=-1)
        assert shown[token] == largest
        assert pixels[token] == pytest.approx(
            0 if largest < 0 else scene.objects[largest].size * side[token] * 8 / 10000
        )
    for idx, site in enumerate(scene.sites):
        middle = np.argmin(around[64:, idx])
        row, column = scene.to_square(site.centre) * 48
        assert abs(middle // 48 + 0.5 - row) <= 1 and abs(middle % 48 + 0.5 - column) <= 1
    # Beside every object that is seen, and nowhere else.
    assert near.any() and not near[:64][pixels[:64] == 0].all()


def test_what_is_meant_is_what_the_words_name():
    for seed in range(30):
        scene = make_scene(seed)
        for question in (one for drawn in pointing.draw_questions(scene) for one in drawn):
            if question.kind == "absent" and question.sites:
                assert not any(pointing.is_meant(question, thing) for thing in scene.objects_of[question.sites[0]])
            elif question.kind in ("colour", "type") or question.answer == "yes":
                things = scene.objects_of[question.sites[0]]
                assert [one for one in things if pointing.is_meant(question, one)] == list(question.objects)
            elif question.kind in ("count", "comparison"):
                assert all(pointing.is_meant(question, thing) for thing in scene.objects)


def test_the_states_that_are_kept_are_the_decoders_whatever_points(tiny, encoded, monkeypatch):
    processor, model = tiny
    for name, value in (("ALONE", 2), ("TOGETHER", 5)):
        monkeypatch.setattr(pointing, name, value)
    monkeypatch.setattr(model.model, "pointer", None)
    collator = pointing.PointCollator(processor, model.config.grids, None, True)
    plain = pointing.encode_scene(model, processor, collator, SEED, False)
    stored = pointing.load_file(encoded / "fixed" / f"{SEED}.safetensors")
    assert all(torch.equal(value, plain[name]) for name, value in stored.items())


def test_states_of_other_questions_are_refused(tiny, encoded):
    processor, model = tiny
    collator = pointing.PointCollator(processor, model.config.grids, None, True)
    stored = pointing.load_file(encoded / "fixed" / f"{SEED}.safetensors")
    with pytest.raises(ValueError, match=f"Scene {SEED + 3}: the states of .* are of other questions"):
        for seed in (SEED + 3,):
            pointing.PointedScene(make_scene(seed), stored, collator, 8)


def test_a_run_learns_to_point_and_its_model_loads_and_points(tiny, encoded, tmp_path):
    processor, model = tiny
    shared = ["--encoded", encoded, "--scenes", 1, "--crowded", 1, "--batch-size", 2]
    arguments = ["--model", ROOT, "--output", tmp_path / "out", *shared, "--native", 1, "--fresh", "--steps", 40]
    assert not pointing.main(list(map(str, arguments)))
    processor, trained = load_model(tmp_path / "out", device_map=None)
    assert trained.config.pointer == {"hidden": 256, "width": 32, "threshold": 0.2}
    (none,) = processor.tokenizer(" none", add_special_tokens=False)["input_ids"]
    before, after = model.state_dict(), trained.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name]) and ".pointer." not in name}
    assert changed <= {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    rows = (before["lm_head.weight"] != after["lm_head.weight"]).any(1).nonzero()[:, 0]
    assert rows.tolist() == [none]
    collator = pointing.PointCollator(processor, model.config.grids, None, True)
    lost = []
    untrained = load_model(device_map=None)[1]
    torch.manual_seed(0)  # as the run began
    pointing.start_pointer(untrained)
    for one in (untrained, trained):
        scenes = [
            pointing.PointedScene(made(SEED), pointing.load_file(encoded / kind / f"{SEED}.safetensors"), collator, 8)
            for kind, made in (("fixed", make_scene), ("native", native_scene))
        ]
        with torch.no_grad():
            found = [pointing.losses(one, batch) for scene in scenes for batch in pointing.batches_of(scene)]
        lost.append({name: np.mean([float(of[name]) for of in found if name in of]) for name in found[0]})
    assert all(lost[1][name] < 0.9 * lost[0][name] for name in lost[0]), lost
    # What is not there ends an answer.
    image = encode(trained, processor.image_processor([paint(make_scene(3))], return_tensors="pt"))[0]
    inputs = write_prompts(trained, processor, ["How many objects are at the castle?"], [[image]], 30)
    ids = torch.cat((inputs["input_ids"], torch.tensor([[none]])), dim=1)
    seen = trained.visual_inputs(ids, None, compress(trained, inputs))
    with torch.no_grad():
        logits = trained(input_ids=ids, mm_encoder_outputs={**seen["mm_encoder_outputs"], "told": True}).logits[0, -1]
    assert processor.tokenizer.decode([int(logits.argmax())]) == pointing.END
    answer = ask(processor, trained, paint(make_scene(SEED)), "How many objects are at the pier?")
    assert all(one.source == "token" for one in answer.objects)
    assert not any(parameter.requires_grad for parameter in trained.model.pointer.parameters())
    # And then what is told, by other scenes.
    arguments = [
        "--model",
        tmp_path / "out",
        "--output",
        tmp_path / "told",
        *shared,
        "--native",
        0,
        "--told",
        "--steps",
        2,
    ]
    assert not pointing.main(list(map(str, arguments)))
    told = load_model(tmp_path / "told", device_map=None)[1].state_dict()
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, told[name])}
    assert changed and all(".pointer.tell" in name for name in changed)
