"""Real pictures with boxes of trees -> questions to fine-tune on, and others to ask: a small example of own data.

    pip download --no-deps deepforest==2.1.0 && unzip deepforest-*.whl "deepforest/data/*"
    python -m uhr_bat.examples.trees --data deepforest/data --output trees
    uhr-bat train --config tiny_laptop --train_data trees/train.json --eval_data trees/test.json --output_dir runs/trees

The pictures (NEON, in the package deepforest, MIT) are cut into parts; every part is asked about in which half of it more
trees stand. Parts of one picture are learnt from, those of the others are asked about.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from ..common.files import whole_files
from ..evaluation.suites import SUITES

LEARNT = "2019_YELL_2_528000_4978000_image_crop2"
# Of a part, and from one to the next.
SIDE, STEP = 256, 128
# So many of a part's trees more stand in the half that is the answer; parts where it is less clear are not asked about.
CLEARLY = 0.2
# Answers by the place of the first half and that of the second, x or y.
HALVES = {"Are there more trees on the left or on the right?": (0, "left", "right")}
HALVES["Are there more trees at the top or at the bottom?"] = (1, "top", "bottom")


def centres(boxes, left, top):
    """(x, y) in 0..1 of the centres of boxes (left, top, right, bottom) that lie in a part of a picture."""
    found = (((x1 + x2) / 2 - left, (y1 + y2) / 2 - top) for x1, y1, x2, y2 in boxes)
    return [(x / SIDE, y / SIDE) for x, y in found if 0 <= x < SIDE and 0 <= y < SIDE]


def questions(trees) -> list[tuple[str, str]]:
    """(question, answer) about a part with trees at such places."""
    asked = []
    for question, (axis, first, second) in HALVES.items():
        more = sum(1 if tree[axis] < 0.5 else -1 for tree in trees)
        if abs(more) > CLEARLY * len(trees):
            asked.append((question, first if more > 0 else second))
    return asked


def rows_of(sample, folder, name) -> list[dict]:
    """Rows of training data about all parts of a picture, whose files are written."""
    picture = Image.open(sample.pictures[0].source).convert("RGB")
    rows = []
    for top in range(0, picture.height - SIDE + 1, STEP):
        for left in range(0, picture.width - SIDE + 1, STEP):
            path = folder / f"{name}_{top}_{left}.png"
            picture.crop((left, top, left + SIDE, top + SIDE)).save(path)
            asked = questions(centres(sample.boxes, left, top))
            rows += [{"image": path.name, "question": question, "answer": answer} for question, answer in asked]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="deepforest/data")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    files = {"train.json": [], "test.json": []}
    with whole_files(args.output) as built:
        for sample in SUITES["pascal-voc"].load(str(args.data)):
            name, _, kind = sample.id.rpartition("/")
            if kind == "Tree":
                files["train.json" if name == LEARNT else "test.json"] += rows_of(sample, built, name)
        for name, rows in files.items():
            (built / name).write_text(json.dumps(rows, indent=1), encoding="utf-8")
            print(f"{args.output / name}: {len(rows)} questions about {len({row['image'] for row in rows})} parts")


if __name__ == "__main__":
    main()
