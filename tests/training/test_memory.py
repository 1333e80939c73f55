"""The formula of a recipe's memory against what PyTorch holds."""

import pytest
import torch
from own_data import make_rows, write_rows
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.training import memory
from uhr_bat.training.collator import UHRBatDataCollator
from uhr_bat.training.data import load_samples
from uhr_bat.training.memory import predict_memory
from uhr_bat.training.options import read_options
from uhr_bat.training.parts import freeze_parts


def predict(folder, *more):
    arguments = [
        "--train_data",
        "x.json",
        "--output_dir",
        "x",
        "--use_cpu",
        "true",
        "--per_device_train_batch_size",
        "4",
    ]
    return predict_memory(UHRBatConfig.from_pretrained(folder), *read_options([*arguments, *more]))


def num_bytes(tensors):
    return sum(one.numel() * one.element_size() for one in {one.data_ptr(): one for one in tensors}.values())


@pytest.fixture(scope="module")
def held(small_folder, tmp_path_factory):
    """Bytes that a step of the small model holds, by what takes them, and its tokens; four samples of one length."""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("own")
    processor, model = load_model(small_folder, device_map=None)
    freeze_parts(model, ["vision_tower"])
    samples = load_samples(write_rows(folder / "data.json", make_rows(folder, 4)), processor)
    batch = UHRBatDataCollator(processor)(list(samples))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        loss = model.train()(**batch).loss
    weights = {one.data_ptr() for one in model.parameters()}
    kept = num_bytes(one for one in saved if one.data_ptr() not in weights)
    loss.backward()
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values() if value.ndim)
    return {
        "weights": num_bytes(model.parameters()),
        "gradients": num_bytes(one.grad for one in model.parameters() if one.grad is not None),
        "optimizer": num_bytes(states),
        "saved": kept,
        "scores": batch["input_ids"].numel() * model.config.text_config.vocab_size * 4,
        "tokens": batch["input_ids"].shape[1],
    }


def test_weights_gradients_and_the_optimizers_states_are_exact(held, small_folder):
    predicted = predict(small_folder)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(predicted, name) == held[name], name


def test_activations_are_within_a_third_of_what_a_step_saves(held, small_folder):
    predicted = predict(small_folder, "--max_length", str(held["tokens"]))
    assert predicted.activations == pytest.approx(held["saved"] - held["scores"], rel=0.33)
    assert predicted.logits >= held["scores"]  # their copy and their gradient come later


def test_each_saving_takes_its_part(small_folder):
    whole = predict(small_folder)
    assert predict(small_folder, "--gradient_checkpointing", "true").activations < whole.activations
    assert predict(small_folder, "--optim", "adafactor").optimizer < whole.optimizer
    adapter = predict(small_folder, "--use_peft", "true", "--lora_r", "1")
    assert adapter.gradients < 0.1 * whole.gradients
    four_bits = predict(small_folder, "--use_peft", "true", "--lora_r", "1", "--load_in_4bit", "true")
    assert four_bits.weights < adapter.weights
    halves = predict(small_folder, "--dtype", "bfloat16")
    assert halves.weights == whole.weights / 2 and halves.optimizer == whole.optimizer / 2


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "training/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_head_of_a_recipe_and_the_page_say_what_the_formula_gives(path, capsys):
    folder = ROOT / "export" / "uhr_bat_7b" if "gb" in path.stem or "7b" in path.stem else ROOT
    assert memory.main(["--config", str(path), "--model_name_or_path", str(folder)]) == 0
    total = capsys.readouterr().out.split(" GiB")[0]
    assert f"emory: {total} GiB" in path.read_text(encoding="utf-8")
    page = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{path.stem}`")]
    assert f"| {total} GiB" in line
