"""Engines on two processes: what one process learns from two batches a step, saved, taken up again and made whole.

The files are those that GPUs get. Here each process is a CPU, through gloo; ZeRO runs where DeepSpeed is installed.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import torch.distributed.run
from accelerate import state
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from copies import run_copies
from own_data import ask, make_model_folder, make_rows, write_rows
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.training import sft
from uhr_bat.training.collator import UHRBatDataCollator
from uhr_bat.training.data import load_samples
from uhr_bat.training.engines import ENGINES
from uhr_bat.training.options import read_options
from uhr_bat.training.trainer import UHRBatTrainer

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="it takes DeepSpeed: deepspeed.txt")
SHARDED = ["fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return write_rows(folder / "train.json", make_rows(folder, 4 * STEPS))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("small"))


def arguments(small_folder, data, output, *more):
    return [
        "--model_name_or_path", str(small_folder), "--train_data", str(data), "--output_dir", str(output),
        "--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--report_to", "none", "--disable_tqdm", "true",
        "--learning_rate", "1e-2", "--visual_learning_rate", "5e-3", "--logging_steps", "1", "--save_steps", "2", *more,
    ]  # fmt: skip


def launch_anew(engine, *options):
    """Two processes as a user starts them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ENGINES[engine])]
    command = ["-m", "uhr_bat", "train", *options, "--use_cpu", "true"]
    done = subprocess.run(
        [*launcher, "--num_processes", "2", "--main_process_port", "0", *command],
        env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture
def launch(monkeypatch):
    """Two processes of an engine. DDP's are started as a user starts them; of what `accelerate launch` starts for the others,
    copies of this process have the imports already."""

    def launch(engine, *options):
        if engine == "ddp":
            return launch_anew(engine, *options)
        command = ["--config_file", str(ENGINES[engine]), "--num_processes", "2", "--main_process_port", "0"]
        options = [*options, "--ddp_backend", "gloo"]
        train = train_sharded if engine == "fsdp2" else train_with_deepspeed
        monkeypatch.setattr(torch.distributed.run, "run", lambda _: run_copies(2, train, options))
        launch_command(launch_command_parser().parse_args([*command, "-m", "uhr_bat"]))

    return launch


def train_sharded(options):
    """accelerate shards by FSDP on GPUs alone: it is told that every process has one, which is the CPU, and that they speak
    through gloo. What it does with the engine's file from there on is its own."""
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    return sft.main(options)


def train_with_deepspeed(options):
    """DeepSpeed compiles C++ by which processes on CPUs speak through shared memory: that takes longer than all else here. They
    speak through gloo."""
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return sft.main(options)


@pytest.fixture(scope="module")
def alone(small_folder, data, tmp_path_factory):
    """(losses, folder) of one process that takes two batches a step."""
    output = tmp_path_factory.mktemp("alone")
    more = ["--use_cpu", "true", "--gradient_accumulation_steps", "2"]
    trainer = sft.train(*read_options(arguments(small_folder, data, output, *more)))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], output


def scores(folder, data):
    """Logits of the first samples, in this process."""
    processor, model = load_model(folder, device_map=None)
    batch = UHRBatDataCollator(processor)([load_samples(data, processor)[idx] for idx in range(2)])
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", *SHARDED])
def test_two_processes_learn_what_one_does_and_go_on_and_are_made_whole(
    engine, launch, small_folder, data, alone, tmp_path
):
    output, again = tmp_path / "out", tmp_path / "again"
    launch(engine, *arguments(small_folder, data, output))
    found = losses_of(output)
    # The order of sums differs, and Adam makes the smallest gradients as large as others.
    assert found == pytest.approx(alone[0], rel=2e-3) and found[-1] < 0.8 * found[0]
    torch.testing.assert_close(scores(output, data), scores(alone[1], data), rtol=0.05, atol=0.05)
    if engine == "ddp":
        return
    again.mkdir()
    shutil.copytree(output / "checkpoint-2", again / "checkpoint-2")
    launch(engine, *arguments(small_folder, data, again))
    assert losses_of(again) == pytest.approx(losses_of(output))
    expected = scores(output, data)
    torch.testing.assert_close(scores(again, data), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores(consolidate(engine, output), data), expected, rtol=1e-5, atol=1e-5)


def losses_of(folder):
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def consolidate(engine, output):
    """A model folder of a checkpoint in parts, by the engine's own tool and the export."""
    checkpoint, whole = output / f"checkpoint-{STEPS}", output.parent / "whole"
    shutil.copytree(output, whole, ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors"))
    if engine == "fsdp2":
        run_copies(
            1, run_as_script, runpy.run_module, "accelerate.commands.merge", checkpoint / "pytorch_model_fsdp_0", whole
        )
    else:
        run_copies(1, run_as_script, runpy.run_path, checkpoint / "zero_to_fp32.py", checkpoint, whole)
    return convert(checkpoint=whole, output=output.parent / "exported")


def run_as_script(run, tool, *arguments):
    sys.argv = list(map(str, (tool, *arguments)))
    run(str(tool), run_name="__main__")


def test_samples_that_would_make_processes_wait_are_refused(small_folder, data, tmp_path, monkeypatch):
    rows = [*make_rows(tmp_path, 4), {"conversations": ask("What is a pier?", " A place.")}]
    mixed = write_rows(tmp_path / "mixed.json", rows)
    monkeypatch.setattr(UHRBatTrainer, "shares_weights", True)
    with pytest.raises(ValueError, match="the samples have 0, 1 images"):
        sft.train(*read_options(arguments(small_folder, mixed, tmp_path / "out", "--use_cpu", "true")))
