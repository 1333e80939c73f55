"""A checkpoint to a model folder: weights, interruptions, memory, the command and the Hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import (
    VISION,
    WIDTH,
    load_clean,
    name_here,
    nothing_was_made,
    released_config,
    released_tensors,
    weights_of,
    with_token_mlp_copy,
    write_released,
)
from copies import run_copies, start_copies
from huggingface_hub import HfApi, metadata_load
from safetensors.torch import load_file, save_file
from uhr_bat.benchmarks.meters import peak_bytes, reset_peak
from uhr_bat.common.loading import ROOT
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.export import convert_checkpoint
from uhr_bat.export.checkpoint_files import CheckpointError
from uhr_bat.export.convert_checkpoint import convert


# Weights


def test_the_model_loads_with_these_weights(exported):
    weights, loaded = weights_of(exported), load_clean(exported).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_shards_of_the_output_have_an_index_and_the_size_asked_for(released, tmp_path):
    output = convert(released, tmp_path / "model", max_shard_size="50KB")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and not (output / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in released_tensors().values())
    for shard in shards:
        tensors = load_file(output / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 50_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == shard for name in tensors)
    load_clean(output)


def test_a_shard_size_that_is_none_is_refused(released, tmp_path):
    with pytest.raises(CheckpointError, match="--max-shard-size big"):
        convert(released, tmp_path / "model", max_shard_size="big")


def test_weights_can_be_cast(released, tmp_path, exported):
    output = convert(released, tmp_path / "model", dtype="bfloat16")
    expected = weights_of(exported)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in weights_of(output).items())
    assert load_clean(output).dtype == torch.bfloat16


def test_without_a_cast_every_tensor_keeps_its_type(tmp_path):
    tensors = {name: value if "norm" in name else value.bfloat16() for name, value in released_tensors().items()}
    output = convert(write_released(tmp_path / "released", tensors), tmp_path / "model")
    assert {name: value.dtype for name, value in weights_of(output).items()} == {
        name_here(name): value.dtype for name, value in tensors.items()
    }
    assert UHRBatConfig.from_pretrained(output).dtype in ("bfloat16", torch.bfloat16)


def test_a_cast_that_overflows_is_refused(tmp_path):
    tensors = released_tensors()
    tensors["model.norm.weight"][0] = 1e6
    with pytest.raises(CheckpointError, match="model.safetensors.*'model.norm.weight'.*float16"):
        convert(write_released(tmp_path / "released", tensors), tmp_path / "model", dtype="float16")
    assert nothing_was_made(tmp_path / "model")


def test_unknown_missing_and_misshapen_tensors_are_all_named_at_once(tmp_path):
    tensors = released_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.scale_pos_residuals.56"]
    tensors["model.image_newline"] = torch.ones(WIDTH)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, WIDTH)
    tensors["model.language_model.norm.weight"] = torch.ones(WIDTH)
    tensors["model.mm_projector.2.weight"] = torch.ones(WIDTH, WIDTH + 1)
    tensors["model.mm_projector.2.bias"] = torch.ones(WIDTH, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        convert(write_released(tmp_path / "released", tensors), tmp_path / "model")
    message, file = str(error.value), re.escape(str(tmp_path / "released" / "model.safetensors"))
    for name in ("model.image_newline", "model.layers.2.mlp.up_proj.weight", "model.language_model.norm.weight"):
        assert re.search(rf"{file}: tensor '{re.escape(name)}' is unknown", message)
    for name in ("model.language_model.layers.1.mlp.up_proj.weight", "model.scale_embedding.tables.56"):
        assert f"missing: '{name}'" in message
    assert re.search(rf"{file}: tensor 'model.mm_projector.2.weight' has the shape \[32, 33\].*\[32, 32\]", message)
    assert re.search(rf"{file}: tensor 'model.mm_projector.2.bias' is of type torch.int64", message)
    assert "in 7 points" in message and nothing_was_made(tmp_path / "model")


@pytest.mark.parametrize("head", ["absent", "equal", "different", "alone"])
def test_a_tied_head_may_be_absent_or_equal(tmp_path, head):
    tensors = released_tensors()
    embeddings = tensors["model.embed_tokens.weight"]
    if head == "absent":
        del tensors["lm_head.weight"]
    elif head != "different":
        tensors["lm_head.weight"] = embeddings.clone()
    if head == "alone":
        del tensors["model.embed_tokens.weight"]
    folder = write_released(tmp_path / "released", tensors, released_config(tie_word_embeddings=True))
    if head == "different":
        with pytest.raises(CheckpointError, match="embed_tokens.weight' differs from 'lm_head.weight'"):
            convert(folder, tmp_path / "model")
        return
    model = load_clean(convert(folder, tmp_path / "model"))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, embeddings)


# Whole or not at all


def test_an_output_that_is_there_is_left_alone(released, tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert(released, output)
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    load_clean(convert(released, output))


@pytest.mark.parametrize("step", ["write_weights", "check_weights", "write_model_card"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(OSError, marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(released, tmp_path, monkeypatch, step, error):
    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        raise error

    original = getattr(convert_checkpoint, step)
    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, step, interrupted)
        with pytest.raises(error):
            convert(released, tmp_path / "model")
    assert nothing_was_made(tmp_path / "model")
    load_clean(convert(released, tmp_path / "model"))


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_a_folder_that_does_not_load_and_is_removed_by_the_next(released, tmp_path):
    def killed():
        convert_checkpoint.check_weights = lambda *args: os.kill(os.getpid(), 9)
        convert(released, output)

    output = tmp_path / "model"
    (process,) = start_copies(1, killed)
    process.join()
    assert process.exitcode == -9
    left = tmp_path / "model.incomplete"
    assert not output.exists() and (left / "model.safetensors").exists() and not (left / "config.json").exists()
    load_clean(convert(released, output))
    assert not left.exists()


def test_a_shard_that_was_not_written_as_it_is_is_noticed(released, tmp_path, monkeypatch):
    def damage(tensors, path, **kwargs):
        tensors["model.language_model.norm.weight"][0] += 1
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(convert_checkpoint, "save_file", damage)
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'model.language_model.norm.weight'"):
        convert(released, tmp_path / "model")
    assert nothing_was_made(tmp_path / "model")


def test_a_full_disk_is_noticed_before_anything_is_written(released, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="10 bytes are free"):
        convert(released, tmp_path / "model")


def test_a_dry_run_prints_the_table_and_writes_nothing(tmp_path, capsys):
    tensors = with_token_mlp_copy(released_tensors()) | {"model.text_to_vision_proj.weight": torch.ones(2)}
    folder = write_released(tmp_path / "released", tensors)
    convert(folder, tmp_path / "there" / "model", dtype="bfloat16", dry_run=True)
    assert not (tmp_path / "there").exists()
    lines = capsys.readouterr().out.splitlines()
    for pattern in [
        r"cast to bfloat16 +float32 +\[1024, 32\] +model.embed_tokens.weight +model.language_model.embed_tokens.weight",
        r"same as model.multiscale_token_mlp.0.bias +float32 +\[32\] +multiscale_token_mlp.0.bias +-",
        r"drop +float32 +\[2\] +model.text_to_vision_proj.weight +-",
    ]:
        assert any(re.fullmatch(pattern, line) for line in lines), pattern


# The command, the Hub


@pytest.mark.slow
def test_the_command_runs_in_a_clone_that_is_not_installed(released, tmp_path):
    # Whatever the clone is called, and whatever `uhr_bat` is installed: the code is that of the clone.
    clone = tmp_path / "UHR-BAT"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "model.safetensors", "tests", "build"))
    (tmp_path / "installed" / "uhr_bat").mkdir(parents=True)
    (tmp_path / "installed" / "uhr_bat" / "__init__.py").write_text("raise ImportError('the installed one')")
    path = os.pathsep.join(filter(None, [str(tmp_path / "installed"), os.environ.get("PYTHONPATH")]))

    def run(*command, checkpoint):
        arguments = [*command, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "model")]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=clone, env=environment)

    # A file, which runs itself again as the module that it is.
    done = run("export/convert_checkpoint.py", checkpoint=released)
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout and "Writing: 100%" in done.stderr and "Checking: 100%" in done.stderr
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    # Raised in one file and caught in another: one class of error.
    refused = run("-m", "export.convert_checkpoint", checkpoint=tmp_path / "empty")
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr


def test_a_checkpoint_of_the_hub_is_fetched_without_code(released, tmp_path, monkeypatch):
    calls = []

    def fetch(repository, **kwargs):
        calls.append((repository, kwargs))
        return str(released)

    monkeypatch.setattr(convert_checkpoint, "snapshot_download", fetch)
    output = convert("someone/some-model", tmp_path / "model")
    assert [repository for repository, _ in calls] == ["someone/some-model"]
    assert not [pattern for _, kwargs in calls for pattern in kwargs["allow_patterns"] if "py" in pattern]
    assert metadata_load(output / "README.md")["base_model"] == ["someone/some-model"]


def test_a_checkpoint_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no/where: neither a folder nor a repository"):
        convert("no/where", tmp_path / "model")


def test_the_finished_folder_is_pushed_whole(released, tmp_path, hub):
    output = convert(released, tmp_path / "model", push_to_hub="someone/UHR-BAT")
    ((repository, files),) = hub
    assert repository == "someone/UHR-BAT"
    assert files == {path.name: path.read_bytes() for path in output.iterdir()}
    assert b'model_id = "someone/UHR-BAT"' in files["README.md"]


def test_a_push_that_fails_leaves_the_folder(released, tmp_path, hub, monkeypatch):
    def refuse(self, **kwargs):
        raise OSError("no token")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    with pytest.raises(CheckpointError, match="complete, but could not be pushed.*no token"):
        convert(released, tmp_path / "model", push_to_hub="someone/UHR-BAT")
    load_clean(tmp_path / "model")


# Memory


def large_tensors(num_layers):
    """(released name, shape) of a decoder 1024 wide, 30 MB a layer in bfloat16, beside the small tower."""
    width, wide = 1024, 4096
    for name, tensor in released_tensors().items():
        shape = [width if size == WIDTH else size for size in tensor.shape]
        if not name.startswith("model.layers."):
            yield name, list(tensor.shape) if name.startswith(VISION) else shape
    for layer in (f"model.layers.{idx}." for idx in range(num_layers)):
        for name in ("q_proj", "k_proj", "v_proj"):
            yield f"{layer}self_attn.{name}.weight", [width, width]
            yield f"{layer}self_attn.{name}.bias", [width]
        yield f"{layer}self_attn.o_proj.weight", [width, width]
        yield f"{layer}mlp.gate_proj.weight", [wide, width]
        yield f"{layer}mlp.up_proj.weight", [wide, width]
        yield f"{layer}mlp.down_proj.weight", [width, wide]
        yield from ((f"{layer}{name}_layernorm.weight", [width]) for name in ("input", "post_attention"))


def write_large(folder, num_bytes, shard_bytes, kind):
    folder.mkdir()
    noise = torch.randn(2**23).bfloat16()
    generator = torch.Generator().manual_seed(0)
    weight_map, shard, size, number, total = {}, {}, 0, 0, 0
    num_layers = num_bytes // (2 * (4 * 1024**2 + 3 * 4096 * 1024))

    def write():
        file = f"{'model' if kind == 'safetensors' else 'pytorch_model'}-{number:05}.{kind}"
        weight_map.update(dict.fromkeys(shard, file))
        (save_file if kind == "safetensors" else torch.save)(shard, folder / file)

    for name, shape in large_tensors(num_layers):
        start = int(torch.randint(2**21, (), generator=generator))
        shard[name] = noise[start : start + torch.Size(shape).numel()].view(shape).clone()
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size > shard_bytes:
            write()
            shard, size, number = {}, 0, number + 1
    write()
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": num_layers, "num_key_value_heads": 4}
    config = released_config(**sizes)
    (folder / "config.json").write_text(json.dumps(config))
    return total


def grow_by_less(most, small, large, output, dtype):
    """Convert a large checkpoint, after a small one, which sets up what every conversion needs."""
    convert(small, output / "small")
    before = reset_peak()
    convert(large, output / "large", max_shard_size="50MB", dtype=dtype)
    assert peak_bytes() - before < most, f"{peak_bytes() - before:,} bytes"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "kind, sharded, dtype, num_bytes, beside",
    [("safetensors", True, "auto", 3.3e8, 1e8), ("bin", False, "float16", 6.6e8, 4e8)],
)
def test_memory_holds_two_shards_and_no_more(released, tmp_path, kind, sharded, dtype, num_bytes, beside):
    shard = 50_000_000
    most = 2 * shard + beside
    assert write_large(tmp_path / kind, int(num_bytes), shard if sharded else 2e9, kind) > 1.2 * most
    run_copies(1, grow_by_less, most, released, tmp_path / kind, tmp_path, dtype)
    shutil.rmtree(tmp_path / kind), shutil.rmtree(tmp_path / "large")
