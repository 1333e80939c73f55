"""UltraVR (arXiv 2606.05576): multiple-choice questions about very large pictures, some of them of remote sensing.

A file of JSON lines a domain. Its pictures of remote sensing are DOTA's, which are not in it: put them into `images`.
"""

from dataclasses import replace
from pathlib import PurePosixPath

from ..samples import first
from ..scoring import DECLARED_LETTERS, Scorer, read_letters, same_letters
from .own import Own, prompt


class UltraVR(Own):
    title = "UltraVR"
    files = ("data/annotations/*.jsonl", "annotations/*.jsonl", "*.jsonl")
    places = ("", "images", "data/images/rs", "images/rs")
    anywhere = False
    prompts = {"ultra-vr/short-1": prompt}
    scorers = (Scorer("ultra-vr/letters-1", DECLARED_LETTERS, read_letters, same_letters),)

    def samples_of(self, record, index, pictures):
        name = PurePosixPath(str(first(record, "image_path")).replace("\\", "/"))
        # Where the picture lay on the machine of the authors says nothing here.
        name = name.name if name.is_absolute() else str(name)
        record = record | {"image": name, "options": first(record, "options")}
        (sample,) = super().samples_of(record, index, pictures)
        return [
            replace(
                sample,
                task=str(first(record, "question_type", default="questions")),
                section=str(record.get("domain") or ""),
            )
        ]
