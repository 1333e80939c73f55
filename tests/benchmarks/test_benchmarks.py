"""The benchmark runs, both of its sides agree, and it fails where they do not. No time is asserted."""

import json
import os
from pathlib import Path

import pytest
import torch
from copies import Inline, forked
from PIL import Image
from uhr_bat.benchmarks import compare, gpu, images, run, sides
from uhr_bat.benchmarks.measures import MEASURES, compression, end_to_end, flops, quantized
from uhr_bat.benchmarks.meters import FlopMeter, SyncMeter
from uhr_bat.benchmarks.sides import SIDES, STAGES, Meter, ask, prompt_ids, side_of
from uhr_bat.benchmarks.straightforward import Straightforward, cluster, select
from uhr_bat.token_clustering_uhr_bat import cluster_regions
from uhr_bat.token_compression_uhr_bat import merge_tokens, select_tokens
from uhr_bat.training import sft

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")


@pytest.fixture
def in_one_process(monkeypatch):
    monkeypatch.setattr(sides, "one_process", Inline)


def run_quick(*arguments):
    return run.main(["--quick", "--repetitions", "1", *arguments])


def ask_both(path):
    ours, straightforward = (
        ask(side_of(name, "quick"), path, prompt_ids(side_of(name, "quick").model.config), lambda stage: None)
        for name in SIDES
    )
    return ours, straightforward


# The command


def first_time(train):
    """Train by the options of the first call; those of others are read all the same."""
    trained = []

    def train_once(*options):
        if not trained:
            trained.append(train(*options))
        return trained[0]

    return train_once


@pytest.mark.slow
def test_all_measures_run_and_the_last_line_is_json(in_one_process, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(end_to_end, "LIBRARIES", "import json")
    monkeypatch.setattr(end_to_end, "MAX_TILES", 16)
    monkeypatch.setattr(quantized, "QUESTIONS", 1)
    monkeypatch.setattr(sft, "train", first_time(sft.train))
    assert run_quick("--output", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert list(result["measures"]) == list(MEASURES) and result["disagreements"] == []
    assert json.loads((tmp_path / "results.json").read_text())["measures"] == result["measures"]
    written = (tmp_path / "results.md").read_text()
    rows = [row for rows in result["measures"].values() for row in rows]
    assert all(row["measure"] in written and row["result"] in written for row in rows)
    question, memory = (row["numbers"] for row in result["measures"]["end_to_end"])
    assert list(question["stages"]) == list(STAGES) and set(memory["peak_bytes"]) == set(SIDES)
    assert question["agreement"] == {"same_region": 1.0, "visual_tokens": 152, "answer": 64}


def test_each_side_runs_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(sides, "get_context", forked)
    with sides.process_pair() as pair:
        found = {pair[name].submit(os.getpid).result() for name in SIDES for _ in range(2)}
    assert len(found | {os.getpid()}) == 3


def test_a_measure_that_runs_alone_leaves_the_others_as_they_were(in_one_process, tmp_path):
    run_quick("--only", "padding", "--output", str(tmp_path))
    first = json.loads((tmp_path / "results.json").read_text())["measures"]
    run_quick("--only", "synchronisations", "--output", str(tmp_path))
    both = json.loads((tmp_path / "results.json").read_text())["measures"]
    assert list(both) == ["padding", "synchronisations"] and both["padding"] == first["padding"]


@pytest.mark.parametrize("arguments", [["--only", "speed"], ["--repetitions", "0"]])
def test_arguments_that_make_no_sense_are_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)


# What is planted is found


def swap_two_tokens(visual_tokens):
    first, *others = visual_tokens
    return [first[[1, 0, *range(2, len(first))]], *others]


def change_one_pixel(inputs):
    inputs[0][2][5, 1, 3, 3] += 1e-6
    return inputs


def change_last_token(ids):
    return [*ids[:-1], ids[-1] + 1]


def shuffle_regions(regions):
    return [*regions[:-1], regions[-1].flip(0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "method", "change", "message"),
    [
        ("end_to_end", "select", swap_two_tokens, "end_to_end: Scale 0: 2 of 8 visual tokens are not the same."),
        ("end_to_end", "answer", change_last_token, "end_to_end: The answers are not the same"),
        ("end_to_end", "regions", shuffle_regions, "% of the tokens are in the same region."),
        ("preprocessing", "preprocess", change_one_pixel, "preprocessing: The tiles of 600x600.jpg"),
    ],
)
def test_a_difference_makes_it_fail(in_one_process, monkeypatch, capsys, measure, method, change, message):
    honest = getattr(Straightforward, method)
    monkeypatch.setattr(Straightforward, method, lambda *arguments: change(honest(*arguments)))
    assert run_quick("--only", measure) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert message in json.loads(printed.out.splitlines()[-1])["disagreements"][0]


@pytest.mark.slow
def test_a_formula_that_is_not_what_the_counter_says_makes_it_fail(monkeypatch, capsys):
    monkeypatch.setattr(flops.costs, "head_flops", lambda config, M: 0)
    assert run_quick("--only", "flop_counts") == 1
    assert "the counter says" in capsys.readouterr().err


# The two sides


@pytest.mark.slow
@pytest.mark.parametrize("size", [(480, 480), (480, 360), (240, 720), (900, 30)])
def test_both_sides_give_the_same(tmp_path, size):
    ours, straightforward = ask_both(images.photograph(tmp_path, size))
    compare.check_question(ours, straightforward)


@pytest.mark.slow
def test_the_stages_together_are_what_generate_does(tmp_path):
    side = side_of("ours", "quick")
    path, ids = images.photograph(tmp_path, (400, 400)), prompt_ids(side.model.config)
    staged = ask(side, path, ids, lambda stage: None)
    inputs = side.processor(path, return_tensors="pt")
    whole = side.model.generate(ids, **inputs, do_sample=False, max_new_tokens=sides.ANSWER_TOKENS)
    assert whole[0, -sides.ANSWER_TOKENS :].tolist() == staged["answer"]


@pytest.mark.parametrize("threshold", ["ge", "gt"])
@pytest.mark.parametrize("budget", [1, 7, 60, 85, 100])
def test_the_loop_over_regions_selects_what_ours_does(threshold, budget):
    generator = torch.Generator().manual_seed(budget)
    tokens, importance = torch.randn(100, 4, generator=generator), torch.rand(100, generator=generator)
    regions = torch.randint(12, (100,), generator=generator)
    ours = merge_tokens(tokens, select_tokens(importance, regions, budget, threshold=threshold), budget)
    assert torch.allclose(ours, select(tokens, importance, regions, budget, threshold), atol=1e-6)


@pytest.mark.parametrize("num_regions", [1, 9, 300])
def test_the_loop_over_clusters_clusters_as_ours_does(num_regions):
    features, coords = compression.random_features(256, 8, 20), compression.grid_coords(256)
    ours = cluster_regions(features, coords, num_regions)
    labels = cluster(features, coords, num_regions, num_iterations=10, coord_weight=0.05)
    assert compare.same_region(ours, labels) == compare.same_region(labels, ours) == 1


# Meters


@pytest.mark.parametrize(
    ("wait", "count"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.unique(return_inverse=True), 1),
        (lambda x: x[x.argsort()] + torch.where(x > 1, x, 0), 0),
    ],
)
def test_waits_for_a_device_are_counted(wait, count):
    with SyncMeter() as meter:
        wait(torch.arange(4))
    assert meter.count == count


def test_what_torchs_counter_passes_over_is_counted():
    points, centres = torch.randn(100, 16), torch.randn(30, 16)
    query = torch.randn(1, 2, 40, 8)
    with FlopMeter() as meter, torch.no_grad():
        torch.cdist(points, centres)
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert meter.get_total_flops() == 2 * 100 * 16 * 30 + 4 * 2 * 40 * 40 * 8


def test_a_meter_adds_up_by_stage():
    readings = iter([0, 3, 4, 10])
    mark = Meter(lambda: next(readings))
    for stage in ("read", "encode", "read"):
        mark(stage)
    assert mark.stages == dict.fromkeys(STAGES, 0) | {"read": 9, "encode": 1}


# The script for a GPU


@pytest.mark.slow
def test_the_table_for_a_gpu_runs_on_a_cpu(capsys, tmp_path):
    assert gpu.main(["--quick", "--device", "cpu", "--repetitions", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result == json.loads((tmp_path / "gpu.json").read_text()) and result["device"] == "CPU"
    assert (tmp_path / "gpu.md").read_text() in printed
    assert all(entry["same_visual_tokens"] == 1 and entry["same_answer"] for entry in result["budgets"].values())
    assert "the paper's Table 4" in printed


# Images


def test_a_tiled_tiff_shows_its_tiles_again_and_again(tmp_path):
    path = images.tiled_tiff(tmp_path, (2500, 1300), num_drawn=2)
    with Image.open(path) as image:
        assert image.size == (2500, 1300)
        corner, beside, below = (image.crop((x, y, x + 200, y + 200)) for x, y in ((0, 0), (1024, 0), (0, 1024)))
    assert corner.tobytes() == beside.tobytes() == below.tobytes() and len(set(corner.tobytes())) > 20
