"""An adapter's folder wherever a model's is taken: asked, served, evaluated, trained on."""

import json

import pytest
import torch
from own_data import make_rows, write_rows
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from uhr_bat.common.loading import load_model
from uhr_bat.examples import ask
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.planning import __main__ as plan
from uhr_bat.serving.decoding import decoder_folder
from uhr_bat.serving.front import fingerprint
from uhr_bat.training import memory, sft
from uhr_bat.training.options import read_options
from uhr_bat.training.parts import quantize_decoder

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return write_rows(folder / "train.json", make_rows(folder, 8))


@pytest.fixture
def adapter(small_folder, tmp_path):
    """A random one, as peft writes it, with a part that is trained whole."""
    _, model = load_model(small_folder, device_map=None)
    settings = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], modules_to_save=["multi_modal_projector"])
    model = get_peft_model(model, settings)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.05
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(model, data, output, *more):
    return sft.train(*read_options([
        "--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(output), "--max_steps", "2",
        "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "1e-2",
        "--save_strategy", "no", "--logging_steps", "1", *more,
    ]))  # fmt: skip


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_and_leaves_one(adapter, small_folder, data, tmp_path):
    trainer = run(adapter, data, tmp_path / "run", "--learning_rate", "0")
    before, after = weights(adapter), weights(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    trained = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert any("lora_A" in name for name in trained) and any("multi_modal_projector" in name for name in trained)
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)
    run(adapter, data, tmp_path / "more")
    after = weights(tmp_path / "more")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("lora_A" in name for name in moved) and any("multi_modal_projector" in name for name in moved)
    settings = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(small_folder) and settings["r"] == 3
    assert load_model(tmp_path / "more", device_map=None)[1].peft_config["default"].r == 3


@pytest.mark.slow
def test_what_a_run_leaves_is_found_from_any_folder(small_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(small_folder.parent)
    run(small_folder.name, data, tmp_path / "run", "--use_peft", "true", "--model_settings", '{"selector": "top_k"}')
    monkeypatch.chdir(tmp_path)
    run("run", data, tmp_path / "more", "--model_settings", '{"anchor_share": 0.5}')
    processor, model = load_model("more", device_map=None)
    assert "default" in model.peft_config and processor.default_budgets == model.config.budgets
    assert (model.config.selector, model.config.anchor_share) == ("top_k", 0.5)


@pytest.mark.slow
def test_commands_take_an_adapter(adapter, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    assert ask.main([str(picture), "What colour?", "--model", str(adapter), "--max-new-tokens", "2"]) == 0
    assert "Answer:" in capsys.readouterr().out
    assert plan.main([str(adapter), "--image-size", "400x300", "--tokens", "12", "--device", "cpu"]) == 0
    arguments = ["--model_name_or_path", str(adapter), "--train_data", "x.json", "--output_dir", str(tmp_path / "o")]
    assert memory.main(arguments) == 0
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere/at-all"}')
    assert ask.main([str(picture), "What colour?", "--model", str(adapter)]) == 2
    assert "an adapter of 'nowhere/at-all'" in capsys.readouterr().err


def test_an_adapter_of_a_larger_model_or_without_weights_or_named_twice_is_refused(adapter, small_folder, tmp_path):
    kept = weights(adapter)
    more = {name.replace("layers.1.", "layers.7."): one.clone() for name, one in kept.items() if "layers.1." in name}
    save_file(kept | more, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"of another model: {len(more)} of its tensors have no place, as .*layers.7."):
        load_model(adapter, device_map=None)
    with pytest.raises(CheckpointError, match="names an adapter twice"):
        convert(str(small_folder), tmp_path / "out", merge_adapter=[str(adapter), f"{adapter}/../adapter"])
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="an adapter without weights, there is no adapter_model.safetensors"):
        load_model(adapter, device_map=None)


def test_a_served_adapter_is_known_by_its_weights_and_its_models(adapter, small_folder, tmp_path):
    one = fingerprint(adapter)
    assert one == fingerprint(adapter) != fingerprint(small_folder)
    _, model = load_model(adapter, device_map=None)
    with pytest.raises(ValueError, match="decoder of an adapter cannot be written out. Merge it"):
        decoder_folder(model, one, tmp_path)


@pytest.mark.slow
def test_an_adapter_answers_on_weights_of_four_bits_without_a_merge(small_folder, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    trainer = run(small_folder, data, tmp_path / "run", "--use_peft", "true", "--load_in_4bit", "true", "--lora_dropout", "0")
    ids = torch.arange(5, 40)[None]
    # In training's way: bitsandbytes answers on CPUs by rows of 64 and more, and these have 32.
    live = trainer.model.train()(input_ids=ids).logits
    _, model = load_model(tmp_path / "run", torch.float32, None, quantize_decoder(4, torch.bfloat16))
    torch.testing.assert_close(model.train()(input_ids=ids).logits, live, rtol=1e-2, atol=1e-2)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    more = run(tmp_path / "run", data, tmp_path / "more", "--load_in_4bit", "true")
    assert weights(tmp_path / "more").keys() == weights(tmp_path / "run").keys() and more.state.global_step == 2
