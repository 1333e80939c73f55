"""CDVQA (TGRS 2022): questions about what changed between two aerial pictures of 512 px, made from SECOND's land cover.

Its files are of RSVQA's form, with the names of the pictures in a third one. A name is that of two pictures: `im1` has the
first date, `im2` the second, as SECOND itself is laid out.
"""

import re

from ...common.answers import plain
from ..samples import Sample, first, text_of
from ..scoring import Scorer, read_words, same_words
from .rsvqa import ENDS, RSVQA, beside, joined, questions_file, rows_of
from .vrsbench import prompt as short_prompt

YES_NO = ("yes", "no")
COVERS = {
    "NVG_surface": "non-vegetated ground surface", "low_vegetation": "low vegetation", "trees": "trees", "water": "water",
    "buildings": "buildings", "playgrounds": "playgrounds",
}  # fmt: skip
SHARES = ("0", *(f"{low}_to_{low + 10}" for low in range(0, 100, 10)))
# What may be answered, by the type of a question.
ANSWERS = {
    **dict.fromkeys(("change_or_not", "increase_or_not", "decrease_or_not"), YES_NO),
    **dict.fromkeys(("smallest_change", "largest_change", "change_to_what"), tuple(COVERS)),
    **dict.fromkeys(("change_ratio", "change_ratio_types"), SHARES),
}


def prompt(sample: Sample) -> str:
    if sample.task not in ANSWERS:
        return short_prompt(sample)
    return f"{sample.question}\nAnswer with one of: {', '.join(ANSWERS[sample.task])}."


def in_classes(text: str) -> str:
    """A word as the files have it: "non-vegetated ground surface" is NVG_surface, "30 to 40 %" and "35 %" are 30_to_40."""
    word = plain(text)
    for name, said in COVERS.items():
        if word.replace("_", " ").replace("-", " ") in (name.lower().replace("_", " "), said.replace("-", " ")):
            return name
    number = r"(\d{1,3})(?:\.\d+)? ?(?:%|percent)?"
    if match := re.fullmatch(rf"(?:between )?{number} ?(?:to|and|_to_|-|\u2013) ?{number}", word):
        return f"{int(match[1])}_to_{int(match[2])}"
    # Which range a bound belongs to is stated nowhere.
    if (match := re.fullmatch(r"(\d{1,3}(?:\.\d+)?) ?(?:%|percent)?", word)) and float(match[1]) < 100:
        low, rest = divmod(float(match[1]), 10)
        return "0" if not float(match[1]) else f"{low * 10:.0f}_to_{low * 10 + 10:.0f}" if rest else word
    return word


class CDVQA(RSVQA):
    title = "CDVQA"
    two_dates = True
    files = tuple(f"{split}_{ENDS}" for split in ("Test", "Val", "Train"))
    places = ("", "SECOND", "train", "SECOND/train")
    prompts = {"cdvqa/choices-1": prompt, "cdvqa/short-1": short_prompt}
    scorers = (
        Scorer(
            "cdvqa/words-1", "Equal words without case and final stop, as the files write them.", read_words, same_words
        ),
        Scorer(
            "cdvqa/classes-1",
            'Classes in words count, too, and shares as "30 to 40 %" or a number inside a range. A rule of ours.',
            lambda sample, text: in_classes(text),
            lambda sample, said: said == in_classes(sample.answer),
        ),
    )

    def records(self, data):
        path = questions_file(data, self.files, self.title)
        images = beside(path, "images")
        names = {image["id"]: first(image, "file_name") for image in rows_of(images, "images")}
        for row in joined(path):
            if row.get("img_id") not in names:
                raise ValueError(
                    f"{path}: the picture {row.get('img_id')!r} of question {row['id']!r} is none of the {len(names)} of "
                    f"{images.name}."
                )
            yield row | {"file_name": names[row["img_id"]]}, [path.parent, *list(path.parent.parents)[:1]]

    def samples_of(self, record, index, pictures):
        return [
            Sample(
                id=text_of(record["id"]),
                pictures=pictures([f"{date}/{record['file_name']}" for date in ("im1", "im2")]),
                question=str(first(record, "question")),
                answer=text_of(record["answer"]),
                task=str(first(record, "type")),
            )
        ]
