"""Every door times every kind of image: whatever was asked about can be answered, drawn and mapped, or is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image
from uhr_bat import load_model
from uhr_bat.geo import evidence_frame
from uhr_bat.pictures import attention_picture, kept_picture, regions_picture

SIZE = (150, 200)
QUESTION = "What colour is the plane at the runway?"
# Options of a call, and how many visual tokens the image takes.
KINDS = {
    "whole": ({}, 146),
    "a scale without tokens": ({"budgets": [0, 8, 40, 94]}, 142),
    "no anchor, no middle": ({"budgets": [0, 0, 0, 5]}, 5),
    "the anchor alone": ({"max_tiles": 4}, 4),
    "some tiles": ({"max_tiles": 40}, 146),
    "native levels": ({"max_tiles": 40, "native": True}, 146),
}
DRAWINGS = {
    "attention": lambda out, picture: attention_picture(out, picture, QUESTION, width=600),
    "regions": lambda out, picture: regions_picture(out, picture, width=600),
    "kept": lambda out, picture: kept_picture(out, picture, QUESTION, width=600),
}


@pytest.fixture(scope="module")
def loaded():
    return load_model()


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8))


def prompts(processor):
    """Of a question about an image, and of one without."""
    image = [{"type": "image"}]
    chats = [[{"role": "user", "content": [*shown, {"type": "text", "text": QUESTION}]}] for shown in (image, [])]
    return [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]


def call(processor, texts, images, options):
    return processor(text=texts, images=images, padding=True, return_tensors="pt", **options)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, loaded, picture):
    """(options, visual tokens, what was kept) of a kind of image."""
    processor, model = loaded
    options, num_tokens = KINDS[request.param]
    return options, num_tokens, model.compress(**call(processor, prompts(processor)[:1], [[picture]], options))


def test_the_prompt_takes_the_tokens_that_were_counted(kind):
    _, num_tokens, out = kind
    assert out.pooler_output[0].shape[0] == num_tokens


def test_a_prompt_without_an_image_beside_it_changes_nothing(kind, loaded, picture):
    options, _, out = kind
    (processor, model), (asked, text) = loaded, prompts(loaded[0])
    for texts, images in (([asked, text], [[picture], []]), ([text, asked], [[], [picture]])):
        beside = model.compress(**call(processor, texts, images, options))
        torch.testing.assert_close(beside.pooler_output[0], out.pooler_output[0], rtol=0, atol=1e-5)


def test_an_encoded_image_gives_the_same(kind, loaded, picture):
    options, _, out = kind
    processor, model = loaded
    reading = {name: value for name, value in options.items() if name != "budgets"}
    features = model.encode_image(**processor.image_processor(picture, return_tensors="pt", **reading))
    asking = {name: value for name, value in options.items() if name != "native"}
    inputs = processor(text=prompts(processor)[:1], image_features=features, return_tensors="pt", **asking)
    torch.testing.assert_close(model.compress(**inputs).pooler_output[0], out.pooler_output[0], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWINGS)
def test_every_picture_is_drawn(kind, picture, name):
    assert DRAWINGS[name](kind[2], picture).width == 600


def test_every_token_has_its_place_on_the_map(kind):
    _, num_tokens, out = kind
    frame = evidence_frame(out, SIZE, out.scales[0])
    assert len(frame) == num_tokens and not frame.geometry.is_empty.any()


def test_a_scale_that_spends_nothing_still_counts_among_the_tokens_that_there_are(loaded, picture):
    processor, model = loaded
    (features,) = model.encode_image(**processor.image_processor(picture, return_tensors="pt"))
    out = model.compress(**call(processor, prompts(processor)[:1], [[picture]], {"budgets": [0, 8, 40, 94]}))
    assert [int(out.importance[0].present(idx).sum()) for idx in range(4)] == features.available


def test_tiles_that_images_share_are_named_with_their_number(loaded, picture):
    text = prompts(loaded[0])[0].replace("<image>", "<image><image>")
    with pytest.raises(ValueError, match="`max_tiles` is 2, but the 4 tiles.* The 4 tiles of a prompt are shared by its 2"):
        call(loaded[0], [text], [[picture, picture]], {"max_tiles": 4})
    (features,) = loaded[1].encode_image(**loaded[0].image_processor(picture, max_tiles=30))
    with pytest.raises(ValueError, match="`max_tiles` is 0, but the 4 tiles.* The 1 tiles of a prompt are shared by its 2"):
        loaded[0](text=text, image_features=[features] * 2, max_tiles=1)
