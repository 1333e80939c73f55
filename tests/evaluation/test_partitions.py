"""Partitions compared: what is planted, what is kept of it, and the tables."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from uhr_bat.evaluation import partitions
from uhr_bat.scenes import layout

EVERY_MASK_ARGUMENTS = ["--points-per-side", "2", "--pred-iou-thresh", "-100", "--stability-score-thresh", "0"]


def test_planted_ships_are_where_they_are_said_to_be():
    image, colours = Image.new("RGB", (500, 400)), list(layout.PAINTS.values())
    places = partitions.plant_ships(image, 12, seed=3)
    pixels = np.asarray(image)
    assert len(places) == 12
    for ship, (row, column) in enumerate(places):
        assert tuple(pixels[int(row), int(column)]) == colours[ship % len(colours)]
    # And nothing else is painted: a ship is at most 96 of 10,000 units long.
    rows, columns = np.nonzero(pixels.any(-1))
    distance = np.hypot(rows[:, None] - places[:, 0], columns[:, None] - places[:, 1]).min(1)
    assert distance.max() <= 48 * 500 / 10000 + 1.5


def test_too_many_ships_are_refused():
    with pytest.raises(ValueError, match="of 60 ships find a place"):
        partitions.plant_ships(Image.new("RGB", (500, 25)), 60)


def test_ships_are_counted_as_kept_averaged_or_dropped():
    slots = torch.tensor([0, 1, 1, -1, 2, -1])
    assert partitions.fractions_of_ships(slots, torch.tensor([0, 4, 1, 3])) == (0.5, 0.25)
    assert partitions.fractions_of_ships(slots, torch.tensor([3, 5])) == (0.0, 0.0)


@pytest.mark.slow
def test_the_comparison_of_partitions_writes_tables_and_a_plot(tmp_path, sam_folder, capsys):
    arguments = [
        "--output", str(tmp_path), "--size", "900", "150", "--ships", "10", "--questions", "1", "--factors", "1", "2",
        "--methods", "kmeans", "none", "--clusters", "10", "50", "--checkpoint", str(sam_folder), "--view", "64",
    ]  # fmt: skip
    assert partitions.main([*arguments, *EVERY_MASK_ARGUMENTS]) == 0
    result = json.loads((tmp_path / "partitions.json").read_text(encoding="utf-8"))
    assert [(row["method"], row["factor"]) for row in result["methods"]] == [
        (name, factor) for name in ("kmeans", "none", "sam") for factor in (1, 2)
    ]
    assert [row["k"] for row in result["clusters"]] == [10, 50]
    assert [max(row["regions"]) for row in result["clusters"]] == [10, 50]
    for row in result["methods"]:
        spent = [min(row["factor"] * budget, seen) for budget, seen in zip((4, 8, 40, 94), result["tokens_seen"])]
        assert row["budgets"] == spent and row["tokens"] == sum(spent)
        if row["method"] == "none":
            assert row["regions"] == result["tokens_seen"] and row["merged"] == [0, 0]
    text = (tmp_path / "partitions.md").read_text(encoding="utf-8")
    assert "| sam |" in text and text in capsys.readouterr().out
    with Image.open(tmp_path / "partitions.png") as picture:
        assert picture.width == 1400
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.size == (900, 150)


def test_the_comparison_of_partitions_refuses_two_sources_of_masks(tmp_path, capsys):
    assert partitions.main(["--output", str(tmp_path / "out"), "--masks", "a.pt", "--checkpoint", "b"]) == 2
    assert "--masks and --checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
