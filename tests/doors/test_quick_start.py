"""The Quick Start of the model card, end to end.

Runs on every supported release of transformers.
"""

import importlib
import os
from types import SimpleNamespace

import pytest
import torch
from asking import HAS_AUTO_IMAGE_PROCESSOR, picture
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer


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
            multiscale_topk=[4, 8, 40, 94],  # the card: 80, 320, 600, 2000
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
        return quick_start(str(model_folder), str(path), "Describe this remote-sensing image.")


def test_the_model_card_runs_to_an_answer(card):
    assert isinstance(card.answer, str)
    assert 1 <= card.answer_ids.shape[1] == len(card.output.scores) <= 6
    assert card.image_token_id == card.model.config.image_token_id
    assert (card.output.sequences == card.image_token_id).sum() == 4 + 8 + 40 + 94


def test_the_model_card_gets_the_answer_of_the_modern_call(card, model_folder):
    processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
    inputs = processor(text=[card.prompt], images=[[card.image]], return_tensors="pt")
    output = card.model.generate(
        **inputs, do_sample=False, max_new_tokens=6, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(card.output.sequences, output.sequences)
    torch.testing.assert_close(torch.stack(card.output.scores), torch.stack(output.scores), rtol=0, atol=1e-6)


def test_the_sequences_hold_ids_of_the_vocabulary_only(card):
    sequences = card.output.sequences
    assert 0 <= sequences.min() and sequences.max() < card.model.config.text_config.vocab_size
