"""What was asked, in a few letters: digests of samples and of pictures, which tie answers to them."""

import os
from collections.abc import Iterable

from ..common.digests import digest, file_digest
from .samples import Picture, Sample

WHOLE_PICTURE = 4 << 30  # of a picture: half a GiB a second, where reading and decoding it takes longer


def picture_digest(picture: Picture) -> str:
    """Of the file where the picture is one on this machine, else its key, which is the content's digest in tables."""
    if not isinstance(picture.source, str) or not os.path.isfile(picture.source):
        return picture.key
    return file_digest(picture.source, WHOLE_PICTURE)


def asked(sample: Sample) -> str:
    """ "question/pictures": digests of question, options and right answer, and of the pictures' content."""
    question = digest([sample.question, sample.options, sample.answer])
    return f"{question}/{digest([picture_digest(picture) for picture in sample.pictures])}"


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
