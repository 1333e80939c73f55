"""The Quick Start of the model card, and the released call around it, which is translated to the modern one.

Runs on every supported release of transformers.
"""

import importlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_remote_code import GENERATION, HAS_AUTO_IMAGE_PROCESSOR, assert_all_differ, picture
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, StoppingCriteriaList
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


SCALES, BUDGETS, TILE, PATCH = [64, 128, 256, 384], [16, 24, 40, 66], 32, 8
QUESTION = "Describe this remote-sensing image."
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
if HAS_AUTO_IMAGE_PROCESSOR:
    from transformers import AutoImageProcessor
else:

    class AutoImageProcessor:
        """What the README shows for the releases whose class of that name needs torchvision."""

        @staticmethod
        def from_pretrained(model_id):
            return AutoProcessor.from_pretrained(model_id, trust_remote_code=True).image_processor


def quick_start(model_id, image_path, question):
    """The model card's code, word for word but for numbers that are the embedded default's; returns its variables."""
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    image_processor = AutoImageProcessor.from_pretrained(model_id)

    model = AutoModelForCausalLM.from_pretrained(
        model_id,
        trust_remote_code=True,
        torch_dtype="auto",
        device_map="auto",
    ).eval()

    # Reuse the preprocessing helpers shipped with the model's remote code.
    uhrbat = importlib.import_module(model.__class__.__module__)
    image = Image.open(image_path).convert("RGB")

    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<image>\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    image_token_id = getattr(model.config, "image_token_index", -200)
    input_ids = (
        uhrbat.tokenizer_image_token(
            prompt,
            tokenizer,
            image_token_id,
            return_tensors="pt",
        )
        .unsqueeze(0)
        .to(model.device)
    )
    attention_mask = torch.ones_like(input_ids)

    target_sizes = [64, 128, 256, 384]  # the card: 672, 1344, 2688, 4032
    multiscale_pixels = [
        uhrbat.split_image_to_multiscale_tiles(
            image,
            image_processor,
            target_sizes=target_sizes,
            tile_size=336,
        )
    ]

    with torch.inference_mode():
        output = model.generate(
            inputs=input_ids,
            attention_mask=attention_mask,
            image_sizes=[image.size],
            modalities=["image"],
            multiscale_pixels=multiscale_pixels,
            multiscale_masks=[{}],
            multiscale_topk=[16, 24, 40, 66],  # the card: 80, 320, 600, 2000
            multiscale_target_sizes=target_sizes,
            do_sample=False,
            max_new_tokens=6,  # the card: 256
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    prompt_len = output.sequences.shape[1] - len(output.scores)
    answer_ids = output.sequences[:, prompt_len:].clone()
    answer_ids[answer_ids < 0] = tokenizer.pad_token_id or tokenizer.eos_token_id
    answer = tokenizer.decode(answer_ids[0], skip_special_tokens=True).strip()
    return SimpleNamespace(**locals())


@pytest.fixture(scope="module")
def card(model_folder, tmp_path_factory):
    """The model card's variables after its code has run, as a script that nobody answers at a terminal."""
    path = tmp_path_factory.mktemp("images") / "your_remote_sensing_image.jpg"
    picture().save(path, quality=95)
    with open(os.devnull, encoding="utf-8") as nobody, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sys.stdin", nobody)
        return quick_start(str(model_folder), str(path), QUESTION)


@pytest.fixture(scope="module")
def processor(model_folder):
    return AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)


def released(card, question=QUESTION, image=None, image_token_id=None, **changes):
    """The released call's arguments for one image."""
    image = card.image if image is None else image
    token = card.image_token_id if image_token_id is None else image_token_id
    ids = card.uhrbat.tokenizer_image_token(PROMPT.format(question), card.tokenizer, token, return_tensors="pt")[None]
    pixels = card.uhrbat.split_image_to_multiscale_tiles(image, card.image_processor, SCALES, TILE)
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


def modern(card, processor, question=QUESTION):
    return processor(text=[PROMPT.format(question)], images=[[card.image]], return_tensors="pt")


def generate(card, inputs, **settings):
    with torch.inference_mode():
        return card.model.generate(
            **inputs, **{**GENERATION, "return_dict_in_generate": True, "output_logits": True, **settings}
        )


def answer(output):
    """long[B, new tokens]"""
    return output.sequences[:, -len(output.logits) :]


def assert_same_generation(output, other):
    """Token by token, visual tokens and scores included."""
    assert torch.equal(output.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(other.logits), rtol=0, atol=1e-6)


# ---- The card -------------------------------------------------------------------------------------------------------


def test_the_model_card_runs_to_an_answer(card):
    assert isinstance(card.answer, str)
    assert 1 <= card.answer_ids.shape[1] == len(card.output.scores) <= 6
    assert card.image_token_id == card.model.config.image_token_id
    assert (card.output.sequences == card.image_token_id).sum() == sum(BUDGETS)


def test_the_model_card_gets_the_answer_of_the_modern_call(card, processor):
    inputs = modern(card, processor)
    output = card.model.generate(
        **inputs, do_sample=False, max_new_tokens=6, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(card.output.sequences, output.sequences)
    torch.testing.assert_close(torch.stack(card.output.scores), torch.stack(output.scores), rtol=0, atol=1e-6)


def test_the_sequences_hold_ids_of_the_vocabulary_only(card):
    for sequences in (card.output.sequences, generate(card, released(card, image_token_id=-200)).sequences):
        assert 0 <= sequences.min() and sequences.max() < card.model.config.text_config.vocab_size


# ---- Variants of the call -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_token_id", "settings"),
    [(None, {}), (-200, {}), (-200, {"repetition_penalty": 1.1}), (-200, {"num_beams": 2})],
)
def test_the_released_call_is_the_modern_call(card, processor, image_token_id, settings):
    output = generate(card, released(card, image_token_id=image_token_id), **settings)
    assert_same_generation(output, generate(card, modern(card, processor), **settings))


def test_images_and_questions_change_what_the_released_call_says(card):
    calls = [released(card, question, picture(seed)) for question in (QUESTION, "How many ships?") for seed in (0, 1)]
    assert_all_differ([generate(card, call, max_new_tokens=1).logits[0] for call in calls])


@pytest.mark.parametrize("changes", [{"multiscale_masks": None}, {"multiscale_topk": None}, {"attention_mask": None}])
def test_what_is_left_out_is_what_the_card_says(card, changes):
    assert_same_generation(generate(card, released(card, **changes)), generate(card, released(card)))


def test_budgets_of_one_call_are_spent_exactly(card):
    output = generate(card, released(card, multiscale_topk=[8, 16, 24, 40]), max_new_tokens=1)
    assert (output.sequences == card.image_token_id).sum() == 88


def test_a_prompt_without_an_image_answers(card):
    ids = card.tokenizer("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt").input_ids
    output = generate(card, {"inputs": ids, "attention_mask": torch.ones_like(ids), "modalities": ["text"]})
    assert_same_generation(output, generate(card, {"input_ids": ids}))


def test_a_left_padded_batch_of_two_images_answers_as_one_by_one(card):
    questions = (QUESTION, "How many ships are there at the pier in the north of this scene?")
    calls = [released(card, question, picture(seed)) for seed, question in enumerate(questions)]
    length = max(call["inputs"].shape[1] for call in calls)
    assert length > min(call["inputs"].shape[1] for call in calls)

    def pad(name, value):
        rows = [call[name][0] for call in calls]
        return torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=value) for row in rows])

    lists = ("image_sizes", "multiscale_pixels", "multiscale_masks")
    batch = {
        **calls[0],
        "inputs": pad("inputs", card.tokenizer.pad_token_id),
        "attention_mask": pad("attention_mask", 0),
        **{name: [call[name][0] for call in calls] for name in lists},
    }
    output = generate(card, batch)
    alone = [generate(card, call) for call in calls]
    assert answer(output).tolist() == [answer(one)[0].tolist() for one in alone]
    expected = torch.stack([torch.cat(one.logits) for one in alone], dim=1)
    torch.testing.assert_close(torch.stack(output.logits), expected, rtol=0, atol=1e-4)


# ---- Helpers --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_cut_at_its_images(card):
    def words(text):
        return card.tokenizer(text).input_ids

    ids = card.uhrbat.tokenizer_image_token("a <image>\nb<image>", card.tokenizer)
    assert ids == [*words("a "), -200, *words("\nb"), -200]
    tensor = card.uhrbat.tokenizer_image_token("a <image>\nb<image>", card.tokenizer, 7, return_tensors="pt")
    assert tensor.dtype == torch.long and tensor.tolist() == [*words("a "), 7, *words("\nb"), 7]


@pytest.mark.parametrize("size", [(160, 20), (97, 301), (1500, 1501), (64, 64)])
def test_tiles_are_bit_equal_to_pillows_resize_of_the_padded_square(card, size):
    image = picture(2, size)
    tiles = card.uhrbat.split_image_to_multiscale_tiles(image, card.image_processor, SCALES, TILE)
    assert list(tiles) == SCALES
    square = Image.new("RGB", (max(size), max(size)), (122, 116, 104))
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    mean, std = np.array(OPENAI_CLIP_MEAN, np.float32), np.array(OPENAI_CLIP_STD, np.float32)
    for scale in SCALES:
        view = square.resize((scale, scale), Image.Resampling.BICUBIC)
        boxes = [(x, y, x + TILE, y + TILE) for y in range(0, scale, TILE) for x in range(0, scale, TILE)]
        pixels = np.stack([np.asarray(view.crop(box)) for box in boxes])
        expected = ((pixels * (1 / 255)).astype(np.float32) - mean) / std  # CLIP's processor rescales in float64
        assert np.array_equal(tiles[scale].numpy(), expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("target_sizes", [SCALES[:2], [32, 96]])
def test_tiles_are_cut_at_the_scales_that_are_asked_for(card, target_sizes):
    tiles = card.uhrbat.split_image_to_multiscale_tiles(picture(), card.image_processor, target_sizes)
    assert {scale: len(value) for scale, value in tiles.items()} == {s: (s // TILE) ** 2 for s in target_sizes}


def label_maps():
    """{scale: int32[H, W]}: seven regions and background, unlike each other at every scale."""
    rng = np.random.default_rng(3)
    return {scale: rng.integers(0, 8, (scale // PATCH,) * 2, dtype=np.int32) for scale in SCALES}


def write_mask_file(path, maps):
    """The released layout: a list of tiles in any order, and their places."""
    p = TILE // PATCH
    scales = {}
    for scale, labels in maps.items():
        places = [(row, column) for row in range(scale // TILE) for column in range(scale // TILE)]
        np.random.default_rng(scale).shuffle(places)
        tiles = [labels[row * p : (row + 1) * p, column * p : (column + 1) * p] for row, column in places]
        scales[scale] = {
            "tile_masks": [torch.from_numpy(tile.copy()) for tile in tiles],
            "tile_coords": [(int(row), int(column)) for row, column in places],
        }
    torch.save({"scales": scales}, path)


def test_a_mask_file_of_the_released_layout_is_read_and_guides_the_answer(card, processor, tmp_path):
    maps = label_maps()
    write_mask_file(tmp_path / "masks.pt", maps)
    masks = card.uhrbat.load_multiscale_tile_masks(tmp_path / "masks.pt", SCALES)
    assert masks.keys() == maps.keys()
    for scale in SCALES:
        assert masks[scale].dtype == torch.long
        assert np.array_equal(masks[scale].numpy(), maps[scale])

    output = generate(card, released(card, multiscale_masks=[masks]))
    as_stored = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert_same_generation(output, generate(card, released(card, multiscale_masks=[as_stored])))
    labels = torch.cat([masks[scale].flatten() for scale in SCALES])[None]
    assert_same_generation(output, generate(card, {**modern(card, processor), "region_labels": labels}))
    assert_all_differ([output.logits[0], generate(card, released(card), max_new_tokens=1).logits[0]])


def test_keywords_stop_the_answer_where_they_stand(card):
    whole = answer(generate(card, released(card)))[0]
    words = [card.tokenizer.decode(token) for token in whole[2:].split(1)]
    keyword = next(word for word in words if word.isascii() and word.strip())
    call = released(card)
    criteria = card.uhrbat.KeywordsStoppingCriteria([keyword], card.tokenizer, call["inputs"])
    stopped = answer(generate(card, call, stopping_criteria=StoppingCriteriaList([criteria])))[0]
    texts = [card.tokenizer.decode(whole[: end + 1]) for end in range(len(whole))]
    expected = next(end for end, text in enumerate(texts) if keyword in text) + 1
    assert stopped.tolist() == whole[:expected].tolist()
    assert expected < len(whole)


@pytest.mark.parametrize("keyword", ["<|im_start|>assistant", "assistant\n"])
def test_keywords_at_the_end_of_the_prompt_do_not_stop_the_answer(card, keyword):
    call = released(card)
    whole = answer(generate(card, call))[0]
    assert keyword not in card.tokenizer.decode(whole)
    criteria = card.uhrbat.KeywordsStoppingCriteria([keyword], card.tokenizer, call["inputs"])
    output = generate(card, call, stopping_criteria=StoppingCriteriaList([criteria]))
    assert answer(output)[0].tolist() == whole.tolist()


# ---- Wrong calls ----------------------------------------------------------------------------------------------------


def without_scale(pixels, scale):
    return {kept: tiles for kept, tiles in pixels.items() if kept != scale}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda call: {"multiscale_target_sizes": [32, 64]}, r"\[64, 128, 256, 384\]. Got .*\[32, 64\]"),
        (
            lambda call: {"multiscale_pixels": [without_scale(call["multiscale_pixels"][0], 256)]},
            r"\[64, 128, 384\].*\[256\]",
        ),
        (lambda call: {"multiscale_topk": [32, 64]}, r"2 budgets \[32, 64\] and 4 scales"),
        (lambda call: {"multiscale_topk": [64, 32, 128, 256]}, r"\[64, 32, 128, 256\]"),
        (
            lambda call: {name: call[name] * 2 for name in ("multiscale_pixels", "image_sizes", "multiscale_masks")},
            "1 images, but 2 were passed",
        ),
        (lambda call: {"image_sizes": call["image_sizes"] * 2}, "`image_sizes`.* 2 .* 1 "),
        (
            lambda call: {"multiscale_masks": [{64: torch.ones(4, 4).long()}]},
            r"64 px must be \[8, 8\] tokens. Got \[4, 4\]",
        ),
    ],
    ids=["sizes", "missing scale", "number of budgets", "order of budgets", "images", "image_sizes", "label map"],
)
def test_a_call_that_does_not_fit_is_an_error_with_both_numbers(card, changes, message):
    call = released(card)
    with pytest.raises(ValueError, match=message):
        generate(card, {**call, **changes(call)})


def test_label_maps_for_some_images_only_are_an_error_with_both_numbers(card):
    maps = {scale: torch.from_numpy(labels).long() for scale, labels in label_maps().items()}
    call = released(card)
    batch = {name: call[name] * 2 for name in ("image_sizes", "multiscale_pixels")}
    rows = {name: call[name].repeat(2, 1) for name in ("inputs", "attention_mask")}
    with pytest.raises(ValueError, match="Got 1 for 2 images"):
        generate(card, {**call, **batch, **rows, "multiscale_masks": [maps, {}]})


def test_a_scale_that_is_no_multiple_of_the_tile_is_an_error_with_both_numbers(card):
    with pytest.raises(ValueError, match="100 px.*32 px"):
        card.uhrbat.split_image_to_multiscale_tiles(picture(), card.image_processor, [32, 100])


def test_a_mask_file_without_a_scale_is_an_error_that_names_it(card, tmp_path):
    maps = label_maps()
    del maps[256]
    write_mask_file(tmp_path / "masks.pt", maps)
    with pytest.raises(ValueError, match=r"\[64, 128, 384\].*\[256\]"):
        card.uhrbat.load_multiscale_tile_masks(tmp_path / "masks.pt", SCALES)


def test_a_mask_file_never_runs_code(card, tmp_path):
    torch.save({"scales": {}, "hook": SimpleNamespace()}, tmp_path / "masks.pt")
    with pytest.raises(ValueError, match=r"masks\.pt is no mask cache: it is damaged or holds more than tensors"):
        card.uhrbat.load_multiscale_tile_masks(tmp_path / "masks.pt")
