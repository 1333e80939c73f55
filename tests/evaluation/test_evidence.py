"""Rows that are compared: what counts as kept, what each of them spends, and questions through all of it."""

import json

import pytest
import torch
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.evaluation import evidence, native, reports, rows
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
    return {"row": row, "x": x, "line": row, "tokens": 10, "right": right, "kept": kept, "seconds": {}, **about}


def test_differences_are_paired_and_losses_sorted_by_size():
    records = []
    for image, (full, proposed, other, pixels) in enumerate(
        [(True, True, False, 2.0), (True, False, True, 3.0), (True, False, True, 6.0), (False, True, True, 6.0)]
    ):
        records.append(record(rows.FULL, 100.0, full, image, pixels=pixels))
        records.append(record(rows.PAPER, 4.0, proposed, image, pixels=pixels))
        records.append(record("uniform", 4.0, other, image, kept=False, pixels=pixels))
    found = reports.summarise(records, evidence.BASELINES, evidence.SIZES)
    found = {row["name"]: row for row in found}
    lost = {name: (group["lost"], group["held"]) for name, group in found[rows.PAPER]["groups"].items()}
    assert lost == {"1-2 px": (0, 1), "3-4 px": (1, 1), "5-8 px": (1, 1)}
    assert found["uniform"]["differences"][rows.PAPER][0] == pytest.approx(0.25)
    assert found["uniform"]["kept"][0] == 0 and found[rows.PAPER]["kept"][0] == 1


def test_native_objects_are_told_by_their_size_in_the_image_and_in_the_fixed_view():
    records = []
    for image, (before, after, pixels) in enumerate([(False, True, 0.15), (False, True, 0.3), (True, True, None)]):
        records += [record(rows.FULL, 100.0, before, image, pixels=pixels)]
        records += [record(native.ZOOM, 4.0, after, image, pixels=pixels)]
    full, zoomed = reports.summarise(records, {rows.FULL: 100.0}, native.GROUPS)
    assert full["accuracy"][0] == pytest.approx(1 / 3) and zoomed["accuracy"][0] == 1
    object_asked = zoomed["groups"]["with an object"]
    assert object_asked["questions"] == 2 and object_asked["differences"][rows.FULL][0] == 1
    assert zoomed["groups"]["2-3 px"]["questions"] == zoomed["groups"]["0.25-0.5 px fixed"]["questions"] == 1


@pytest.mark.slow
@pytest.mark.weights
def test_a_question_through_all_rows(tmp_path, monkeypatch):
    """All rows but the smaller image spend as much, all tokens keep all."""
    for name in ("scenes", "scenes-specks"):
        monkeypatch.setattr(SUITES[name], "lay_out", lambda seed: make_scene(seed, 2.0))
        monkeypatch.setattr(SUITES[name], "max_new_tokens", 2)
    (samples,) = ([one] for one in evidence.samples_of("scenes", VALIDATION_SEEDS[:1]) if one.task == "colour")
    harder = {"scenes-specks": evidence.samples_of("scenes-specks", VALIDATION_SEEDS[:1])[:1]}
    result = evidence.measure(ROOT, samples, harder, fractions=(0.02,), control_scenes=20)
    found = {row["name"]: row for row in result["rows"]}
    assert set(found) == {rows.FULL, evidence.TEXT_ONLY, evidence.NO_IMAGE, *evidence.ROWS}
    assert {row["questions"] for row in found.values()} == {1} and not result["errors"]
    assert len({found[name]["tokens"] for name in (*rows.METHODS, rows.ZOOMED)}) == 1
    assert found[rows.FULL]["kept"][0] == 1 and found[rows.DOWNSAMPLING]["kept"][0] == 0
    assert found[rows.DOWNSAMPLING]["tokens"] <= found[rows.PAPER]["tokens"]
    assert {row["name"] for row in result["harder"]["scenes-specks"]} == {rows.FULL, *evidence.HARDER_ROWS}
    result["about"] = {"title": "this test", "says": "", "axis": "tokens", "groups": "pixels"}
    written = reports.report(result)
    specks = written.split("Made-up scenes with specks")[1]
    assert f"| 2 % | {rows.PAPER} |" in written and f"| {rows.REFINED} |" in specks
    figure = reports.plot(result, ("accuracy", "kept"), rows.BLIND, log=True)
    reports.finish(tmp_path / "out", "evidence", result, written, figure)
    assert json.loads((tmp_path / "out" / "evidence.json").read_text())["rows"][0]["questions"] == 1
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".md", ".png"]


@pytest.mark.slow
def test_native_objects_are_asked_about_in_every_row_from_as_many_tokens(monkeypatch):
    suite = SUITES[native.SUITE]
    monkeypatch.setattr(suite, "lay_out", lambda seed: make_scene(seed, 1.0, width=1600))
    monkeypatch.setattr(suite, "max_new_tokens", 2)
    focus = load_model(device_map=None, region_focus={"layers": [0, 2]})
    asked = native.rows_of((0.04,), 60, focus)
    samples = suite.samples_of_seed(11)[:1]
    records = rows.records_of(load_model(device_map=None), suite, "scenes/plain-1", asked, samples, focus=focus)
    assert {one["row"] for one in records} == {rows.FULL, rows.PAPER, rows.REFINED, native.ZOOM, native.FOCUS}
    assert {one["tokens"] for one in records if one["row"] in (rows.PAPER, rows.REFINED, native.ZOOM)} == {146}
    assert all(17 < one["tokens"] <= 146 for one in records if one["row"] == native.FOCUS)
    found = reports.summarise(records, {rows.FULL: 100.0}, native.GROUPS)
    result = {"rows": found, "errors": [], "about": {"title": "", "says": "", "groups": ""}}
    assert native.ZOOM in reports.report(result) and native.plot(found)


def test_the_report_about_native_objects_names_the_command_with_its_model(tmp_path, monkeypatch):
    records = [
        record(row, x, True, image, pixels=0.3) for row, x in ((rows.FULL, 100.0), (native.ZOOM, 4.0)) for image in "ab"
    ]
    monkeypatch.setattr(native, "ask_rows", lambda folder, jobs, *options: dict.fromkeys(jobs, (records, [])))
    assert native.main(["--scenes", "2", "--set", "selector=top_k", "--output", str(tmp_path)]) == 0
    written = (tmp_path / "native.md").read_text()
    assert "2 questions about 2 made-up scenes" in written
    assert "`uhr-bat evidence native --set selector=top_k --scenes 2 --tiles 128`" in written


def test_more_scenes_than_there_are_is_an_error_with_both_numbers(tmp_path, capsys):
    assert evidence.main(["--scenes", "1000", "--seeds", "2", "--output", str(tmp_path)]) == 2
    assert "There are 1000 test scenes, but 1000 x 2 are asked for." in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
