"""Pictures with boxes of trees become questions: one picture is asked about, nothing of it is learnt from."""

import json
import sys

import numpy as np
from PIL import Image
from uhr_bat.common.loading import load_model
from uhr_bat.examples import trees
from uhr_bat.training.data import load_samples


def write_picture(folder, name, size, boxes):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(
        folder / f"{name}.png"
    )
    things = "".join(
        f"<object><name>Tree</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 8}</xmax><ymax>{y + 8}</ymax></bndbox></object>"
        for x, y in boxes
    )
    (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{things}</annotation>")


def test_the_quarter_with_most_trees_is_asked_about_each_as_often_and_learnt_from_other_pictures(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    write_picture(tmp_path, trees.ASKED, (1000, 700), [(x, 50 + x // 4) for x in range(0, 900, 15)])
    write_picture(tmp_path, "other", (500, 400), rng.integers(0, (160, 400), (60, 2)).tolist())
    monkeypatch.setattr(sys, "argv", ["trees", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--parts", "12"])
    trees.main()
    learnt, asked = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("train", "test"))
    assert len({row["image"] for row in learnt}) == 12 and all(row["image"].startswith("other_") for row in learnt)
    assert asked and all(row["image"].startswith(trees.ASKED) for row in asked)
    said = [row["answer"] for row in asked]
    assert max(map(said.count, trees.QUADRANTS)) - min(map(said.count, trees.QUADRANTS)) <= 1
    assert len(load_samples(tmp_path / "out" / "train.json", load_model(device_map=None)[0])) == len(learnt)
