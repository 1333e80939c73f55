"""HR-Bench (AAAI 2025), 4K and 8K: multiple-choice questions, each asked four times with its options turned round."""

from ..samples import Sample, first, option_columns, text_of
from ..scoring import DECLARED_LETTER, Scorer, read_letter, read_letter_1, read_one_option, same_letter
from .suite import Suite, lettered


def prompt(sample: Sample) -> str:
    return f"{sample.question.strip()}\n{lettered(sample)}\nAnswer the option letter directly."


class HRBench(Suite):
    title = "HR-Bench"
    files = ("hr_bench_*.tsv", "HRBench*.tsv", "**/*.parquet")
    split, configuration = "hrbench_8k", "hrbench_version_split"
    prompts = {"hr-bench/lmms-eval-1": prompt}
    scorers = (
        Scorer("hr-bench/letter-2", DECLARED_LETTER, read_letter, same_letter),
        Scorer(
            "hr-bench/lmms-eval-1 without its judge",
            "The one letter among the words, else the one option that is quoted. The benchmark asks a GPT where that "
            "finds nothing; here that counts as wrong.",
            read_one_option,
            same_letter,
        ),
        Scorer(
            "hr-bench/letter-1",
            "The first letter that stands alone, else the option that is quoted.",
            read_letter_1,
            same_letter,
        ),
    )
    averages = {"mean of the four turns": lambda sample: sample.groups["cycle_category"]}

    def samples_of(self, record, index, pictures):
        category = str(first(record, "category"))
        return [
            Sample(
                id=text_of(first(record, "index", default=index)),
                pictures=pictures(first(record, "image", "image_path")),
                question=str(first(record, "question")),
                answer=str(first(record, "answer")).strip(),
                options=tuple(option_columns(record)),
                task=category,
                section=category,
                groups={"cycle_category": text_of(first(record, "cycle_category", default="0"))},
            )
        ]
