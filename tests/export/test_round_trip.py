"""This project's own checkpoints and adapters: trained, exported, loaded."""

import json
import shutil
import sys

import pytest
import torch
from checkpoints import in_new_process, load_clean, nothing_was_made, same_json, weights_of
from safetensors.torch import load_file, save_file
from small import prompt, small_model
from transformers import AutoProcessor, Trainer, TrainingArguments
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration


def question():
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": prompt(7, "image", 11, 12), "pixel_values": torch.randn(1, 14, 3, 8, 8, generator=generator)}


LOGITS_OF_A_FOLDER = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, inputs, wanted = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", output_loading_info=True
)
assert not any(report.values()), report
with torch.no_grad():
    logits = model.eval()(**torch.load(inputs, weights_only=True)).logits
torch.testing.assert_close(logits, torch.load(wanted, weights_only=True), rtol=0, atol=1e-5)
print("equal")
"""


def train_two_steps(model, folder):
    """Two steps of the library's Trainer, with images; the folder of its checkpoint."""
    generator = torch.Generator().manual_seed(1)
    ids = prompt(7, "image", 11, 12, 20, 21)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 2, -100)
    data = [
        {"input_ids": ids[0], "labels": labels[0], "pixel_values": torch.randn(14, 3, 8, 8, generator=generator)}
        for _ in range(2)
    ]
    arguments = TrainingArguments(
        output_dir=folder, max_steps=2, per_device_train_batch_size=1, learning_rate=1e-2, report_to=[], save_steps=2,
        remove_unused_columns=False, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return folder / "checkpoint-2"


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model after two steps, checkpoint that the Trainer wrote, weights before)."""
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    return model, train_two_steps(model, tmp_path_factory.mktemp("training")), before


@pytest.mark.slow
def test_a_fine_tuned_copy_goes_round(trained, tmp_path):
    """Its folder, in a new process without a network, gives the logits of the model that was trained."""
    model, checkpoint, before = trained
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    output = convert(checkpoint, tmp_path / "model", max_shard_size="20KB")
    with torch.no_grad():
        wanted = model.eval()(**question()).logits
    torch.save(question(), tmp_path / "inputs.pt")
    torch.save(wanted, tmp_path / "wanted.pt")
    printed = in_new_process(LOGITS_OF_A_FOLDER, tmp_path, output, tmp_path / "inputs.pt", tmp_path / "wanted.pt")
    assert printed.strip() == "equal"
    config = UHRBatConfig.from_pretrained(output)
    assert (config.threshold, config.scale_embedding_form, config.budgets) == ("ge", "factorized", [2, 5, 7])


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_consolidated_weights_of_several_processes_go_round(trained, tmp_path, flat):
    """FSDP and ZeRO leave the same names in `pytorch_model.bin`; some hold the vision tower one level higher."""
    model, checkpoint, _ = trained
    folder = tmp_path / "consolidated"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    weights = model.state_dict()
    if flat:
        weights = {name.replace("vision_tower.vision_model.", "vision_tower."): one for name, one in weights.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    exported = load_clean(convert(folder, tmp_path / "model"))
    assert torch.equal(exported(**question()).logits, model.eval()(**question()).logits)


def test_an_own_checkpoint_is_held_to_its_configuration(trained, tmp_path):
    _, checkpoint, _ = trained
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.scale_embedding.table"
    save_file({**weights, name: weights[name][:, :2].contiguous(), "more": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.scale_embedding.table' has the shape") as error:
        convert(folder, tmp_path / "model")
    assert "model.safetensors: tensor 'more' is unknown" in str(error.value)
    with pytest.raises(CheckpointError, match="--vision-heads"):
        convert(checkpoint, tmp_path / "model", vision_heads=2)


def test_the_exported_copy_can_be_pushed_by_the_library(trained, tmp_path, hub):
    output = convert(trained[1], tmp_path / "model")
    model = load_clean(output)
    model.push_to_hub("someone/tuned")
    files = {name for _, uploaded in hub for name in uploaded}
    assert files >= {"config.json", "model.safetensors", "modeling_uhr_bat.py", "configuration_uhr_bat.py"}
    assert {repository for repository, _ in hub} == {"someone/tuned"}


def test_uhr_bat_tiny_exports_to_an_equal_copy(model_folder, tmp_path):
    output = convert(model_folder, tmp_path / "model")
    expected, written = weights_of(model_folder), weights_of(output)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert {path.name for path in output.iterdir()} >= {path.name for path in model_folder.iterdir()}
    for name in ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"):
        assert same_json(output / name, model_folder / name), name
    assert (output / "tokenizer.json").read_bytes() == (model_folder / "tokenizer.json").read_bytes()
    assert (output / "chat_template.jinja").read_bytes() == (model_folder / "chat_template.jinja").read_bytes()
    model, processor = load_clean(output), AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert processor.image_token_id == model.config.image_token_index
    assert processor.default_budgets == model.config.budgets


# LoRA


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(merged model, base checkpoint, adapter folder) after two steps with LoRA."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    small_model().save_pretrained(folder / "base")
    model = UHRBatForConditionalGeneration.from_pretrained(folder / "base")
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["multi_modal_projector"])
    model = peft.get_peft_model(model, settings)
    adapter = train_two_steps(model, folder / "training")
    return model.merge_and_unload(), folder / "base", adapter


@pytest.mark.slow
def test_an_adapter_is_merged_and_goes_round(adapted, tmp_path):
    merged, base, adapter = adapted
    output = convert(base, tmp_path / "model", merge_adapter=adapter)
    weights, original = weights_of(output), load_file(base / "model.safetensors")
    changed = [name for name in original if not torch.equal(original[name], weights[name])]
    assert any("q_proj" in name for name in changed) and any("multi_modal_projector" in name for name in changed)
    wanted, found = (model.eval()(**question()).logits for model in (merged, load_clean(output)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_adapter_names_its_base_model(adapted, tmp_path):
    merged, base, adapter = adapted
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    exported = load_clean(convert(adapter, tmp_path / "model", merge_adapter=True))
    torch.testing.assert_close(exported(**question()).logits, merged.eval()(**question()).logits, rtol=0, atol=1e-5)


def test_an_adapter_that_is_damaged_or_incomplete_is_refused(adapted, tmp_path):
    _, base, adapter = adapted
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(adapter / "adapter_config.json", folder)
    with pytest.raises(CheckpointError, match="adapter: an adapter without weights"):
        convert(base, tmp_path / "model", merge_adapter=folder)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="adapter: cannot be merged.*missing adapter keys"):
        convert(base, tmp_path / "model", merge_adapter=folder)
    assert nothing_was_made(tmp_path / "model")


def test_an_adapter_that_names_no_base_model_asks_for_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="names no base model"):
        convert(tmp_path, tmp_path / "model", merge_adapter=True)


def test_merging_without_peft_says_what_to_install(trained, tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.lora_A.weight": torch.ones(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match=r'pip install "uhr-bat\[train\]"'):
        convert(trained[1], tmp_path / "model", merge_adapter=tmp_path / "adapter")
    assert nothing_was_made(tmp_path / "model")
