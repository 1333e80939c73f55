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


@pytest.mark.parametrize("options, message", [
    (["--native", "0", "--ordinary", "-1"], "--ordinary must be at least 0"),
    (["--native", "0", "--ordinary", "0"], "No scene is asked for"),
    (["--questions", "0"], "--questions must be at least 1"),
    (["--questions", "1000000"], "--questions must be at least 1 and at most 200. Got 1000000."),
    (["--native", "6"], "native_5.png: --output writes a file of this name, and this is a folder"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused_before_a_scene_is_painted(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.delattr(scenes, "write")
    (tmp_path / "native_5.png").mkdir()
    assert scenes.main(["--output", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_scenes_without_a_question_are_an_error_and_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scenes, "write", lambda *arguments: [])
    assert scenes.main(["--output", str(tmp_path), "--ordinary", "2", "--native", "0"]) == 2
    assert "None of 2 scenes shows what a question needs" in capsys.readouterr().err and not list(tmp_path.iterdir())
