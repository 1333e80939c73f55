"""Pictures with boxes of trees become questions: one picture is asked about, nothing of it is learnt from."""

import json
import sys

import numpy as np
import pytest
import torch
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


@pytest.mark.slow
def test_the_fuller_half_is_asked_about_either_as_often_and_learnt_from_other_pictures(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    write_picture(tmp_path, trees.ASKED, (700, 500), [(x, 50 + x // 4) for x in range(0, 600, 15)])
    write_picture(tmp_path, "other", (500, 400), rng.integers(0, (160, 400), (60, 2)).tolist())
    monkeypatch.setattr(sys, "argv", ["trees", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--parts", "12"])
    trees.main()
    learnt, asked = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("train", "test"))
    assert len({row["image"] for row in learnt}) == 12 and all(row["image"].startswith("other_") for row in learnt)
    assert asked and all(row["image"].startswith(trees.ASKED) for row in asked)
    for question, answers in trees.QUESTIONS.items():
        said = [row["answer"] for row in asked if row["question"] == question]
        assert set(said) <= set(answers) and abs(said.count(answers[0]) - said.count(answers[1])) <= 1
    assert len(load_samples(tmp_path / "out" / "train.json", load_model(device_map=None)[0])) == len(learnt)
    assert "one answer every time: " in capsys.readouterr().out


def test_a_mirrored_part_has_its_trees_in_the_other_half():
    part, centres = Image.new("RGB", (100, 100)), np.array([[10.0, 20], [20, 10], [30, 40]])
    assert trees.fuller_halves(centres, 100) == [0, 0]
    assert trees.fuller_halves(trees.mirror(part, centres, 0)[1], 100) == [1, 0]
    assert trees.fuller_halves(np.concatenate((centres, [[90.0, 10], [80, 10]])), 100) == [None, 0]


def test_what_the_tokens_hold_is_read_on_parts_that_were_not_learnt_from():
    rng, direction = torch.Generator().manual_seed(0), torch.eye(8)[3]
    signs = torch.tensor([1.0, -1]).repeat(100)
    values = torch.randn(200, 8, generator=rng) + 3 * signs[:, None] * direction
    learnt, asked = (values[:100], signs[:100]), (values[100:], signs[100:])
    assert trees.right_of_linear(learnt, asked).float().mean() > 0.9
    assert trees.right_of_linear(learnt, (asked[0], -asked[1])).float().mean() < 0.1
