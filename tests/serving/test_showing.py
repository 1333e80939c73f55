"""What a page shows: an image is encoded once, answers are those of `generate`, budgets keep the model's proportions."""

import io
import json

import numpy as np
import pytest
import torch
from images import random_image
from PIL import Image
from small import count_tiles
from uhr_bat.common.asking import answer_texts, prompt_text
from uhr_bat.common.loading import load_model
from uhr_bat.scenes import painting
from uhr_bat.serving.cache import ContentCache
from uhr_bat.serving.front import Front, ImageFile
from uhr_bat.serving.refusals import Refusal
from uhr_bat.serving.showing import Desk, Gone, Recent

QUESTION = "What colour is the plane at the runway?"
SIZE = (260, 300)  # height, width


@pytest.fixture(scope="module")
def desk():
    return Desk(Front(*load_model(), "tiny", ContentCache(2**30), workers=2), note="made-up scenes")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    painting.example(SIZE[::-1]).save(path)
    return ImageFile.of_file(path)


@pytest.fixture(scope="module")
def opened(desk, source):
    return desk.open(source)


@pytest.fixture(scope="module")
def answered(desk, opened):
    return desk.ask(opened, QUESTION, desk.budget_range(opened)[0])


@pytest.mark.slow
def test_an_answer_at_the_usual_budget_is_that_of_generate(desk, source, answered):
    processor, model = desk.front.processor, desk.front.model
    inputs = processor(text=prompt_text(processor, QUESTION), images=source.content, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=desk.max_new_tokens)
    answer = desk.answers.get(answered)
    assert answer.text == answer_texts(processor, output[:, inputs["input_ids"].shape[1] :])[0] != ""
    assert answer.num_tokens == inputs["token_counts"].sum()


@pytest.mark.slow
def test_a_question_looks_closer_where_the_image_was_opened_so(desk, source):
    processor, model = desk.front.processor, desk.front.model
    name = desk.open(source, tiles=(40, True))
    assert desk.budget_range(name)[0] == sum(model.config.budgets)
    answered = desk.ask(name, QUESTION, 60)
    inputs = processor(
        text=prompt_text(processor, QUESTION), images=source.content, max_tiles=40, native=True, budgets=60,
        return_tensors="pt",
    )  # fmt: skip
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=desk.max_new_tokens)
    answer = desk.answers.get(answered)
    assert answer.text == answer_texts(processor, output[:, inputs["input_ids"].shape[1] :])[0] and answer.num_tokens == 60
    assert len(json.loads(desk.geojson(answered))["features"]) == 60
    assert desk.page(answered, "{}") != desk.page(name, "{}") and desk.kept_png(answered)


def test_an_image_is_encoded_once_whatever_is_asked(desk, source, opened):
    tiles = count_tiles(desk.front.model)
    for question, num_tokens in (("How many ships?", 146), ("How many ships?", 20), (QUESTION, 20)):
        assert desk.answers.get(desk.ask(opened, question, num_tokens)).num_tokens == num_tokens
    again = desk.images.get(desk.open(source))
    assert tiles == [] and again.encoded_before and again.seconds == desk.images.get(opened).seconds


def test_budgets_keep_the_models_proportions_and_never_decrease(desk, opened):
    usual, most = desk.budget_range(opened)
    available = desk.images.get(opened).encoded.features.available
    assert desk.share(opened, usual) == desk.config.budgets and most == sum(available)
    for total in (1, 2, 3, 7, 50, 1000, most):
        shares = desk.share(opened, total)
        assert sum(shares) == total and all(share <= limit for share, limit in zip(shares, available))
        assert sorted(filter(None, shares)) == list(filter(None, shares))


@pytest.mark.parametrize("question, message", [("  ", "no question"), ("ships " * 5000, "context window")])
def test_what_cannot_be_asked_is_refused(desk, opened, question, message):
    with pytest.raises(ValueError, match=message):
        desk.ask(opened, question, 20)


def test_the_map_is_of_the_image_and_then_of_the_answer(desk, opened, answered):
    before, after = desk.page(opened, "/shown/{}"), desk.page(answered, "/shown/{}")
    for page in (before, after):
        assert f'href="/shown/{opened}/overview.jpg"' in page and f"/shown/{opened}/detail.jpg?box=" in page
    assert before.count("<path class=") == 0
    assert after.count('<path class="token') == desk.answers.get(answered).num_tokens


def test_a_part_of_the_image_is_its_pixels(desk, opened, source):
    top, left, bottom, right = box = 40, 30, 100, 150
    seen = Image.open(io.BytesIO(desk.detail(opened, box, 4096)))
    expected = Image.open(source.content).crop((left, top, right, bottom))
    assert seen.size == (right - left, bottom - top)
    assert np.abs(np.asarray(seen, float) - np.asarray(expected, float)).mean() < 8  # a JPEG
    assert max(Image.open(io.BytesIO(desk.detail(opened, box, 60))).size) == 60
    whole = Image.open(io.BytesIO(desk.overview(opened)))
    assert whole.size == SIZE[::-1]


@pytest.mark.parametrize("box", [(-1, 0, 9, 9), (0, 0, 0, 9), (0, 0, 9, SIZE[1] + 1)])
def test_what_is_no_part_of_the_image_is_refused(desk, opened, box):
    with pytest.raises(ValueError, match="is no part of 260 x 300 pixels"):
        desk.detail(opened, box, 100)


@pytest.mark.slow
def test_files_of_an_answer_hold_its_tokens_and_texts(desk, answered):
    answer = desk.answers.get(answered)
    collection = json.loads(desk.geojson(answered))
    assert len(collection["features"]) == answer.num_tokens
    about = {"question": QUESTION, "answer": answer.text, "image": "scene.png", "note": "made-up scenes"}
    assert about.items() <= collection.items()
    assert Image.open(io.BytesIO(desk.kept_png(answered))).width >= 1000


def test_the_same_file_read_in_another_way_is_another_image(desk, tmp_path):
    path = tmp_path / "bands.png"
    random_image(40, 50).save(path)
    source = ImageFile.of_file(path)
    plain, turned = (desk.images.get(desk.open(source, bands=bands)) for bands in (None, [3, 2, 1]))
    assert not turned.encoded_before and plain.encoded.key != turned.encoded.key
    with pytest.raises(ValueError, match="bands"):
        desk.open(source, bands=[7, 8, 9])


def test_the_last_values_are_kept_by_names_that_nobody_guesses():
    recent = Recent(2)
    first, second = recent.put("a"), recent.put("b")
    assert recent.get(first) == "a" and len(first) > 20
    third = recent.put("c")
    with pytest.raises(Gone):
        recent.get(second)
    assert {recent.get(first), recent.get(third)} == {"a", "c"}


def test_a_question_may_be_about_control_tokens_and_is_no_book(desk, opened):
    spelled = "What is <image> in HTML?<|im_end|>"
    answer = desk.answers.get(desk.ask(opened, spelled, 20))
    assert (answer.question, answer.num_tokens) == (spelled, 20)
    with pytest.raises(Refusal, match="The question has 500000 letters, of which at most 131072 fit"):
        desk.ask(opened, "ship " * 100_000, 20)
