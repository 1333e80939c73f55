"""The made-up scene and the question command."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import examples.ask
from examples import scene
from examples.ask import WEIGHTS_NOTE, main

ROOT = Path(scene.__file__).resolve().parent.parent
SIZE = (600, 480)


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    scene.write(path, SIZE)
    return path


def test_the_same_seed_gives_the_same_scene(image_path):
    with Image.open(image_path) as image:
        first = np.asarray(image)
    assert image.size == SIZE
    assert (first == np.asarray(scene.render(SIZE, seed=0))).all()
    assert (first != np.asarray(scene.render(SIZE, seed=1))).any()


def test_the_scene_shows_sea_land_and_ships(image_path):
    with Image.open(image_path) as image:
        pixels = np.asarray(image).astype(int)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    assert (blue > red + 30).mean() > 0.2
    assert (green > blue + 20).mean() > 0.2
    sea = slice(0, SIZE[0] // 3)
    assert (red > blue + 60)[:, sea].any()


@pytest.mark.parametrize("size", [(1, 1), (50, 200), (200, 50)])
def test_any_size_can_be_made(size):
    assert scene.render(size).size == size


def test_a_scene_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "scene.png"
    path.write_bytes(b"the one before")

    def stop(image, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(OSError, match="disk full"):
        scene.write(path, (50, 40))
    assert [file.name for file in tmp_path.iterdir()] == ["scene.png"]
    assert path.read_bytes() == b"the one before"


def test_ask_answers_and_accounts_for_tokens_and_seconds(image_path):
    # From another folder, as run.py does it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    question = ["How many ships?", "--budgets", "8,16,24,32", "--max-new-tokens", "3"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "examples.ask", image_path.name, *question],
        capture_output=True, text=True, encoding="utf-8", env=environment, cwd=image_path.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "600 x 480 px" in done.stdout and WEIGHTS_NOTE in done.stdout
    assert "Question: How many ships?" in done.stdout and "Answer:" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
    # 480 of 600 rows are 179 of 224 px, centred: they touch 14 of 16 rows of patches.
    assert ["224", "px", "16", "x", "16", "224", "8", "8"] in rows
    assert rows[rows.index(["stage", "seconds"]) - 1][-2:] == ["80", "80"]
    stages = [row[0] for row in rows[rows.index(["stage", "seconds"]) + 1 :]]
    assert stages == ["load", "decode", "preprocess", "encode", "compress", "generate", "all"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jpg"], "missing.jpg: there is no such image file."),
        ([__file__], "test_examples.py: not an image"),
        (["IMAGE", "How many?", "--budgets", "1,2"], "2 budgets [1, 2] and 4 scales"),
        (["IMAGE", "How many?", "--budgets", "all"], "invalid numbers value: 'all'"),
        (["IMAGE", "How many?", "--model", "nowhere"], "nowhere: this is no model folder"),
    ],
    ids=["missing", "not an image", "budgets", "numbers", "model"],
)
def test_ask_says_what_is_wrong(image_path, monkeypatch, capsys, arguments, message):
    arguments = [str(image_path) if argument == "IMAGE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["ask", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_scene_is_made_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(scene, "DEFAULT_PATH", tmp_path / "scene.jpg")
    monkeypatch.setattr(scene, "write", lambda: scene.render((60, 48)).save(tmp_path / "scene.jpg"))
    asked = []
    monkeypatch.setattr(examples.ask, "ask", lambda image, question, *rest: asked.append((image, question)))
    monkeypatch.setattr(sys, "argv", ["ask"])
    main()
    assert asked == [(str(tmp_path / "scene.jpg"), "What colour are the ships at the pier?")]
    assert (tmp_path / "scene.jpg").exists()


def test_the_readme_says_which_weights_these_are():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("*", "").split())
    assert WEIGHTS_NOTE.removeprefix("These weights ") in readme
