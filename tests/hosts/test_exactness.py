"""What a host answers is what the library's own model answers, of every family: rows that were kept, looks, steps."""

import pytest
import torch
from hosts_tiny import FAMILIES, plain_inputs
from images import random_image
from transformers import AutoModelForImageTextToText
from uhr_bat.common.asking import prompt_text
from uhr_bat.modeling_outputs_uhr_bat import Places

ONE_TILE = {"levels": 1, "max_tiles": None}


def ask(processor, budget, question="How many ships are at the pier?", seed=0):
    """Inputs of a question about an image that is one tile, and the image."""
    side = processor.image_processor.crop_size["height"]
    image = random_image(side, side, seed=seed)
    return processor(text=prompt_text(processor, question), images=image, budgets=budget, return_tensors="pt"), image


@torch.no_grad()
def last_logits(model, **inputs):
    return model(**inputs).logits[0, -1]


def test_an_image_of_one_tile_that_is_kept_whole_is_bit_equal_to_the_plain_call(family, loaded, host_folder):
    processor, model = loaded(family, **ONE_TILE)
    inputs, image = ask(processor, FAMILIES[family]["rows"] ** 2)
    plain = plain_inputs(family, host_folder(family), inputs["input_ids"], image)
    difference = (last_logits(model, **inputs) - last_logits(model.host, **plain)).abs().max()
    # Of one family the plain call has a row more, which is out of sight.
    assert difference == 0 if family != "llava_onevision" else difference < 1e-5


# Linear layers see what is out of sight: steps of Qwen3.5 are compared with a loop instead.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_5"])
def test_a_third_of_the_rows_is_equal_to_the_whole_prompt_with_the_others_out_of_sight(family, loaded, host_folder):
    processor, model = loaded(family, **ONE_TILE)
    rows = FAMILIES[family]["rows"] ** 2
    inputs, image = ask(processor, rows // 3)
    whole = ask(processor, rows)[0]["input_ids"].clone()
    if family == "mistral3":  # an image that is not whole is written without the ends of its rows
        whole = whole[whole != processor.tokenizer.convert_tokens_to_ids("[IMG_BREAK]")][None]
    kept = model.compress(**inputs).slots[0][0] >= 0
    ours = last_logits(model, **inputs)
    for seen, closest in ((kept, 1e-5), (kept.roll(1), None)):  # others in their place are a control
        plain = plain_inputs(family, host_folder(family), whole, image, seen)
        difference = (ours - last_logits(model.host, **plain)).abs().max()
        assert difference < closest if closest else difference > 1e-3


def test_greedy_steps_are_those_of_a_loop_without_a_cache(family, loaded):
    processor, model = loaded(family, **ONE_TILE)
    inputs, _ = ask(processor, FAMILIES[family]["rows"] ** 2 // 3)
    image_tokens = list(range(300, model.host.config.get_text_config().vocab_size))
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[2, *image_tokens])
    ids, compressed = inputs["input_ids"], model.compress(**inputs)
    for _ in range(4):
        mask = torch.ones_like(ids)
        with torch.no_grad():
            logits = model.host(
                input_ids=ids, attention_mask=mask, use_cache=False, **model.visual_inputs(ids, mask, compressed)
            ).logits[0, -1]
        logits[[2, *image_tokens]] = -torch.inf
        ids = torch.cat((ids, logits.argmax()[None, None]), dim=1)
    assert torch.equal(output, ids)


def test_a_look_is_the_attention_that_eager_returns_at_every_full_layer(family, loaded, host_folder):
    processor, model = loaded(family, **ONE_TILE)
    eager = AutoModelForImageTextToText.from_pretrained(host_folder(family), attn_implementation="eager").eval()
    ids = ask(processor, 1)[0]["input_ids"][0]
    rows = torch.randn(9, model.row_width, generator=torch.Generator().manual_seed(0))
    places = [Places(torch.tensor([3, 1, 7, 0, 2, 6, 4, 5, 8]), (3, 3), 0)]
    where = model.find_placeholders(ids).nonzero()[:, 0].tolist()
    whole, start, order, inputs = model.prompt_with(ids, where, rows, places)
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    if family == "qwen3_5":  # of its linear layers there are none
        attentions = dict(zip(model.attention, attentions))
    for layer in model.attention:
        for question, first in (("all", start + 9), ("last", len(whole) - 1)):
            seen = model.read_attention(ids, rows, places, layer=layer, question_tokens=question)
            expected = attentions[layer][0, :, first:, start : start + 9].mean((0, 1))
            assert torch.allclose(seen[order], expected, atol=1e-6)
