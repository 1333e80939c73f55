"""What a benchmark consists of, whatever its files look like: samples, and the records that they are made of.

JSON and JSONL are read as they are; tables (parquet, arrow, TSV, CSV) and data sets of the Hub by the `datasets`
library, which maps them into memory: a picture is read from them when it is needed.
"""

import ast
import csv
import hashlib
import json
import math
import os
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..common.answers import option_lines, right_letters
from ..common.data_tables import leave_files_closed
from ..common.extras import require
from ..common.images import is_file_name

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tsv": "csv", ".csv": "csv"}
LINES = (".jsonl", ".json")
TALKS = {"conversations", "messages"}
# Splits that a benchmark is, the first that there is.
SPLITS = (("test", "testing"), ("validation", "val", "valid", "dev", "eval"), ("train", "training"))
SHARED_NAME = 64  # characters at most of an `image` that names the row which has the picture, as VLMEvalKit reads it


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
        if self.position is not None:
            value = (written_list(value) if isinstance(value, str) else value)[self.position]
        value = (value["bytes"] or value["path"]) if isinstance(value, dict) else value
        return as_base64(value) if isinstance(value, str) else value


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
        row: of the record in its file, from 0.
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
    row: int | None = None

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

    def is_there(value):
        return value not in (None, "") and not (isinstance(value, float) and math.isnan(value))

    letters = [letter for letter in string.ascii_uppercase if is_there(record.get(letter))]
    return [f"{letter}. {text_of(record[letter])}" for letter in letters]


def with_right_letters(sample: Sample, several: bool) -> Sample:
    """The sample with the letter of its right answer, however the file writes it; as it is where it has no options.

    Raises:
        ValueError: the answer is no option.
    """
    if not sample.options:
        return sample
    try:
        return replace(sample, answer=right_letters(sample.answer, option_lines(sample.options), several))
    except ValueError as error:
        raise ValueError(f"The right answer of sample {sample.id!r}: {error}") from error


def boxes_in(record: dict, names) -> tuple[tuple[float, ...], ...]:
    """float (x0, y0, x1, y1) in pixels, of the first of some fields that a record has: a box, a list of them, or of
    objects with one, as JSON too; none where it has no such field.

    Raises:
        ValueError: four numbers are no such box, or one of shares of the picture.
    """
    name = next((name for name in names if record.get(name) not in (None, "", [], {})), None)
    found = record.get(name, [])
    found = json.loads(found) if isinstance(found, str) else found
    several = isinstance(found, (list, tuple)) and (not found or isinstance(found[0], (list, tuple, dict)))
    return tuple(_box(box, name) for box in (found if several else [found]))


def _box(box, name) -> tuple[float, ...]:
    box = first(box, "bbox", "box") if isinstance(box, dict) else box
    said = f"`{name}` holds {str(box)[:80]}"
    numbers = isinstance(box, (list, tuple)) and all(type(edge) in (int, float) and math.isfinite(edge) for edge in box)
    if not numbers or len(box) != 4:
        raise ValueError(f"{said}, which is no box of four numbers: [x0, y0, x1, y1] in pixels.")
    x0, y0, x1, y1 = map(float, box)
    if x0 > x1 or y0 > y1:
        raise ValueError(f"{said}, whose edges are turned round: a box is [x0, y0, x1, y1] in pixels.")
    if 0 <= x0 and 0 <= y0 and x1 <= 1 and y1 <= 1:
        raise ValueError(f"{said}, which are shares of the picture: a box is [x0, y0, x1, y1] in pixels.")
    return x0, y0, x1, y1


def written_list(text: str) -> list[str] | None:
    """["a", "b"] from "['a', 'b']" or '["a", "b"]', as tables have several pictures in a cell; None where it is
    none."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None


def as_base64(text: str) -> str:
    """Base64 that is read as nothing else: a long path may be spelled in its letters, too."""
    return text if text.startswith("data:") else f"data:;base64,{text}"


# ---- Files -----------------------------------------------------------------------------------------------------------


def existing(data: str, otherwise: str) -> Path:
    """The file or folder of a benchmark. Raises `FileNotFoundError` where there is none, with what else it could have been."""
    if not os.path.exists(data):
        raise FileNotFoundError(f"{data}: there is no such file or folder, and {otherwise}.")
    return Path(data)


def find_files(data: str, patterns, version: str | None = None, split: str | None = None) -> list[Path]:
    """The files of a benchmark: one that is named, or those of a folder that fit the first pattern that any fits, if
    they are one file or the shards of one split.

    Args:
        version: "lite" or "", of a benchmark that has both; files of the other one, and of its Chinese one, are left.
        split: that is wanted; else test before validation before train.

    Raises:
        FileNotFoundError: no such file is in the folder, or there is no such folder.
        ValueError: several are, and none of them is the one; it names them.
    """
    path = existing(data, f"this benchmark is read from files of its own: {', '.join(patterns)}")
    if path.is_file():
        return [path]
    for pattern in (*patterns, "*.jsonl", "*.json", "*.parquet", "*.tsv", "*.csv", "*.arrow"):
        names = (one.relative_to(path) for one in path.glob(pattern))
        if found := sorted(name for name in names if not any(part.startswith(".") for part in name.parts)):
            return [path / name for name in _of_one_split(path, _of_version(path, found, version, pattern), split)]
    raise FileNotFoundError(f"{data}: no file of this benchmark is in the folder. Looked for {', '.join(patterns)}.")


def _of_version(folder, names, version, pattern) -> list[Path]:
    if version is None:
        return names
    marks = {"lite": r"(?<![A-Za-z])lite(?![a-z])|L(?:ite|ITE)(?![a-z])", "cn": r"(?<![A-Za-z])cn(?![a-z])|CN(?![a-z])"}
    of = {name: next((mark for mark, form in marks.items() if re.search(form, str(name))), "") for name in names}
    if found := [name for name in names if of[name] == version]:
        return found
    # A name of the benchmark's own without "Lite" is the whole one; of any other name nobody knows.
    if version == "lite" and set(of.values()) == {""} and pattern.startswith("*"):
        return names
    raise ValueError(
        f"{folder} holds {_listed(names)}, {'none of which is Lite' if version else 'no whole benchmark'}: give the file that "
        "is meant as --data."
    )


def _of_one_split(folder, names, split) -> list[Path]:
    """Files of one name but for the numbers of shards, as train-00000-of-00002."""
    groups = defaultdict(list)
    for name in names:
        base = re.sub(r"[-_.]\d{5}$|[-_.]\d+[-_]of[-_]\d+$", "", name.stem)
        groups[name.parent, base, base != name.stem].append(name)
    if len(groups) > 1:
        for wanted in ((split,) if split else (), *SPLITS):
            found = [
                group for group in groups if set(wanted) & set(re.split(r"[^a-z0-9]+", str(Path(*group[:2])).lower()))
            ]
            if len(found) == 1:
                return groups[found[0]]
            if found:
                break
        raise ValueError(f"{folder} holds {_listed(names)}, which are not one benchmark: give one of them as --data.")
    return names


def _listed(names, shown=8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def choose_split(names, split: str | None = None) -> str:
    """Of the splits of a data set the one that is wanted, else test before validation before train, else the only one.

    Raises:
        ValueError: none of these.
    """
    names = list(names)
    for wanted in ((split,) if split else (), *SPLITS):
        if found := [name for name in names if name.lower() in wanted]:
            return found[0]
    if len(names) == 1:
        return names[0]
    raise ValueError(f"The data set has the splits {', '.join(names)}: give the folder or file of one as --data.")


def read_lines(path: Path) -> list[dict]:
    """Records of JSON (a list, or a dictionary that holds one) or JSONL, which some call .json too."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: lists in lists without end are no records.") from error
    except json.JSONDecodeError:
        found = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: this is no JSON ({error}).") from error
    if isinstance(found, dict):
        # A single line is a record, and so is what talks; of any other dictionary its one list of records is meant.
        alone = path.suffix == ".jsonl" or TALKS & set(found)
        lists = [
            value for value in found.values() if isinstance(value, list) and all(isinstance(one, dict) for one in value)
        ]
        found = lists[0] if len(lists) == 1 and not alone else [found]
    return found


def read_records(data: str, patterns=(), split=None, name=None, version=None) -> Iterator[tuple[dict, list[Path]]]:
    """(record, folders that its pictures are looked for in) of every row of a benchmark.

    Args:
        data: a file, a folder (`save_to_disk`'s, too), or the id of a data set on the Hub.
        patterns: how the benchmark's own files are called.
        split, name: of the data set on the Hub.
        version: see `find_files`.

    Raises:
        FileNotFoundError: no such file or folder, and no id.
    """
    if not os.path.exists(data):
        if data.count("/") != 1 or data.startswith(("/", ".", "~")):
            existing(data, "it is no id of a data set (OWNER/NAME)")
        require("evaluate", "datasets")
        from datasets import get_dataset_split_names, load_dataset

        split = choose_split(get_dataset_split_names(data, name), split)
        yield from _rows(load_dataset(data, name, split=split), _downloads(data))
        return
    if folder := _saved_folder(Path(data), split):
        require("evaluate", "datasets")
        from datasets import load_from_disk

        yield from _rows(load_from_disk(str(folder)), [folder, *list(folder.resolve().parents)[:2]])
        return
    for path in find_files(data, patterns, version, split):
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


def _downloads(repository: str) -> list[Path]:
    """Where the library keeps the files of a data set of the Hub: no record names a picture elsewhere on this machine."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(HF_HUB_CACHE, f"datasets--{repository.replace('/', '--')}"), Path(config.DOWNLOADED_DATASETS_PATH)]


def _saved_folder(folder: Path, split) -> Path | None:
    """The folder of a table that `save_to_disk` wrote: this one, or that of one of its splits."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return folder / choose_split(splits, split)
    return folder if all((folder / name).is_file() for name in ("state.json", "dataset_info.json")) else None


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
    table = leave_files_closed(table)
    columns = [column for column in PICTURE_COLUMNS if column in table.column_names]
    texts = table.remove_columns(columns)
    arrow = table.with_format("arrow")
    rows_of = {}

    def cell_of(row, column):
        return _cells(arrow[row][column][0], table, row, column)

    def shared(value, row, column):
        """The picture of the row whose `index` stands where a picture should, as VLMEvalKit's tables share them."""
        if isinstance(value, list):
            return [shared(one, row, column) for one in value]
        if not isinstance(value, str) or len(value) > SHARED_NAME or "index" not in texts.column_names:
            return value
        if not rows_of:
            rows_of.update({text_of(name): at for at, name in reversed(list(enumerate(texts["index"])))})
        other = rows_of.get(value.strip(), row)
        found = cell_of(other, column) if other != row else value
        return found if isinstance(found, Picture) or _pictures_alone(found) else value

    for row in range(len(table)):
        record = texts[row] if texts.column_names else {}
        for column in columns:
            record[column] = shared(cell_of(row, column), row, column)
        if record.get("image") == "" and record.get("image_path"):
            record["image"] = None  # VLMEvalKit's tables have one of the two
        yield record, folders


def _pictures_alone(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Picture) for one in value)


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
    if pa.types.is_string(value.type) or pa.types.is_large_string(value.type):
        if position is None and buffer[:1] == b"[" and (several := written_list(value.as_py())) is not None:
            return [
                one if len(one) < 1024 else _picture(one.encode(), table, row, column, at)
                for at, one in enumerate(several)
            ]
        if len(buffer) < 1024:
            return value.as_py()
    return _picture(buffer, table, row, column, position)


def _picture(buffer, table, row, column, position) -> Picture:
    # Every byte counts: uncompressed mosaics with black edges are alike at both ends.
    return Picture(hashlib.sha1(buffer).hexdigest(), Cell(table, row, column, position))


def pictures_in(value, folders, places=("",), anywhere=False) -> tuple[Picture, ...]:
    """Pictures of a record's field: cells of a table, or names, looked for in the folders and the `places` below them.

    A name that is nowhere stays as it is: the sample fails by itself when the picture is read, and is listed.

    Args:
        anywhere: whether a name may be an address or lead out of the folders, as in data of one's own.

    Raises:
        ValueError: it may not, and does.
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(one if isinstance(one, Picture) else _named(one, folders, tuple(places), anywhere) for one in values)


def _below(name: str, folders) -> list[Path]:
    """The folders in which a downloaded record may name a picture: the machine's root is none of them.

    Raises:
        ValueError: the name is an address, or leads out of them.
    """
    text, said = name.replace("\\", "/"), f"it names the picture {name[:200]!r}"
    if not is_file_name(text) and not text.startswith("data:"):
        raise ValueError(f"{said}, which is an address. The pictures of a benchmark are files beside its questions.")
    inside = [folder for folder in folders if folder.absolute() != folder.absolute().parent]
    if text.startswith(("/", "~")) or ".." in text.split("/"):
        roots = [os.path.abspath(folder) for folder in inside]
        named = [os.path.abspath(folder / text) for folder in inside]
        if not any(path.startswith(root + os.sep) for path in named for root in roots):
            raise ValueError(f"{said}, which does not lie below {' or '.join(roots)}.")
    return inside


def _named(name, folders, places, anywhere) -> Picture:
    if isinstance(name, str) and 0 < len(name) < 1024 and not anywhere:
        folders = _below(name, folders)
    if name == "":
        return Picture("no picture", None)
    if not isinstance(name, str) or len(name) >= 1024:  # base64 in JSON
        text = name if isinstance(name, str) else json.dumps(name)
        source = as_base64(name) if isinstance(name, str) and not anywhere and is_file_name(name) else name
        return Picture(hashlib.sha1(text.encode()).hexdigest(), source)
    # Files may have been named on Windows, or with accents in another form.
    slashed = name.replace("\\", "/")
    forms = dict.fromkeys([name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))])
    candidates = [folder / place / form for form in forms for folder in folders for place in places]
    found = next((path for path in candidates if os.path.isfile(path)), None)
    if found is None and len(name) > SHARED_NAME and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", name):
        return Picture(hashlib.sha1(name.encode()).hexdigest(), as_base64(name))  # of a small picture
    return Picture(name, str(found or (candidates[0] if candidates else name)))
