"""Distillation of the region focus module: its loss by hand, and that it learns to look where the decoder looks."""

import numpy as np
import pytest
import torch
from small import small_config, small_model
from torch.utils.data import DataLoader
from uhr_bat.common.asking import prompt_text
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.modeling_layers_uhr_bat import last_token_logits
from uhr_bat.scenes.native import native_scene, picture_of
from uhr_bat.scenes.questions import make_question
from uhr_bat.training.tiny import descending, focusing
from uhr_bat.training.tiny.focusing import FocusScenes, distillation_loss, pairs_of


def test_the_loss_is_that_of_the_paper():
    student, teacher = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).double()
    is_level = torch.tensor([False, False, True, True, True, True, False])

    def divergence(chosen, temperature):
        total = 0.0
        for head in range(3):
            learnt = np.exp(student[head, chosen].numpy() / temperature)
            taught = np.exp(teacher[head, chosen].numpy() / temperature)
            learnt, taught = learnt / learnt.sum(), taught / taught.sum()
            total += (taught * np.log(taught / learnt)).sum()
        return total / 3

    difference = ((student[:, is_level] - teacher[:, is_level]) / 2).square().mean().item()
    expected = divergence(torch.ones(7, dtype=torch.bool), 1) + 2 * divergence(is_level, 2) + difference
    assert distillation_loss(student, teacher, is_level).item() == pytest.approx(expected, rel=1e-5)
    assert distillation_loss(teacher, teacher, is_level).item() == pytest.approx(0, abs=1e-6)


def test_the_first_and_the_last_pair_of_layers_are_compared():
    assert pairs_of([0, 1, 5, 11, 14]) == [(1, 1), (4, 14)]
    assert pairs_of([0, 2]) == [(1, 2)] and pairs_of([2]) == [(0, 2)]


def test_only_the_module_learns_from_the_decoder_and_it_comes_nearer():
    vision = small_config().vision_config.to_dict() | {"patch_size": 2}
    model = small_model(vision_config=vision, region_focus={"layers": [0, 2], "separator_token_id": 4})
    module = model.model.region_focus
    module.start_from(model.model.language_model, [0, 2])
    optimizer = torch.optim.Adam([one for one in module.parameters() if one.requires_grad], lr=3e-3)
    sequence = torch.randn(1, 20, 24, generator=torch.Generator().manual_seed(0))
    is_level, losses = torch.arange(20) > 5, []
    for _ in range(30):
        (student,) = model.model.read_layers(module.layers, sequence, last_token_logits)
        (teacher,) = model.model.read_layers(model.model.language_model.layers, sequence, last_token_logits, [2])
        loss = distillation_loss(student, teacher, is_level)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert not any(one.grad is not None for one in model.model.language_model.parameters())


def test_scenes_of_both_kinds_come_from_workers():
    scenes = list(DataLoader(FocusScenes(6, 0.5, 0), batch_size=None, collate_fn=lambda one: one))
    widths = [scene.width for scene, _, _ in scenes]
    assert {width is None for width in widths} == {True, False} and all(
        len(questions) == 4 for _, _, questions in scenes
    )


@pytest.mark.slow
@pytest.mark.weights
def test_the_stage_runs_and_what_it_writes_answers(tmp_path, capsys):
    arguments = ["--model", ROOT, "--output", tmp_path / "out", "--steps", 2, "--batch-size", 1, "--measured", 2]
    assert not focusing.main(list(map(str, arguments)))
    before, after = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("Before", "After")))
    assert before.partition(":")[2] != after.partition(":")[2]  # what two steps give is no promise
    processor, model = load_model(tmp_path / "out", device_map=None)
    scene, image, questions = FocusScenes(1, 0.0, 1)[0]
    text = prompt_text(processor, questions[0].text)
    inputs = processor(text=text, images=image, dynamic_pyramid=True, budgets=60, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_pooled_tokens_are_to_say_what_their_fullest_patch_says():
    tokens = torch.arange(16.0).view(1, 16, 1)
    counts = torch.zeros(1, 4, 4)
    counts[0, 1, 0], counts[0, 0, 2:] = 3.0, 0.1  # an object in the first block; a pad on two patches of the second
    target, most = descending.pooled_target(tokens, counts)
    assert target[0, :, 0].tolist() == [4.0, 2.5, 10.5, 12.5]
    assert most[0].tolist() == pytest.approx([3.0, 0.1, 0, 0])
    assert descending.pool(tokens)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


def test_questions_that_share_a_beginning_do_not_see_each_other():
    seen = descending.shared_mask(2, [2, 1])[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


def test_a_level_of_a_scene_is_what_the_model_makes_of_its_tiles():
    scene = native_scene(descending.SEEDS["native"])
    level = descending.pyramid_levels(scene)[1]
    tile = np.arange(np.prod(level.tiles))
    of_scene = descending.LevelOfScene(scene, level, torch.zeros(len(tile), 36, 1), tile)
    order = of_scene.sequence(of_scene.tile == 0)
    assert order.tolist()[:7] == [0, 1, 2, 3, 4, 5, -1] and len(order) == 42
    assert len(of_scene.place) + level.grid[0] == level.num_tokens and len(set(of_scene.place)) == len(of_scene.place)
    thing = next(thing for thing in scene.objects if thing.site is not None)
    question = make_question(scene, "count", thing.site, rng=np.random.default_rng(0))
    wanted = of_scene.wanted(question)
    assert wanted.sum() == pytest.approx(1) and wanted[of_scene.at([thing.centre])].sum() > 0
    assert not wanted[(of_scene.site >= 0) & (of_scene.site != thing.site)].any()


@pytest.mark.slow
@pytest.mark.weights
def test_a_model_of_the_own_form_is_made_in_two_steps_and_answers(tmp_path, monkeypatch):
    for name, small in {"WHOLE": 9, "SITES": 1, "PER_SITE": 1, "ELSEWHERE": 2, "TILES_OF_STEP": 4}.items():
        monkeypatch.setattr(descending, name, small)
    options = ["--painted", tmp_path / "painted", "--scenes", 1, "--steps", 2, "--batch-size", 1, "--workers", 0]
    for model, output in (ROOT, tmp_path / "tower"), (tmp_path / "tower", tmp_path / "out"):
        assert not focusing.main(list(map(str, ["--model", model, "--output", output, *options])))
    before, (processor, model) = (
        load_model(tmp_path / "tower", device_map=None)[1],
        load_model(tmp_path / "out", device_map=None),
    )
    assert model.config.tile_size == 96 and model.config.focus.layers == (0, 1, 2)
    module, decoder = model.model.region_focus, model.model.language_model
    for own, layer in zip(module.layers, decoder.layers):
        assert torch.equal(own.self_attn.q_proj.weight, layer.self_attn.q_proj.weight)
    assert not torch.equal(
        decoder.layers[0].mlp.up_proj.weight, before.model.language_model.layers[0].mlp.up_proj.weight
    )
    scene = native_scene(descending.SEEDS["native"])
    inputs = processor(text=prompt_text(processor, "How many objects are at the pier?"), images=picture_of(scene),
                       dynamic_pyramid=True, return_tensors="pt")  # fmt: skip
    model.config.region_focus["max_levels"] = 2
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
