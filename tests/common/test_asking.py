"""Asking, step by step: the steps say what one call says, of a batch, of text alone and of exact counts."""

from types import SimpleNamespace

import pytest
import torch
from images import random_image
from rasters import write_dates
from uhr_bat.common import asking
from uhr_bat.common.loading import load_model
from uhr_bat.common.objects import Pointed
from uhr_bat.examples import ask as ask_command
from uhr_bat.geo import __main__ as evidence_map

QUESTIONS = ["What colour is the plane at the runway?", "How many ships?"]
BUDGETS = [2, 3, 5, 6]


@pytest.fixture(scope="module")
def loaded():
    processor, model = load_model(dtype=torch.float32, device_map=None)
    image = random_image(60, 90)
    return processor, model, image, asking.encode(model, processor.image_processor(image, return_tensors="pt"))


def test_a_batch_says_of_encoded_images_what_generate_says_of_each_image(loaded):
    processor, model, image, features = loaded
    options = {"budgets": BUDGETS, "max_new_tokens": 2}
    found = asking.answers(model, processor, QUESTIONS, [features, features * 2], **options)
    for question, number, (text, spent) in zip(QUESTIONS, (1, 2), found):
        prompt = asking.prompt_text(processor, question, number)
        inputs = processor(text=prompt, images=[image] * number, budgets=BUDGETS, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=2)
        ids = output[0, inputs["input_ids"].shape[1] :]
        assert (text, spent) == (processor.decode(ids, skip_special_tokens=True).strip(), sum(BUDGETS))


def test_text_alone_has_no_visual_tokens(loaded):
    processor, model, _, _ = loaded
    inputs = asking.write_prompts(model, processor, QUESTIONS, [[], []])
    assert asking.compress(model, inputs) is None
    assert [spent for _, spent in asking.answers(model, processor, QUESTIONS, [[], []], max_new_tokens=2)] == [0, 0]


def test_exact_counts_may_be_of_any_order_and_are_what_the_prompt_holds(loaded):
    processor, model, _, features = loaded
    counts = [[9, 1, 3, 2], [1, 1, 0, 1]]
    inputs = asking.write_prompts(model, processor, QUESTIONS, [features, features], counts=counts)
    placeholders = (inputs["input_ids"] == processor.image_token_id).sum(1)
    compressed = asking.compress(model, inputs)
    assert placeholders.tolist() == compressed.tokens_per_prompt == [15, 3]
    assert [[len(tokens) for tokens in scales] for scales in compressed.tokens] == counts


def test_a_model_that_names_tokens_points_to_their_boxes(loaded, monkeypatch):
    processor, model, image, _ = loaded
    assert not asking.ask(processor, model, image, QUESTIONS[0], budgets=BUDGETS, max_new_tokens=1).objects

    def point(ids, compressed):
        assert len(ids) == 1 and len(compressed.slots) == 1
        return [[Pointed("plane", 3, 24 * 48 + 47, 0.75)]]

    monkeypatch.setattr(type(model), "point", staticmethod(point), raising=False)
    answer = asking.ask(processor, model, image, QUESTIONS[0], budgets=BUDGETS, max_new_tokens=1)
    # The finest scale has 48 tokens a side, over a square of 90 px with 15 px above the image.
    (plane,) = answer.objects
    assert plane.box == (88.125, 30, 90, 31.875) and (plane.score, plane.level, plane.source) == (0.75, 3, "token")


def test_objects_lie_in_the_last_image_of_a_prompt():
    grids = [(2, 2), (8, 8), (4, 4)]
    maps = [SimpleNamespace(grids=[grid]) for grid in grids]
    compressed = SimpleNamespace(regions=[], importance=maps, images_per_prompt=[2, 1])
    model = SimpleNamespace(point=lambda ids, compressed: [[Pointed("plane", 0, 9)]] * 2)
    found = asking.objects_of_answers(model, ["", ""], compressed, [(80, 80), (40, 40)], ids=torch.zeros(2, 1))
    assert [one.box for (one,) in found] == [(10, 10, 20, 20), (10, 20, 20, 30)]


def test_dates_that_lie_apart_are_refused_by_their_names_before_anything_is_cut(loaded, monkeypatch, tmp_path, capsys):
    processor, model, _, _ = loaded
    here, _, there = write_dates(tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("An image was cut.")

    monkeypatch.setattr(type(processor.image_processor), "preprocess", never)
    for ask in (
        lambda: asking.ask(processor, model, there, "What is new?", before=here),
        lambda: processor(text="<image><image>What is new?", images=[here, there], dates=True),
    ):
        with pytest.raises(ValueError, match="common ground: .*earlier.tif and .*apart.tif lie apart"):
            ask()
    assert ask_command.main([there, "What is new?", "--before", here]) == 2
    assert evidence_map.main([there, "What?", "--before", here, "--page", str(tmp_path / "page.html")]) == 2
    assert capsys.readouterr().err.count("earlier.tif and ") == 2


def test_an_answer_says_how_sure_the_model_is_of_it(loaded):
    processor, model, image, features = loaded
    answer = asking.ask(processor, model, image, QUESTIONS[0], budgets=BUDGETS, max_new_tokens=3)
    inputs = asking.write_prompts(model, processor, QUESTIONS[:1], [features], BUDGETS)
    compressed = asking.compress(model, inputs)
    ids, (confidence,) = asking.generate_surely(model, inputs, compressed, max_new_tokens=3)
    assert asking.answer_texts(processor, ids) == [answer.text] and answer.confidence == pytest.approx(confidence)
    # Token by token, up to the end of the answer.
    whole, probability = torch.cat((inputs["input_ids"], ids), dim=1), 1.0
    with torch.no_grad():
        seen = model.visual_inputs(inputs["input_ids"], inputs["attention_mask"], compressed)
        answered = torch.arange(whole.shape[1]) >= inputs["input_ids"].shape[1]
        scores = model(input_ids=whole, answer_mask=answered[None], **seen).logits[0].softmax(-1)
    for place, token in enumerate(ids[0].tolist(), start=inputs["input_ids"].shape[1]):
        if token == model.generation_config.eos_token_id:
            break
        probability *= float(scores[place - 1, token])
    assert confidence == pytest.approx(probability, rel=1e-4)
