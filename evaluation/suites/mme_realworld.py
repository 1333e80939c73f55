"""MME-RealWorld, its remote-sensing part: 3,738 multiple-choice questions about images over 5,000 px, 150 in Lite.

Its own JSON ("Answer choices", "Ground truth") and the tables that were made for lmms-eval ("multi-choice options") are
read alike.
"""

from ..samples import Sample, first, text_of
from ..scoring import (
    DECLARED_LETTER,
    GLUED_PREFIXES,
    PREFIXES,
    Scorer,
    read_first_capital,
    read_letter,
    read_letter_1,
    same_letter,
)
from .suite import PaperFigure, Suite

SELECT = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
    "(A, B, C, D, or E) of the correct option."
)


def official(sample: Sample) -> str:
    options = "\n".join(sample.options)
    return f"{sample.question} The choices are listed below:\n{options}\n{SELECT} \nThe best answer is:"


def lmms_eval(sample: Sample) -> str:
    options = "\n".join(sample.options)
    return f"{sample.question} The choices are listed below:\n{options}\n{SELECT}\nThe best answer is: "


def lrs_vqa(sample: Sample) -> str:
    options = "\n".join(sample.options)
    return f"{sample.question} The choices are listed below: \n\n{options}\n{SELECT}"


class MMERealWorldRS(Suite):
    title = "MME-RealWorld, remote sensing"
    files = ("MME_RealWorld*.json", "MME-RealWorld*.json", "**/*.parquet")
    places = ("", "remote_sensing", "imgs", "images", "data", "MME-RealWorld-data", "MME-RealWorld-Lite-data")
    prompts = {
        "mme-realworld/official-1": official,
        "mme-realworld/lmms-eval-1": lmms_eval,
        "mme-realworld/lrs-vqa-1": lrs_vqa,
    }
    scorers = (
        Scorer("mme-realworld/letter-2", DECLARED_LETTER, read_letter, same_letter),
        Scorer(
            "mme-realworld/official-1 (as published)",
            'The first capital A-E anywhere ("Answer: B" is A), else the first option that contains the answer, as '
            "each contains an empty one; two missing commas leave four prefixes in place.",
            read_first_capital(GLUED_PREFIXES, lambda sample: sample.options),
            same_letter,
        ),
        Scorer(
            "mme-realworld/lmms-eval-1 (as published)",
            'As the official one with its commas; an answer without a capital is looked for in "(A)" to "(E)": "b" is '
            "B, and an empty answer A.",
            read_first_capital(PREFIXES, lambda sample: ("(A)", "(B)", "(C)", "(D)", "(E)")),
            same_letter,
        ),
        Scorer(
            "mme-realworld/letter-1",
            "The first letter that stands alone, else the option that is quoted: the official rule, mistakes mended.",
            read_letter_1,
            same_letter,
        ),
    )
    paper = (
        PaperFigure(
            "UHR-BAT 7B", 33.33, "macro: (position 44 + colour 42 + count 14) / 3; fits Lite, of about 150 questions"
        ),
        PaperFigure("GeoLLaVA-8K", 28.41, "full set, beside which the paper prints the above"),
    )

    def samples_of(self, record, index, pictures):
        category = str(first(record, "Category", "category"))
        subtask = record.get("Subtask") or category.split("/")[-1]
        if str(subtask).lower().replace("_", " ") != "remote sensing":
            return []
        task = category if "Subtask" in record else str(first(record, "l2-category", default=category))
        return [
            Sample(
                id=text_of(first(record, "Question_id", "question_id", "index", default=index)),
                pictures=pictures(first(record, "Image", "image", "bytes")),
                question=str(first(record, "Text", "question")),
                answer=text_of(first(record, "Ground truth", "answer")),
                options=tuple(map(str, first(record, "Answer choices", "multi-choice options", "options"))),
                task=task.split("/")[-1].lower(),
            )
        ]
