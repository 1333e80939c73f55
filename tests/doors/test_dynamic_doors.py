"""A processor that is set to dynamic pyramids: whoever cannot use what comes of them says so before the long work."""

import pytest
from PIL import Image

from uhr_bat import cli
from uhr_bat.common import loading
from uhr_bat.image_pyramids_uhr_bat import DynamicPyramid
from uhr_bat.serving.cache import ContentCache
from uhr_bat.serving.front import Front


@pytest.fixture
def dynamic(tmp_path, monkeypatch):
    """Tiny's processor, whose settings say `dynamic_pyramid`, at every command; no command may load a model."""
    processor = loading.load_processor()
    processor.image_processor.dynamic_pyramid = True
    for command in ("uhr_bat.geo.__main__", "uhr_bat.pictures.__main__"):
        monkeypatch.setattr(f"{command}.load_processor", lambda *args: processor)
        monkeypatch.setattr(f"{command}.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    Image.new("RGB", (90, 60)).save(tmp_path / "image.png")
    return processor


@pytest.mark.parametrize("verb, output", [("pictures", "--output"), ("evidence-map", "--geojson")])
def test_commands_that_draw_refuse_it_before_a_model_is_loaded(dynamic, tmp_path, capsys, verb, output):
    name = {"--output": "drawn", "--geojson": "out.geojson"}[output]
    assert cli.main([verb, str(tmp_path / "image.png"), "What is here?", output, str(tmp_path / name)]) != 0
    assert "Read the image without `dynamic_pyramid`." in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_a_server_refuses_it_when_it_starts(dynamic):
    with pytest.raises(ValueError, match="load it with `dynamic_pyramid=False`"):
        Front(dynamic, None, "tiny", ContentCache(0), workers=1)


def test_the_setting_is_what_the_argument_is(dynamic, tmp_path):
    text = "<image> What is here?"
    found, asked = (
        dynamic(text=text, images=tmp_path / "image.png", return_tensors="pt", **options)
        for options in ({}, {"dynamic_pyramid": True})
    )
    assert found["input_ids"].tolist() == asked["input_ids"].tolist()
    assert isinstance(found["image_pyramids"][0], DynamicPyramid) and "token_counts" not in found
    assert "token_counts" in dynamic(text=text, images=tmp_path / "image.png", dynamic_pyramid=False)
