"""The evidence test: what counts as kept, what each choice spends, and one scene through all of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from uhr_bat.common.loading import ROOT
from uhr_bat.evaluation import choices, evidence
from uhr_bat.scenes import layout, questions


def slots(*values):
    return [torch.tensor(value) for value in values]


PLACES = [torch.tensor([0, 1, 2]), torch.tensor([0, 2, 5])]


@pytest.mark.parametrize(
    "evidence_tokens, kept",
    [
        ([[(0, 0)]], True),  # a slot of its own
        ([[(0, 1)]], False),  # merged with another
        ([[(1, 5)]], False),  # dropped
        ([[(1, 2), (0, 1)]], True),  # at one scale of two
        ([[(0, 0)], [(0, 1)]], False),  # one object of two
        ([], True),
    ],
)
def test_evidence_is_kept_where_every_object_has_a_token_of_its_own(evidence_tokens, kept):
    assert choices.keeps(slots([0, 1, 1], [1, 0, -1]), PLACES, evidence_tokens) is kept


@pytest.mark.parametrize("method", choices.CHOICES)
def test_choices_spend_the_budget(method):
    generator = torch.Generator().manual_seed(0)
    features = SimpleNamespace(
        tokens=[torch.randn(number, 4, generator=generator) for number in (6, 20)],
        positions=[torch.arange(6), torch.arange(20)],
    )
    model = SimpleNamespace(config=SimpleNamespace(coord_weight=0.05, grids=[(2, 3), (4, 5)]))
    chosen = choices.choose(method, model, features, [3, 5])
    assert [int(slot.max()) + 1 for slot in chosen] == [3, 5]
    assert len(choices.gather(features, chosen)) == 8


def record(method, fraction, right, scene=0, kept=True, pixels=3.0):
    return {
        "scene": scene, "kind": "colour", "method": method, "fraction": fraction, "tokens": 10, "right": right, "kept": kept,
        "pixels": pixels,
    }  # fmt: skip


def test_differences_are_paired_and_losses_sorted_by_size():
    records = []
    for scene, (full, proposed, other, pixels) in enumerate(
        [(True, True, False, 2.0), (True, False, True, 3.0), (True, False, True, 6.0), (False, True, True, 6.0)]
    ):
        records.append(record(evidence.FULL, 1.0, full, scene, pixels=pixels))
        records.append(record(choices.PAPER, 0.04, proposed, scene, pixels=pixels))
        records.append(record("uniform", 0.04, other, scene, kept=False, pixels=pixels))
    rows = {row["method"]: row for row in evidence.summarise(records)["rows"]}
    assert rows[choices.PAPER]["lost_by_size"] == {
        "1-2": {"right_in_full": 1, "lost": 0},
        "3-4": {"right_in_full": 1, "lost": 1},
        "5-8": {"right_in_full": 1, "lost": 1},
    }
    assert rows["uniform"]["differences"]["paper"][0] == pytest.approx(0.25)
    assert rows["uniform"]["kept"][0] == 0 and rows[choices.PAPER]["kept"][0] == 1


@pytest.mark.slow
@pytest.mark.weights
def test_one_scene_through_all_of_it(tmp_path):
    sets = evidence.evaluate(
        ROOT,
        layout.VALIDATION_SEEDS[:1],
        fractions=(0.02,),
        control_scenes=50,
        stress_seeds=layout.VALIDATION_SEEDS[:1],
    )
    records = sets.pop(evidence.PLAIN)
    methods = {evidence.FULL, evidence.TEXT_ONLY, evidence.NO_IMAGE, *choices.ROWS}
    assert {one["method"] for one in records} == methods
    asked = sum(one["method"] == evidence.FULL for one in records)
    assert 4 <= asked <= len(questions.KINDS) and len(records) == asked * len(methods)
    assert all(one["kept"] for one in records if one["method"] == evidence.FULL and one["kept"] is not None)
    spent = {one["tokens"] for one in records if one["method"] in (*choices.RULES, *choices.CHOICES)}
    assert len(spent) == 1
    assert sets.keys() == evidence.STRESS.keys()
    result = evidence.summarise(records) | {
        "stress": {name: evidence.summarise(hard) for name, hard in sets.items()},
        "about": {"command": "this test", "questions": asked, "scenes": 1, "seeds": 1, "fractions": [0.02]},
    }
    evidence.write_results(result, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evidence.json", "evidence.md", "evidence.png"]
    assert json.loads((tmp_path / "evidence.json").read_text())["about"]["questions"] == asked
    written = (tmp_path / "evidence.md").read_text()
    assert f"| 2 % | {choices.PAPER} |" in written and f"| specks | 1 % | {choices.REFINED} |" in written


def test_more_scenes_than_there_are_is_an_error_with_both_numbers(tmp_path, capsys):
    assert evidence.main(["--scenes", "1000", "--seeds", "2", "--output", str(tmp_path)]) == 2
    assert "There are 1000 test scenes, but 1000 x 2 are asked for." in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
