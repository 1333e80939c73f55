"""Pictures with boxes in Pascal VOC's XML, as DeepForest has of trees: how many there are, and where."""

import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

from ..samples import Sample, existing, pictures_in
from ..scoring import Scorer, read_words
from .suite import Suite, spaced


def box_of(thing) -> tuple[float, ...]:
    """(x0, y0, x1, y1) of an object; nan where an edge is missing or no number: the object counts, nothing shows it."""
    edges = (thing.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
    try:
        return tuple(map(float, edges))
    except (TypeError, ValueError):
        return (math.nan,) * 4


class PascalVOC(Suite):
    title = "Pictures with boxes"
    places = ("", "JPEGImages", "images")
    prompts = {"pascal-voc/count-1": lambda sample: sample.question}
    scorers = (
        Scorer(
            "pascal-voc/count-1",
            "The number of boxes, written as a number.",
            read_words,
            lambda sample, said: said == sample.answer,
        ),
    )

    def load(self, data, limit=None):
        """A question for every kind of object in every picture of a folder of XML files, or of one file."""
        wanted = "--data is an XML file of Pascal VOC, or a folder that holds some"
        path = existing(str(data), wanted)
        files = [path] if path.is_file() else sorted(path.glob("**/*.xml"))
        if not files:
            raise FileNotFoundError(f"{data}: {wanted}.")
        samples = []
        for file in files:
            try:
                root = ElementTree.parse(file).getroot()
            except ElementTree.ParseError as error:
                raise ValueError(f"{file}: this is no XML ({error}).") from error
            boxes = defaultdict(list)
            for thing in root.findall("object"):
                boxes[thing.findtext("name")].append(box_of(thing))
            shown = pictures_in(root.findtext("filename") or "", [file.parent], self.places)
            for kind, of_kind in boxes.items():
                samples.append(
                    Sample(
                        id=f"{file.stem}/{kind}",
                        pictures=shown,
                        question=f"How many objects of the kind {kind} are there?",
                        answer=str(len(of_kind)),
                        task=kind,
                        boxes=tuple(of_kind),
                    )
                )
        return spaced(samples, limit)
