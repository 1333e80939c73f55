"""What every suite says of itself, and how it is loaded."""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...common.answers import option_lines
from ...common.images import is_file_name
from ...image_raster_files_uhr_bat import driver_of
from ..samples import Cell, Picture, Sample, pictures_in, read_records, with_right_letters
from ..scoring import Scorer

# What reading raises of files whose values are of other types than those of the benchmark.
NOT_OF_THE_FORM = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


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
        two_dates: whether the two pictures of a sample show one place, the earlier date first: they are then compared.
        points: whether a scorer reads boxes, which are then kept in pixels beside the answer.
        above: how many folders above that of the records may have pictures, too.
        anywhere: whether records may name pictures by any path or address: the data is the user's own.
        box_fields: fields of a record in which boxes of evidence are looked for, where a suite has some.
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
    several = two_dates = points = anywhere = False
    above = 2
    box_fields: tuple[str, ...] = ()
    version: str | None = None

    def __init__(self, name: str, version: str | None = None):
        self.name, self.version = name, version

    def samples_of(self, record: dict, index: int, pictures: Callable) -> list[Sample]:
        """The samples of a record, the `index`-th of the benchmark; none where it belongs to another part of it.

        `pictures(value)`: the pictures of a field.
        """
        raise NotImplementedError

    def records(self, data: str) -> Iterator[tuple[dict, list[Path]]]:
        """(record, folders that its pictures are looked for in) of every row, see `read_records`."""
        return read_records(data, self.files, self.split, self.configuration, self.version)

    def load(self, data: str | None, limit: int | None = None) -> list[Sample]:
        """All samples, or `limit` of them, evenly spaced.

        Raises:
            FileNotFoundError, ValueError: no such data, records of another form, or a right answer that is no option.
        """
        if data is None:
            raise ValueError(f"{self.name} needs --data: a file, a folder or the id of a data set on the Hub.")
        samples = []
        for index, (record, folders) in enumerate(self._records(data)):
            if not isinstance(record, dict):
                raise ValueError(f"{data}: record {index} is no dictionary of fields: {str(record)[:80]!r}.")
            folders = folders[: self.above + 1]
            anywhere = self.anywhere and os.path.exists(data)  # what is on the Hub is somebody else's
            pictures = partial(pictures_in, folders=folders, places=self.places, anywhere=anywhere)
            try:
                found = [
                    with_right_letters(sample, self.several) for sample in self.samples_of(record, index, pictures)
                ]
            except ValueError as error:
                raise ValueError(f"{data}, record {index}: {error}") from error
            except NOT_OF_THE_FORM as error:
                raise ValueError(f"{data}, record {index} is not of the form of {self.title} ({error!r}).") from error
            samples += [replace(sample, row=index) for sample in found]
        if not samples:
            raise ValueError(f"{data} holds no sample of {self.title}.")
        return spaced(unique_ids(samples), limit)

    def _records(self, data):
        """`records`, which raise `ValueError` for files of another form."""
        try:
            yield from self.records(data)
        except NOT_OF_THE_FORM as error:
            raise ValueError(f"{data} is not of the form of {self.title} ({error!r}).") from error

    def open(self, picture: Picture):
        """What the image processor reads: a path, a URL, a file or its bytes, base64 or an image."""
        source = picture.source
        if source is None:
            raise ValueError("the record names no picture")
        if isinstance(source, Cell):
            source = source.read()
        if self.anywhere or not isinstance(source, str):
            return source
        if os.path.isdir(source):
            raise ValueError(f"{source}: the record names a folder, and no picture")
        if not os.path.isfile(source):
            if not is_file_name(source) and not source.startswith("data:"):
                raise ValueError(f"{source[:100]}: the record names an address, and no picture")
            return source
        # A downloaded file is opened as what it begins as: what GDAL reads besides may name other files and addresses.
        with open(source, "rb") as file:
            if driver_of(start := file.read(16)):
                return source
            content = io.BytesIO(start + file.read())
        content.name = source
        return content


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
