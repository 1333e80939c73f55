"""EarthVQA (AAAI 2024): questions about land use in LoveDA's pictures of 1,024 px, by type.

One file a split, {picture: [{"Type": ..., "Question": ..., "Answer": ...}, ...]}; the pictures are in SPLIT/images_png.
"""

import json

from ..samples import Sample, find_files, first, text_of
from ..scoring import TOLERANT, Scorer, read_tolerant, read_words, same_tolerant, same_words
from .suite import Suite
from .vrsbench import prompt

FORM = '{picture: [{"Type": ..., "Question": ..., "Answer": ...}, ...]}'


def once(pairs) -> dict:
    """A dictionary of JSON; `ValueError` where a key stands there twice, of which the first would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{len(pairs)} keys are {len(found)} different ones, {twice[:80]!r} stands twice")
    return found


class EarthVQA(Suite):
    title = "EarthVQA"
    files = ("*_QA.json",)
    prompts = {"earth-vqa/short-1": prompt}
    scorers = (
        Scorer("earth-vqa/words-1", "Equal words without case and final stop.", read_words, same_words),
        Scorer("earth-vqa/tolerant-1", TOLERANT, read_tolerant, same_tolerant),
    )
    max_new_tokens = 48  # of the longest of its answers, which are sentences

    def records(self, data):
        path = find_files(data, self.files)[0]
        try:
            found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: this is not of the form {FORM} ({error}).") from error
        rows = found.values() if isinstance(found, dict) else [found]
        if not found or not all(isinstance(row, list) and all(isinstance(one, dict) for one in row) for row in rows):
            raise ValueError(f"{path}: this is not of the form {FORM}.")
        asked = [one for row in rows for one in row]
        answered = sum(one.get("Answer") not in (None, "") for one in asked)
        if asked and not answered:
            raise ValueError(
                f"{path}: 0 of {len(asked)} questions have an answer. Those of the test are on the benchmark's server: give "
                "Val_QA.json as --data."
            )
        folders = [path.parent / path.stem.removesuffix("_QA") / "images_png", path.parent]
        for name, row in found.items():
            for number, one in enumerate(row):
                yield one | {"id": f"{name}/{number}", "Image": name}, folders

    def samples_of(self, record, index, pictures):
        return [
            Sample(
                id=record["id"],
                pictures=pictures(record["Image"]),
                question=str(first(record, "Question")),
                answer=text_of(first(record, "Answer")),
                task=str(first(record, "Type")),
            )
        ]
