"""Real pictures with boxes of trees -> questions to fine-tune on, and others to ask: a small example of own data.

    pip download --no-deps deepforest==2.1.0 && unzip deepforest-*.whl "deepforest/data/*"
    python -m uhr_bat.examples.trees --data deepforest/data --output trees --parts 600
    uhr-bat train --config tiny_laptop --train_data trees/train.json --eval_data trees/test.json --output_dir runs/trees

Which half of a part of a picture has more trees? Parts of three pictures (NEON, in the package deepforest, MIT), drawn at random,
turned, mirrored and recoloured, are learnt from. Parts of another picture are asked about, mirrored such that either answer is as
often right: whoever does not look is right half of the time. What a linear classifier reads from the visual tokens of the model, before
any fine-tuning, is printed as well: what these hold of the answer. What came out: training/README.md.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..common.files import whole_files
from ..common.loading import load_model
from ..common.outputs import Output, check_outputs
from ..common.tables import percent_interval, wilson
from ..evaluation.suites import SUITES
from ..image_pictures_uhr_bat import PICTURE_FORMATS

ASKED = "2019_YELL_2_528000_4978000_image_crop2"  # the largest picture; the others are learnt from
# By axis (0: left and right): the question, and what is answered, as UHR-BAT-Tiny does: its answers begin with a space.
QUESTIONS = {
    "Which half has more trees, the left or the right?": (" left", " right"),
    "Which half has more trees, the upper or the lower?": (" upper", " lower"),
}
SIDES = (160, 320)  # of the parts that are learnt from, drawn between the two
SIDE = 256  # of the parts that are asked about; one begins at every half of it
# One half has at least so many trees more than the other, and so many times as many: the boxes are not sure to a tree.
MORE, TIMES = 3, 2
# How far the colours of what is learnt from are changed: brightness alone points to shadows, and not the same way everywhere.
RECOLOURED = 0.4
READ_SCALE = 1  # index of the scale whose tokens are classified: 128 px
RIDGE = 300  # of the linear classifier


def fuller_halves(centres, side) -> list[int | None]:
    """By axis, 0 or 1: the half with clearly more of the trees, whose centres float[N, 2] lie between 0 and `side`; None where
    neither has."""
    found = []
    for second in (centres >= side / 2).sum(0).tolist():
        numbers = len(centres) - second, second
        clear = max(numbers) - min(numbers) >= MORE and max(numbers) >= TIMES * min(numbers)
        found.append(int(second > len(centres) - second) if clear else None)
    return found


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
    """`number` (part, centres) of random places, sides, symmetries and colours, of which an answer is clear."""
    width, height = parts.picture.size
    while number:
        side = int(rng.integers(*SIDES, endpoint=True))
        part, centres = parts.cut(rng.integers(width - side + 1), rng.integers(height - side + 1), side)
        if rng.random() < 0.5:
            part, centres = part.transpose(Image.Transpose.TRANSPOSE), centres[:, ::-1]
        for axis in np.flatnonzero(rng.random(2) < 0.5):
            part, centres = mirror(part, centres, axis)
        if fuller_halves(centres, side) != [None, None]:
            number -= 1
            yield recolour(part, rng), centres


def balanced_parts(parts):
    """(part, centres) side by side, mirrored such that the answers about each axis take turns."""
    width, height = parts.picture.size
    wanted = [0, 0]
    for top in range(0, height - SIDE + 1, SIDE // 2):
        for left in range(0, width - SIDE + 1, SIDE // 2):
            part, centres = parts.cut(left, top, SIDE)
            if (halves := fuller_halves(centres, SIDE)) != [None, None]:
                for axis, half in enumerate(halves):
                    if half is not None:
                        if half != wanted[axis]:
                            part, centres = mirror(part, centres, axis)
                        wanted[axis] = 1 - wanted[axis]
                yield part, centres


def write_rows(found, name, folder) -> list[dict]:
    """Rows of the questions about some parts, whose files are written."""
    rows = []
    for number, (part, centres) in enumerate(found):
        part.save(folder / f"{name}_{number}.jpg", quality=95)
        for half, (question, answers) in zip(fuller_halves(centres, part.width), QUESTIONS.items()):
            if half is not None:
                rows.append({"image": f"{name}_{number}.jpg", "question": question, "answer": answers[half]})
    return rows


@torch.no_grad()
def differences(rows, folder, processor, model):
    """(float[N, D] mean token of the second half less that of the first, of the halves that each row asks about; float[N] 1 where
    the second has more trees, else -1)."""
    found, known, (height, width) = [], {}, model.config.grids[READ_SCALE]
    sizes = [rows * columns for rows, columns in model.config.grids]
    for row in rows:
        if row["image"] not in known:
            inputs = processor.image_processor(Image.open(folder / row["image"]), return_tensors="pt")
            shown = [torch.full((size,), scale == READ_SCALE) for scale, size in enumerate(sizes)]
            (image,) = model.encode_image(inputs["pixel_values"], torch.cat(shown)[None])  # of the other scales nothing
            known[row["image"]] = image.tokens[READ_SCALE].float().view(height, width, -1)
        axis = list(QUESTIONS).index(row["question"])
        first, second = known[row["image"]].chunk(2, dim=1 - axis)
        found.append(second.mean((0, 1)) - first.mean((0, 1)))
    signs = [2.0 * QUESTIONS[row["question"]].index(row["answer"]) - 1 for row in rows]
    return torch.stack(found), torch.tensor(signs)


def right_of_linear(learnt, asked) -> torch.Tensor:
    """bool[N]: where ridge regression from what is learnt, (differences, signs), names the half of what is asked."""
    values, signs = learnt
    scale = values.square().mean(0).sqrt()
    values = values / scale
    weights = torch.linalg.solve(values.T @ values + RIDGE * torch.eye(values.shape[1]), values.T @ signs)
    return (asked[0] / scale @ weights).sign() == asked[1]


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
    processor, model = load_model(device_map=None)
    learnt, asked = (differences(rows, args.output, processor, model) for rows in files.values())
    said, rows = [row["answer"] for row in files["test.json"]], files["test.json"]
    share = right_of_linear(learnt, asked).float().mean().item()
    always = sum(max(map(said.count, answers)) for answers in QUESTIONS.values()) / len(said)
    number = len({row["image"] for row in rows})
    print(
        f"A linear classifier on the tokens: {percent_interval(wilson(share, number))} %; one answer every time: {100 * always:.1f} %"
    )


if __name__ == "__main__":
    main()
