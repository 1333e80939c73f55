"""RSVQA (TGRS 2020): questions made from OpenStreetMap, about Sentinel-2 pictures of 256 px (LR) and aerial ones of 512 (HR).

Questions and answers are files of their own, joined by their ids; a picture is called as its id.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...common.answers import plain
from ..samples import Sample, find_files, first, text_of
from ..scoring import TOLERANT, Scorer, read_tolerant, read_words, same_tolerant, same_words
from .suite import Suite
from .vrsbench import prompt

ENDS = "questions.json"
LIMITS = (10, 100, 1000)


def in_ranges(text: str, counts: bool) -> str:
    """A word as the benchmark's own loader has it: an area, and of LR a count, is one of the ranges of `LIMITS`."""
    word = plain(text)
    match = re.fullmatch(r"(\d{1,18}) ?(m2|m\u00b2)" + ("?" if counts else ""), word)
    if not match or not (number := int(match[1])):
        return word.replace("\u00b2", "2").replace(" m2", "m2")
    unit, low = "m2" if match[2] else "", 0
    for high in LIMITS:
        if number <= high:
            return f"between {low}{unit} and {high}{unit}"
        low = high
    return f"more than {low}{unit}"


def rows_of(path: Path, name: str) -> list[dict]:
    """The active rows of {"questions": [...]} or {"answers": [...]}; `ValueError` for other forms, or two of one id."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))[name]
        rows = [row for row in rows if row.get("active", True)]
        twice = [number for number, times in Counter(row["id"] for row in rows).items() if times > 1]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'{path}: this is not of the form {{"{name}": [{{"id": ..., ...}}, ...]}} ({error!r}).'
        ) from error
    if twice:
        raise ValueError(f"{path}: {len(twice)} of {len(rows)} ids stand there more than once, {twice[0]!r} first.")
    return rows


def questions_file(data: str, files, title: str) -> Path:
    """The file of the questions. Raises `FileNotFoundError` or `ValueError` where there is none."""
    path = find_files(data, files)[0]
    if not path.name.endswith(ENDS):
        raise ValueError(f"{path}: the questions of {title} are a file ..._{ENDS}. Give it as --data.")
    return path


def joined(path: Path) -> Iterator[dict]:
    """Every active question of a file with its "answer", in its order.

    Raises:
        FileNotFoundError, ValueError: there are no answers, they are of another form, or a question has none.
    """
    answers = beside(path, "answers")
    found = {row["id"]: row for row in rows_of(answers, "answers")}
    for row in rows_of(path, "questions"):
        names = row.get("answers_ids") or ["none"]
        answer = found.get(names[0]) if isinstance(names, list) and isinstance(names[0], (int, str)) else None
        if answer is None:
            raise ValueError(
                f"{path}: the answer {str(names)[:40]} to question {row['id']!r} is none of the {len(found)} of {answers.name}."
            )
        yield row | {"answer": first(answer, "answer")}


def beside(path: Path, name: str) -> Path:
    """The file of "answers" or "images" that belongs to one of questions."""
    found = path.with_name(f"{path.name.removesuffix(ENDS)}{name}.json")
    if not found.is_file():
        raise FileNotFoundError(f"{found}: there is no such file, which has the {name} to {path.name}.")
    return found


class RSVQA(Suite):
    places = ("", "Images_LR", "Images_HR", "Images", "Data", "data")
    prompts = {"rsvqa/short-1": prompt}

    def records(self, data):
        path = questions_file(data, self.files, self.title)
        for row in joined(path):
            yield row, [path.parent]

    def samples_of(self, record, index, pictures):
        return [
            Sample(
                id=text_of(record["id"]),
                pictures=pictures(f"{text_of(first(record, 'img_id'))}.tif"),
                question=str(first(record, "question")),
                answer=text_of(record["answer"]),
                task=str(first(record, "type")),
            )
        ]


def scorers_of(name: str, counts: bool) -> tuple[Scorer, ...]:
    what, unit = ("numbers", "") if counts else ("areas", " m2")
    says = f"Equal words; {what} by the ranges of the benchmark's loader: 0, to 10, to 100, to 1000{unit}, more."

    def read(sample, text):
        return in_ranges(text, counts)

    return (
        Scorer(f"{name}/ranges-1", says, read, lambda sample, said: said == in_ranges(sample.answer, counts)),
        Scorer(f"{name}/words-1", "Equal words without case and final stop.", read_words, same_words),
        Scorer(f"{name}/tolerant-1", TOLERANT, read_tolerant, same_tolerant),
    )


def files_of(place: str) -> tuple[str, ...]:
    return tuple(f"{place}_split_{split}_{ENDS}" for split in ("test", "val", "train"))


class RSVQALR(RSVQA):
    title, files, scorers = "RSVQA-LR", files_of("LR"), scorers_of("rsvqa-lr", counts=True)


class RSVQAHR(RSVQA):
    title, files, scorers = "RSVQA-HR", files_of("USGS"), scorers_of("rsvqa-hr", counts=False)
