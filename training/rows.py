"""Files of training data -> their rows, one at a time: what is no row is one that says why, and ends none of the others.

No type is guessed from other rows. A row of JSON is kept as JSON, its numbers as their digits; every cell of a CSV is text.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Of a row of a file, as `SampleReader` takes it: JSON, or what is wrong with it.
COLUMNS = ("row_json", "row_kind", "row_detail")
NO_JSON = "that are no JSON"
LINES = (".jsonl", ".ndjson")
# One of them tells a row from a turn of a conversation.
ROW_KEYS = ("conversations", "messages", "question", "query", "instruction", "image", "images")
LIST_COLUMNS = (
    "conversations", "messages", "history", "image", "images", "bands", "window", "value_range", "budgets",
)  # fmt: skip
DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda name: None)
BETWEEN_ROWS = re.compile(r"\}\s*,?\s*(?=\{)")


def read_rows(path: str, stamp=None) -> Iterator[dict]:
    """The rows of a file of JSON (a list, or an object that holds one), JSON lines, CSV or TSV: dictionaries of `COLUMNS`.

    Args:
        stamp: no part of the result; tells a changed file from its earlier self where results are kept.
    """
    suffix, found = Path(path).suffix.lower(), False
    rows = _csv_rows(path, "\t" if suffix == ".tsv" else ",") if suffix in (".csv", ".tsv") else _json_rows(path)
    for value in rows:
        found = True
        if isinstance(value, NoRow):
            yield dict(zip(COLUMNS, ("", value.kind, value.detail)))
        elif not isinstance(value, dict):
            said = json.dumps(value)[:60]
            yield dict(zip(COLUMNS, ("", "that are no objects", f"a row has columns, as {{...}}. Got {said}")))
        else:
            yield dict(zip(COLUMNS, (json.dumps(value), "", "")))
    if not found:
        yield dict(zip(COLUMNS, ("", "of files without rows", "the file holds no row")))


class NoRow:
    """A place of a file where a row should be: what it is counted as, and what is to be seen there."""

    def __init__(self, kind: str, detail: str):
        self.kind, self.detail = kind, detail


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _json_rows(path):
    with open(path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if Path(path).suffix.lower() in LINES and not start.startswith(b"["):
        with open(path, "rb") as file:
            yield from _line_rows(file)
        return
    text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    place = _skip_space(text, 0)
    if place == len(text):
        return
    if text[place] == "[":
        yield from _list_rows(text, place + 1)
        return
    first = _decode(text, place)
    if isinstance(first, NoRow):
        lines = text.splitlines()
        # Lines that are rows each, some of them not; else one thing, broken somewhere.
        if any(isinstance(_decode_whole(line), dict) for line in lines):
            yield from _line_rows(lines)
        else:
            yield first
    elif _skip_space(text, first[1]) < len(text):
        yield from _line_rows(text.splitlines())
    else:
        value = first[0]
        lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
        is_row = isinstance(value, dict) and any(key in value for key in ROW_KEYS)
        yield from lists[0] if len(lists) == 1 and not is_row else [value]


def _line_rows(lines):
    for number, line in enumerate(lines, 1):
        line = line.decode("utf-8-sig", errors="surrogateescape") if isinstance(line, bytes) else line
        if line.strip():
            value = _decode_whole(line)
            yield NoRow(NO_JSON, f"line {number}: {value.detail}") if isinstance(value, NoRow) else value


def _list_rows(text, place):
    """The rows of a list that begins before `place`. Behind a broken one they go on where the next row can be read."""
    while True:
        place = _skip_space(text, place)
        if text.startswith("]", place):
            if (rest := _skip_space(text, place + 1)) < len(text):
                yield NoRow(NO_JSON, f"{_where(text, rest)}: there is something behind the list")
            return
        if place == len(text):
            yield NoRow(NO_JSON, f"{_where(text, place)}: the file ends before its list does, rows may be missing")
            return
        found = _decode(text, place)
        if isinstance(found, NoRow):
            yield found
            place = next(_places_of_rows(text, place), len(text))
            if place == len(text):
                return
            continue
        value, place = found
        yield value
        place = _skip_space(text, place)
        if text.startswith(",", place):
            place += 1
        elif not text.startswith("]", place) and place < len(text):
            yield NoRow(NO_JSON, f"{_where(text, place)}: a comma is missing between two rows")
            place = next(_places_of_rows(text, place - 1), len(text))
            if place == len(text):
                return


def _places_of_rows(text, place):
    for match in BETWEEN_ROWS.finditer(text, place):
        found = _decode(text, match.end())
        if not isinstance(found, NoRow) and any(key in found[0] for key in ROW_KEYS):
            yield match.end()


def _decode(text, place):
    """(value, place behind it), or what is wrong with it."""
    try:
        return DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        return NoRow(NO_JSON, f"line {error.lineno}, column {error.colno}: {error.msg}")
    except RecursionError:
        return NoRow(NO_JSON, f"{_where(text, place)}: brackets within brackets, more than can be read")


def _decode_whole(line):
    found = _decode(line, _skip_space(line, 0))
    if isinstance(found, NoRow):
        return found
    value, place = found
    return value if _skip_space(line, place) == len(line) else NoRow(NO_JSON, f"column {place + 1}: something follows")


def _skip_space(text, place) -> int:
    return re.compile(r"[ \t\r\n]*").match(text, place).end()


def _where(text, place) -> str:
    return f"line {text.count(chr(10), 0, place) + 1}, column {place - text.rfind(chr(10), 0, place)}"


# ---- CSV ------------------------------------------------------------------------------------------------------------


def _csv_rows(path, separator):
    csv.field_size_limit(sys.maxsize)  # images in base64
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = file.readlines()
    names, start = None, 0
    while start < len(lines):
        reader = csv.reader(lines[start:], delimiter=separator, strict=True)
        begun = 0
        try:
            for cells in reader:
                where, begun = f"line {start + begun + 1}", reader.line_num
                if not cells:
                    continue
                if names is None:
                    names = cells
                    if twice := sorted({name for name in names if names.count(name) > 1}):
                        yield NoRow("of files with two columns of a name", f"{where}: {', '.join(twice)}")
                        return
                elif len(cells) != len(names):
                    yield NoRow(
                        "with other numbers of cells than of columns", f"{where}: {len(cells)} and {len(names)}"
                    )
                else:
                    yield {name: _cell(name, text) for name, text in zip(names, cells) if text != ""}
            return
        except csv.Error as error:
            yield NoRow("that are no CSV", f"line {start + begun + 1}: {error}")
            start += begun + 1  # a quote that is never closed takes all rows behind it: they are read anew


def _cell(name, text):
    """A cell's text; of columns that are no text what it holds, where that is a list in JSON."""
    if name in LIST_COLUMNS and text.startswith("["):
        value = _decode_whole(text)
        return text if isinstance(value, NoRow) else value
    return text
