"""Weight files of every kind: whole, damaged, hostile."""

import json
import os
import pickle
import re

import pytest
import torch
from checkpoints import nothing_was_made, released_tensors, weights_of, write_released
from safetensors.torch import save_file
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.convert_checkpoint import convert


@pytest.mark.parametrize(
    "how", ["safetensors shards index", "safetensors shards", "bin", "bin shards index", "bin shards", "bin old"]
)
def test_every_kind_of_weight_file_gives_the_same_weights(tmp_path, exported, how):
    output = convert(write_released(tmp_path / "released", how=how, tokenizer=False), tmp_path / "model")
    expected, written = weights_of(exported), weights_of(output)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())


# Hostile


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("how", ["zip", "old", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    folder = write_released(tmp_path / "released", how="bin")
    tensors = {"model.norm.weight": torch.ones(2), "model.embed_tokens.weight": Bomb()}
    if how == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"released/pytorch_model.bin: refused") as error:
        convert(folder, tmp_path / "model")
    if how != "old":
        assert re.search(r"(posix|nt).system in entry 'model.embed_tokens.weight'", str(error.value))
    assert not (tmp_path / "exploded").exists() and nothing_was_made(tmp_path / "model")


def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path):
    folder = write_released(tmp_path / "released", how="bin")
    for content, message in [([1, 2], "a list"), ({"model.norm.weight": {"a": 1}}, "'model.norm.weight' is a dict")]:
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=f"pytorch_model.bin.*{message}"):
            convert(folder, tmp_path / "model")


# Damaged


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_a_truncated_safetensors_shard_is_refused(tmp_path, kept):
    folder = write_released(tmp_path / "released", how="safetensors shards index")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: .*truncated") as error:
        convert(folder, tmp_path / "model")
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(f"'{name}'" in str(error.value) for name, file in names.items() if file == shard.name)


def test_a_truncated_pytorch_shard_is_refused(tmp_path):
    folder = write_released(tmp_path / "released", how="bin shards index")
    shard = folder / "pytorch_model-00003-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:20_000])
    first = list(released_tensors())[2]
    with pytest.raises(CheckpointError, match=rf"pytorch_model-00003-of-00003.bin: .*truncated.*'{first}'"):
        convert(folder, tmp_path / "model")


# The index


OUTSIDE = ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "..\\x.bin", "..", "", "x.py", 5]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, shard):
    folder = write_released(tmp_path / "released", how="safetensors shards index")
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json.*'lm_head.weight'.*not the name of a weight file"):
        convert(folder, tmp_path / "model")


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = write_released(tmp_path / "released", how="safetensors shards index")
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="index.json: puts tensor '.*'model-00003-of-00003.safetensors', but"):
        convert(folder, tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 shards"):
        convert(folder, tmp_path / "model")


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path):
    folder = write_released(tmp_path / "released", how="safetensors shards index")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.nowhere"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.safetensors: the index.*model.nowhere"):
        convert(folder, tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[1]", '{"weight_map": []}'])
def test_a_broken_index_is_refused(released, tmp_path, content):
    (released / "model.safetensors").unlink()
    (released / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json"):
        convert(released, tmp_path / "model")


def test_folders_without_weights_say_what_is_missing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        convert(tmp_path / "empty", tmp_path / "model")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--merge-adapter"):
        convert(tmp_path / "empty", tmp_path / "model")
    (tmp_path / "parts" / "global_step2").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="consolidate"):
        convert(tmp_path / "parts", tmp_path / "model")
