"""TreeBench: multiple-choice questions with boxes of the objects that the answer rests on; accuracy and mean IoU."""

from functools import partial

from ...common.extras import require
from ...common.objects import PLAIN_BOX, boxes_said, overlap, paired_overlap
from ..samples import Sample, boxes_in, first, option_columns, text_of
from ..scoring import DECLARED_LETTER, Scorer, read_letter, read_letter_1, same_letter
from .suite import Suite, lettered


def prompt(sample: Sample) -> str:
    options = f"Options:\n{lettered(sample)}\nPlease select the correct answer from the options above. \n"
    return f"Question: {sample.question}\n{options}"


def with_boxes(sample: Sample) -> str:
    return (
        prompt(sample)
        + "Give the box of every object that you looked at as [x0, y0, x1, y1] in pixels, then the letter.\n"
    )


def read_boxes(sample: Sample, text: str) -> list[tuple[float, ...]]:
    return boxes_said(text)


def mean_overlap(sample: Sample, boxes) -> float:
    """Mean over the boxes of the file of the best IoU among those of the answer."""
    if not sample.boxes:
        return 0.0
    return sum(max(overlap(box, said) for said in boxes) for box in sample.boxes) / len(sample.boxes)


def mean_paired_overlap(sample: Sample, boxes) -> float:
    return paired_overlap(sample.boxes, boxes)


def read_choice(sample: Sample, text: str) -> str:
    return read_letter(sample, PLAIN_BOX.sub(" ", text))


def read_choice_1(sample: Sample, text: str) -> str:
    return read_letter_1(sample, PLAIN_BOX.sub(" ", text))


class TreeBench(Suite):
    title = "TreeBench"
    files = ("TreeBench*.tsv", "TreeBench*.json*", "**/*.parquet")
    places = ("", "images", "image")
    prompts = {"tree-bench/vlmevalkit-1": prompt, "tree-bench/boxes-1": with_boxes}
    scorers = (
        Scorer("tree-bench/letter-2", DECLARED_LETTER, read_choice, same_letter),
        Scorer(
            "tree-bench/mean-iou-3",
            "Boxes of the answer and of the file paired one to one, as well as they can be: mean IoU over the longer of the two "
            "lists. Boxes in the form of a model's own family are placed by its unit, others are [x0, y0, x1, y1] in pixels. How "
            "the benchmark itself pairs boxes is not stated in what was available.",
            read_boxes,
            mean_paired_overlap,
            prepare=partial(require, "evaluate", "scipy"),
            boxes=True,
        ),
        Scorer(
            "tree-bench/letter-1",
            "The first letter that stands alone, else the option that is quoted.",
            read_choice_1,
            same_letter,
        ),
        Scorer(
            "tree-bench/mean-iou-2",
            "The same of [x0, y0, x1, y1] as it is written, whatever a family's unit.",
            read_boxes,
            mean_paired_overlap,
            prepare=partial(require, "evaluate", "scipy"),
        ),
        Scorer(
            "tree-bench/mean-iou-1",
            "For every box of the file the best IoU among those of the answer, however many these are, mean over the file's.",
            read_boxes,
            mean_overlap,
        ),
    )
    max_new_tokens = 256
    points = True
    box_fields = ("bboxes", "bbox", "boxes", "target_instances")

    def samples_of(self, record, index, pictures):
        options = record.get("options") or record.get("multi-choice options")
        options = option_columns(record) if options is None else options
        return [
            Sample(
                id=text_of(first(record, "index", "id", "question_id", default=index)),
                pictures=pictures(first(record, "image", "image_path", "images")),
                question=str(first(record, "question")),
                answer=str(first(record, "answer")).strip(),
                options=tuple(map(str, options)),
                task=str(first(record, "category", "task", default="questions")),
                boxes=boxes_in(record, self.box_fields),
            )
        ]
