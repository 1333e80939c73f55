"""Contents of files and of model folders in a few letters, which tie results to them."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

from .models import base_of, hub_name

WHOLE = 4 << 20  # bytes of a file of weights of which every one counts
BLOCK, STEP = 4096, 1 << 20  # of a larger one: so many bytes at every so many, and its end
MOST_HEADER = 100_000_000  # bytes, as safetensors has it
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
LETTERS = 12


def file_digest(path, whole: int = WHOLE) -> str:
    """12 letters that differ between files of different length or content.

    Args:
        whole: bytes up to which every one counts. Of a larger file, 4 KiB at every MiB, and of safetensors names, shapes and the
            beginning of every tensor: a tensor or a picture that was made anew is noticed, a single weight or pixel need not be.
    """
    facts = os.stat(path)
    return _file_digest(str(path), facts.st_size, facts.st_mtime_ns, facts.st_ino, whole)


@cache
def _file_digest(path: str, size: int, changed: int, number: int, whole: int) -> str:
    """A file of many questions is looked at once, as long as nobody writes it anew."""
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= whole:
            while block := file.read(STEP):
                found.update(block)
        else:
            header, starts = _tensors(file) if path.endswith(".safetensors") else (b"", ())
            found.update(header)
            for start in (*range(0, size, STEP), size - BLOCK, *starts):
                file.seek(start)
                found.update(file.read(BLOCK))
    return found.hexdigest()[:LETTERS]


def _tensors(file) -> tuple[bytes, list[int]]:
    """The header of a safetensors file, and where its tensors begin; nothing of a file that is none."""
    length = int.from_bytes(file.read(8), "little")
    header = file.read(min(length, MOST_HEADER))
    try:
        tensors = [one for name, one in json.loads(header).items() if name != "__metadata__"]
        return header, sorted(8 + length + int(one["data_offsets"][0]) for one in tensors)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return b"", []  # whoever loads it says what is wrong


def folder_digest(folder: Path) -> str:
    """Of a model folder: its weights, of large files samples, configuration and tokenizer; of the Hub's, name and revision; of
    an adapter's, those of its model, too."""
    base = base_of(folder)
    found = [base is not None]
    for place in [Path(folder)] + ([base] if base is not None else []):
        if hub := hub_name(place):
            found.append(hub)
            continue
        files = [path for path in sorted(place.iterdir()) if path.suffix in MODEL_FILES and path.is_file()]
        found += [[path.name, file_digest(path)] for path in files]
    return digest(found)


def weights_digest(folder: Path) -> str | None:
    """Of the weights alone, wherever they lie; of an adapter's, with those of its model. None where there are none, as of a
    repository of which nothing was fetched."""
    if not Path(folder).is_dir():
        return None
    places = [Path(folder), base_of(folder)]
    files = [path for place in places if place is not None for path in sorted(place.glob("*.safetensors"))]
    return digest([[path.name, file_digest(path)] for path in files]) if files else None


def digest(value) -> str:
    """Of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:LETTERS]
