"""Training through the library's Trainer: on two processes, cut off and gone on with, and what came of it."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from copies import run_copies
from safetensors.torch import load_file
from transformers import TrainingArguments
from uhr_bat.common.asking import answers, write_prompt
from uhr_bat.common.budgets import counts_of_fraction
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.scenes import questions
from uhr_bat.scenes.evidence import site_cells, site_tokens, tokens_at
from uhr_bat.scenes.layout import OBJECTS, PAINTS, TEST_SEEDS, make_scene
from uhr_bat.scenes.painting import paint
from uhr_bat.training.collator import IGNORED
from uhr_bat.training.tiny.encoding import all_tokens, encode_scenes
from uhr_bat.training.tiny.exchange import exchange_tower
from uhr_bat.training.tiny.finetune import Collator, GuidedTrainer, Questions, draw_tokens, main, prepare_decoder
from uhr_bat.training.tiny.vision import HEADS, head_labels

SCENES = 4


@pytest.fixture(scope="module")
def features_path(tmp_path_factory):
    """Scenes that every run of this file trains on, encoded by the first of them."""
    return tmp_path_factory.mktemp("features") / "features.safetensors"


@pytest.fixture(scope="module")
def finetune(features_path):
    def train(output, *arguments, processes=None, steps=2):
        arguments = [
            "--model", str(ROOT), "--output", str(output), "--features", str(features_path), "--scenes", str(SCENES),
            "--steps", str(steps), "--workers", "0", "--batch-size", "1", *arguments,
        ]  # fmt: skip
        if processes is None:
            assert not main(arguments)
        else:
            run_copies(processes, main, arguments)
        return load_file(output / "model.safetensors")

    return train


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
def test_two_processes_train_as_two_batches_a_step_do(finetune, tmp_path):
    start = load_file(ROOT / "model.safetensors")
    accumulated = finetune(tmp_path / "accumulated", "--together", "5", "--accumulation", "2")
    parallel = finetune(tmp_path / "parallel", "--together", "5", processes=2)
    assert largest_difference(accumulated, parallel) < 2e-5
    assert largest_difference(start, parallel) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [("--taught",), ("--together", "5")])
def test_going_on_gives_the_same_weights_as_not_stopping(finetune, tmp_path, stage):
    whole = finetune(tmp_path / "whole", "--save-steps", "2", *stage, steps=4)
    # A run that was cut off: its last checkpoint is there, its model is not.
    cut = tmp_path / "cut" / "checkpoints"
    cut.mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "checkpoint-2").rename(cut / "checkpoint-2")
    assert largest_difference(whole, finetune(tmp_path / "cut", *stage, steps=4)) == 0.0


def test_labels_of_tokens_say_what_the_layout_says():
    config = load_model(ROOT)[1].config
    scene = make_scene(5, objects_outside=(100, 160))
    labels = head_labels(scene, config)
    sizes = [height * width for height, width in config.grids]
    assert {name: len(values) for name, values in labels.items()} == dict.fromkeys(HEADS, sum(sizes))
    finest = {name: values[-sizes[-1] :] for name, values in labels.items()}
    for thing in scene.objects:
        (token,) = tokens_at(scene, [thing.centre], config.grids[-1])
        assert finest["colour"][token] == list(PAINTS).index(thing.colour) + 1
        assert finest["kind"][token] == OBJECTS.index(thing.kind) + 1
    assert (finest["colour"] == 0).mean() > 0.5 and (finest["colour"] == IGNORED).any()


def test_cells_of_a_site_are_where_it_is():
    scene, grid = make_scene(3), (8, 8)
    cells = site_cells(scene, (0,), grid)
    row, column = scene.to_square(scene.sites[0].centre) * 8
    assert cells.sum() == pytest.approx(1) and cells.argmax() in {
        int(r) * 8 + int(c) for r in (row - 0.5, row, row + 0.5) for c in (column - 0.5, column, column + 0.5)
    }
    rows, columns = np.divmod(np.arange(64), 8) + np.full((2, 1), 0.5)
    assert abs((cells * rows).sum() - row) < 0.1 and abs((cells * columns).sum() - column) < 0.1


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.04, 0.3, 1.0])
def test_a_fraction_of_all_tokens_is_spent(fraction):
    available = [56, 208, 832, 1872]
    counts = counts_of_fraction(fraction, available, (16, 24, 40, 66))
    assert sum(counts) == max(round(fraction * 2968), 4)
    assert all(1 <= count <= limit for count, limit in zip(counts, available))


@pytest.fixture(scope="module")
def encoded():
    """Processor, model, scene and its features."""
    processor, model = load_model(ROOT)
    scene = make_scene(1)
    (features,) = model.encode_image(**processor.image_processor(paint(scene), return_tensors="pt"))
    return processor, model, scene, features


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_what_no_question_chose_holds_all_sites_and_keeps_the_order(encoded, share):
    _, model, scene, features = encoded
    grids = model.config.grids
    sites = site_tokens(scene, range(len(scene.sites)), grids)
    image = draw_tokens(features, sites, share, grids, torch.Generator().manual_seed(0))
    for scale, (tokens, slots, places) in enumerate(zip(image.tokens[0], image.slots[0], features.positions)):
        needed = [token for at, token in sites if at == scale and token in places]
        assert (slots[needed] >= 0).all() and len(tokens) == max(round(share * len(places)), len(needed))
        assert slots[slots >= 0].tolist() == list(range(len(tokens)))
        assert torch.equal(tokens, features.tokens[scale][slots[places] >= 0])
    if share == 1:
        assert torch.equal(image.pooler_output[0], torch.cat(features.tokens))


@pytest.mark.slow
@torch.no_grad()
def test_questions_asked_together_have_the_loss_of_each_asked_alone(encoded, tmp_path):
    processor, model, scene, features = encoded
    model.set_attn_implementation({"text_config": "eager"})
    item = Questions([features], [scene.seed], model.config.grids, num_questions=6)[0]
    inputs = Collator(processor, model.config.grids, (0.1, 0.1), together=True).collate_together(item, 0.5)
    trainer = GuidedTrainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    trainer.loss_together(model, **inputs)
    together, alone, answers = trainer.parts, defaultdict(list), []
    start, image = inputs["start"], inputs["image"]
    for ids, labels, mask, targets in zip(
        inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool(), inputs["targets"]
    ):
        row = {
            "input_ids": torch.cat((start, ids[None, mask]), dim=1),
            "labels": torch.cat((torch.full_like(start, IGNORED), labels[None, mask]), dim=1),
        }
        outputs = model(**row, mm_encoder_outputs={"image": image}, output_attentions=True)
        answers += [float(outputs.loss)] * int((labels != IGNORED).sum())
        begins = [start.shape[1] - len(image.pooler_output[0])]
        for name, part in trainer.look(model.config, outputs.attentions, row, image.slots, begins, [targets]).items():
            alone[f"whole_{name}"].append(float(part))
    assert together.pop("whole_answers") == pytest.approx([np.mean(answers)], rel=1e-4)
    assert set(together) == {
        f"whole_{name}" for name in ("look_at_words", "look_at_sites", "then_at_sites", "read_evidence")
    }
    # Shares of attention are rounded at 6e-8.
    assert together == {name: pytest.approx([np.mean(parts)], rel=1e-3, abs=1e-7) for name, parts in alone.items()}


@pytest.mark.slow
def test_questions_asked_alone_read_what_the_model_chooses_and_teach_it_where_to_look(encoded, tmp_path, monkeypatch):
    processor, model, scene, features = encoded
    monkeypatch.setattr(model.model, "pointer", None)  # which comes after this stage
    model.set_attn_implementation({"text_config": "eager"})
    item = Questions([features], [scene.seed], model.config.grids, num_questions=2)[0]
    inputs = Collator(processor, model.config.grids, (0.02, 0.02), together=False)([item])
    trainer = GuidedTrainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    trainer.compute_loss(model, inputs).backward()
    assert all(one.grad.isfinite().all() for one in model.model.language_model.parameters() if one.grad is not None)
    alone = inputs["alone"]
    rows = {name: alone[name] for name in ("input_ids", "attention_mask", "labels")}
    images = {"image_features": [item["features"]] * 2, "token_counts": alone["token_counts"]}
    with torch.no_grad():
        answers = float(model(**rows, **images).loss)
        chosen = model.compress(**rows, **images)
    assert trainer.parts["answers"] == pytest.approx([answers], rel=1e-4)
    divergences = []
    for maps, (_, targets) in zip(chosen.importance, item["questions"]):
        for scale, found in enumerate(maps[1:], 1):
            wanted = [at for where, at in targets["evidence"] if where == scale] or [
                at for where, at in targets["sites"] if where == scale
            ]
            found = found.flatten() / found.sum()
            divergences.append(np.mean([-float(found[at].log()) - np.log(len(set(wanted))) for at in set(wanted)]))
    assert trainer.parts["refined"] == pytest.approx([np.mean(divergences)], rel=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_a_prepared_decoder_gets_words_and_visual_tokens_of_the_same_length():
    processor, model = load_model(ROOT)
    tiles = processor.image_processor(paint(make_scene(1)), return_tensors="pt")
    features = model.encode_image(**tiles)
    prepare_decoder(model, features)
    tokens = model.encode_image(**tiles)[0].tokens  # by the scaled weights
    torch.testing.assert_close(tokens, features[0].tokens, rtol=1e-4, atol=1e-4)
    for rows in (torch.cat(tokens), model.get_input_embeddings().weight):
        assert rows.square().mean().sqrt() == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
@torch.no_grad()
def test_an_exchanged_tower_is_turned_to_the_tokens_that_the_decoder_knows():
    (processor, model), (_, other) = load_model(ROOT), load_model(ROOT)
    decoder = {name: value.clone() for name, value in model.model.language_model.state_dict().items()}
    before = all_tokens(encode_scenes(model, processor.image_processor, [1]))
    turn = 3 * torch.linalg.qr(torch.randn(before.shape[1], before.shape[1], generator=torch.manual_seed(0))).Q
    last = other.model.multi_modal_projector.linear_2
    last.weight.copy_(turn @ last.weight)
    last.bias.copy_(turn @ last.bias + 2)
    for parameter in other.model.scale_embedding.parameters():
        parameter.copy_(parameter @ turn.T)
    other.model.language_model.norm.weight.zero_()  # not asked for
    assert exchange_tower(model, other, processor.image_processor, [2]) > 0.99
    after = all_tokens(encode_scenes(model, processor.image_processor, [1]))
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)  # they come in bfloat16
    assert all(torch.equal(value, decoder[name]) for name, value in model.model.language_model.state_dict().items())


@pytest.mark.slow
@pytest.mark.weights
@torch.no_grad()
def test_the_shipped_weights_look_where_the_question_points_and_answer_it():
    """60 questions about scenes that nothing was trained on, with 4 % of the visual tokens, and every second one with all."""
    processor, model = load_model(ROOT)
    shares, by_chance, right, right_from_all = [], [], [], []
    for seed in TEST_SEEDS[-11:]:
        scene, rng = make_scene(seed), np.random.default_rng([seed, 3])
        features = model.encode_image(**processor.image_processor(paint(scene), return_tensors="pt"))[0]
        for question in (questions.make_question(scene, kind, rng=rng) for kind in questions.KINDS):
            if question is None or len(shares) == 60:
                continue
            prompt = write_prompt(processor, question.text)
            importance = model.estimate_importance(prompt["input_ids"][0], features.anchor_tokens)
            named = (
                torch.tensor(site_cells(scene, question.sites, model.config.grids[0]))[features.anchor_positions] > 0
            )
            shares.append(float(importance[named].sum() / importance.sum()))
            by_chance.append(float(named.float().mean()))
            asked = [(None, right), ([features.available], right_from_all)]
            for counts, found in asked[: 1 + len(shares) % 2]:
                ((said, _),) = answers(model, processor, [question.text], [[features]], counts=counts)
                found.append(said == question.answer)
    assert (len(shares), len(right_from_all)) == (60, 30)
    assert np.mean(by_chance) < 0.15 and np.mean(shares) > 0.65
    assert np.mean(right) > 0.7 and np.mean(right_from_all) > 0.7  # guessing: 0.3
