"""What a benchmark consists of, whatever its files look like: samples, and the records that they are made of.

JSON and JSONL are read as they are; tables (parquet, arrow, TSV, CSV) and data sets of the Hub by the `datasets`
library, which maps them into memory: a picture is read from them when it is needed.
"""

import csv
import hashlib
import json
import os
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..common.data_tables import leave_files_closed
from ..common.extras import require

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tsv": "csv", ".csv": "csv"}
LINES = (".jsonl", ".json")
ENDS = 65536  # bytes at either end of a picture in a table that, with its length, tell it from the others


@dataclass(frozen=True)
class Cell:
    """A picture in a table: the row and column, and which one where the cell holds a list."""

    table: object = field(repr=False, compare=False)
    row: int
    column: str
    position: int | None = None

    def read(self) -> str | bytes:
        """The encoded file, as bytes or in base64, or its path, as the image processor takes them."""
        value = self.table[self.row][self.column]
        value = value if self.position is None else value[self.position]
        return (value["bytes"] or value["path"]) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Picture:
    """`key`: equal for equal pictures, which are encoded once. `source`: what the suite opens."""

    key: str
    source: object = field(repr=False, compare=False)


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: unique in the suite.
        pictures: in the order in which the prompt shows them.
        question, options, answer: as they stand in the file; options with or without their letters.
        task: the finest unit that the suite averages over.
        section: a part of the suite with figures of its own, "" where there is none.
        groups: what other averages go over, by the name of the average.
        boxes: float (x0, y0, x1, y1) in pixels of the first picture, of objects that the answer needs.
    """

    id: str
    pictures: tuple[Picture, ...]
    question: str
    answer: str
    options: tuple[str, ...] = ()
    task: str = ""
    section: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    boxes: tuple[tuple[float, float, float, float], ...] = ()

    @property
    def picture_keys(self) -> tuple[str, ...]:
        return tuple(picture.key for picture in self.pictures)


def first(record: dict, *names, default=None):
    """The value of the first of some names that a record has."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    if default is not None:
        return default
    raise ValueError(f"A record has none of the fields {list(names)}: its fields are {sorted(record)}.")


def text_of(value) -> str:
    """ "3" from 3 and from 3.0, which tables make of it; the joined parts of a list."""
    if isinstance(value, (list, tuple)):
        return "".join(map(text_of, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def option_columns(record: dict) -> list[str]:
    """Options that stand in columns of their own, "A" to "Z": ["A. red", "B. blue"]."""
    letters = [letter for letter in string.ascii_uppercase if record.get(letter) not in (None, "", "nan")]
    return [f"{letter}. {text_of(record[letter])}" for letter in letters]


def option_lines(options) -> dict[str, str]:
    """{letter: text} of options, whether they are written "(A) red", "A. red" or "red".

    Only letters that all options have, in their order, are letters: "N. of it" and "S. of it" are texts.
    """
    options = [option.strip() for option in options]
    found = [re.fullmatch(r"\(?([A-Z])[.):]\s*(.*)", option, re.DOTALL) for option in options]
    letters = [match[1] for match in found if match]
    if len(letters) == len(options) and letters[:1] == ["A"] and sorted(set(letters)) == letters:
        return {match[1]: match[2].strip() for match in found}
    return {chr(ord("A") + index): option for index, option in enumerate(options)}


# ---- Files -----------------------------------------------------------------------------------------------------------


def find_files(data: str, patterns) -> list[Path]:
    """The files of a benchmark: one that is named, or those of a folder that fit the first pattern that any fits."""
    path = Path(data)
    if path.is_file():
        return [path]
    for pattern in (*patterns, "*.jsonl", "*.json", "*.parquet", "*.tsv", "*.arrow"):
        if found := sorted(path.glob(pattern)):
            return found
    raise FileNotFoundError(f"{data}: no file of this benchmark is in the folder. Looked for {', '.join(patterns)}.")


def read_lines(path: Path) -> list[dict]:
    """Records of JSON (a list, or a dictionary that holds one) or JSONL, which some call .json too."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: this is no JSON ({error}).") from error
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else [found]
    return found


def read_records(data: str, patterns=(), split=None, name=None) -> Iterator[tuple[dict, list[Path]]]:
    """(record, folders that its pictures are looked for in) of every row of a benchmark.

    Args:
        data: a file, a folder, or the id of a data set on the Hub.
        patterns: how the benchmark's own files are called.
        split, name: of the data set on the Hub.

    Raises:
        FileNotFoundError: no such file or folder, and no id.
    """
    if not os.path.exists(data):
        if data.count("/") != 1 or data.startswith(("/", ".", "~")):
            raise FileNotFoundError(
                f"{data}: there is no such file or folder, and it is no id of a data set (OWNER/NAME)."
            )
        require("evaluate", "datasets")
        from datasets import load_dataset

        yield from _rows(load_dataset(data, name, split=split or "train"), [])
        return
    for path in find_files(data, patterns):
        folders = [path.parent, *list(path.parent.parents)[:2]]
        if path.suffix in LINES:
            yield from ((record, folders) for record in read_lines(path))
        elif path.suffix in TABLES:
            require("evaluate", "datasets")
            from datasets import load_dataset

            options = _csv_options(path) if TABLES[path.suffix] == "csv" else {}
            table = load_dataset(TABLES[path.suffix], data_files=str(path), split="train", **options)
            yield from _rows(table, folders)
        else:
            raise ValueError(f"{path}: a benchmark is JSON, JSONL, parquet, arrow, TSV or CSV.")


def _csv_options(path) -> dict:
    """Every column is text, "None" and "007" too; rows with whole pictures are read some at a time."""
    from datasets import Features, Value

    separator = "\t" if path.suffix == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=separator))
    features = Features(dict.fromkeys(names, Value("large_string")))
    return {"sep": separator, "keep_default_na": False, "features": features, "chunksize": 100}


PICTURE_COLUMNS = ("image", "images", "bytes", "Image")


def _rows(table, folders):
    """Rows without their pictures, which are `Cell`s that are read later, one key each."""
    table = leave_files_closed(table, PICTURE_COLUMNS)
    columns = [column for column in PICTURE_COLUMNS if column in table.column_names]
    texts = table.remove_columns(columns)
    arrow = table.with_format("arrow")
    for row in range(len(table)):
        record = texts[row] if texts.column_names else {}
        cells = arrow[row]
        for column in columns:
            record[column] = _cells(cells[column][0], table, row, column)
        yield record, folders


def _cells(value, table, row, column):
    """`Picture`s of a cell, or the text in it where that is short: a name."""
    import pyarrow as pa

    if isinstance(value, (pa.ListScalar, pa.LargeListScalar)):
        if value.as_py() is None:
            return []
        return [_cell(one, table, row, column, position) for position, one in enumerate(value)]
    return _cell(value, table, row, column, None)


def _cell(value, table, row, column, position):
    import pyarrow as pa

    if isinstance(value, pa.StructScalar):
        value = value["bytes"] if value["bytes"].is_valid else value["path"]
    if not value.is_valid:
        return None
    buffer = memoryview(value.as_buffer())
    if (pa.types.is_string(value.type) or pa.types.is_large_string(value.type)) and len(buffer) < 1024:
        return value.as_py()
    ends = hashlib.sha1(str(len(buffer)).encode() + bytes(buffer[:ENDS]) + bytes(buffer[-ENDS:]))
    return Picture(ends.hexdigest(), Cell(table, row, column, position))


def pictures_in(value, folders, places=("",)) -> tuple[Picture, ...]:
    """Pictures of a record's field: cells of a table, or names, looked for in the folders and the `places` below them.

    A name that is nowhere stays as it is: the sample fails by itself when the picture is read, and is listed.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(one if isinstance(one, Picture) else _named(one, folders, tuple(places)) for one in values)


def _named(name, folders, places) -> Picture:
    if not isinstance(name, str) or len(name) >= 1024:  # base64 in JSON
        text = name if isinstance(name, str) else json.dumps(name)
        return Picture(hashlib.sha1(text.encode()).hexdigest(), name)
    candidates = [folder / place / name for folder in folders for place in places]
    found = next((path for path in candidates if path.is_file()), candidates[0] if candidates else name)
    return Picture(name, str(found))
