"""Distillation of the region focus module: its loss by hand, and that it learns to look where the decoder looks."""

import numpy as np
import pytest
import torch
from small import small_config, small_model
from torch.utils.data import DataLoader
from uhr_bat.common.asking import prompt_text
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.modeling_layers_uhr_bat import last_token_logits
from uhr_bat.training.tiny import focusing
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
