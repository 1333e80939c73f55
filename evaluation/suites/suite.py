"""What every suite says of itself, and how it is loaded."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ...common.answers import option_lines
from ..samples import Cell, Picture, Sample, pictures_in, read_records, with_right_letters
from ..scoring import Scorer


class PaperFigure(NamedTuple):
    """A figure that a paper reports, never one of ours. `says`: over what, and what it is a mean of."""

    model: str
    percent: float
    says: str


class Suite:
    """A benchmark by name; subclasses fill this in.

    Attributes:
        title: as it is called in a report.
        files: patterns of its own files in a folder; `split`, `configuration`: of its data set on the Hub.
        places: folders below the data in which pictures are looked for.
        prompts: {name: Sample -> text}, the first is asked unless another is named.
        scorers: the rules that count; the first one's figure is the suite's.
        averages: {name: Sample -> group}: means of the groups' means, beside the mean over samples.
        paper: figures of the UHR-BAT paper, quoted.
        max_new_tokens: of an answer.
        several: whether several options may be right.
        points: whether a scorer reads boxes, which are then kept in pixels beside the answer.
        version: "lite" or "" of a benchmark that has both, see `find_files`.
    """

    title = ""
    files: tuple[str, ...] = ()
    split = configuration = None
    places: tuple[str, ...] = ("",)
    prompts: dict[str, Callable[[Sample], str]] = {}
    scorers: tuple[Scorer, ...] = ()
    averages: dict[str, Callable[[Sample], str]] = {"macro": lambda sample: sample.task}
    paper: tuple[PaperFigure, ...] = ()
    max_new_tokens = 16
    several = points = False
    version: str | None = None

    def __init__(self, name: str, version: str | None = None):
        self.name, self.version = name, version

    def samples_of(self, record: dict, index: int, pictures: Callable) -> list[Sample]:
        """The samples of a record, the `index`-th of the benchmark; none where it belongs to another part of it.

        `pictures(value)`: the pictures of a field.
        """
        raise NotImplementedError

    def load(self, data: str | None, limit: int | None = None) -> list[Sample]:
        """All samples, or `limit` of them, evenly spaced.

        Raises:
            FileNotFoundError, ValueError: no such data, records of another form, or a right answer that is no option.
        """
        if data is None:
            raise ValueError(f"{self.name} needs --data: a file, a folder or the id of a data set on the Hub.")
        samples = []
        records = read_records(data, self.files, self.split, self.configuration, self.version)
        for index, (record, folders) in enumerate(records):
            if not isinstance(record, dict):
                raise ValueError(f"{data}: record {index} is no dictionary of fields: {str(record)[:80]!r}.")
            found = self.samples_of(record, index, partial(pictures_in, folders=folders, places=self.places))
            samples += [replace(with_right_letters(sample, self.several), row=index) for sample in found]
        if not samples:
            raise ValueError(f"{data} holds no sample of {self.title}.")
        return spaced(unique_ids(samples), limit)

    def open(self, picture: Picture):
        """What the image processor reads: a path, a URL, the bytes of a file, base64 or an image."""
        if picture.source is None:
            raise ValueError("the record names no picture")
        return picture.source.read() if isinstance(picture.source, Cell) else picture.source


def unique_ids(samples: list[Sample]) -> list[Sample]:
    """Samples of one id get numbers, so that no answer is ever counted for another one: "1", "1 (2)", "1 (3)"."""
    taken, seen, found = {sample.id for sample in samples}, Counter(), []
    for sample in samples:
        name = sample.id
        seen[sample.id] += 1
        if seen[sample.id] > 1:
            number = seen[sample.id]
            while (name := f"{sample.id} ({number})") in taken:
                number += 1
            taken.add(name)
            seen[sample.id] = number
        found.append(replace(sample, id=name))
    return found


def spaced(items: list, limit: int | None) -> list:
    """`limit` items, evenly spaced; all where there are no more."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ValueError(f"The limit of samples must be at least 1. Got {limit}.")
    return [items[index * len(items) // limit] for index in range(limit)]


def lettered(sample: Sample) -> str:
    """The options, one a line, each with its letter."""
    return "\n".join(f"{letter}. {text}" for letter, text in option_lines(sample.options).items())
