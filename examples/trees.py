"""Real pictures with boxes of trees -> questions to fine-tune on, and others to ask: a small example of own data.

    pip download --no-deps deepforest==2.1.0 && unzip deepforest-*.whl "deepforest/data/*"
    python -m uhr_bat.examples.trees --data deepforest/data --output trees
    uhr-bat train --config tiny_laptop --train_data trees/train.json --eval_data trees/test.json --output_dir runs/trees

The pictures (NEON, in the package deepforest, MIT) are cut into parts; every part is asked about whether trees are few or many.
Those of the left half of one picture are learnt from, those of its right half and of the other pictures are asked about.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from ..common.files import whole_files
from ..evaluation.suites import SUITES
from ..picture_reading_uhr_bat import PICTURE_FORMATS

LEARNT = "2019_YELL_2_528000_4978000_image_crop2"
# Of a part, and from one to the next.
SIDE, STEP = 256, 128
# Trees of a part from which on they are many, about the median of what is learnt from. Parts with about as many are not asked
# about: the boxes are not that sure.
MANY, ABOUT = 8, range(6, 10)
QUESTION = "Are there few trees or many?"


def count_trees(boxes, left, top) -> int:
    """Boxes (left, top, right, bottom) whose centre lies in a part of a picture."""
    centres = (((x1 + x2) / 2 - left, (y1 + y2) / 2 - top) for x1, y1, x2, y2 in boxes)
    return sum(0 <= x < SIDE and 0 <= y < SIDE for x, y in centres)


def rows_of(sample, folder, name) -> dict[str, list[dict]]:
    """Rows of the files of training data about the parts of a picture, whose own files are written."""
    picture = Image.open(sample.pictures[0].source, formats=tuple(PICTURE_FORMATS)).convert("RGB")
    rows = {"train.json": [], "test.json": []}
    for top in range(0, picture.height - SIDE + 1, STEP):
        for left in range(0, picture.width - SIDE + 1, STEP):
            number = count_trees(sample.boxes, left, top)
            is_learnt = name == LEARNT and left + SIDE <= picture.width // 2
            if number not in ABOUT and (is_learnt or name != LEARNT or left >= picture.width // 2):
                path = folder / f"{name}_{top}_{left}.png"
                picture.crop((left, top, left + SIDE, top + SIDE)).save(path)
                answer = "many" if number >= MANY else "few"
                rows["train.json" if is_learnt else "test.json"].append(
                    {"image": path.name, "question": QUESTION, "answer": answer}
                )
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
                for file, rows in rows_of(sample, built, name).items():
                    files[file] += rows
        for name, rows in files.items():
            (built / name).write_text(json.dumps(rows, indent=1), encoding="utf-8")
            print(f"{args.output / name}: {len(rows)} questions about {len({row['image'] for row in rows})} parts")


if __name__ == "__main__":
    main()
