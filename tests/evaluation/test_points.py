"""Points, refusals and confidences: what is right where it is known by hand, and the command with a small model that points."""

import json

import numpy as np
import pytest
from uhr_bat import cli
from uhr_bat.common.loading import load_model, save_model
from uhr_bat.evaluation import points
from uhr_bat.evaluation.suites import SUITES
from uhr_bat.scenes.layout import TEST_SEEDS, make_scene
from uhr_bat.training.tiny.pointing import start_pointer


def test_a_point_is_right_up_to_one_token_beside_the_object():
    for middle, right, inside in (((5.5, 5.9), True, True), ((5.5, 7.0), True, False), ((5.5, 7.01), False, False)):
        found = points.match_points([(5.5, 5.5)], [1.0], [middle])
        assert [one.tolist() for one in found[:3]] == [[right], [inside], [right]] and found[3] == 0


def test_an_object_that_is_pointed_to_twice_is_one_right_and_one_wrong_point():
    right, _, found, twice = points.match_points([(5.5, 5.5), (5.5, 6.5)], [1.0, 1.0], [(5.6, 5.6), (20.0, 20.0)])
    assert (right.tolist(), found.tolist(), twice) == ([True, False], [True, False], 1)


def test_as_many_points_as_can_be_have_an_object_each():
    # The first point is nearest to the only object in reach of the second.
    right, _, found, twice = points.match_points([(5.5, 5.5), (5.5, 3.5)], [1.0, 1.0], [(5.5, 5.0), (5.5, 6.9)])
    assert right.all() and found.all() and twice == 0


def test_without_objects_every_point_is_wrong_and_without_points_every_object_is_missed():
    right, inside, found, twice = points.match_points([(5.5, 5.5)], [1.0], [])
    assert (right.tolist(), inside.tolist(), found.tolist(), twice) == ([False], [False], [], 0)
    right, _, found, twice = points.match_points([], [], [(5.5, 5.5)])
    assert (right.tolist(), found.tolist(), twice) == ([], [False], 0)


def test_tokens_lie_on_the_grid_of_their_own_level_over_the_letterboxed_square():
    boxes = [(14, 4, 16, 6)]  # of an image 80 px high: 10 px of the letterbox lie above it
    grids = [(10, 10), (100, 100)]
    for level, position, right in ((0, 11, True), (0, 13, False), (1, 15 * 100 + 15, True), (1, 15 * 100 + 17, False)):
        judged = points.judge_points([("", level, position, 0.9)], grids, boxes, (80, 100))
        assert judged["points"] == [right] and judged["twice"] == 0


def record(task, sure, right=True, refused=False, image="1", **more):
    about = {
        "task": task,
        "sure": [sure] * len(points.TEMPERATURES),
        "right": right,
        "refused": refused,
        "image": image,
    }
    return {**about, "points": [], "inside": [], "found": [], "twice": 0, "answer": "red", **more}


def test_calibration_and_risk_are_those_counted_by_hand():
    assert points.calibration_error([0.95, 0.95, 0.55, 0.55], [1, 1, 1, 0]) == pytest.approx(0.05)
    assert points.calibration_error([1.0], [1]) == 0
    np.testing.assert_allclose(points.risks([0.9, 0.2, 0.5], [1, 0, 1]), [0, 0, 1 / 3])


@pytest.mark.parametrize("said_none, threshold", [(0, 0.02), (1, 0.02), (2, 0.02), (3, 0.0)])
def test_a_threshold_refuses_at_most_two_in_a_hundred_with_those_that_a_word_refuses(said_none, threshold):
    records = [record("type", idx / 100, refused=idx < said_none) for idx in range(100)]
    records += [record("absent", 0.0)] * 50  # which have no part in it
    assert points.choose_threshold(records) == threshold
    refused = [one["refused"] or one["sure"][0] < threshold for one in records[:100]]
    assert sum(refused) == max(2, said_none)


def test_shares_are_of_all_points_and_all_objects_of_a_row():
    pointed = {"points": [True, False], "inside": [False, False], "found": [True], "twice": 1}
    records = [
        record("count", 0.9, **pointed, answer="2"),
        record("yes/no", 0.9, found=[False]),
        record("absent", 0.9, False),
    ]
    figures = points.figures_of([*records, record("count", 0.9, answer="1", image="2")], 0.0)
    assert figures["precision"][0] == figures["recall"][0] == figures["number_said"][0] == 0.5
    assert (figures["inside"][0], figures["twice"], figures["absent"]) == (0, 1, 1)
    assert figures["by_kind"]["count"] == [0.5, 1.0] and figures["by_kind"]["yes/no"] == [None, 0.0]


def test_the_questions_are_those_of_the_other_tables_and_two_about_what_is_not_there():
    samples = points.samples_with_absent("scenes", TEST_SEEDS[:2])
    absent = [one for one in samples if one.task == "absent"]
    own = [one for seed in TEST_SEEDS[:2] for one in SUITES["scenes"].samples_of_seed(seed)]
    assert [one for one in samples if one.task != "absent"] == own and len({one.id for one in samples}) == len(samples)
    assert len(absent) == 4 and {(one.answer, one.boxes) for one in absent} == {("none", ())}


def test_the_command_asks_a_model_that_points(tmp_path, monkeypatch, capsys):
    processor, model = load_model(device_map=None)
    start_pointer(model)
    model.config.pointer["threshold"] = 1e-4  # untrained, it is never sure
    save_model(model, processor, tmp_path / "model")
    suite = SUITES[points.NATIVE]
    monkeypatch.setattr(suite, "lay_out", lambda seed: make_scene(seed, 1.0, width=1200))
    monkeypatch.setattr(suite, "max_new_tokens", 2)
    monkeypatch.setattr(points, "FRACTIONS", (0.01,))
    monkeypatch.setattr(points, "TILES", 16)
    arguments = ["--scenes", "1", "--native", "--workers", "1", "--model", str(tmp_path / "model")]
    assert points.main([*arguments, "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "points.json").read_text())
    (row,) = result["rows"]
    assert not result["errors"] and row["name"] == "coarse to fine" and row["points"]["absent"] == 2
    assert row["questions"] == len(suite.samples_of_seed(TEST_SEEDS[0])) and row["points"]["precision"] is not None
    written = (tmp_path / "out" / "points.md").read_text()
    assert (
        "1 test scenes" in written and "--scenes 1 --native`" in written and (tmp_path / "out" / "points.png").exists()
    )
    assert points.main([*arguments, "--output", str(tmp_path / "model" / "config.json")]) == 2


def test_a_model_that_points_to_nothing_is_refused_by_name(tmp_path, capsys):
    assert cli.main(["evidence", "points", "--set", "pointer=none", "--output", str(tmp_path)]) == 2
    assert "has no pointer: its answers name no visual tokens" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
