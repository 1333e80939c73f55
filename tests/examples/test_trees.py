"""Pictures with boxes of trees become questions: parts of one half are learnt from, nothing of them is asked about."""

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


def test_parts_become_questions_that_can_be_trained_on(tmp_path, monkeypatch):
    forest = [(x, y) for x in range(0, 250, 50) for y in range(0, 250, 50)]
    write_picture(tmp_path, trees.LEARNT, (1100, 300), [*forest, (900, 100)])
    write_picture(tmp_path, "other", (300, 300), [(20, 20)])
    monkeypatch.setattr(sys, "argv", ["trees", "--data", str(tmp_path), "--output", str(tmp_path / "out")])
    trees.main()
    learnt, asked = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("train", "test"))
    assert [(row["image"], row["answer"]) for row in learnt][0] == (f"{trees.LEARNT}_0_0.png", "many")
    assert {row["answer"] for row in asked} == {"few"} and "other_0_0.png" in {row["image"] for row in asked}
    lefts = [int(row["image"].rsplit("_", 1)[1][:-4]) for row in asked if row["image"].startswith(trees.LEARNT)]
    assert lefts and min(lefts) >= 1100 // 2
    assert not {row["image"] for row in learnt} & {row["image"] for row in asked}
    assert len(load_samples(tmp_path / "out" / "train.json", load_model(device_map=None)[0])) == len(learnt)
