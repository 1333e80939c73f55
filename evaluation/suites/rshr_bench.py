"""RSHR-Bench and XHRBench, of one form: 1,932 multiple-choice questions about scenes of 4,000 px to 300 megapixels.

It has no public harness: the wording is that of the UHR-BAT release, without its hint at the number of right answers.
"""

from ...common.answers import option_lines
from ..samples import Sample, first, text_of
from ..scoring import (
    DECLARED_LETTERS,
    Scorer,
    read_all_capitals,
    read_letters,
    read_letters_1,
    same_letters,
)
from .suite import PaperFigure, Suite, lettered

REASONING = (
    "anomaly", "future prediction", "multi-region joint contrast", "object state", "ad", "fp", "mrjc", "mrjcs", "osj",
    "reasoning",
)  # fmt: skip
SELECT = "Select the best answer based on the image."


def prompt(sample: Sample) -> str:
    return f"{sample.question}\n{lettered(sample)}\n{SELECT} Answer with the option letter only."


def with_hint(sample: Sample) -> str:
    several = len(set(sample.answer.upper()) & set("ABCD")) > 1
    return (
        prompt(sample).replace(SELECT, f"{SELECT} You should choose multiple answers.") if several else prompt(sample)
    )


class RSHRBench(Suite):
    title = "RSHR-Bench"
    files = ("*mcq*.json*", "*MCQ*.json*", "**/*.parquet")
    places = ("", "images", "image")
    prompts = {"rshr-bench/letters-1": prompt, "rshr-bench/uhr-bat-release (as published: hints at several)": with_hint}
    scorers = (
        Scorer("rshr-bench/letters-2", DECLARED_LETTERS, read_letters, same_letters),
        Scorer(
            "rshr-bench/uhr-bat-release (as published)",
            "Every A-F of the upper-cased answer, compared as a set; a sample that crashed counts as right.",
            read_all_capitals,
            same_letters,
            failed=1.0,
        ),
        Scorer("rshr-bench/letters-1", "Letters that stand alone, compared as a set.", read_letters_1, same_letters),
    )
    several = True
    paper = (
        PaperFigure("UHR-BAT 7B", 29.2, "perception, macro over 9 subtasks"),
        PaperFigure("UHR-BAT 7B", 45.0, "reasoning, macro over 5 subtasks"),
        PaperFigure("UHR-BAT 7B", 34.8, "macro over all 14 subtasks"),
        PaperFigure("Qwen3-8B, text only", 32.0, "perception: no image was shown"),
        PaperFigure("Qwen3-8B, text only", 42.2, "reasoning: no image was shown"),
    )

    def samples_of(self, record, index, pictures):
        options = first(record, "options", "multi-choice options")
        if isinstance(options, dict):
            options = [f"{letter}. {text}" for letter, text in sorted(options.items()) if text is not None]
        task = str(first(record, "task", "subtask", "sub_task", "category", "type", default="questions"))
        plain = task.lower().replace("_", " ")
        section = str(record.get("section") or record.get("dimension") or "").capitalize()
        if section not in ("Perception", "Reasoning"):
            thinking = any(plain == name or len(name) > 5 and name in plain for name in REASONING)
            section = "Reasoning" if thinking else "Perception"
        return [
            Sample(
                id=text_of(first(record, "id", "index", "question_id", default=index)),
                pictures=pictures(first(record, "images", "image")),
                question=str(first(record, "question")),
                answer=text_of(first(record, "answer")),
                options=tuple(f"{letter}. {text}" for letter, text in option_lines(map(str, options)).items()),
                task=task,
                section=section,
            )
        ]


class XHRBench(RSHRBench):
    title = "XHRBench"
    files = ("dataset.json", "**/*.parquet")
    above = 0
    paper = ()
