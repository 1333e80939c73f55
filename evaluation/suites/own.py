"""A suite of one's own, without code: a TSV, CSV, parquet, JSON or JSON lines, a question a row.

| field | what it holds |
|---|---|
| question | the text |
| answer | a letter or the text of an option; without options a word or phrase |
| image | name or names, looked for beside the file and in `images`; base64 in tables, or the `index` of the row that has it |
| A to Z, or options | the options, in columns of their own or as a list |
| id or index, category | optional: the name of the sample, what the macro average goes over |
"""

import json

from ..samples import Sample, first, option_columns, text_of, written_list
from ..scoring import (
    TOLERANT,
    Scorer,
    read_letters,
    read_tolerant,
    read_words,
    same_letters,
    same_tolerant,
    same_words,
)
from .suite import Suite, lettered


def prompt(sample: Sample) -> str:
    if sample.options:
        return f"{sample.question.strip()}\n{lettered(sample)}\nAnswer with the option's letter from the given choices directly."
    return f"{sample.question.strip()}\nAnswer the question using a single word or phrase."


def as_written(sample: Sample) -> str:
    """Without a word of ours, as a model that was fine-tuned on such questions has read them."""
    return f"{sample.question.strip()}\n{lettered(sample)}" if sample.options else sample.question.strip()


def options_of(record) -> list[str]:
    options = first(record, "options", "multi-choice options", "Answer choices", "choices", default=[])
    if isinstance(options, str):
        found = written_list(options) if options.strip() else []
        options = json.loads(options) if found is None and options.lstrip().startswith("{") else found
        if options is None:
            raise ValueError(f"Options are columns A, B, ... or a list of texts. Got {record['options']!r}.")
    if isinstance(options, dict):
        options = [f"{letter}. {text_of(text)}" for letter, text in sorted(options.items()) if text is not None]
    return [text_of(option) for option in options] or option_columns(record)


def either(letters, words):
    """One function for samples with options, another for open ones."""
    return lambda sample, text: letters(sample, text) if sample.options else words(sample, text)


class Own(Suite):
    title = "A suite of one's own"
    files = ("*.tsv", "*.jsonl", "*.json", "*.csv", "**/*.parquet")
    places = ("", "images", "image")
    anywhere = True
    prompts = {"own/short-1": prompt, "own/as-written-1": as_written}
    scorers = (
        Scorer(
            "own/match-1",
            "The letters of options that are declared last, compared as a set; without options, equal words without case and "
            "final stop.",
            either(read_letters, read_words),
            either(same_letters, same_words),
        ),
        Scorer(
            "own/tolerant-1",
            f"The letters as above; without options: {TOLERANT[0].lower()}{TOLERANT[1:]}",
            either(read_letters, read_tolerant),
            either(same_letters, same_tolerant),
        ),
    )
    several = True
    max_new_tokens = 64

    def samples_of(self, record, index, pictures):
        shown = first(record, "image", "images", "Image", "image_path", default="")
        return [
            Sample(
                id=text_of(first(record, "id", "index", "question_id", default=index)),
                pictures=pictures(shown) if shown not in ([], ()) else (),
                question=str(first(record, "question", "Question", "Text")),
                answer=text_of(first(record, "answer", "Answer", "ground_truth")),
                options=tuple(options_of(record)),
                task=text_of(first(record, "category", "task", "type", default="questions")),
            )
        ]
