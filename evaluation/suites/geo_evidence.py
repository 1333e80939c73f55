"""GeoEvidence-6K: multiple-choice questions about scenes, local ones with the box of what the answer rests on.

The form is that of its authors' training code (`train.jsonl`): `problem` with the options on lines of their own,
`answer`, one name in `images`. The views with a box drawn in, and the crops, are left: they show where to look. What
the boxes are called is stated nowhere that we could read. The fields of `box_fields` are looked for, in a record and in
its `extra_info`, in pixels of the picture.
"""

import io
import re

from ...image_pictures_uhr_bat import jpeg_orientation, open_picture
from ...image_raster_files_uhr_bat import upright_by
from ..samples import Sample, boxes_in, first, text_of
from ..scoring import DECLARED_LETTERS, Scorer, read_letters, same_letters
from .own import options_of
from .suite import Suite, lettered

HINT = re.compile(r"\s*Only focus on the (?:objects?|region) inside the red bounding box[^.]*\.")
OPTION = re.compile(r"(?m)^[ \t]*([A-Z])\. +(.+)$")


def split_problem(text: str) -> tuple[str, list[str]]:
    """(question, options) of a text whose options are lines "A. red"; what stands behind them says how to answer."""
    text = HINT.sub("", text.replace("<image>", "")).strip()
    found = list(OPTION.finditer(text))
    return text[: found[0].start()].strip() if found else text, [match[0].strip() for match in found]


def size_of_picture(source) -> tuple[int, int] | None:
    """(height, width) of a file, upright, from its header; None of what cannot be read: that sample fails by itself."""
    try:
        source = io.BytesIO(source) if isinstance(source, bytes) else source
        with open(source, "rb") if isinstance(source, str) else source as file:
            image = open_picture(file, "")
            turned = upright_by(jpeg_orientation(image, str(source)[:80]))[0]
            return image.size if turned else image.size[::-1]
    except Exception:
        return None


def prompt(sample: Sample) -> str:
    said = "Answer with the letter of the right option, or with all letters if several are right."
    return f"{sample.question}\n{lettered(sample)}\n{said}"


class GeoEvidence(Suite):
    title = "GeoEvidence-6K"
    files = ("train.jsonl", "metadata.jsonl", "final_annotations.json", "**/*.parquet")
    prompts = {"geo-evidence/letters-1": prompt}
    scorers = (Scorer("geo-evidence/letters-1", DECLARED_LETTERS, read_letters, same_letters),)
    several = True
    above = 0
    box_fields = ("bbox", "bboxes", "boxes", "evidence_bbox", "evidence_box", "target_bbox", "box")

    def load(self, data, limit=None):
        """As of other suites, and a box that its picture does not hold is refused.

        The scenes are larger than their published pictures: boxes in pixels of a scene would be looked for elsewhere.
        """
        samples, sizes = super().load(data, limit), {}
        outside = []
        for sample in (sample for sample in samples if sample.boxes):
            (shown,) = sample.pictures
            if shown.key not in sizes:
                sizes[shown.key] = size_of_picture(self.open(shown)) if shown.source else None
            if size := sizes[shown.key]:
                h, w = size
                outside += [
                    (sample.id, box, w, h) for box in sample.boxes if min(box) < -1 or box[2] > w + 1 or box[3] > h + 1
                ]
        if outside:
            name, box, w, h = outside[0]
            raise ValueError(
                f"{data}: {len(outside)} of {sum(len(sample.boxes) for sample in samples)} boxes leave their pictures, "
                f"first that of sample {name!r}: {box} in {w} x {h} px (width x height). Boxes are [x0, y0, x1, y1] in "
                "pixels of the picture that is asked about."
            )
        return samples

    def samples_of(self, record, index, pictures):
        more = record["extra_info"] if isinstance(record.get("extra_info"), dict) else {}
        question, options = split_problem(str(first(record, "problem", "question")))
        options = options or options_of(record)
        if not options:
            raise ValueError(f"`problem` has no line of an option, as 'A. red': {question[:80]!r}.")
        shown = pictures(first(record, "images", "image", "plain"))
        if len(shown) != 1:
            raise ValueError(f"a question is about 1 picture. Got {len(shown)}.")
        return [
            Sample(
                id=text_of(first(record, "id", "index", "question_id", default=index)),
                pictures=shown,
                question=question,
                answer=text_of(first(record, "answer")),
                options=tuple(options),
                task=text_of(first(more | record, "task", "category", "task_type", "type", default="questions")),
                boxes=boxes_in(record, self.box_fields) or boxes_in(more, self.box_fields),
            )
        ]
