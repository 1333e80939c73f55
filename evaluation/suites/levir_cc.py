"""LEVIR-CC (TGRS 2022): 10,077 pairs of pictures of 256 px, with five sentences each that say what changed.

One file, {"images": [{"filename", "split", "changeflag", "sentences": [{"raw", "tokens"}, ...]}, ...]}; the pictures are in
images/SPLIT/A before and images/SPLIT/B after.
"""

import json
import re

from ...common.extras import require
from ..samples import Sample, choose_split, find_files, first
from ..scoring import Scorer
from .suite import Suite

FORM = '{"images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}, ...]}, ...]}'
CHANGED, UNCHANGED = "changed", "unchanged"
# By these sentences the authors' evaluation knows a pair, and an answer, without a change.
NO_CHANGE = (
    "the scene is the same as before", "there is no difference", "the two scenes seem identical", "no change has occurred",
    "almost nothing has changed",
)  # fmt: skip
BETA = 1.2  # of ROUGE-L in the evaluation of COCO's captions


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+(?:['-]\w+)*", text.lower())


def prompt(sample: Sample) -> str:
    return f'{sample.question} Answer with one sentence. If nothing has changed, answer "{NO_CHANGE[0]}".'


def references(sample: Sample) -> list[list[str]]:
    return [words_of(sentence) for sentence in sample.answer.split("\n")]


def common_subsequence(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for column, match in enumerate(other, 1):
            row.append(before[column - 1] + 1 if word == match else max(row[-1], before[column]))
        before = row
    return before[-1]


def rouge_l(sample: Sample, said: list[str]) -> float:
    """ROUGE-L of a sentence, of the greatest precision and the greatest recall among the references, as for COCO's captions."""
    common = [(common_subsequence(said, other), len(other)) for other in references(sample)]
    precision, recall = max(length for length, _ in common) / len(said), max(length / of for length, of in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def bleu_4(sample: Sample, said: list[str]) -> float:
    require("evaluate", "nltk")
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    return float(sentence_bleu(references(sample), said, smoothing_function=SmoothingFunction().method1))


def says_whether(sample: Sample, said: list[str]) -> bool:
    return (" ".join(said) in NO_CHANGE) == (sample.task == UNCHANGED)


def read_sentence(sample: Sample, text: str) -> list[str]:
    return words_of(text)


class LevirCC(Suite):
    title = "LEVIR-CC"
    two_dates = True
    files = ("LevirCCcaptions.json",)
    prompts = {"levir-cc/sentence-1": prompt}
    scorers = (
        Scorer(
            "levir-cc/rouge-l-1",
            "ROUGE-L as in the evaluation of COCO's captions (beta 1.2), the mean over pairs.",
            read_sentence,
            rouge_l,
        ),
        Scorer(
            "levir-cc/bleu-4-1",
            "nltk's BLEU-4 of each sentence, smoothed by its method 1, the mean over pairs. Papers report BLEU over all "
            "sentences together: do not compare figures.",
            read_sentence,
            bleu_4,
            prepare=lambda: require("evaluate", "nltk"),
        ),
        Scorer(
            "levir-cc/changed-1",
            "Whether the answer is one of the five sentences of no change, by which the authors tell, exactly where the pair "
            "has none.",
            read_sentence,
            says_whether,
        ),
    )
    max_new_tokens = 48
    above = 0

    def records(self, data):
        path = find_files(data, self.files)[0]
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))["images"]
            splits = dict.fromkeys(row["split"] for row in rows)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"{path}: this is not of the form {FORM} ({error!r}).") from error
        split = choose_split(splits) if splits else None
        yield from ((row, [path.parent]) for row in rows if row["split"] == split)

    def samples_of(self, record, index, pictures):
        name = str(first(record, "filename"))
        sentences = [" ".join(words_of(str(first(one, "raw")))) for one in first(record, "sentences")]
        sentences = [sentence for sentence in sentences if sentence]
        if not sentences:
            raise ValueError(f"the pair {name!r} has no sentence.")
        if (flag := record.get("changeflag")) not in (None, 0, 1, "0", "1"):
            raise ValueError(f"the `changeflag` of the pair {name!r} is 0 or 1. Got {str(flag)[:40]!r}.")
        unchanged = sentences[min(1, len(sentences) - 1)] in NO_CHANGE if flag is None else not int(flag)
        return [
            Sample(
                id=name,
                pictures=pictures([f"images/{record['split']}/{date}/{name}" for date in "AB"]),
                question="The second image shows the same place as the first one, at a later date. What has changed?",
                answer="\n".join(sentences),
                task=UNCHANGED if unchanged else CHANGED,
            )
        ]
