"""Made-up scenes become rows that training reads, each with a picture of its own."""

import json

import pytest
from PIL import Image
from uhr_bat.common.loading import load_model
from uhr_bat.examples import scenes
from uhr_bat.training.data import load_samples


@pytest.mark.slow
def test_rows_name_pictures_of_whole_scenes_and_of_parts_at_native_pixels(tmp_path, capsys):
    options = ["--output", str(tmp_path / "out"), "--ordinary", "1", "--native", "1", "--questions", "3"]
    assert scenes.main(options) == 0
    rows = json.loads((tmp_path / "out" / "train.json").read_text())
    assert {row["image"] for row in rows} == {"ordinary_0.png", "native_0.png"}
    assert Image.open(tmp_path / "out" / "native_0.png").size == (scenes.WINDOW, scenes.WINDOW)
    assert all(row["answer"].startswith(" ") for row in rows)
    assert len(load_samples(tmp_path / "out" / "train.json", load_model(device_map=None)[0])) == len(rows)
    assert f"{len(rows)} questions about 2 pictures" in capsys.readouterr().out
