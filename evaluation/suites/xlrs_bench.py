"""XLRS-Bench (CVPR 2025), all of it and lite: 3,080 multiple-choice questions about images of 8,500 px on average."""

from ..samples import Sample, first, text_of
from ..scoring import (
    DECLARED_LETTERS,
    Scorer,
    read_all_capitals,
    read_any_letters,
    read_letters,
    read_letters_1,
    same_letters,
)
from .suite import PaperFigure, Suite

SEVERAL = "Overall Land use classification"  # the one subtask in which several options may be right
REASONING = (
    "Anomaly Detection and Interpretation", "Environmental condition reasoning", "Route planning",
    "Counting with changing detection", "Counting with complex reasoning",
)  # fmt: skip
ONE = (
    "\nSelect the best answer for the multiple-choice question based on the image. Only respond with the letter "
    "corresponding to the correct answer (A, B, C, D).\nThe answer is:"
)
MORE = (
    "\nSelect the best answer(s) for the multiple-choice question based on the image. There may be more than one "
    "correct option. Only respond with the letter(s) corresponding to the correct answer(s) (A, B, C, D), with "
    "multiple choices separated by spaces.The answer(s) is(are):"
)


def prompt(sample: Sample) -> str:
    """As lmms-eval asks: two line breaks before "Select", and another wording where several options may be right."""
    options = "The choices are listed below:\n" + "\n".join(sample.options) + "\n"
    return sample.question + options + (MORE if sample.task == SEVERAL else ONE)


class XLRSBench(Suite):
    title = "XLRS-Bench"
    files = ("XLRS-Bench*.jsonl", "XLRS-Bench*.json", "**/*.parquet")
    places = ("", "images", "image")
    prompts = {"xlrs-bench/lmms-eval-1": prompt}
    scorers = (
        Scorer("xlrs-bench/letters-2", DECLARED_LETTERS, read_letters, same_letters),
        Scorer(
            "xlrs-bench/lmms-eval-1 (as published)",
            'Every a-e of the answer once a capital is in it, compared as a set: "B. Blue" is B and E, and two missing '
            "commas leave four prefixes in place.",
            read_any_letters,
            lambda sample, said: set(said) == set(sample.answer),
        ),
        Scorer(
            "xlrs-bench/uhr-bat-release (as published)",
            "Every A-F of the upper-cased answer, compared as a set; a sample that crashed counts as right.",
            read_all_capitals,
            same_letters,
            failed=1.0,
        ),
        Scorer(
            "xlrs-bench/letters-1",
            "Letters that stand alone, compared as a set: the official rule without its mistakes.",
            read_letters_1,
            same_letters,
        ),
    )
    several = True
    averages = {
        "macro": lambda sample: sample.task,
        "macro of VLMEvalKit": lambda sample: sample.groups["category and l2-category"],
    }
    paper = (
        PaperFigure("UHR-BAT 7B", 44.0, "lite, micro over 3,080 questions"),
        PaperFigure("UHR-BAT 7B", 48.6, "lite, macro over 13 subtasks, computed from the same table"),
        PaperFigure("GeoLLaVA-8K", 43.3, "lite, micro over 3,080 questions"),
        PaperFigure("GeoLLaVA-8K", 51.5, "lite, macro over 13 subtasks, computed from the same table"),
    )
    max_new_tokens = 64

    def samples_of(self, record, index, pictures):
        category = str(first(record, "category"))
        task = category.split("/")[-1]
        return [
            Sample(
                id=text_of(first(record, "index", default=index)),
                pictures=pictures(first(record, "image", "image_path", "images")),
                question=str(first(record, "question")),
                answer=text_of(first(record, "answer")),
                options=tuple(map(str, first(record, "multi-choice options", "options"))),
                task=task,
                section="Reasoning" if task in REASONING else "Perception",
                groups={"category and l2-category": f"{category}/{record.get('l2-category') or ''}"},
            )
        ]
