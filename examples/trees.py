"""Real pictures with boxes of trees -> questions to fine-tune on, and others to ask: a small example of own data.

    pip download --no-deps deepforest==2.1.0 && unzip deepforest-*.whl "deepforest/data/*"
    python -m uhr_bat.examples.trees --data deepforest/data --output trees
    uhr-bat train --config tiny_laptop --train_data trees/train.json --eval_data trees/test.json --output_dir runs/trees

Which quarter of a part of a picture has most trees? Parts of three pictures (NEON, in the package deepforest, MIT), drawn at random,
turned, mirrored and recoloured, are learnt from. Parts of another picture are asked about, mirrored such that
every answer is as often right: whoever does not look is right a quarter of the time. What came out: training/README.md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.files import whole_files
from ..common.outputs import Output, check_outputs
from ..evaluation.suites import SUITES
from ..image_pictures_uhr_bat import PICTURE_FORMATS
from ..scenes.layout import QUADRANTS

ASKED = "2019_YELL_2_528000_4978000_image_crop2"  # the largest picture; the others are learnt from
QUESTION = "In which quadrant are most trees?"
SIDES = (160, 320)  # of the parts that are learnt from, drawn between the two
SIDE = 256  # of the parts that are asked about; one begins at every half of it
# One quarter has at least so many trees more than any other, and so many times as many: the boxes are not sure to a tree.
MORE, TIMES = 2, 1.5
# How far the colours of what is learnt from are changed: brightness alone points to shadows, and not the same way everywhere.
RECOLOURED = 0.4


def fullest_quarter(centres, side) -> tuple[int, int] | None:
    """(right, lower), 0 or 1 each, of the quarter with clearly more of the trees than any other, whose centres float[N, 2] lie
    between 0 and `side`; else None."""
    halves = (centres >= side / 2).astype(int)
    *_, second, most = sorted(numbers := np.bincount(halves @ [1, 2], minlength=4))
    quarter = int(numbers.argmax())
    return (quarter % 2, quarter // 2) if most - second >= MORE and most >= TIMES * second else None


class Parts:
    """Square parts of a picture, and where its trees stand in them.

    Args:
        samples: of the suite pascal-voc, one for each kind of tree in the picture.
    """

    def __init__(self, samples):
        self.name = samples[0].id.rpartition("/")[0]
        self.picture = Image.open(samples[0].pictures[0].source, formats=tuple(PICTURE_FORMATS)).convert("RGB")
        boxes = np.array([box for sample in samples for box in sample.boxes])
        self.centres = (boxes[:, :2] + boxes[:, 2:]) / 2

    def cut(self, left, top, side):
        """(the part, float[N, 2] centres (x, y) of the trees in it)."""
        centres = self.centres - (left, top)
        shown = ((centres >= 0) & (centres < side)).all(1)
        return self.picture.crop((left, top, left + side, top + side)), centres[shown]


def mirror(part, centres, axis):
    """A part and its centres with the halves of an axis (0: left and right) in each other's place."""
    method = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)[axis]
    flipped = centres.copy()
    flipped[:, axis] = part.width - centres[:, axis]
    return part.transpose(method), flipped


def recolour(part, rng):
    """The part with other light: every channel times a factor, to a power."""
    power, factors = np.exp(rng.uniform(-RECOLOURED, RECOLOURED)), np.exp(rng.uniform(-RECOLOURED, RECOLOURED, 3))
    values = np.outer(factors, (np.arange(256) / 255) ** power) * 255
    return part.point(values.clip(0, 255).round().astype(int).flatten().tolist())


def draw_parts(parts, number, rng):
    """`number` (part, centres) of random places, sides, symmetries and colours, whose answer is clear."""
    width, height = parts.picture.size
    while number:
        side = int(rng.integers(*SIDES, endpoint=True))
        part, centres = parts.cut(rng.integers(width - side + 1), rng.integers(height - side + 1), side)
        if rng.random() < 0.5:
            part, centres = part.transpose(Image.Transpose.TRANSPOSE), centres[:, ::-1]
        for axis in np.flatnonzero(rng.random(2) < 0.5):
            part, centres = mirror(part, centres, axis)
        if fullest_quarter(centres, side):
            number -= 1
            yield recolour(part, rng), centres


def balanced_parts(parts):
    """(part, centres) side by side, mirrored such that the answers take turns."""
    width, height = parts.picture.size
    wanted = 0
    for top in range(0, height - SIDE + 1, SIDE // 2):
        for left in range(0, width - SIDE + 1, SIDE // 2):
            part, centres = parts.cut(left, top, SIDE)
            if quarter := fullest_quarter(centres, SIDE):
                for axis, half in enumerate((wanted % 2, wanted // 2)):
                    if quarter[axis] != half:
                        part, centres = mirror(part, centres, axis)
                wanted = (wanted + 1) % 4
                yield part, centres


def write_rows(found, name, folder) -> list[dict]:
    """Rows of the question about some parts, whose files are written."""
    rows = []
    for number, (part, centres) in enumerate(found):
        right, lower = fullest_quarter(centres, part.width)
        part.save(folder / f"{name}_{number}.jpg", quality=95)
        rows.append({"image": f"{name}_{number}.jpg", "question": QUESTION, "answer": QUADRANTS[2 * lower + right]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="deepforest/data")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--parts", type=int, default=1000, help="that are learnt from")
    args = parser.parse_args()
    check_outputs((), Output("--output", args.output, names=("train.json", "test.json")))
    pictures = {}
    for sample in SUITES["pascal-voc"].load(str(args.data)):
        pictures.setdefault(sample.pictures[0].source, []).append(sample)
    pictures = [Parts(samples) for samples in pictures.values()]
    learnt = [parts for parts in pictures if parts.name != ASKED]
    # A larger picture has more to show, but not as many more sites as it is larger.
    sides = [sum(parts.picture.size) for parts in learnt]
    files, rng = {"train.json": [], "test.json": []}, np.random.default_rng(0)
    with whole_files(args.output) as built:
        for parts, side in zip(learnt, sides):
            number = round(args.parts * side / sum(sides))
            files["train.json"] += write_rows(draw_parts(parts, number, rng), parts.name, built)
        for parts in pictures:
            if parts.name == ASKED:
                files["test.json"] += write_rows(balanced_parts(parts), parts.name, built)
        for name, rows in files.items():
            (built / name).write_text(json.dumps(rows, indent=1), encoding="utf-8")
            print(f"{args.output / name}: {len(rows)} questions about {len({row['image'] for row in rows})} parts")


if __name__ == "__main__":
    main()
