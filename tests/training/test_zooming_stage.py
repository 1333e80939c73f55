"""The stage that learns to look closer: pools of tiles, what a step asks for, and a run of it."""

import numpy as np
import pytest
import torch
from copies import forked
from safetensors.torch import save_file
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.export import build_tiny
from uhr_bat.scenes.layout import make_scene
from uhr_bat.scenes.questions import draw_question
from uhr_bat.training.tiny import pools, zooming


@pytest.fixture(scope="module")
def tiny():
    return load_model(device_map=None)


@pytest.fixture(scope="module")
def pooled(tiny):
    processor, model = tiny
    scene = make_scene(5, 1.0, width=1500)
    pool = pools.encode_pool(model, processor.image_processor, scene, num_tiles=20)
    return zooming.PooledScene(scene, pool, 100, model.config.patch_size), pool


@pytest.mark.slow
def test_a_pool_has_coarse_levels_whole_and_of_finer_ones_what_questions_need(pooled):
    one, pool = pooled
    counts = torch.bincount(pool["level"]).tolist()
    assert pool["scales"].tolist() == [64, 128, 256, 512, 1024, 1504] and counts[:3] == [4, 16, 64]
    assert all(count <= 40 for count in counts[3:])
    for thing in one.scene.objects:
        if thing.site is not None:
            assert all(len(one.find(level_idx, [thing.centre])) == 1 for level_idx in range(6))


@pytest.mark.slow
def test_a_question_looks_at_so_many_tokens_and_should_look_at_what_it_needs(pooled):
    one, _ = pooled
    rng = np.random.default_rng(0)
    for question in [draw_question(one.scene, rng) for _ in range(6)]:
        for level_idx in range(1, 6):
            drawn = zooming.draw_look(one, question, level_idx, 48, rng)
            if drawn is None:  # the pool has nothing of what is needed
                continue
            places, portion = drawn
            assert len(set(places)) == len(places) <= 48 and np.isclose(portion.sum(), 1)
            needed = one.find(level_idx, zooming.points_of(one.scene, question))
            assert set(places[portion > 0]) <= set(needed)
        read, shows = zooming.draw_answered_from(one, question, 100, rng)
        assert len(read) == len(shows) <= 110 and read == sorted(
            read, key=lambda token: (token[0], one.positions[token[0]][token[1]])
        )


def test_native_scales_start_from_what_deeper_levels_had(tiny):
    from copy import deepcopy

    model = deepcopy(tiny[1])
    vectors = model.model.scale_embedding.scale_vectors.clone()
    zooming.start_native_scales(model, [768, 1536])
    found = model.model.scale_embedding.scale_vectors
    assert model.config.native_scales == [768, 1536] and torch.equal(found[:4], vectors[:4])
    assert torch.equal(found[4], vectors[3]) and torch.equal(found[5], vectors[3])
    assert len(model.model.scale_embedding(2000, torch.arange(40))) == 40


@pytest.mark.slow
def test_a_run_makes_a_model_that_loads_from_scenes_that_were_encoded_and_others(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "get_context", forked)
    processor, model = tiny
    kept = tmp_path / "pools" / "fixed" / "7.safetensors"
    kept.parent.mkdir(parents=True)
    save_file(pools.encode_pool(model, processor.image_processor, make_scene(7), num_tiles=8), kept)
    written = kept.stat().st_mtime_ns
    arguments = [
        "--model",
        ROOT,
        "--output",
        tmp_path / "out",
        "--pools",
        tmp_path / "pools",
        "--native",
        1,
        "--fixed",
        1,
    ]
    arguments += ["--first-seed", 7, "--tiles", 8, "--steps", 1, "--batch-size", 2, "--together", 2]
    assert not zooming.main(list(map(str, arguments)))
    assert kept.stat().st_mtime_ns == written and len(list((tmp_path / "pools" / "native").iterdir())) == 1
    _, model = load_model(tmp_path / "out", device_map=None)
    assert model.config.native_scales == build_tiny.NATIVE_SCALES
