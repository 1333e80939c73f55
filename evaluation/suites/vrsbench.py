"""VRSBench, its questions (NeurIPS 2024): 37,409 open questions about crops of 512 px, by type."""

from ..samples import Sample, first, text_of
from ..scoring import TOLERANT, Scorer, read_tolerant, read_words, same_tolerant, same_words
from .suite import Suite


def prompt(sample: Sample) -> str:
    return f"{sample.question}\nAnswer the question using a single word or phrase."


class VRSBenchVQA(Suite):
    title = "VRSBench-VQA"
    files = ("VRSBench_EVAL_vqa.json", "*vqa*.json*")
    places = ("", "Images_val", "images")
    prompts = {"vrsbench-vqa/short-1": prompt}
    scorers = (
        Scorer(
            "vrsbench-vqa/words-1",
            "Equal words without case and final stop. The benchmark's own score asks a GPT: do not compare figures.",
            read_words,
            same_words,
        ),
        Scorer("vrsbench-vqa/tolerant-1", TOLERANT, read_tolerant, same_tolerant),
    )

    def samples_of(self, record, index, pictures):
        return [
            Sample(
                id=text_of(first(record, "question_id", default=index)),
                pictures=pictures(first(record, "image_id", "image")),
                question=str(first(record, "question")),
                answer=text_of(first(record, "ground_truth", "answer")),
                task=str(first(record, "type", default="questions")),
            )
        ]
