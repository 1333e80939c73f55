"""What stands beside the weights: code, tokenizer, processors, and the folder of the 7B model."""

import json
import shutil

import pytest
import torch
from checkpoints import ROWS, load_clean, nothing_was_made, released_config, released_tensors, same_json, write_released
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from uhr_bat.common.loading import ROOT
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.export import convert_checkpoint, model_folder
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor


CODE = sorted(path.name for path in ROOT.glob("*_uhr_bat.py"))


def test_the_folder_is_complete(exported):
    assert {path.name for path in exported.iterdir()} == {
        *CODE, "LICENSE", "README.md", "config.json", "generation_config.json", "preprocessor_config.json",
        "processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    }  # fmt: skip
    weights = exported / "model.safetensors"
    assert safe_open(weights, "pt").metadata() == {"format": "pt"}
    assert oct(weights.stat().st_mode)[-3:] == "644"


# Tokenizer and processors


def test_the_tokenizer_gets_an_image_token(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    image = UHRBatConfig.from_pretrained(exported).image_token_index
    assert image == 1023
    ids = tokenizer("a<image>\nb").input_ids
    assert ids.count(image) == 1 and tokenizer.decode(ids) == "a<image>\nb"
    assert tokenizer.model_max_length == 300 and tokenizer.padding_side == "left"
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["padding_side"] == "left" and settings["model_max_length"] == 300
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation == {"do_sample": False, "eos_token_id": [1022], "pad_token_id": 1022}


def test_the_exported_processor_and_model_agree(exported):
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    model = load_clean(exported)
    inputs = processor(text="<image>What?", images=Image.new("RGB", (60, 40)), return_tensors="pt")
    assert inputs["token_counts"].tolist() == [[4, 16]]
    assert model(**inputs).logits.isfinite().all()


def test_a_tokenizer_of_qwens_own_files_works_too(tmp_path):
    folder = write_released(tmp_path / "released", tokenizer=False)
    tokenizer = json.loads((ROOT / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 123, "chat_template": "{{ 'not this one' }}"}
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: token[key] for key in token if key != "id"}
        for token in tokenizer["added_tokens"]
        if token["content"] != "<image>"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {k: v for k, v in released_config().items() if k != "tokenizer_model_max_length"}
    (folder / "config.json").write_text(json.dumps(config))
    output = convert(folder, tmp_path / "model")
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert processor.tokenizer("<image>").input_ids == [1023]
    assert processor.tokenizer.model_max_length == 123
    assert "not this one" not in processor.chat_template


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path, capsys):
    output = convert(write_released(tmp_path / "released", tokenizer=False), tmp_path / "model")
    assert "tokenizer: none" in capsys.readouterr().out
    assert UHRBatConfig.from_pretrained(output).image_token_index == ROWS - 1
    assert not list(output.glob("tokenizer*")) and "held no tokenizer" in (output / "README.md").read_text()
    load_clean(output)


def test_code_that_a_tokenizer_names_does_not_get_into_the_folder(released, tmp_path):
    settings = json.loads((released / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "someone/else--tokenizer.Tokenizer"]}
    (released / "tokenizer_config.json").write_text(json.dumps(settings))
    output = convert(released, tmp_path / "model")
    assert "someone" not in (output / "tokenizer_config.json").read_text()


def test_an_image_token_without_a_row_is_refused(tmp_path):
    tensors = released_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:1023].clone()
    folder = write_released(tmp_path / "released", tensors, released_config(vocab_size=1023))
    with pytest.raises(CheckpointError, match=r"\[1023\].*below 1023"):
        convert(folder, tmp_path / "model")
    assert nothing_was_made(tmp_path / "model")


def test_a_broken_tokenizer_is_refused(released, tmp_path):
    (released / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        convert(released, tmp_path / "model")
    assert nothing_was_made(tmp_path / "model")


def test_a_tokenizer_with_another_image_token_is_refused(model_folder, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": 5}))
    with pytest.raises(CheckpointError, match=r"\[1023\].*\[5\]"):
        convert(folder, tmp_path / "model")


def test_the_image_processors_numbers_are_kept(released, tmp_path):
    (released / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0],
        "crop_size": {"height": 999, "width": 999}, "size": {"shortest_edge": 999},
    }))  # fmt: skip
    processor = UHRBatImageProcessor.from_pretrained(convert(released, tmp_path / "model"))
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.crop_size["height"] == 28 and processor.scales == [28, 56] and not processor.mask_padding


# The 7B folder


def test_the_7b_folder_is_what_is_written_for_it(tmp_path):
    model_folder.write_7b(tmp_path)
    kept = ROOT / "export" / "uhr_bat_7b"
    assert sorted(path.name for path in kept.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    for path in kept.iterdir():
        assert same_json(path, tmp_path / path.name), path.name


def test_the_7b_folder_holds_the_papers_numbers_and_makes_a_model(tmp_path):
    config = UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    text, vision = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (28, 3584, 152064)
    assert (text.num_attention_heads, text.num_key_value_heads, text.intermediate_size) == (28, 4, 18944)
    assert (vision.num_hidden_layers, vision.hidden_size, vision.image_size, vision.patch_size) == (24, 1024, 336, 14)
    assert config.scales == [672, 1344, 2688, 4032] and config.budgets == [80, 320, 600, 2000]
    assert (config.num_regions, config.threshold, config.question_tokens) == (600, "ge", "all")
    assert (config.scale_embedding_form, config.token_mlp) == ("factorized", False)
    model = convert_checkpoint.meta_model(config)
    assert 7.9e9 < sum(parameter.numel() for parameter in model.parameters()) < 8e9


def test_the_7b_folder_loads_with_the_code_beside_it(tmp_path):
    shutil.copytree(ROOT / "export" / "uhr_bat_7b", tmp_path / "model")
    model_folder.write_code(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "UHRBatForConditionalGeneration" and model.lm_head.weight.shape == (152064, 3584)
    processor = UHRBatImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.scales == config.scales and processor.crop_size["height"] == 336
