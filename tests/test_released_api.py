"""The helpers of the released code, and the calls that scripts make with them, which are translated to the modern ones.

Runs on every supported release of transformers.
"""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asking import GENERATION, assert_all_differ, picture
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, StoppingCriteriaList
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


SCALES, BUDGETS, TILE, PATCH = [64, 128, 256, 384], [4, 8, 40, 94], 32, 8
QUESTION = "Describe this remote-sensing image."
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


# ---- Scripts in the released style ----------------------------------------------------------------------------------


def split(model, uhrbat, image_processor, image, target_sizes):
    """One entry of `multiscale_pixels`, its tiles moved to the model scale by scale."""
    entries = uhrbat.split_image_to_multiscale_tiles(image, image_processor, target_sizes=target_sizes, tile_size=336)
    for entry in entries.values():
        entry["tiles"] = entry["tiles"].to(device=model.device, dtype=model.dtype)
    return entries


def ask(script, images, prompt, target_sizes=SCALES, topk=BUDGETS, mask_entries=None):
    """An evaluator's `generate`: returns its output and the ids of the answer."""
    model, uhrbat, tokenizer = script.model, script.uhrbat, script.tokenizer
    model.config._log_vision_tokens = False
    input_ids = uhrbat.tokenizer_image_token(prompt, tokenizer, model.config.image_token_index, return_tensors="pt")
    input_ids = input_ids.unsqueeze(0).to(model.device)
    attention_mask = input_ids.ne(tokenizer.pad_token_id).to(model.device)
    masks = [{}]
    if mask_entries is not None:
        masks = [
            uhrbat.load_multiscale_tile_masks(entry, scales=target_sizes, tile_size=336, patch_size=14)
            for entry in mask_entries
        ]
    stopping_criteria = uhrbat.KeywordsStoppingCriteria(["<|im_end|>"], tokenizer, input_ids)
    with torch.inference_mode():
        output = model.generate(
            inputs=input_ids,
            attention_mask=attention_mask,
            images=torch.zeros(1, 3, 336, 336, device=model.device, dtype=model.dtype),
            image_sizes=[image.size for image in images],
            modalities=["image"] * len(images),
            multiscale_pixels=[split(model, uhrbat, script.image_processor, one, target_sizes) for one in images],
            multiscale_masks=masks,
            multiscale_topk=topk,
            multiscale_target_sizes=target_sizes,
            stopping_criteria=[stopping_criteria],
            return_dict_in_generate=True,
            output_scores=True,
            repetition_penalty=1.1,
            num_beams=1,
            use_cache=True,
            min_new_tokens=1,
            max_new_tokens=6,
            temperature=1.0,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return output, output.sequences[:, -len(output.scores) :]


def weigh(script, images, prompt, answer, target_sizes=SCALES, topk=BUDGETS, placeholder=-200):
    """An evaluator's log-likelihood: the loss of an answer, labels as long as the ids with one placeholder an image."""
    model, uhrbat, tokenizer = script.model, script.uhrbat, script.tokenizer
    prompt_ids = uhrbat.tokenizer_image_token(prompt, tokenizer, placeholder, return_tensors="pt").unsqueeze(0)
    input_ids = uhrbat.tokenizer_image_token(prompt + answer, tokenizer, placeholder, return_tensors="pt").unsqueeze(0)
    labels = input_ids.clone()
    labels[:, : prompt_ids.shape[1]] = -100
    with torch.inference_mode():
        outputs = model(
            input_ids=input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids),
            labels=labels.to(model.device),
            image_sizes=[image.size for image in images],
            modalities=["image"],
            multiscale_pixels=[split(model, uhrbat, script.image_processor, one, target_sizes) for one in images],
            multiscale_masks=[{}],
            multiscale_topk=topk,
            multiscale_target_sizes=target_sizes,
        )
    return outputs.loss


# ---- What they are compared with ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(model_folder):
    """What a script holds after it has loaded the model."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
    return SimpleNamespace(
        model=model,
        uhrbat=importlib.import_module(type(model).__module__),
        processor=processor,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        image=picture(),
    )


def released(script, question=QUESTION, image=None, image_token_id=-200, **changes):
    """The released call's arguments for one image."""
    image = script.image if image is None else image
    ids = script.uhrbat.tokenizer_image_token(PROMPT.format(question), script.tokenizer, image_token_id, "pt")[None]
    pixels = script.uhrbat.split_image_to_multiscale_tiles(image, script.image_processor, SCALES, TILE)
    return {
        "inputs": ids,
        "attention_mask": torch.ones_like(ids),
        "image_sizes": [image.size],
        "modalities": ["image"],
        "multiscale_pixels": [pixels],
        "multiscale_masks": [{}],
        "multiscale_topk": BUDGETS,
        "multiscale_target_sizes": SCALES,
        **changes,
    }


def modern(script, prompt=PROMPT.format(QUESTION), images=None):
    images = [script.image] if images is None else images
    return script.processor(text=[prompt], images=[images], return_tensors="pt")


def modern_with(script, scales):
    """The modern call for an image that shows nothing at other scales, with one placeholder."""
    inputs = modern(script)
    ids = released(script, image_token_id=script.model.config.image_token_id)["inputs"]
    used = torch.tensor([scale in scales for scale in SCALES])
    tiles = used.repeat_interleave(torch.tensor([(scale // TILE) ** 2 for scale in SCALES]))
    patches = used.repeat_interleave(torch.tensor([(scale // PATCH) ** 2 for scale in SCALES]))
    return {
        "input_ids": ids,
        "pixel_values": inputs["pixel_values"] * tiles[:, None, None, None],
        "pixel_attention_mask": inputs["pixel_attention_mask"] * patches,
        "budgets": [budget if scale in scales else 0 for budget, scale in zip(BUDGETS, SCALES)],
    }


def generate(script, inputs, **settings):
    with torch.inference_mode():
        return script.model.generate(
            **inputs, **{**GENERATION, "return_dict_in_generate": True, "output_logits": True, **settings}
        )


def answer(output):
    """long[B, new tokens]"""
    return output.sequences[:, -len(output.logits) :]


def num_image_tokens(script, output):
    return int((output.sequences == script.model.config.image_token_id).sum())


def assert_same_generation(output, other):
    """Token by token, visual tokens and scores included."""
    assert torch.equal(output.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(other.logits), rtol=0, atol=1e-6)


def pick(entries, scales):
    return {scale: entries[scale] for scale in scales}


def shuffled(entries, key):
    """The same {scale: {key: ..., "coords": ...}} with the tiles of every scale in another order."""
    generator = torch.Generator().manual_seed(0)
    orders = {scale: torch.randperm(len(entry["coords"]), generator=generator) for scale, entry in entries.items()}
    return {
        scale: {key: entry[key][orders[scale]], "coords": [entry["coords"][place] for place in orders[scale]]}
        for scale, entry in entries.items()
    }


# ---- A script's answer ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_answer_of_a_script_is_the_last_ids_as_many_as_there_are_scores(script):
    output, answer_ids = ask(script, [script.image], PROMPT.format(QUESTION))
    expected = generate(script, modern(script), no_repeat_ngram_size=0, repetition_penalty=1.1)
    assert 1 <= answer_ids.shape[1] <= 6
    assert answer_ids.tolist() == answer(expected).tolist()
    assert num_image_tokens(script, output) == sum(BUDGETS)


@pytest.mark.slow
def test_a_script_asks_about_two_images_in_one_prompt(script):
    images, prompt = [picture(0), picture(1, (90, 70))], PROMPT.format("<image>\nWhich of the two shows a harbour?")
    output, answer_ids = ask(script, images, prompt)
    expected = generate(script, modern(script, prompt, images), no_repeat_ngram_size=0, repetition_penalty=1.1)
    assert answer_ids.tolist() == answer(expected).tolist()
    assert num_image_tokens(script, output) == sum(BUDGETS)


def test_a_script_passes_its_mask_files_to_the_model(script):
    entry = mask_entry(label_maps())
    output, _ = ask(script, [script.image], PROMPT.format(QUESTION), mask_entries=[entry])
    settings = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.1, "min_new_tokens": 1, "output_scores": True}
    expected = generate(script, {**modern(script), "regions": label_rows(label_maps())}, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(expected.scores), rtol=0, atol=1e-6)
    assert not torch.equal(output.scores[0], generate(script, modern(script), **settings).scores[0])


@pytest.mark.parametrize(
    ("image_token_id", "settings"),
    [(None, {}), (-200, {}), (-200, {"repetition_penalty": 1.1}), (-200, {"num_beams": 2})],
)
def test_the_released_call_is_the_modern_call(script, image_token_id, settings):
    token = script.model.config.image_token_id if image_token_id is None else image_token_id
    output = generate(script, released(script, image_token_id=token), **settings)
    assert_same_generation(output, generate(script, modern(script), **settings))


@pytest.mark.slow
def test_images_and_questions_change_what_the_released_call_says(script):
    calls = [released(script, question, picture(seed)) for question in (QUESTION, "How many ships?") for seed in (0, 1)]
    assert_all_differ([generate(script, call, max_new_tokens=1).logits[0] for call in calls])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"multiscale_masks": None}, {"multiscale_topk": None}, {"attention_mask": None}])
def test_what_is_left_out_is_what_the_card_says(script, changes):
    assert_same_generation(generate(script, released(script, **changes)), generate(script, released(script)))


def test_budgets_of_one_call_are_spent_exactly(script):
    output = generate(script, released(script, multiscale_topk=[8, 16, 24, 40]), max_new_tokens=1)
    assert num_image_tokens(script, output) == 88


def test_the_sequences_hold_ids_of_the_vocabulary_only(script):
    sequences = generate(script, released(script, image_token_id=-200)).sequences
    assert 0 <= sequences.min() and sequences.max() < script.model.config.text_config.vocab_size


def test_a_prompt_without_an_image_answers(script):
    ids = script.tokenizer("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt").input_ids
    call = {"inputs": ids, "attention_mask": torch.ones_like(ids), "images": None, "modalities": ["text"]}
    assert_same_generation(generate(script, call), generate(script, {"input_ids": ids}))


@pytest.mark.slow
def test_a_left_padded_batch_of_two_images_answers_as_one_by_one(script):
    questions = (QUESTION, "How many ships are there at the pier in the north of this scene?")
    calls = [released(script, question, picture(seed)) for seed, question in enumerate(questions)]
    length = max(call["inputs"].shape[1] for call in calls)
    assert length > min(call["inputs"].shape[1] for call in calls)

    def pad(name, value):
        rows = [call[name][0] for call in calls]
        return torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=value) for row in rows])

    lists = ("image_sizes", "multiscale_pixels", "multiscale_masks")
    batch = {
        **calls[0],
        "inputs": pad("inputs", script.tokenizer.pad_token_id),
        "attention_mask": pad("attention_mask", 0),
        **{name: [call[name][0] for call in calls] for name in lists},
    }
    output = generate(script, batch)
    alone = [generate(script, call) for call in calls]
    assert answer(output).tolist() == [answer(one)[0].tolist() for one in alone]
    expected = torch.stack([torch.cat(one.logits) for one in alone], dim=1)
    torch.testing.assert_close(torch.stack(output.logits), expected, rtol=0, atol=1e-4)


# ---- Scales and tiles in any order ----------------------------------------------------------------------------------


def test_scales_in_another_order_give_the_same_answer(script):
    order = [2, 0, 3, 1]
    scales, topk = [SCALES[place] for place in order], [BUDGETS[place] for place in order]
    output, _ = ask(script, [script.image], PROMPT.format(QUESTION), scales, topk)
    expected, _ = ask(script, [script.image], PROMPT.format(QUESTION))
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(expected.scores), rtol=0, atol=1e-6)


def test_tiles_are_placed_by_their_coords(script):
    call = released(script)
    pixels = [shuffled(call["multiscale_pixels"][0], "tiles")]
    assert_same_generation(generate(script, {**call, "multiscale_pixels": pixels}), generate(script, call))


def test_tiles_alone_are_placed_row_by_row(script):
    call = released(script)
    pixels = [{scale: entry["tiles"] for scale, entry in call["multiscale_pixels"][0].items()}]
    assert_same_generation(generate(script, {**call, "multiscale_pixels": pixels}), generate(script, call))


@pytest.mark.slow
@pytest.mark.parametrize("scales", [[64, 128], [64, 384], [256, 128], [384]])
def test_an_image_with_some_scales_spends_their_budgets_alone(script, scales):
    call = released(script)
    pixels = [pick(call["multiscale_pixels"][0], scales)]
    topk = [BUDGETS[SCALES.index(scale)] for scale in scales]
    named = {"multiscale_pixels": pixels, "multiscale_topk": topk, "multiscale_target_sizes": scales}
    output = generate(script, {**call, **named})
    assert num_image_tokens(script, output) == sum(topk)
    assert_same_generation(output, generate(script, modern_with(script, scales)))
    # As well where the scales are named that the dict lacks, or where those that are not to be used are in it.
    assert_same_generation(output, generate(script, {**call, "multiscale_pixels": pixels}))
    assert_same_generation(output, generate(script, {**call, **named, "multiscale_pixels": call["multiscale_pixels"]}))


def test_two_images_may_have_different_scales(script):
    call = released(script)
    pixels = call["multiscale_pixels"][0]
    ids = script.uhrbat.tokenizer_image_token("<image>\n" + PROMPT.format(QUESTION), script.tokenizer, -200, "pt")[None]
    both = {"inputs": ids, "attention_mask": None, "image_sizes": call["image_sizes"] * 2}
    output = generate(script, {**call, **both, "multiscale_pixels": [pixels, pick(pixels, [64, 384])]})
    # Each of two images has half of a budget.
    assert num_image_tokens(script, output) == sum(BUDGETS) // 2 + (BUDGETS[0] + BUDGETS[3]) // 2


# ---- The log-likelihood of an answer --------------------------------------------------------------------------------


def modern_loss(script, images, prompt, answer_text):
    inputs = modern(script, prompt + answer_text, images)
    labels = inputs["input_ids"].clone()
    labels[:, : modern(script, prompt, images)["input_ids"].shape[1]] = -100
    with torch.inference_mode():
        return script.model(**inputs, labels=labels).loss


@pytest.mark.slow
@pytest.mark.parametrize("placeholder", [-200, None])
def test_the_loss_of_an_answer_is_that_of_the_modern_call(script, placeholder):
    placeholder = script.model.config.image_token_index if placeholder is None else placeholder
    images, prompt = [script.image], PROMPT.format(QUESTION)
    losses = [weigh(script, images, prompt, text, placeholder=placeholder) for text in ("Two ships.", "A forest.")]
    assert losses[0] != losses[1]
    expected = [modern_loss(script, images, prompt, text) for text in ("Two ships.", "A forest.")]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_loss_of_an_answer_about_two_images_is_that_of_the_modern_call(script):
    images, prompt = [picture(0), picture(1, (90, 70))], PROMPT.format("<image>\nWhich of the two shows a harbour?")
    loss = weigh(script, images, prompt, "The first.")
    torch.testing.assert_close(loss, modern_loss(script, images, prompt, "The first."), rtol=0, atol=1e-5)


def test_the_loss_of_an_answer_needs_some_scales_only(script):
    images, prompt, image_token_id = [script.image], PROMPT.format(QUESTION), script.model.config.image_token_id
    loss = weigh(script, images, prompt, "Two ships.", [128, 64], BUDGETS[1::-1])
    inputs = modern_with(script, [64, 128])
    ids = script.uhrbat.tokenizer_image_token(prompt + "Two ships.", script.tokenizer, image_token_id, "pt")
    expanded = ids.repeat_interleave(torch.where(ids == image_token_id, sum(BUDGETS[:2]), 1))[None]
    labels = expanded.clone()
    labels[:, : inputs["input_ids"].shape[1] - 1 + sum(BUDGETS[:2])] = -100
    with torch.inference_mode():
        expected = script.model(**{**inputs, "input_ids": expanded}, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


# ---- Helpers --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_cut_at_its_images(script):
    def words(text):
        return script.tokenizer(text).input_ids

    ids = script.uhrbat.tokenizer_image_token("a <image>\nb<image>", script.tokenizer)
    assert ids == [*words("a "), -200, *words("\nb"), -200]
    tensor = script.uhrbat.tokenizer_image_token("a <image>\nb<image>", script.tokenizer, 7, return_tensors="pt")
    assert tensor.dtype == torch.long and tensor.tolist() == [*words("a "), 7, *words("\nb"), 7]


@pytest.mark.parametrize("size", [(160, 20), (97, 301), (1500, 1501), (64, 64)])
def test_tiles_are_bit_equal_to_pillows_resize_of_the_padded_square(script, size):
    image = picture(2, size)
    tiles = script.uhrbat.split_image_to_multiscale_tiles(image, script.image_processor, SCALES, TILE)
    assert list(tiles) == SCALES
    square = Image.new("RGB", (max(size), max(size)), (122, 116, 104))
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    mean, std = np.array(OPENAI_CLIP_MEAN, np.float32), np.array(OPENAI_CLIP_STD, np.float32)
    for scale in SCALES:
        view = square.resize((scale, scale), Image.Resampling.BICUBIC)
        boxes = [(x, y, x + TILE, y + TILE) for y in range(0, scale, TILE) for x in range(0, scale, TILE)]
        pixels = np.stack([np.asarray(view.crop(box)) for box in boxes])
        expected = ((pixels * (1 / 255)).astype(np.float32) - mean) / std  # CLIP's processor rescales in float64
        assert np.array_equal(tiles[scale]["tiles"].numpy(), expected.transpose(0, 3, 1, 2))
        assert tiles[scale]["coords"] == [(y // TILE, x // TILE) for x, y, _, _ in boxes]


@pytest.mark.parametrize("target_sizes", [SCALES[:2], [96, 32], SCALES[::-1]])
def test_tiles_are_cut_at_the_scales_and_in_the_order_that_are_asked_for(script, target_sizes):
    tiles = script.uhrbat.split_image_to_multiscale_tiles(picture(), script.image_processor, target_sizes)
    assert list(tiles) == target_sizes
    for scale, entry in tiles.items():
        assert list(entry["tiles"].shape) == [(scale // TILE) ** 2, 3, TILE, TILE]
        (alone,) = script.uhrbat.split_image_to_multiscale_tiles(picture(), script.image_processor, [scale]).values()
        assert torch.equal(entry["tiles"], alone["tiles"]) and entry["coords"] == alone["coords"]


def test_keywords_stop_the_answer_where_they_stand(script):
    whole = answer(generate(script, released(script)))[0]
    words = [script.tokenizer.decode(token) for token in whole[2:].split(1)]
    keyword = next(word for word in words if word.isascii() and word.strip())
    call = released(script)
    criteria = script.uhrbat.KeywordsStoppingCriteria([keyword], script.tokenizer, call["inputs"])
    stopped = answer(generate(script, call, stopping_criteria=StoppingCriteriaList([criteria])))[0]
    texts = [script.tokenizer.decode(whole[: end + 1]) for end in range(len(whole))]
    expected = next(end for end, text in enumerate(texts) if keyword in text) + 1
    assert stopped.tolist() == whole[:expected].tolist()
    assert expected < len(whole)


@pytest.mark.slow
@pytest.mark.parametrize("keyword", ["<|im_start|>assistant", "assistant\n"])
def test_keywords_at_the_end_of_the_prompt_do_not_stop_the_answer(script, keyword):
    call = released(script)
    whole = answer(generate(script, call))[0]
    assert keyword not in script.tokenizer.decode(whole)
    criteria = script.uhrbat.KeywordsStoppingCriteria([keyword], script.tokenizer, call["inputs"])
    output = generate(script, call, stopping_criteria=StoppingCriteriaList([criteria]))
    assert answer(output)[0].tolist() == whole.tolist()


# ---- Masks ----------------------------------------------------------------------------------------------------------


def label_maps(seed=3):
    """{scale: int32[H, W]}: seven regions and background, unlike each other at every scale."""
    rng = np.random.default_rng(seed)
    return {scale: rng.integers(0, 8, (scale // PATCH,) * 2, dtype=np.int32) for scale in SCALES}


def label_rows(maps):
    """long[1, N], the model's `regions` of one image."""
    return torch.cat([torch.from_numpy(labels).flatten() for labels in maps.values()])[None].long()


def mask_entry(maps):
    """What a mask file holds: a list of tiles, and their coords, here in any order."""
    p = TILE // PATCH
    scales = {}
    for scale, labels in maps.items():
        coords = [(row, column) for row in range(scale // TILE) for column in range(scale // TILE)]
        np.random.default_rng(scale).shuffle(coords)
        tiles = [labels[row * p : (row + 1) * p, column * p : (column + 1) * p] for row, column in coords]
        scales[scale] = {
            "tile_masks": [torch.from_numpy(tile.copy()) for tile in tiles],
            "tile_coords": [(int(row), int(column)) for row, column in coords],
        }
    return {"scales": scales}


def small_entry(**changes):
    """Masks of one scale of 2 x 2 tiles of 2 x 2 patches: tile (row, column) holds the label 2 * row + column."""
    scale = {
        "tile_masks": [torch.full((2, 2), label, dtype=torch.int32) for label in (3, 0, 2, 1)],
        "tile_coords": [(1, 1), (0, 0), (1, 0), (0, 1)],
    }
    return {"scales": {16: {**scale, **changes}}}


def test_a_mask_entry_becomes_masks_and_coords(script):
    masks = script.uhrbat.load_multiscale_tile_masks(small_entry(), scales=[16], tile_size=8, patch_size=4)
    assert list(masks) == [16] and set(masks[16]) == {"masks", "coords"}
    assert masks[16]["masks"].shape == (4, 2, 2) and not masks[16]["masks"].is_floating_point()
    assert masks[16]["masks"][:, 0, 0].tolist() == [2 * row + column for row, column in masks[16]["coords"]]


def test_masks_come_in_the_order_of_the_scales_without_those_that_the_entry_lacks(script):
    entry = mask_entry(label_maps())
    del entry["scales"][128]
    masks = script.uhrbat.load_multiscale_tile_masks(entry, scales=[384, 128, 64], tile_size=TILE, patch_size=PATCH)
    assert list(masks) == [384, 64]
    assert list(script.uhrbat.load_multiscale_tile_masks(entry)) == [64, 256, 384]


def test_the_scales_of_a_mask_entry_may_be_text(script):
    entry = {"scales": {"16": small_entry()["scales"][16]}}
    masks = script.uhrbat.load_multiscale_tile_masks(entry, scales=[16])
    assert masks[16]["masks"].shape == (4, 2, 2)


@pytest.mark.parametrize("entry", [None, {}, {"scales": {}}, small_entry()])
def test_no_masks_are_an_empty_dict(script, entry):
    assert script.uhrbat.load_multiscale_tile_masks(entry, scales=[672, 1344], tile_size=336, patch_size=14) == {}


def test_a_mask_file_is_read_like_what_it_holds(script, tmp_path):
    torch.save(small_entry(), tmp_path / "masks.pt")
    expected = script.uhrbat.load_multiscale_tile_masks(small_entry(), scales=[16])
    for path in (tmp_path / "masks.pt", str(tmp_path / "masks.pt")):
        masks = script.uhrbat.load_multiscale_tile_masks(path, scales=[16])
        assert masks[16]["coords"] == expected[16]["coords"]
        assert torch.equal(masks[16]["masks"], expected[16]["masks"])


def test_masks_of_another_tile_than_the_call_says_are_taken_with_a_warning_of_both_numbers(script, monkeypatch):
    said = []
    monkeypatch.setattr(helpers(script).logger, "warning_once", said.append)
    masks = script.uhrbat.load_multiscale_tile_masks(small_entry(), scales=[16], tile_size=8, patch_size=4)
    assert not said
    masks = script.uhrbat.load_multiscale_tile_masks(small_entry(), scales=[16], tile_size=336, patch_size=14)
    assert masks[16]["masks"].shape == (4, 2, 2)
    assert len(said) == 1 and "24 x 24" in said[0] and "2 x 2" in said[0]


def helpers(script):
    """The module that defines the helpers."""
    return importlib.import_module(script.uhrbat.load_multiscale_tile_masks.__module__)


@pytest.mark.slow
def test_every_form_of_masks_guides_the_answer_alike(script):
    maps = label_maps()
    expected = generate(script, {**modern(script), "regions": label_rows(maps)})
    entry = mask_entry(maps)
    loaded = script.uhrbat.load_multiscale_tile_masks(entry, scales=SCALES, tile_size=TILE, patch_size=PATCH)
    forms = [loaded, shuffled(loaded, "masks"), pick(loaded, SCALES[::-1]), entry]
    forms.append({scale: torch.from_numpy(labels).long() for scale, labels in maps.items()})
    for masks in forms:
        assert_same_generation(generate(script, released(script, multiscale_masks=[masks])), expected)
    assert_all_differ([expected.logits[0], generate(script, released(script), max_new_tokens=1).logits[0]])


def test_a_scale_without_masks_is_all_background(script):
    masks = {scale: torch.from_numpy(labels).long() for scale, labels in label_maps().items()}
    output = generate(script, released(script, multiscale_masks=[pick(masks, [256])]))
    background = {scale: labels if scale == 256 else torch.zeros_like(labels) for scale, labels in masks.items()}
    assert_same_generation(output, generate(script, released(script, multiscale_masks=[background])))


@pytest.mark.slow
@pytest.mark.parametrize("none", [{}, None, {"scales": {}}])
def test_an_image_without_masks_beside_one_with_masks_is_all_background(script, none):
    masks = {scale: torch.from_numpy(labels).long() for scale, labels in label_maps().items()}
    call = released(script)
    ids = script.uhrbat.tokenizer_image_token("<image>\n" + PROMPT.format(QUESTION), script.tokenizer, -200, "pt")[None]
    call |= {"inputs": ids, "attention_mask": None}
    call |= {name: call[name] * 2 for name in ("image_sizes", "multiscale_pixels")}
    output = generate(script, {**call, "multiscale_masks": [masks, none]})
    background = {scale: torch.zeros_like(labels) for scale, labels in masks.items()}
    assert_same_generation(output, generate(script, {**call, "multiscale_masks": [masks, background]}))


# ---- Wrong calls ----------------------------------------------------------------------------------------------------


def with_entry(call, **changes):
    """`multiscale_pixels` with another entry of the scale 64."""
    pixels = call["multiscale_pixels"][0]
    return {"multiscale_pixels": [{**pixels, 64: {**pixels[64], **changes}}]}


def mask_of_64(side, num_tiles=4):
    """`multiscale_masks` of one image, with masks of the scale 64 alone."""
    coords = [(0, 0), (0, 1), (1, 0), (1, 1)][:num_tiles]
    return {"multiscale_masks": [{64: {"masks": torch.ones(num_tiles, side, side).int(), "coords": coords}}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda call: {"multiscale_target_sizes": [32, 64]}, r"\[64, 128, 256, 384\]. Got \[32, 64\]"),
        (lambda call: {"multiscale_target_sizes": [64, 64]}, r"each once: \[64, 128, 256, 384\]. Got \[64, 64\]"),
        (
            lambda call: {"multiscale_pixels": [{32: torch.zeros(1, 3, 32, 32), **call["multiscale_pixels"][0]}]},
            r"`multiscale_pixels` .*\[64, 128, 256, 384\]. Got \[32, 64, 128, 256, 384\]",
        ),
        (
            lambda call: {
                "multiscale_pixels": [pick(call["multiscale_pixels"][0], [64])],
                "multiscale_target_sizes": [128, 256],
                "multiscale_topk": [16, 24],
            },
            r"tiles of the scales \[64\], none of \[128, 256\]",
        ),
        (
            lambda call: with_entry(call, tiles=torch.zeros(4, 3, 14, 14)),
            r"64 px.*\[4, 3, 32, 32\]. Got \[4, 3, 14, 14\]",
        ),
        (
            lambda call: with_entry(call, coords=[(0, 0), (0, 1), (1, 1), (1, 1)]),
            r"64 px.*4 tiles and 4 coords, 3 of them different, from \(0, 0\) to \(1, 1\)",
        ),
        (lambda call: with_entry(call, coords=[(0, 0)]), r"64 px.*4 tiles and 1 coords"),
        (
            lambda call: {"multiscale_pixels": [{64: {"tiles": call["multiscale_pixels"][0][64]["tiles"]}}]},
            r"64 px.*\['tiles'\], but not \['coords'\]",
        ),
        (lambda call: {"multiscale_topk": [32, 64]}, r"2 budgets \[32, 64\] and 4 scales"),
        (lambda call: {"multiscale_topk": [64, 32, 128, 256]}, r"\[64, 32, 128, 256\]"),
        (
            lambda call: {name: call[name] * 2 for name in ("multiscale_pixels", "image_sizes", "multiscale_masks")},
            r"prompts hold 1 image tokens, but 2 images were passed",
        ),
        (lambda call: {"image_sizes": call["image_sizes"] * 2}, "`image_sizes`.* 2 .* 1 "),
        (lambda call: {"multiscale_masks": [{64: torch.ones(4, 4).long()}]}, r"64 px.*\[8, 8\] tokens. Got \[4, 4\]"),
        (lambda call: mask_of_64(24), r"64 px.*\[8, 8\] tokens. Got \[48, 48\]"),
        (lambda call: mask_of_64(4, num_tiles=3), "3 tiles and 3 coords"),
        (lambda call: {"multiscale_masks": [{96: torch.ones(12, 12).long()}]}, r"\[64, 128, 256, 384\]. Got \[96\]"),
        (lambda call: {"multiscale_masks": [{64: torch.ones(8, 8).long()}] * 2}, "Got 2 for 1 images"),
    ],
    ids=[
        "sizes",
        "size twice",
        "foreign scale",
        "no scale",
        "tiles",
        "coords twice",
        "number of coords",
        "no coords",
        "number of budgets",
        "order of budgets",
        "images",
        "image_sizes",
        "label map",
        "patches of a mask",
        "tiles of a mask",
        "foreign mask",
        "number of masks",
    ],
)
def test_a_call_that_does_not_fit_is_an_error_with_both_numbers(script, changes, message):
    call = released(script)
    with pytest.raises(ValueError, match=message):
        generate(script, {**call, **changes(call)})


def test_a_scale_that_is_no_multiple_of_the_tile_is_an_error_with_both_numbers(script):
    with pytest.raises(ValueError, match="100 px.*32 px"):
        script.uhrbat.split_image_to_multiscale_tiles(picture(), script.image_processor, [32, 100])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "no mask cache.*'scales'"),
        ({"annotations": []}, "no mask cache.*'scales'"),
        ({"scales": [16]}, "no mask cache.*'scales'"),
        ({"scales": {"fine": {}}}, r"its scales are \['fine'\]"),
        ({"scales": {16: {"tile_masks": []}}}, "16 px.*'tile_coords'"),
        ({"scales": {16: None}}, "16 px.*'tile_masks'"),
        (small_entry(tile_masks=[]), r"16 px.*one shape \(p, p\). Got \[\]"),
        (small_entry(tile_masks=["ship"] * 4), "16 px.*arrays of labels"),
        (small_entry(tile_masks=[torch.ones(2, 3).int()] * 4), r"16 px.*\[\(2, 3\)\]"),
        (small_entry(tile_masks=[torch.ones(2, 2).int(), torch.ones(4, 4).int()]), r"\[\(2, 2\), \(4, 4\)\]"),
        (small_entry(tile_masks=[torch.ones(2, 2)] * 4), "16 px.*integers. Got torch.float32"),
        (small_entry(tile_masks=[torch.ones(2, 2).int()] * 3), "16 px.*3 tiles and 4 coords"),
        (small_entry(tile_coords=[(0, 0), (0, 1), (1, 0), (0, 0)]), "4 coords, 3 of them different"),
        (small_entry(tile_coords=[(0, 0), (0, 8), (8, 0), (8, 8)]), r"from \(0, 0\) to \(8, 8\)"),
        (small_entry(tile_coords=[(0, 0, 0)] * 4), r"16 px.*pairs \(row, column\)"),
    ],
)
def test_an_entry_that_holds_no_masks_is_an_error_that_names_what_is_wrong(script, entry, message):
    with pytest.raises(ValueError, match=message):
        script.uhrbat.load_multiscale_tile_masks(entry, scales=[16], tile_size=8, patch_size=4)


def test_a_mask_file_never_runs_code(script, tmp_path):
    torch.save({"scales": {}, "hook": SimpleNamespace()}, tmp_path / "masks.pt")
    with pytest.raises(ValueError, match=r"masks\.pt is no mask cache: it is damaged or holds more than tensors"):
        script.uhrbat.load_multiscale_tile_masks(tmp_path / "masks.pt")


def test_a_mask_file_that_is_not_there_is_an_error_of_its_own(script, tmp_path):
    with pytest.raises(FileNotFoundError):
        script.uhrbat.load_multiscale_tile_masks(tmp_path / "masks.pt")
