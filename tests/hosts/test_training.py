"""Models of other families, trained by an adapter on compressed prompts: what a run learns, leaves and goes on from."""

import json
import shutil

import pytest
import torch
from hosts_tiny import FAMILIES, save_family
from images import random_image
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from uhr_bat import load_model
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.training import memory, sft
from uhr_bat.training.collator import UHRBatDataCollator
from uhr_bat.training.options import read_options

pytest.importorskip("datasets")
TILE = {name: family.get("settings", {}) for name, family in FAMILIES.items()}
SHORT = {"levels": 2, "refinement": 8}


def write_data(folder):
    """Four samples: one image, two of them, a chat of two questions, and text alone."""
    for number in range(3):
        random_image(40, 60, seed=number).save(folder / f"{number}.png")
    turn = lambda role, text: {"role": role, "content": text}  # noqa: E731
    rows = [
        {"image": "0.png", "question": "What?", "answer": " red"},
        {"image": ["0.png", "1.png"], "messages": [turn("user", "<image>and<image>differ?"), turn("assistant", " no")]},
        {"image": "2.png", "messages": [turn("user", "<image>What?"), turn("assistant", " blue"), turn("user", "Where?"),
                                        turn("assistant", " here")]},
        {"question": "And you?", "answer": " fine", "system": "Be brief."},
    ]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def run(model, data, output, *more, **settings):
    return sft.train(*read_options([
        "--config", "lora_24gb", "--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(output),
        "--model_settings", json.dumps(SHORT | settings), "--budgets", "5", "7", "--max_steps", "4", "--use_cpu", "true",
        "--disable_tqdm", "true", "--learning_rate", "2e-2", "--lr_scheduler_type", "constant", "--warmup_steps", "0",
        "--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0",
        "--logging_steps", "1", "--bf16", "false", "--eval_share", "0", "--eval_strategy", "no", "--save_strategy", "no",
        "--budget_range", "0.6", "1", "--dtype", "float32", "--lora_dropout", "0", "--seed", "1", *more,
    ]))  # fmt: skip


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def batch_of(trainer):
    return UHRBatDataCollator(trainer.processing_class)([trainer.train_dataset[idx] for idx in (0, 1, 4)])


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits[:, -3:]  # marks may be more or fewer


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, settings", [("qwen3_vl", {}), ("gemma3", {}), ("internvl", {}), ("internvl", {"marks": True})]
)
def test_what_is_trained_is_an_adapter_of_the_library_and_a_model_of_ours(name, settings, host_folder, data, tmp_path):
    base = host_folder(name)
    before = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    trainer = run(base, data, tmp_path / "run", **TILE[name], **settings)
    assert len(losses(trainer)) == 4 and losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    trained = {one for one, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in one and ".layers." in one for one in trained)
    now = trainer.model.get_base_model().state_dict()
    for one, weight in before.items():
        assert torch.equal(weight, now[one if one in now else ".base_layer.".join(one.rsplit(".", 1))])
    assert all(weight.any() for one, weight in adapter_of(tmp_path / "run").items() if "lora_B" in one)

    batch = batch_of(trainer)
    processor, ours = load_model(tmp_path / "run", device_map=None, max_tiles=None)
    assert processor.default_budgets == ours.settings.budgets == [5, 7] and ours.settings.levels == 2
    wanted = logits(ours, batch)
    assert ours.settings.marks == settings.get("marks", False)
    _, untrained = load_model(base, device_map=None, max_tiles=None, budgets=[5, 7], **SHORT, **TILE[name], **settings)
    assert (logits(untrained, batch) - wanted).abs().max() > 1e-2
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "run").eval()
    with torch.no_grad():
        assert torch.allclose(plain(**ours.prepare(**batch)).logits[:, -3:], wanted, atol=1e-5)

    convert(str(tmp_path / "run"), tmp_path / "merged", merge_adapter=True)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    _, merged = load_model(tmp_path / "merged", device_map=None, max_tiles=None)
    assert torch.allclose(logits(merged, batch), wanted, atol=1e-3)
    if name != "qwen3_vl":
        return
    more = run(tmp_path / "merged", data, tmp_path / "more", "--max_steps", "1", **TILE[name], **settings)
    assert losses(more)[0] < losses(trainer)[0]


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_was_not(host_folder, data, tmp_path):
    options = ["--save_strategy", "steps", "--save_steps", "2", "--per_device_train_batch_size", "2", "--lora_dropout", "0.1"]
    run(host_folder("qwen3_vl"), data, tmp_path / "whole", *options, **TILE["qwen3_vl"])
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    trainer = run(host_folder("qwen3_vl"), data, tmp_path / "cut", *options, **TILE["qwen3_vl"])
    assert trainer.state.global_step == 4 and len(losses(trainer)) == 4
    whole, cut = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(torch.allclose(weight, cut[one], atol=1e-6) for one, weight in whole.items())
    again = run(tmp_path / "whole", data, tmp_path / "again", "--max_steps", "1", "--learning_rate", "0")
    assert all(torch.equal(weight, adapter_of(tmp_path / "again")[one]) for one, weight in whole.items())
    assert again.train_dataset.num_rows == 5


@pytest.mark.slow
def test_held_out_questions_are_answered_and_an_image_is_encoded_once_for_its_questions(host_folder, data, tmp_path):
    options = ["--eval_data", str(data), "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "2"]
    options += ["--group_by_image", "true", "--train_sampling_strategy", "random", "--eval_max_new_tokens", "2"]
    trainer = run(host_folder("gemma3"), data, tmp_path, *options)
    found = trainer.state.log_history
    assert any("eval_accuracy" in entry for entry in found) and any(entry.get("eval_loss", 0) > 0 for entry in found)


@pytest.mark.slow
def test_the_decoders_layers_alone_are_of_four_bits(data, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    base = save_family("smolvlm", tmp_path / "base", text_config=wide)
    trainer = run(base, data, tmp_path / "run", "--load_in_4bit", "true", "--max_steps", "1")
    kinds = {name: type(module).__name__ for name, module in trainer.model.named_modules() if "lora_" not in name}
    four_bits = {name for name, kind in kinds.items() if kind == "Linear4bit" and name.endswith("base_layer")}
    assert len(four_bits) == 4 * 7 and all("text_model.layers" in name for name in four_bits)


def test_without_an_adapter_a_host_is_not_trained(host_folder, data, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(host_folder("gemma3")), "--train_data", str(data), "--output_dir", str(tmp_path)]
    assert sft.main([*arguments, "--use_cpu", "true"]) == 2
    assert "another family is trained by an adapter alone: `use_peft: true`" in capsys.readouterr().err



def test_memory_counts_the_weights_of_a_host_and_its_adapter(host_folder, data, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(memory, "print", told.append, raising=False)
    arguments = ["--model_name_or_path", str(host_folder("internvl")), "--train_data", str(data), "--output_dir", str(tmp_path)]
    assert memory.main([*arguments, "--use_peft", "true", "--lora_r", "3", "--lora_target_modules", ".*o_proj"]) == 0
    weights = sum(one.nbytes for one in load_file(host_folder("internvl") / "model.safetensors").values())
    assert told[0].weights == weights + told[0].gradients and told[0].gradients == 4 * 4 * 3 * (32 + 32)
    assert memory.main(arguments) == 2


@pytest.mark.slow
def test_two_adapters_of_a_host_answer_by_turns_and_none_where_they_are_off(host_folder, tmp_path):
    base = host_folder("qwen3_vl")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=r".*language_model.*(q|v|up)_proj", init_lora_weights=False)
        get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config).save_pretrained(tmp_path / name)
    processor, model = load_model(base, device_map=None, **SHORT, **TILE["qwen3_vl"])
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=text, images=random_image(50, 70), budgets=9, return_tensors="pt")
    plain = logits(model, inputs)
    adapted = PeftModel.from_pretrained(model.host, tmp_path / "one", "one")
    adapted.load_adapter(tmp_path / "two", "two")
    for name in ("one", "two"):
        adapted.set_adapter(name)
        _, alone = load_model(tmp_path / name, device_map=None, **SHORT, **TILE["qwen3_vl"])
        found, wanted = logits(model, inputs), logits(alone, inputs)
        assert torch.allclose(found, wanted, atol=1e-5) and (found - plain).abs().max() > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(logits(model, inputs), plain)
