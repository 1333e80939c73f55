"""Rows that are compared: what counts as kept, what each of them spends, and questions through all of it."""

import json

import pytest
import torch
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.evaluation import evidence, native, rows
from uhr_bat.evaluation.suites import SUITES
from uhr_bat.scenes.layout import VALIDATION_SEEDS, make_scene

SLOTS = [torch.tensor([0, 1, 1, -1]), torch.tensor([1, -1, 0, -1, -1, -1])]


@pytest.mark.parametrize(
    "tokens, kept",
    [
        ([[(0, 0)]], True),  # a slot of its own
        ([[(0, 1)]], False),  # merged with another
        ([[(1, 5)]], False),  # dropped
        ([[(1, 2), (0, 1)]], True),  # at one scale of two
        ([[(0, 0)], [(0, 1)]], False),  # one object of two
        ([], None),
    ],
)
def test_evidence_is_kept_where_every_object_has_a_token_of_its_own(tokens, kept):
    assert rows.keeps(SLOTS, tokens) is kept


def record(row, x, right, image=0, kept=True, pixels=3.0):
    about = {"image": image, "task": "colour", "section": "", "pixels": pixels, "native": pixels and 16 * pixels}
    return {"row": row, "x": x, "tokens": 10, "right": right, "kept": kept, **about}


def test_differences_are_paired_and_losses_sorted_by_size():
    records = []
    for image, (full, proposed, other, pixels) in enumerate(
        [(True, True, False, 2.0), (True, False, True, 3.0), (True, False, True, 6.0), (False, True, True, 6.0)]
    ):
        records.append(record(rows.FULL, 1.0, full, image, pixels=pixels))
        records.append(record(rows.PAPER, 0.04, proposed, image, pixels=pixels))
        records.append(record("uniform", 0.04, other, image, kept=False, pixels=pixels))
    found = rows.summarise(records, evidence.BASELINES, evidence.in_bins("pixels", evidence.SIZES))
    found = {row["name"]: row for row in found}
    lost = {name: (group["lost"], group["held"]) for name, group in found[rows.PAPER]["groups"].items()}
    assert lost == {"1-2": (0, 1), "3-4": (1, 1), "5-8": (1, 1)}
    assert found["uniform"]["differences"][rows.PAPER][0] == pytest.approx(0.25)
    assert found["uniform"]["kept"][0] == 0 and found[rows.PAPER]["kept"][0] == 1


def test_native_objects_are_told_by_their_size_in_the_image_and_in_the_fixed_view():
    records = []
    for image, (before, after, pixels) in enumerate([(False, True, 0.15), (False, True, 0.3), (True, True, None)]):
        records += [record(rows.FULL, 1.0, before, image, pixels=pixels)]
        records += [record(native.ZOOM, 0.04, after, image, pixels=pixels)]
    full, zoomed = rows.summarise(records, {rows.FULL: (rows.FULL, 1.0)}, native.GROUPS)
    assert full["accuracy"][0] == pytest.approx(1 / 3) and zoomed["accuracy"][0] == 1
    object_asked = zoomed["groups"]["with an object"]
    assert object_asked["questions"] == 2 and object_asked["differences"][rows.FULL][0] == 1
    assert zoomed["groups"]["native 2-3"]["questions"] == zoomed["groups"]["fixed 0.25-0.5"]["questions"] == 1


@pytest.mark.slow
@pytest.mark.weights
def test_questions_through_all_rows(tmp_path):
    """One about an object and one about a place: all rows but the smaller image spend as much, all tokens keep all."""
    samples = [one for one in evidence.samples_of("scenes", VALIDATION_SEEDS[:1]) if one.task in ("colour", "quadrant")]
    harder = {name: evidence.samples_of(name, VALIDATION_SEEDS[:1])[:1] for name in evidence.STRESS}
    result = evidence.measure(ROOT, samples, harder, fractions=(0.02,), control_scenes=20)
    found = {row["name"]: row for row in result["rows"]}
    assert set(found) == {rows.FULL, evidence.TEXT_ONLY, evidence.NO_IMAGE, *evidence.ROWS}
    assert {row["questions"] for row in found.values()} == {2} and not result["errors"]
    assert len({found[name]["tokens"] for name in (*rows.METHODS, rows.ZOOMED)}) == 1
    assert found[rows.FULL]["kept"][0] == 1 and found[rows.DOWNSAMPLING]["kept"][0] == 0
    assert found[rows.DOWNSAMPLING]["tokens"] <= found[rows.PAPER]["tokens"]
    assert {row["name"] for row in result["stress"]["scenes-specks"]} == {rows.FULL, *evidence.STRESS_ROWS}
    result["about"] = {"command": "this test", "questions": 2, "scenes": 1, "seeds": 1, "fractions": [0.02]}
    written = evidence.report(result)
    assert f"| 2 % | {rows.PAPER} |" in written and f"| specks | 1 % | {rows.REFINED} |" in written
    evidence.plot(result, tmp_path / "evidence.png")
    json.dumps(result)


@pytest.mark.slow
def test_native_objects_are_asked_about_in_every_row_from_as_many_tokens(monkeypatch):
    suite = SUITES[native.SUITE]
    monkeypatch.setattr(suite, "lay_out", lambda seed: make_scene(seed, 1.0, width=1600))
    focus = load_model(device_map=None, region_focus={"layers": [0, 2]})
    asked = native.rows_of((0.04,), 60, focus)
    samples = suite.samples_of_seed(11)[:2]
    records = rows.records_of(load_model(device_map=None), suite, "scenes/plain-1", asked, samples, focus=focus)
    assert {one["row"] for one in records} == {rows.FULL, rows.PAPER, rows.REFINED, native.ZOOM, native.FOCUS}
    assert {one["tokens"] for one in records if one["row"] in (rows.PAPER, rows.REFINED, native.ZOOM)} == {146}
    assert all(17 < one["tokens"] <= 146 for one in records if one["row"] == native.FOCUS)
    about = {"questions": 2, "scenes": 1, "command": "", "tiles": 60, "fractions": (0.04,)}
    result = {
        "rows": rows.summarise(records, {rows.FULL: (rows.FULL, 1.0)}, native.GROUPS),
        "errors": [],
        "about": about,
    }
    assert native.ZOOM in native.report(result)


def test_more_scenes_than_there_are_is_an_error_with_both_numbers(tmp_path, capsys):
    assert evidence.main(["--scenes", "1000", "--seeds", "2", "--output", str(tmp_path)]) == 2
    assert "There are 1000 test scenes, but 1000 x 2 are asked for." in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
