"""Trained weights on disk, read one tensor at a time: safetensors or PyTorch files, alone or in shards.

No code of a checkpoint is ever run, no file outside its folder is opened, no more than one file is mapped at a time.
"""

import json
import pickletools
import re
import warnings
import zipfile
from dataclasses import dataclass
from math import inf
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open

# Where weights are looked for, in the order of transformers; then shards without an index.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_PATTERNS = ("model-*.safetensors", "pytorch_model*.bin")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}

# Bytes that are read before a file is mapped anew: pages of a mapped file count as memory for as long as it is mapped.
MAPPED_BYTES = 2**28


class CheckpointError(ValueError):
    """A checkpoint that cannot be exported; the message names the file, and the tensor where there is one."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is. `dtype` is the file's own word where torch has none for it."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | str


def read_json(path: Path) -> dict:
    """An object from a JSON file. Raises `CheckpointError` if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a JSON object.")
    return value


class Checkpoint:
    """The tensors of a folder. `tensors`: name -> [`TensorInfo`], in the order in which they are cheap to read."""

    def __init__(self, folder: Path):
        self.tensors: dict[str, TensorInfo] = {}
        self._path, self._handle, self._mapped = None, None, 0
        weight_map, paths = find_weights(folder)
        for path in paths:
            wanted = [name for name, shard in weight_map.items() if shard == path.name]
            handle = self._open(path, wanted)
            for name in _names(handle):
                if weight_map.get(name, path.name) != path.name:
                    continue
                if name in self.tensors:
                    raise CheckpointError(f"{path}: tensor {name!r} is also in {self.tensors[name].path.name}.")
                self.tensors[name] = _info(handle, name, path)
            absent = [name for name in wanted if name not in self.tensors]
            if absent:
                raise CheckpointError(f"{path}: the index puts tensors here that the file does not hold: {absent}.")

    def read(self, name: str) -> torch.Tensor:
        """One tensor, perhaps still on disk: copy it, so that the file need not stay mapped."""
        info = self.tensors[name]
        if info.path != self._path or self._mapped > MAPPED_BYTES:
            self._open(info.path)
        tensor = self._handle[name] if isinstance(self._handle, dict) else self._handle.get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor.detach()

    def _open(self, path, wanted=()):
        self._handle = None  # the file before goes first
        is_safetensors = path.suffix == ".safetensors"
        self._handle = _open_safetensors(path, wanted) if is_safetensors else _open_pickle(path, wanted)
        # PyTorch's old format cannot be mapped: it is in memory as a whole, and opening it again gains nothing.
        self._mapped = 0 if is_safetensors or zipfile.is_zipfile(path) else -inf
        self._path = path
        return self._handle


def find_weights(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """The index (tensor name -> file name, empty where there is none) and the weight files of a folder.

    Raises:
        CheckpointError: no weights, a shard that is missing, or an index that names anything but files of the folder.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            if path.suffix != ".json":
                return {}, [path]
            weight_map = _read_index(path)
            return weight_map, [folder / shard for shard in dict.fromkeys(weight_map.values())]
    for pattern in WEIGHT_PATTERNS:
        paths = sorted(folder.glob(pattern))
        if paths:
            numbered = [re.fullmatch(r".*-(\d+)-of-(\d+)", path.stem) for path in paths]
            totals = {int(match[2]) for match in numbered if match}
            if totals and totals != {len(paths)}:
                raise CheckpointError(f"{folder}: {len(paths)} of {max(totals)} shards {pattern} are there.")
            return {}, paths
    hint = ""
    if (folder / "adapter_config.json").is_file():
        hint = " This is an adapter: --merge-adapter merges it into the model that it was trained on."
    elif any(folder.glob("global_step*")) or any(folder.glob("pytorch_model_fsdp_*")):
        hint = " These are parts of several processes: consolidate them (zero_to_fp32.py, accelerate merge-weights)."
    raise CheckpointError(f"{folder}: no weights. Looked for {', '.join(WEIGHT_FILES + WEIGHT_PATTERNS)}.{hint}")


def _read_index(path):
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no `weight_map` from tensor names to files.")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and PurePosixPath(shard).name == PureWindowsPath(shard).name == shard
        if not plain or PurePosixPath(shard).suffix not in (".safetensors", ".bin"):
            raise CheckpointError(
                f"{path}: puts tensor {name!r} into {shard!r}, which is not the name of a weight file beside it."
            )
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"{path}: puts tensor {name!r} into {shard!r}, but there is no such file.")
    return weight_map


def _open_safetensors(path, wanted):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {_describe_damage(path) or error}{_said_to_hold(wanted)}") from error


def _describe_damage(path) -> str | None:
    """What is cut off a safetensors file, as far as its header tells: 8 bytes of length, JSON, the data."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return f"damaged or truncated: {size} bytes do not hold the header."
        try:
            header = json.loads(file.read(length))
            ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"}
        except (ValueError, TypeError, KeyError, IndexError):
            return None
    cut = sorted((end, name) for name, end in ends.items() if end > size)
    if not cut:
        return None
    return f"truncated: tensor {cut[0][1]!r} ends at byte {cut[0][0]}, the file at {size}; {len(cut)} tensors are cut."


def _open_pickle(path, wanted) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of a damaged file the unpickler raises whatever it likes
        reason = _describe_pickle(path) or f"damaged, truncated or no file of tensors ({type(error).__name__})."
        raise CheckpointError(f"{path}: refused: {reason}{_said_to_hold(wanted)}") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}, not tensors by name.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: entry {name!r} is a {type(tensor).__name__}, not a plain tensor.")
    return tensors


def _describe_pickle(path) -> str | None:
    """The first thing of a pickle that is no part of a tensor, and the entry it is in. Reads opcodes, runs nothing."""
    try:
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            file = archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            file = open(path, "rb")
        with file:
            strings = [""] * 3
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                    entry, found = strings[-1], argument
                    if opcode.name == "STACK_GLOBAL":  # its two names stand on the stack
                        entry, found = strings[-3], " ".join(strings[-2:])
                    package = found.split()[0].split(".")[0]
                    if package not in ("torch", "collections") or found.startswith("torch.nn"):
                        found = found.replace(" ", ".")
                        return f"it holds code or objects, not only tensors: {found} in entry {entry!r}."
                elif isinstance(argument, str):
                    strings = strings[-2:] + [argument]
    except Exception:  # nor does a damaged file have to be a pickle
        return None


def _said_to_hold(wanted):
    return f" By the index it holds {len(wanted)} tensors, {wanted[0]!r} first." if wanted else ""


def _names(handle):
    return handle if isinstance(handle, dict) else handle.offset_keys()


def _info(handle, name, path) -> TensorInfo:
    if isinstance(handle, dict):
        return TensorInfo(path, tuple(handle[name].shape), handle[name].dtype)
    entry = handle.get_slice(name)
    return TensorInfo(path, tuple(entry.get_shape()), DTYPES.get(entry.get_dtype(), entry.get_dtype()))
