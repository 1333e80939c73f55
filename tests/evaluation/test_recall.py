"""Which objects a choice of tokens keeps."""

import json

import numpy as np
import pytest
from benchmark_files import picture
from uhr_bat.evaluation import recall
from uhr_bat.evaluation.suites import SUITES
from uhr_bat.geometry_uhr_bat import token_box

VOC = """<annotation><filename>a.png</filename>
<object><name>Tree</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>14</ymax></bndbox></object>
<object><name>Tree</name><bndbox><xmin>20</xmin><ymin>20</ymin><xmax>22</xmax><ymax>23</ymax></bndbox></object>
<object><name>House</name><bndbox><xmin>0</xmin><ymin>0</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>
</annotation>"""


@pytest.mark.parametrize("image_size", [(30, 40), (40, 30), (41, 41), (7, 60)])
def test_the_tokens_of_a_box_are_those_whose_centres_lie_in_it(image_size):
    """Against a plain loop over all tokens; a box between the centres has the token that shows its middle."""
    (h, w), grid, rng = image_size, (6, 6), np.random.default_rng(0)
    side = max(image_size)
    for _ in range(200):
        x0, x1 = np.sort(rng.uniform(0, w, 2))
        y0, y1 = np.sort(rng.uniform(0, h, 2))
        inside = []
        for position in range(36):
            row = (position // 6 + 0.5) * side / 6 - (side - h) // 2
            column = (position % 6 + 0.5) * side / 6 - (side - w) // 2
            if y0 <= row < y1 and x0 <= column < x1:
                inside.append(position)
        found = recall.tokens_in_box((x0, y0, x1, y1), image_size, grid).tolist()
        if inside:
            assert found == inside
        else:
            (only,) = found
            top, left, bottom, right = token_box(only, image_size, grid)
            assert top <= (y0 + y1) / 2 <= bottom and left <= (x0 + x1) / 2 <= right


def test_a_box_outside_the_image_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"\(50, 0, 60, 5\) does not lie in the image of 40 x 30 px"):
        recall.tokens_in_box((50, 0, 60, 5), (30, 40), (6, 6))


def test_recall_is_summarised_by_size():
    records = [
        {
            "image": str(n),
            "method": "m",
            "fraction": 0.1,
            "kept": n < 3,
            "share": n / 4,
            "pixels": 1.0 if n < 2 else 30.0,
        }
        for n in range(4)
    ]
    (row,) = recall.summarise(records)
    assert row["kept"][0] == 0.75 and row["share"][0] == 0.375 and row["objects"] == 4
    assert {name: (one["objects"], one["kept"][0]) for name, one in row["by_size"].items()} == {
        "to 2 px": (2, 1.0),
        "17-64 px": (2, 0.5),
    }


def test_boxes_of_pascal_voc_are_questions_by_kind(tmp_path):
    picture(tmp_path, "a.png")
    (tmp_path / "a.xml").write_text(VOC)
    trees, house = SUITES["pascal-voc"].load(str(tmp_path))
    assert (trees.answer, house.answer) == ("2", "1") and trees.boxes[1] == (20, 20, 22, 23)
    assert trees.question == "How many objects of the kind Tree are there?"


@pytest.mark.slow
def test_recall_of_a_picture_with_boxes_is_written_as_table_and_plot(tmp_path, capsys):
    picture(tmp_path, "a.png")
    (tmp_path / "a.xml").write_text(VOC)
    (tmp_path / "b.xml").write_text(VOC.replace("a.png", "nowhere.png"))
    methods = ["preserve-and-merge", "distinct", "uniform"]
    arguments = ["pascal-voc", "--data", str(tmp_path), "--fractions", "0.05", "1", "--output", str(tmp_path / "out")]
    assert recall.main([*arguments, "--methods", *methods]) == 0
    result = json.loads((tmp_path / "out" / "recall.json").read_text())
    rows = {(row["method"], row["fraction"]): row for row in result["rows"]}
    assert set(rows) == {(method, fraction) for method in methods for fraction in (0.05, 1)}
    assert all(row["objects"] == 3 for row in rows.values())
    assert rows["distinct", 1]["share"][0] == 1 and rows["uniform", 1]["kept"][0] == 1
    assert rows["uniform", 0.05]["share"][0] < 0.2
    assert "nowhere.png" in result["errors"][0]["error"] and "1 images failed." in capsys.readouterr().out
    assert (tmp_path / "out" / "recall.png").stat().st_size > 1000


def test_a_suite_without_boxes_is_refused(tmp_path, capsys):
    from benchmark_files import vrsbench

    assert recall.main(["vrsbench-vqa", "--data", str(vrsbench(tmp_path)), "--output", str(tmp_path / "out")]) == 2
    assert "No sample of vrsbench-vqa has a box" in capsys.readouterr().err


@pytest.mark.slow
def test_a_box_that_lies_nowhere_is_named_and_the_others_count(tmp_path, capsys):
    picture(tmp_path, "a.png")
    (tmp_path / "a.xml").write_text(VOC)
    turned = "<bndbox><xmin>9</xmin><ymin>3</ymin><xmax>2</xmax><ymax>14</ymax></bndbox>"
    outside = "<bndbox><xmin>90</xmin><ymin>3</ymin><xmax>99</xmax><ymax>14</ymax></bndbox>"
    things = "".join(f"<object><name>Car</name>{box}</object>" for box in (turned, outside, ""))
    (tmp_path / "b.xml").write_text(f"<annotation><filename>a.png</filename>{things}</annotation>")
    arguments = ["pascal-voc", "--data", str(tmp_path), "--fractions", "0.05", "--methods", "uniform"]
    assert recall.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert result["rows"][0]["objects"] == 3 and result["errors"] == []
    assert [one["error"][:21] for one in result["boxes"]] == [
        "b/Car: The box (9.0, ",
        "b/Car: The box (90.0,",
        "b/Car: The box (nan, ",
    ]
    assert "3 boxes are left out." in capsys.readouterr().out


@pytest.mark.parametrize("fraction", ["0", "-1", "nan", "1.5"])
def test_fractions_that_cannot_be_are_refused_at_the_door(fraction, tmp_path, capsys):
    assert recall.main(["scenes", "--fractions", fraction, "--output", str(tmp_path / "out")]) == 2
    assert (
        "--fractions must be over 0 and at most 1. Got" in capsys.readouterr().err and not (tmp_path / "out").exists()
    )
