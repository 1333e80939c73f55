"""The model before training: the files of the root that a script writes."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from uhr_bat.common.loading import ROOT
from uhr_bat.export import build_tiny


@pytest.mark.slow
def test_the_configuration_files_are_what_the_build_writes(tmp_path):
    config = build_tiny.tiny_config(build_tiny.build_tokenizer(tmp_path))
    build_tiny.write_configs(tmp_path, config)
    for path in tmp_path.iterdir():
        written, kept = (json.loads(file.read_text(encoding="utf-8")) for file in (path, ROOT / path.name))
        for values in (written, kept):
            values.pop("transformers_version", None)
            values.pop("pointer", None)  # which its stage adds
        assert written == kept, path.name


@pytest.mark.slow
def test_the_untrained_model_is_a_whole_folder_that_never_replaces_weights(tmp_path, capsys):
    build_tiny.main(["--output", str(tmp_path)])
    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    kept = load_file(ROOT / "model.safetensors").items()
    shapes = {name: weight.shape for name, weight in kept if ".pointer." not in name}
    assert {name: weight.shape for name, weight in load_file(tmp_path / "model.safetensors").items()} == shapes
    assert processor.image_processor.scales == model.config.scales == [64, 128, 256, 384]
    weights = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as ended:
        build_tiny.main(["--output", str(tmp_path), "--seed", "1"])
    assert ended.value.code == 2 and "is there already" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == weights
