"""Meters: FLOPs, device synchronisations, resident memory.

A meter counts what goes on inside its `with` block; `sides.Meter` reads it stage by stage.
"""

import ctypes
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..planning.flops import FlopMeter as FlopMeter

aten = torch.ops.aten


# Device synchronisations

# Operations after which the host waits for a device, to know a value or a size.
SYNCHRONISING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique,
    aten._unique2,
}


class SyncMeter:
    """Counts where the host would wait for a device, by the operations that make it; it runs on a CPU too.

    Reads of values (`.item()`, `bool()`, `.tolist()`), comparisons and what has a size that depends on values:
    `nonzero`, `unique`, boolean masks as an index. Each is one, though `unique` waits more than once. Copies to a device
    are not counted.
    """

    def __init__(self):
        self.count = 0

    def __enter__(self):
        self.modes = ExitStack()
        self.modes.enter_context(_CountOperations(self))
        self.modes.enter_context(_CountLists(self))
        return self

    def __exit__(self, *error):
        self.modes.close()


class _CountOperations(TorchDispatchMode):
    def __init__(self, meter):
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.meter.count += func.overloadpacket in SYNCHRONISING
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            self.meter.count += any(place is not None and place.dtype == torch.bool for place in args[1])
        return func(*args, **(kwargs or {}))


class _CountLists(TorchFunctionMode):
    """`.tolist()` reads memory without an operation."""

    def __init__(self, meter):
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.meter.count += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


# Memory, of Linux: the kernel's own account


def _status(name) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since the process started, or since `reset_peak`. Not `ru_maxrss`, which a child
    process inherits from its parent."""
    return _status("VmHWM")


def read_bytes() -> int:
    """Bytes that this process has asked files for, from the disk or its cache."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def reset_peak() -> int:
    """Hand free memory back to the system and start the peak anew: the bytes that are resident now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()
