"""What an answer in words says, and whether it is right: the rules of scoring that suites share.

A rule has a name and a version. A published scorer with a known mistake is a rule of its own, which says "as
published"; the rule without the mistake stands beside it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from ..common.answers import letters_said, option_lines, plain, tolerant_words
from ..common.extras import require
from .samples import Sample

# What the scorers of XLRS-Bench and MME-RealWorld mean to take away before they look for a letter.
PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip
# What they take away: without two commas, four of these are two that nobody writes.
GLUED_PREFIXES = (*PREFIXES[:4], PREFIXES[4] + PREFIXES[5], PREFIXES[6] + PREFIXES[7])
# From VLMEvalKit, for HR-Bench: these refuse to answer.
REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip
DECLARED_LETTER = (
    'The letter of an option that is declared last, behind what was thought; else the last "(B)", the first that stands alone, '
    "the option that is quoted."
)
DECLARED_LETTERS = (
    'The letters of options that are declared last, behind what was thought; else all "(B)", all that stand alone, the option '
    "that is quoted. Compared as a set."
)
WORDNET_MISSING = (
    "WordNet's data is missing, which this score needs: python -m nltk.downloader wordnet (or put it into a folder "
    "corpora/wordnet of $NLTK_DATA). Without it, ask for the score by equal words alone: --scorers {exact}"
)


@dataclass(frozen=True)
class Scorer:
    """One rule: what it reads from an answer, and what that is worth.

    Attributes:
        name: "suite/rule-version".
        says: in one line, what counts as right, and whose rule it is.
        read: the answer's text -> what it says; None or "" where it says nothing: a refusal, worth 0.
        worth: what was read -> 0 to 1.
        failed: what a sample without an answer is worth.
        prepare: raises `ImportError` where something that the rule needs is missing; called before a model runs.
        boxes: whether it reads boxes, which a run may know in pixels of the picture (`running.placed_boxes`).
    """

    name: str
    says: str
    read: Callable[[Sample, str], object]
    worth: Callable[[Sample, object], float]
    failed: float = 0.0
    prepare: Callable[[], object] = lambda: None
    boxes: bool = False

    def score(self, sample: Sample, text: str | None, boxes=None) -> float:
        """0 to 1; `text` is None where the sample failed. `boxes`: of the answer in pixels; None where its text alone is known."""
        if text is None:
            return self.failed
        said = self._said(sample, text, boxes)
        return float(self.worth(sample, said)) if said else 0.0

    def refuses(self, sample: Sample, text: str, boxes=None) -> bool:
        return not self._said(sample, text, boxes)

    def _said(self, sample, text, boxes):
        return boxes if self.boxes and boxes else self.read(sample, text)


# ---- Letters of options ----------------------------------------------------------------------------------------------


def without(prefixes, text: str) -> str:
    for prefix in prefixes:
        text = text.replace(prefix, "")
    return text.strip()


def same_letters(sample: Sample, said: str) -> bool:
    """Several letters are compared as a set."""
    return set(said) == set(re.findall("[A-Z]", sample.answer.upper()))


def same_letter(sample: Sample, said: str) -> bool:
    return said.upper() == sample.answer.strip().upper()


def option_of_text(sample: Sample, text: str) -> str:
    """Version 1: the letter of the one option that an answer quotes, or that quotes the answer; "" where that is not
    one."""
    text = text.strip().strip(".").lower()
    options = {letter: option.lower() for letter, option in option_lines(sample.options).items() if option}
    for fits in (
        lambda option: option == text,
        lambda option: re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text),
        lambda option: text and text in option,
    ):
        found = [letter for letter, option in options.items() if fits(option)]
        if found:
            return found[0] if len(found) == 1 else ""
    return ""


def read_letters(sample: Sample, text: str) -> str:
    """Version 2: see `letters_said`; all that the answer chooses, sorted."""
    return letters_said(text, option_lines(sample.options), several=True)


def read_letter(sample: Sample, text: str) -> str:
    """Version 2: see `letters_said`."""
    return letters_said(text, option_lines(sample.options))


def letters_of(sample: Sample, text: str) -> list[str]:
    """Version 1: letters that an answer chooses, in its order: all "(X)", else an answer of letters only, else capitals
    that are words, else the option that is quoted.

    "A. Farm land" is A, "The answer is C" C, "a, c" and "AC" are A and C; "Blue" is the option Blue, "A red car" the
    option that it quotes.
    """
    text = without(PREFIXES, text)
    last = chr(ord("A") + max(len(sample.options), 5) - 1)
    found = re.findall(rf"(?i)\(([A-{last}])\)", text)
    words = re.findall(r"\w+", text)
    if not found and all(re.fullmatch(rf"[A-{last}]+|[a-{last.lower()}]|and|or", word) for word in words):
        found = [letter for word in words if word not in ("and", "or") for letter in word]
    if not found:
        found = re.findall(rf"(?<![\w'])[A-{last}](?![\w'])", text)
        article = set(found) == {"A"} and re.search(r"(?<!\w)A\s+[a-z]", text)
        if article or not found:
            found = list(option_of_text(sample, text)) or found
    return [letter.upper() for letter in found]


def read_letters_1(sample: Sample, text: str) -> str:
    return "".join(sorted(set(letters_of(sample, text))))


def read_letter_1(sample: Sample, text: str) -> str:
    return "".join(letters_of(sample, text)[:1])


# ---- Published rules, with their mistakes ----------------------------------------------------------------------------


def read_any_letters(sample: Sample, text: str) -> str:
    """XLRS-Bench in lmms-eval: no A-E, nothing; else all "(X)", else any a-e wherever it stands."""
    text = without(GLUED_PREFIXES, text.strip())
    if not re.search("[ABCDE]", text):
        return ""
    found = re.findall(r"\(([a-eA-E])\)", text) or re.findall("[a-eA-E]", text)
    return "".join(sorted({letter.upper() for letter in found}))


def read_first_capital(prefixes, choices):
    """MME-RealWorld: the first of ABCDE wherever it stands, else the first option that contains the text.

    `choices`: sample -> the texts of its options; the letter of one is its second character.
    """

    def read(sample: Sample, text: str) -> str:
        text = text.strip()
        for prefix in prefixes:
            text = text.replace(prefix, "")
        found = re.search("[ABCDE]", text)
        if found or len(text.split()) > 10:
            return found[0] if found else ""
        return next((choice[1] for choice in choices(sample) if text.lower() in choice.lower()), "")

    return read


def read_all_capitals(sample: Sample, text: str) -> str:
    """The released evaluator: every letter A to F of the upper-cased answer."""
    return "".join(sorted(set(re.findall("[A-F]", text.upper()))))


def read_one_option(sample: Sample, text: str) -> str:
    """VLMEvalKit's matching without its judge: the one letter among the words, else the one option that is quoted."""
    if any(refusal in text for refusal in REFUSALS):
        return ""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    options = option_lines(sample.options)
    found = [letter for letter in options if letter in words]
    if len(found) == 1:
        return found[0]
    if not found and "Z" in words:
        return ""
    quoted = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return quoted[0] if len(quoted) == 1 else ""


# ---- Words -----------------------------------------------------------------------------------------------------------


def read_words(sample: Sample, text: str) -> str:
    return plain(text)


def same_words(sample: Sample, said: str) -> bool:
    return said == plain(sample.answer)


def read_tolerant(sample: Sample, text: str) -> str:
    return tolerant_words(text)


def same_tolerant(sample: Sample, said: str) -> bool:
    return said == tolerant_words(sample.answer)


TOLERANT = (
    "Equal words without case, punctuation and articles; numbers in words or digits, units in full or short. A rule of ours, "
    "milder than the benchmark's."
)


@cache
def wordnet():
    """nltk's WordNet; raises `ImportError` with what to do where nltk or the data is missing."""
    require("evaluate", "nltk")
    from nltk.corpus import wordnet as reader

    try:
        reader.ensure_loaded()
    except LookupError as error:
        raise ImportError(WORDNET_MISSING.format(exact="lrs-vqa/exact-1")) from error
    return reader


def share_a_synset(one: str, other: str) -> bool:
    """Whether two words have a meaning in common in WordNet: path_similarity > 0.8, which is 1 / (distance + 1)."""
    reader = wordnet()
    return not set(reader.synsets(one)).isdisjoint(reader.synsets(other))
