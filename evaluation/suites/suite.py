"""What every suite says of itself, and how it is loaded."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ..samples import Cell, Picture, Sample, option_lines, pictures_in, read_records
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

    def __init__(self, name: str):
        self.name = name

    def samples_of(self, record: dict, index: int, pictures: Callable) -> list[Sample]:
        """The samples of a record, the `index`-th of the benchmark; none where it belongs to another part of it.

        `pictures(value)`: the pictures of a field.
        """
        raise NotImplementedError

    def load(self, data: str | None, limit: int | None = None) -> list[Sample]:
        """All samples, or `limit` of them, evenly spaced.

        Raises:
            FileNotFoundError, ValueError: no such data, or records of another form.
        """
        if data is None:
            raise ValueError(f"{self.name} needs --data: a file, a folder or the id of a data set on the Hub.")
        samples = []
        for index, (record, folders) in enumerate(read_records(data, self.files, self.split, self.configuration)):
            samples += self.samples_of(record, index, partial(pictures_in, folders=folders, places=self.places))
        if not samples:
            raise ValueError(f"{data} holds no sample of {self.title}.")
        return spaced(unique_ids(samples), limit)

    def open(self, picture: Picture):
        """What the image processor reads: a path, a URL, the bytes of a file, base64 or an image."""
        return picture.source.read() if isinstance(picture.source, Cell) else picture.source


def unique_ids(samples: list[Sample]) -> list[Sample]:
    """Samples of one id get numbers, so that no answer is ever counted for another one."""
    seen, found = Counter(), []
    for sample in samples:
        seen[sample.id] += 1
        number = seen[sample.id]
        found.append(sample if number == 1 else replace(sample, id=f"{sample.id} ({number})"))
    return found


def spaced(items: list, limit: int | None) -> list:
    """`limit` items, evenly spaced; all where there are no more."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ValueError(f"The limit of samples must be at least 1. Got {limit}.")
    return [items[index * len(items) // limit] for index in range(limit)]


def lettered(sample: Sample, form="{}. {}") -> str:
    """The options, one a line, each with its letter."""
    return "\n".join(form.format(letter, text) for letter, text in option_lines(sample.options).items())
