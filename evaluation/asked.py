"""What was asked, in a few letters: digests of samples, of pictures and of a model's folder, which tie answers to
them."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..common.models import base_of, hub_name
from .samples import Picture, Sample

WHOLE = 4 << 20  # bytes of a file of weights of which every one counts
WHOLE_PICTURE = 4 << 30  # of a picture: half a GiB a second, where reading and decoding it takes longer
BLOCK, STEP = 4096, 1 << 20  # of a larger one: so many bytes at every so many, and its end
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
LETTERS = 12


def file_digest(path, whole: int = WHOLE) -> str:
    """12 letters that differ between files of different length or content.

    Args:
        whole: bytes up to which every one counts. Of a larger file, 4 KiB at every MiB: a tensor of a MiB or a picture that
            was made anew is noticed, a single weight or pixel need not be.
    """
    size, found = os.path.getsize(path), hashlib.sha256()
    found.update(str(size).encode())
    with open(path, "rb") as file:
        if size <= whole:
            while block := file.read(STEP):
                found.update(block)
        else:
            for start in (*range(0, size, STEP), size - BLOCK):
                file.seek(start)
                found.update(file.read(BLOCK))
    return found.hexdigest()[:LETTERS]


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
    return _digest(found)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:LETTERS]


@cache
def _file_digest(path: str, size: int, changed: int) -> str:
    """A picture of many questions is looked at once, as long as nobody writes it anew."""
    return file_digest(path, WHOLE_PICTURE)


def picture_digest(picture: Picture) -> str:
    """Of the file where the picture is one on this machine, else its key, which is the content's digest in tables."""
    if not isinstance(picture.source, str) or not os.path.isfile(picture.source):
        return picture.key
    found = os.stat(picture.source)
    return _file_digest(picture.source, found.st_size, found.st_mtime_ns)


def asked(sample: Sample) -> str:
    """ "question/pictures": digests of question, options and right answer, and of the pictures' content."""
    question = _digest([sample.question, sample.options, sample.answer])
    return f"{question}/{_digest([picture_digest(picture) for picture in sample.pictures])}"


def same_question(one: str, other: str) -> bool:
    """Whether two of `asked` are about the same question, whatever the pictures."""
    return one.split("/")[0] == other.split("/")[0]


def check_asked(
    place, samples: Iterable[Sample], lines: dict, pictures: bool = True, mend: str = "Give another --output."
):
    """Raises `ValueError` where `lines` {(sample, view): line} hold answers to other questions than the samples, or
    about other pictures; a failed answer is none."""
    of = {sample.id: sample for sample in samples}
    if missing := sorted({name for name, _ in lines} - set(of)):
        raise ValueError(
            f"{place} holds answers to {len(missing)} samples that the data no longer has, as {missing[0]!r}. {mend}"
        )
    digests = {}
    for (name, view), line in lines.items():
        digests[name] = digests.get(name) or asked(of[name])
        before = line.get("asked")
        if before is None:
            raise ValueError(f"{place} holds answers that do not say what was asked (an older run). {mend}")
        seen = pictures and line["error"] is None and view == "image"
        if before != digests[name] if seen else not same_question(before, digests[name]):
            what = "about another picture" if same_question(before, digests[name]) else "to another question"
            raise ValueError(
                f"{place} holds a run with other data: its answer to {name!r} is one {what} (digest "
                f"{before}, that of the data is {digests[name]}). {mend}"
            )
