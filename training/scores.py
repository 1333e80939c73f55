"""What an answer to a held-out question is worth, by rules of `common/answers.py` and `common/objects.py`, which evaluation uses
too."""

from ..common.answers import letters_said, number_said, plain, tolerant_words
from ..common.extras import require
from ..common.objects import boxes_said, paired_overlap


def _equal(said) -> float:
    return lambda answer, expected: float(said(answer) == said(expected))


def _letters(text) -> str:
    return letters_said(text, {}, several=True)


# name: (what an expected answer needs to be scored by it, the worth of an answer beside the expected one)
SCORES = {
    "accuracy": (bool, _equal(plain)),
    "words": (bool, _equal(tolerant_words)),
    "letter": (_letters, _equal(_letters)),
    "number": (lambda text: number_said(text) is not None, _equal(number_said)),
    "iou": (boxes_said, lambda answer, expected: paired_overlap(boxes_said(expected), boxes_said(answer))),
}


def score(name: str, answer: str, expected: str) -> float | None:
    """0 to 1; None where the expected answer has nothing that this score compares."""
    applies, worth = SCORES[name]
    return worth(answer, expected) if applies(expected) else None


def check_scores(names, expected: list[str]):
    """Raises `ValueError` where no expected answer has what a score compares, `ImportError` where a score lacks a package."""
    if "iou" in names:
        require("evaluate", "scipy")
    for name in names:
        if not any(score(name, text, text) is not None for text in expected):
            raise ValueError(
                f"`eval_scores`: {name} scores none of the {len(expected)} held-out answers, as the first: {expected[0]!r}."
            )
