"""What stands before the decoder: encoded once, chosen for every question."""

import asyncio
import io
import threading

import numpy as np
import pytest
import torch
from asking import PROMPT, picture
from uhr_bat.common.loading import load_model
from uhr_bat.serving.cache import ContentCache
from uhr_bat.serving.engine import Engine
from uhr_bat.serving.front import Front, ImageFile, fingerprint
from uhr_bat.serving.sources import SourceRules
from uhr_bat.training.tiny.dates import SAME_PLACE

SHIPS, TRUCKS = PROMPT.format("How many ships are there?"), PROMPT.format("What colour is the truck at the road?")


def source(seed=0):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return ImageFile.of_bytes(file.getvalue())


@pytest.fixture(scope="module")
def loaded():
    return load_model()


@pytest.fixture
def front(loaded):
    return Front(*loaded, "tiny", ContentCache(2**30), workers=2)


def test_the_decoder_answers_embeddings_as_the_model_answers_images(front):
    inputs = front.processor(text=SHIPS, images=picture(), return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = front.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    selection = front.select(SHIPS, [front.encode(source())])
    assert selection.first_logits.argmax() == expected[0]  # which a pointer has a part in
    said = front.model.get_input_embeddings()(expected[:1])
    embeds = torch.cat((selection.embeds, said.to(selection.embeds)))[None]
    rest = front.model.generate(inputs_embeds=embeds, **options)[0]
    assert torch.equal(rest[: len(expected) - 1], expected[1:])


def test_a_second_question_costs_no_encoding_and_has_a_selection_of_its_own(front):
    first = front.select(SHIPS, [front.encode(source())])
    second = front.select(TRUCKS, [front.encode(source())])
    assert front.cache.made == {"image": 1, "selection": 2}
    assert any(not torch.equal(*slots) for slots in zip(first.compressed.slots[0], second.compressed.slots[0]))
    assert front.select(SHIPS, [front.encode(source())]) is first


@pytest.mark.parametrize("elsewhere", [False, True])
def test_images_that_were_two_dates_are_asked_about_alone_afterwards(front, monkeypatch, elsewhere):
    alone = front.select(TRUCKS, [front.encode(source())])
    if elsewhere:  # as of a model on a GPU, which is handed copies
        monkeypatch.setattr(front, "_to", lambda features, device: features.to(device))
    earlier, later = (front.encode(source(seed)) for seed in (1, 0))
    both = front.processor.image_token + SHIPS
    compared = front.select(both, [earlier, later], dates=[SAME_PLACE])
    assert compared.compressed.images_per_prompt == [2]
    again = front.select(TRUCKS, [later], budgets=front.processor.default_budgets)
    assert again is not alone and torch.equal(again.first_logits, alone.first_logits)


@pytest.mark.parametrize("change", [{"budgets": [2, 4, 8, 16]}, {"prompt": TRUCKS}, {"seed": 1}])
def test_what_differs_is_chosen_anew(front, change):
    def select(prompt=SHIPS, seed=0, budgets=None):
        return front.select(prompt, [front.encode(source(seed))], budgets)

    assert select() is not select(**change)
    # As it would be without a cache.
    fresh = Front(front.processor, front.model, "tiny", ContentCache(0), workers=2)
    again = fresh.select(
        change.get("prompt", SHIPS), [fresh.encode(source(change.get("seed", 0)))], change.get("budgets")
    )
    assert torch.equal(again.embeds, select(**change).embeds)


def test_an_image_that_is_read_in_another_way_is_another_one(front):
    pytest.importorskip("rasterio")
    keys = {front.encode(source(), **options).key for options in ({}, {"window": (0, 0, 20, 80)}, {"bands": [3, 2, 1]})}
    assert len(keys) == 3


def test_a_raster_whose_world_file_was_edited_lies_where_that_says_and_is_encoded_anew(front, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "scene.tif"
    with rasterio.open(path, "w", driver="GTiff", height=20, width=160, count=3, dtype="uint8") as raster:
        raster.write(np.asarray(picture()).transpose(2, 0, 1))
    rules = SourceRules(2**20, tmp_path)

    def encode():
        return front.encode(asyncio.run(rules.read(str(path))))

    def lies(left, ending=".tfw"):
        path.with_suffix(ending).write_text(f"2\n0\n0\n-2\n{left}\n100\n")
        return encode().georeference.transform[2]

    assert lies(11) == 10 and lies(21) == 20
    assert encode() is encode() and front.cache.made["image"] == 2
    path.with_suffix(".tfw").unlink()
    assert lies(31, ".TFW") == 30  # as Windows spells it


def test_a_model_folder_is_known_by_its_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert fingerprint(tmp_path) != before


def test_work_that_nobody_waits_for_is_not_begun(loaded, monkeypatch):
    """What one who left and one who stays have asked for is done for the latter."""
    front = Front(*loaded, "tiny", ContentCache(2**30), workers=1)
    front_is_free, read = threading.Event(), []
    process_image = front.processor.image_processor.process_image

    def reading(content, **options):
        if isinstance(content, bytes):  # of a request, and not of the steps inside
            read.append(content)
        front_is_free.wait(20)
        return process_image(content, **options)

    monkeypatch.setattr(front.processor.image_processor, "process_image", reading)
    held, left, shared = (source(seed) for seed in range(3))

    async def ask():
        engine = Engine(front, None, max_requests=8)
        first, gone, also_gone, stays = tasks = [
            asyncio.ensure_future(engine.encode(one)) for one in (held, left, shared, shared)
        ]
        while not read:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # the others wait for their turn
        for one in (gone, also_gone):
            one.cancel()
        await asyncio.sleep(0)
        front_is_free.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, gone, also_gone, stays = asyncio.run(ask())
    assert isinstance(gone, asyncio.CancelledError) and isinstance(also_gone, asyncio.CancelledError)
    assert stays.image_size == first.image_size
    assert sorted(read) == sorted([held.content, shared.content])
    assert front.cache.made == {"image": 2}
