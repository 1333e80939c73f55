"""A raster through the library's doors: chat, pipeline, processor and command give what the image processor gives."""

import numpy as np
import pytest
import torch
from asking import GENERATION, PROMPT
from PIL import Image
from rasters import random_bands, rasterio, write_raster
from transformers import pipeline
from uhr_bat import UHRBatProcessor, cli
from uhr_bat.pictures import pages

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
QUESTION = "How many objects are at the pier?"


@pytest.fixture(scope="module")
def processor(model_folder):
    return UHRBatProcessor.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def raster(tmp_path_factory):
    """What rasterio writes by default of 16 bits in three bands: planar, no colours; Pillow does not open it."""
    bands = random_bands(3, 90, 120).astype(np.uint16) * 257
    return write_raster(tmp_path_factory.mktemp("raster") / "scene.tif", bands), np.moveaxis(bands // 257, 0, -1)


def chat(**image):
    content = [{"type": "image", **image}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def test_a_chat_and_a_call_take_rasters_however_they_are_named(processor, raster):
    path, pixels = raster
    expected = processor(
        images=Image.fromarray(pixels.astype(np.uint8)), text=PROMPT.format(QUESTION), return_tensors="pt"
    )
    with rasterio.open(path) as dataset:
        opened = processor.image_processor.open_image(path)
        for source in (path, open(path, "rb").read(), dataset, opened):
            inputs = processor(images=source, text=PROMPT.format(QUESTION), return_tensors="pt")
            assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
            assert torch.equal(inputs["input_ids"], expected["input_ids"])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    for image in ({"path": path}, {"url": path}, {"image": path}):
        inputs = processor.apply_chat_template(chat(**image), **options)
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_options_of_a_raster_reach_it_through_a_call_and_a_chat(processor, raster):
    path, pixels = raster
    part = Image.fromarray(pixels[10:60, 20:90, ::-1].astype(np.uint8))
    expected = processor(images=part, text=PROMPT.format(QUESTION), return_tensors="pt")["pixel_values"]
    options = {"bands": [3, 2, 1], "window": (10, 20, 60, 90)}
    found = processor(images=path, text=PROMPT.format(QUESTION), return_tensors="pt", **options)["pixel_values"]
    assert torch.equal(found, expected)
    chat_options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = processor.apply_chat_template(chat(path=path), processor_kwargs=options, **chat_options)["pixel_values"]
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="3500 pixels are over the limit of 3499 pixels"):
        processor(images=path, text=PROMPT.format(QUESTION), max_image_pixels=3499, **options)


@pytest.mark.slow
def test_the_pipeline_hands_rasters_on_unopened(model_folder, raster, tmp_path):
    path, pixels = raster
    pipe = pipeline("image-text-to-text", model=str(model_folder), trust_remote_code=True)
    assert type(pipe).__name__ == "UHRBatPipeline"
    image, prompt = Image.fromarray(pixels.astype(np.uint8)), PROMPT.format(QUESTION)
    options = {"return_full_text": False, "generate_kwargs": dict(GENERATION)}
    expected = pipe(images=image, text=prompt, **options)[0]["generated_text"]
    expected_of_chat = pipe(text=chat(image=image), **options)[0]["generated_text"]
    seen = []
    handle = pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("pixel_values")), with_kwargs=True
    )
    assert pipe(images=path, text=prompt, **options)[0]["generated_text"] == expected
    assert pipe(text=chat(path=path), **options)[0]["generated_text"] == expected_of_chat
    handle.remove()
    reference = pipe.processor(images=image, text=prompt, return_tensors="pt")["pixel_values"]
    given = [pixel_values for pixel_values in seen if pixel_values is not None]
    assert len(given) == 2 and all(torch.equal(pixel_values, reference) for pixel_values in given)
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "pipeline_uhr_bat.py").is_file()


@pytest.mark.slow
def test_the_commands_read_rasters_as_they_are_told(raster, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "TSNE_TOKENS", 100)  # of thousands it takes most of the time
    path, _ = raster
    assert cli.main(["ask", path, QUESTION, "--max-new-tokens", "2"]) == 0
    assert "120 x 90 px" in capsys.readouterr().out
    options = ["--bands", "3,2,1", "--value-range", "0,30000", "--window", "10,20,60,90"]
    assert cli.main(["ask", path, QUESTION, "--max-new-tokens", "2", *options]) == 0
    assert "70 x 50 px" in capsys.readouterr().out
    assert cli.main(["ask", path, QUESTION, "--max-pixels", "10799"]) == 2
    assert f"{path}: 90 x 120 = 10800 pixels are over the limit of 10799" in capsys.readouterr().err
    assert cli.main(["ask", path, QUESTION, "--bands", "7"]) == 2
    assert "`bands` is one band or three, numbers from 1 to 3. Got [7]" in capsys.readouterr().err
    assert cli.main(["pictures", path, QUESTION, "--output", str(tmp_path), "--width", "600", *options]) == 0
    assert (tmp_path / "kept.png").is_file()
