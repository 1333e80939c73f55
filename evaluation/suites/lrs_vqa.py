"""LRS-VQA (ICCV 2025): 7,333 open questions about 1,228 images of 1,024 to 27,328 px: 3 sources, 8 categories."""

from ..samples import Sample, first, text_of
from ..scoring import TOLERANT, Scorer, read_tolerant, same_tolerant, share_a_synset, wordnet
from .suite import Suite

SUFFIX = "Answer the question using a single word or phrase."


def prompt(sample: Sample) -> str:
    """The text, which ends in the suffix in the file, and a line break, as inference there writes it."""
    text = sample.question if sample.question.rstrip().endswith(SUFFIX) else f"{sample.question}\n {SUFFIX}"
    return f"{text}\n"


def read(sample: Sample, text: str) -> str:
    """Nothing but case and spaces at the ends is taken away: "Yes." is not "yes"."""
    return text.strip().lower()


def equal(sample: Sample, said: str) -> bool:
    return said == sample.answer.lower()


class LRSVQA(Suite):
    title = "LRS-VQA"
    files = (
        "LRS_VQA_merged.jsonl",
        "Script/LRS_VQA_merged.jsonl",
        "LRS_VQA/Script/LRS_VQA_merged.jsonl",
        "LRS_VQA*.jsonl",
    )
    places = ("", "image")  # names begin with LRS_VQA/: they are looked for in the folders above the file, too
    prompts = {"lrs-vqa/official-1": prompt}
    scorers = (
        Scorer(
            "lrs-vqa/official-1",
            "Equal in lower case, or synsets of WordNet with a path similarity over 0.8, which means one in common.",
            read,
            lambda sample, said: equal(sample, said) or share_a_synset(said, sample.answer.lower()),
            prepare=wordnet,
        ),
        Scorer("lrs-vqa/exact-1", "Equal in lower case: not the benchmark's score, which knows synonyms.", read, equal),
        Scorer("lrs-vqa/tolerant-1", TOLERANT, read_tolerant, same_tolerant),
    )

    def samples_of(self, record, index, pictures):
        name = text_of(first(record, "question_id", "id", default=index))
        box = record.get("hbox")
        return [
            Sample(
                id=name,
                pictures=pictures(first(record, "image")),
                question=str(first(record, "text", "question")),
                answer=text_of(first(record, "ground_truth", "answer")),
                task=str(first(record, "category")),
                section=name.split("_")[0],
                boxes=(tuple(map(float, box)),) if box else (),
            )
        ]
