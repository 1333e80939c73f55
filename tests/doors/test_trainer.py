"""The library's Trainer, PEFT and accelerate on the model: what is measured, saved, resumed and trained on processes.

Runs on every supported release of transformers.
"""

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from copies import run_copies
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small import prompt, random_pixels, small_config, small_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration


QUESTION = prompt(5, "image", 6, 7, 30, 31)
NUM_ANSWERED = 2


def collate(rows):
    """Two prompts, with images where the rows say so; the last two ids are the answer."""
    ids = QUESTION if rows[0] else torch.tensor([[5, 6, 7, 30, 31]])
    labels = ids.clone()
    labels[:, :-NUM_ANSWERED] = -100
    batch = {"input_ids": ids.repeat(2, 1), "labels": labels.repeat(2, 1)}
    return {**batch, "pixel_values": random_pixels(2)} if rows[0] else batch


def make_trainer(model, folder, train=(1,) * 8, evaluate=(1,) * 4, **settings):
    settings = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=list(train), eval_dataset=list(evaluate), data_collator=collate)


def tower_weight(model):
    return model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.detach().clone()


def unread(model):
    """Names of the parameters behind the feature layer, which no token comes through."""
    return {name for name, _ in model.named_parameters() if "encoder.layers.2." in name or "post_layernorm" in name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_model().save_pretrained(folder)
    return folder


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def test_evaluating_gives_the_loss(tmp_path):
    model = small_model()
    with torch.no_grad():
        expected = model(**collate([1])).loss
    assert make_trainer(model, tmp_path).evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_predictions_are_logits_alone_and_labels_come_with_them(tmp_path):
    predictions, labels, metrics = make_trainer(small_model(), tmp_path).predict([1] * 4)
    assert isinstance(predictions, np.ndarray) and predictions.shape == (4, QUESTION.shape[1], 50)
    assert labels.shape == (4, QUESTION.shape[1]) and "test_loss" in metrics


def test_a_batch_of_text_may_stand_among_others_where_metrics_are_computed(tmp_path):
    trainer, shapes = make_trainer(small_model(), tmp_path), []
    trainer.compute_metrics = lambda result: shapes.append(result.predictions.shape) or {"measured": 1}
    assert trainer.evaluate([1, 1, 0, 0])["eval_measured"] == 1
    assert shapes == [(4, QUESTION.shape[1], 50)]


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = small_model()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    # The second step is far too long, so that the first one is the best.
    trainer = make_trainer(model, tmp_path, **settings, lr_scheduler_type="constant", learning_rate=1e-3)
    trainer.add_callback(LongSecondStep())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert torch.equal(tower_weight(model), best["model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"])


class LongSecondStep(TrainerCallback):
    def on_step_end(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        lr_scheduler.base_lrs = [10.0 for _ in lr_scheduler.base_lrs]
        for group in optimizer.param_groups:
            group["lr"] = 10.0


# ---- Saving and going on --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_going_on_from_a_checkpoint_restores_the_tower(tmp_path):
    model = small_model()
    start = tower_weight(model)
    make_trainer(model, tmp_path).train()
    learnt = tower_weight(model)
    assert (learnt - start).abs().max() > 1e-3
    other = small_model(seed=1)
    make_trainer(other, tmp_path).train(resume_from_checkpoint=True)
    assert torch.equal(tower_weight(other), learnt)


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}], ids=["no map", "map"])
def test_accelerate_loads_every_weight_of_a_saved_file(folder, device_map):
    with init_empty_weights():
        model = UHRBatForConditionalGeneration(small_config())
    if device_map is None:
        model = small_model(seed=1)
    load_checkpoint_and_dispatch(model, str(folder / "model.safetensors"), device_map=device_map, strict=False)
    model.tie_weights()
    saved = small_model().state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("flat", [False, True], ids=["as saved", "one level higher"])
def test_a_raw_state_dict_of_the_file_loads_every_weight(folder, flat):
    weights = load_file(folder / "model.safetensors")
    if flat:
        weights = {name.replace("vision_tower.vision_model.", "vision_tower."): one for name, one in weights.items()}
    model = small_model(seed=1)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    assert torch.equal(tower_weight(model), tower_weight(small_model()))


def test_weights_are_saved_under_the_names_that_they_have_in_memory(folder, tmp_path):
    model = UHRBatForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    for path in (folder, tmp_path):
        assert load_file(path / "model.safetensors").keys() <= model.state_dict().keys()


# ---- What nothing reads ---------------------------------------------------------------------------------------------


def test_what_nothing_reads_is_frozen_whether_a_model_is_made_or_loaded(folder):
    made, loaded = small_model(), UHRBatForConditionalGeneration.from_pretrained(folder)
    report = UHRBatForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    for model in (made, loaded, report[0]):
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen == unread(model) and frozen


def test_who_trains_what_nothing_reads_gets_gradients_of_0():
    model = small_model().train()
    model.requires_grad_(True)
    model(**collate([1])).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert all((gradients[name] == 0).all() for name in unread(model))


def train(source, output, what, gradient_accumulation_steps):
    """Three steps with gradient checkpointing, and OUTPUT/WHAT.safetensors: the weights that were trained, "all" or those of an
    adapter ("lora")."""
    torch.manual_seed(0)
    model = UHRBatForConditionalGeneration.from_pretrained(source)
    if what == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    trainer = make_trainer(
        model,
        output,
        train=[1] * 12,
        max_steps=3,
        learning_rate=1e-3,
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        trained = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
        save_file({name: one.contiguous() for name, one in trained.items()}, output / f"{what}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["all", "lora"])
def test_two_processes_train_with_gradient_checkpointing_as_two_batches_a_step_do(folder, tmp_path, what):
    outputs = [tmp_path / "together", tmp_path / "alone"]
    for output in outputs:
        output.mkdir()
    run_copies(2, train, folder, outputs[0], what, 1)
    train(folder, outputs[1], what, 2)
    both, alone = (load_file(output / f"{what}.safetensors") for output in outputs)
    assert alone.keys() == both.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(both[name], weight, rtol=1e-4, atol=1e-5)
