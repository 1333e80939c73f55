"""The paper's tables as commands."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from images import random_image
from small import IMAGE, small_config, small_model
from uhr_bat.common.loading import ROOT, load_model, load_processor
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.evaluation import ablations, rows
from uhr_bat.evaluation.suites import SUITES
from uhr_bat.image_pyramids_uhr_bat import DynamicPyramid

AVAILABLE = [64, 256, 1024, 2304]


@pytest.fixture(scope="module")
def config():
    return UHRBatConfig.from_pretrained(ROOT, budgets=[16, 24, 40, 66])


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_row_spends_what_the_image_has(name, config):
    rows = ablations.ABLATIONS[name][0](config)
    assert len({row.name for row in rows}) == len(rows) > 2
    for row in rows:
        counts = row.counts(AVAILABLE)
        if counts is None:  # LRS-VQA's mode takes a share of its own last level
            assert row.view[0] == "descended"
            continue
        limits = AVAILABLE if len(counts) == 4 else [sum(AVAILABLE)]
        assert all(0 <= count <= limit for count, limit in zip(counts, limits)) and sum(counts)


def test_table_4_compresses_as_much_as_the_paper(config):
    rows = ablations.ABLATIONS["table-4"][0](config)
    of_all = [sum(AVAILABLE) / sum(row.counts(AVAILABLE)) for row in rows]
    assert of_all == pytest.approx([32.83, 26.27, 21.89, 16.42, 13.13, 11.94, 10.94], rel=0.01)


def test_table_6_has_budgets_of_zero_and_decreasing_ones(config):
    counts = [row.counts(AVAILABLE) for row in ablations.ABLATIONS["table-6"][0](config)]
    assert [16, 24, 40, 0] in counts and [48, 24, 40, 66] in counts and [0, 24, 40, 66] in counts
    one_budget = UHRBatConfig.from_pretrained(ROOT, budgets=146)
    assert [sum(row.counts(AVAILABLE)) for row in ablations.ABLATIONS["table-6"][0](one_budget)][0] == 146


def test_the_tokens_of_an_image_are_counted_without_encoding_it(tmp_path):
    """Of a picture, and of a raster a third of which holds no data."""
    asked, processor = [], load_processor()
    pixels = np.random.default_rng(0).integers(1, 255, (3, 300, 400), np.uint8)
    pixels[:, :100] = 0
    profile = {
        "driver": "GTiff",
        "height": 300,
        "width": 400,
        "count": 3,
        "dtype": "uint8",
        "photometric": "RGB",
        "nodata": 0,
    }
    with rasterio.open(tmp_path / "a.tif", "w", **profile) as raster:
        raster.write(pixels)
    for image in (random_image(300, 400), processor.image_processor.open_image(str(tmp_path / "a.tif"))):
        views = rows.Views((processor, None), image)
        views.encode = lambda **options: asked.append(options)
        processor.image_processor.native = True  # which the rows of the fixed scales do not hear
        rows.tiles_of_share(views, 0.25)
        processor.image_processor.native = None
        mask = processor.image_processor(image, return_tensors="pt")["pixel_attention_mask"]
        assert asked[-1]["available"] == processor.count_shown(mask)[0]
        anchor, *finer = processor.image_processor(image, max_tiles=10**6)["image_pyramids"][0].num_chosen
        assert asked[-1]["options"] == {"max_tiles": anchor + round(0.25 * sum(finer))}


@torch.no_grad()
def test_tokens_of_lrs_vqas_mode_are_chosen_by_chance_or_by_likeness_to_the_thumbnail_too():
    vision = small_config().vision_config.to_dict() | {"patch_size": 2}
    model = small_model(vision_config=vision, region_focus={"layers": [0, 2], "separator_token_id": 4})
    pyramid = DynamicPyramid(random_image(60, 90), tile_size=8, patch_size=2)
    features, kept = model.encode_image(image_pyramids=[pyramid]), {}
    for pruned_by, scores in rows.PRUNED_BY.items():
        variant = rows.focus_variant(model, scores, {"alpha_select": 1, "alpha_keep": 0.5, "n_max": None})
        assert variant.lm_head.weight is model.lm_head.weight
        found = variant.compress(input_ids=torch.tensor([[5, IMAGE, 6]]), image_features=features)
        kept[pruned_by] = found.slots[0][-1] >= 0
    assert len({tuple(one.tolist()) for one in kept.values()}) == 3
    assert {int(one.sum()) for one in kept.values()} == {int(0.5 * len(kept["random"]))}
    assert model.config.focus.alpha_keep == 0.25
    found = SimpleNamespace(tokens=torch.tensor([[2.0, 0], [0, 1.0]]))
    assert rows.like_the_thumbnail(2, torch.tensor([[5.0, 5], [1, 0], [3, 0], [0, 9]]), None, found).tolist() == [2, 1]


def test_rules_over_regions_of_a_model_without_are_named_and_no_others():
    asked = [rows.row_of(rule, 0.1) for rule in (rows.PAPER, rows.TOP_K, "with coverage", "k-means merge")]
    said = rows.without_regions(UHRBatConfig.from_pretrained(ROOT, region_method="none"), asked)
    assert said.startswith(f"{rows.PAPER}, with coverage: `region_method` of this model is 'none'")
    assert rows.without_regions(UHRBatConfig.from_pretrained(ROOT, region_method="kmeans"), asked) == ""


@pytest.mark.slow
@pytest.mark.weights
def test_a_row_over_regions_warns_where_the_model_has_none():
    processor, model = load_model(region_method="none")
    views = rows.Views((processor, model), random_image(30, 200))
    with pytest.warns(UserWarning, match=f"{rows.PAPER}: `region_method` of this model is 'none'"):
        rows.choose(views, rows.row_of(rows.PAPER, 0.01), "How many?")


@pytest.mark.slow
def test_an_ablation_of_rasters_is_written_as_table_json_and_plot(tmp_path, capsys, monkeypatch):
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 20, 160), np.uint8)
    profile = {"driver": "GTiff", "height": 20, "width": 160, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile) as raster:
        raster.write(pixels)
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "2"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": 1, "image": "a.tif", "conversations": turns}]))
    make_rows, axis = ablations.ABLATIONS["table-5"]
    monkeypatch.setitem(ablations.ABLATIONS, "table-5", (lambda config: make_rows(config)[::2], axis))
    monkeypatch.setattr(SUITES["conversations"], "max_new_tokens", 2)
    arguments = ["--suite", "conversations", "--data", str(tmp_path / "a.json"), "--output", str(tmp_path / "out")]
    assert ablations.main(["table-5", *arguments]) == 0
    result = json.loads((tmp_path / "out" / "table-5.json").read_text())
    assert not result["errors"] and [row["name"] for row in result["rows"]] == [
        "3k, 1 of the width",
        "3k, 0.5 of the width",
    ]
    for row in result["rows"]:
        assert row["questions"] == 1 and row["tokens"] < 0.03 * 3648 and 0 <= row["accuracy"][0] <= 1
        assert row["flops"] > 1e8 and set(row["seconds"]) == {"encode", "compress", "generate"}
        assert min(row["seconds"].values()) > 0
    assert "| 3k, 1 of the width |" in capsys.readouterr().out
    assert (tmp_path / "out" / "table-5.png").stat().st_size > 1000


@pytest.mark.slow
def test_table_4_has_the_7b_model_by_formula():
    big = UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    found = ablations.prices(big, (4, 12), torch.bfloat16, "cuda")
    assert found[0]["kept"] == 4000 and found[-1]["flops"] > found[0]["flops"] > 1e14
    assert "| 7B | 4,000 | 131,328 |" in ablations.prices_table({"7B": found})
