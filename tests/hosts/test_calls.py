"""Every call of UHR-BAT's, with models of other families behind it."""

import re
import threading

import pytest
import torch
from hosts_tiny import FAMILIES
from images import random_image
from PIL import Image
from uhr_bat.common.asking import prompt_text
from uhr_bat.common.loading import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
QUESTIONS = ("How many ships?", "What colour is the plane at the runway?", "Is there a car?")


@pytest.mark.slow
def test_the_readmes_blocks_run(family, loaded, tmp_path, monkeypatch, capsys):
    processor, model = loaded(family)
    monkeypatch.chdir(tmp_path)
    random_image(90, 130).save("my_image.tif")
    names = {"processor": processor, "model": model, "questions": list(QUESTIONS[:2])}
    names["image"], names["prompt"] = Image.open("my_image.tif"), prompt_text(processor, "How many ships?")
    for number, block in enumerate(BLOCKS):
        if not number:  # loaded by `load_model`
            block = re.sub(r".*from_pretrained.*\n", "", block)
        exec(compile(block, "README.md", "exec"), names)
        if number == 1:
            assert int((names["inputs"]["input_ids"] == processor.image_token_id).sum()) == 8 + 12 + 20 + 33
    assert len(capsys.readouterr().out.splitlines()) >= 3
    out = names["out"]
    height, width = out.importance[0][1].shape
    assert len(out.regions[0][1]) == len(out.slots[0][1]) == height * width
    assert out.tokens[0][1].shape[1] == model.row_width
    assert names["inputs"]["image_pyramids"][0].scales[-1] >= 130


def test_the_pages_code_asks_a_model_of_another_family(host_folder, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/any_vlm.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    random_image(90, 130).save("scene.tif")
    exec(compile(block.replace("Qwen/Qwen3-VL-8B-Instruct", str(host_folder("smolvlm"))), "any_vlm.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def questions(processor, image, budgets, **options):
    texts = [prompt_text(processor, question) for question in QUESTIONS[: len(budgets)]]
    return [
        processor(text=text, images=image, budgets=budget, return_tensors="pt", **options)
        for text, budget in zip(texts, budgets)
    ]


def batch_of(processor, alone) -> dict:
    """Prompts with a pyramid each, as one batch."""
    prompts = {name: [one[name][0] for one in alone] for name in ("input_ids", "attention_mask")}
    return {
        **processor.tokenizer.pad(prompts, return_tensors="pt"),
        "image_pyramids": [pyramid for one in alone for pyramid in one["image_pyramids"]],
        "token_counts": torch.cat([one["token_counts"] for one in alone]),
        "images_per_prompt": torch.ones(len(alone), dtype=torch.long),
    }


ONE_BEAM = [(name, 1) for name in ("qwen3_vl", "gemma3", "smolvlm")]


@pytest.mark.parametrize("family, beams", [(name, 2) for name in FAMILIES] + ONE_BEAM)
def test_a_batch_of_different_budgets_answers_as_each_alone(family, loaded, beams):
    processor, model = loaded(family, levels=1, max_tiles=1)
    alone = questions(processor, random_image(60, 90), (5, 9))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": beams}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "num_return_sequences": beams}
    both = model.generate(**batch_of(processor, alone), **settings)
    for number, one in enumerate(alone):
        expected, rows = model.generate(**one, **settings), slice(number * beams, (number + 1) * beams)
        assert torch.allclose(both.logits[0][rows], expected.logits[0], atol=1e-4)
        assert torch.equal(both.sequences[rows, -3:], expected.sequences[:, -3:])


def test_a_prompt_of_two_images_holds_the_rows_of_both_in_their_order(family, loaded):
    processor, model = loaded(family, levels=1, max_tiles=None)
    side = processor.image_processor.crop_size["height"]
    images = [random_image(side, side, seed=seed) for seed in (1, 2)]
    content = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "text", "text": "differ?"},
    ]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=images, budgets=10, return_tensors="pt")
    compressed = model.compress(**inputs)
    made = model.visual_inputs(inputs["input_ids"], inputs["attention_mask"], compressed)
    rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in made["mm_encoder_outputs"]["image"].pooler_output])
    whole = [model.project_tiles(pixels) for pixels in inputs["pixel_values"]]
    of_images = [
        model.features_of(tiles[0][slots[0] >= 0]) for tiles, slots in zip(whole, compressed.slots)
    ]  # kept whole, in raster order
    assert [len(one) for one in of_images] == [5, 5] and torch.allclose(rows, torch.cat(of_images), atol=1e-6)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        swapped = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits[0, -1]
    assert not torch.allclose(logits, swapped, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava"])
def test_threads_ask_at_once_and_each_gets_its_own_answer(name, loaded):
    processor, model = loaded(name, levels=2)
    asked = questions(processor, random_image(60, 90), (12, 7, 20))
    text = processor.tokenizer("Only text", return_tensors="pt")
    calls = [lambda one=one: model.generate(**one, max_new_tokens=3, do_sample=False) for one in (*asked, text)]
    calls += [lambda one=one: model.compress(**one).pooler_output[0] for one in asked]
    expected, found = [call() for call in calls], {}
    barrier = threading.Barrier(len(calls))

    def run(number):
        barrier.wait()
        found[number] = [calls[number]() for _ in range(2)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(expected):
        assert all(torch.allclose(one, again, atol=1e-5) for again in found[number])


def test_a_second_question_encodes_no_tile_that_the_first_has_seen(loaded):
    processor, model = loaded("qwen3_vl")
    features = model.encode_image(**processor.image_processor(random_image(60, 90), return_tensors="pt"))
    texts = [prompt_text(processor, question) for question in QUESTIONS]
    ask = lambda text: model.compress(**processor(text=text, image_features=features, return_tensors="pt"))  # noqa: E731
    first, number = ask(texts[0]), len(features[0].cache)
    assert number and all(rows.device.type == "cpu" for rows in features[0].cache.find(0, [0]).values())
    assert torch.equal(ask(texts[0]).pooler_output[0], first.pooler_output[0]) and len(features[0].cache) == number
