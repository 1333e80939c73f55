"""python on_cpus.py ...: `uhr-bat train ...` where `accelerate launch` started it, on CPUs.

accelerate shards on GPUs alone. Here it is told that every process has one, which is the CPU, and that they speak through
gloo; what it does with the engine's file from there on is its own.
"""

import sys

import conftest  # noqa: F401  makes the package importable
import torch
from accelerate import state
from accelerate.utils import DistributedType


def pretend(self, cpu=False, sagemaker_dp=False, backend=None):
    return "gloo", DistributedType.MULTI_XPU


def use_cpu(self):
    self.device = torch.device("cpu")


state.PartialState._prepare_backend = pretend
state.PartialState.set_device = use_cpu

if __name__ == "__main__":
    from uhr_bat.training.sft import main

    sys.exit(main(sys.argv[1:]))
