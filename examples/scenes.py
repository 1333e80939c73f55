"""Made-up scenes -> pictures and rows to fine-tune on: an adapter of any family learns to read compressed prompts.

    python -m uhr_bat.examples.scenes --output scenes
    uhr-bat train --config tiny_laptop --model_name_or_path MODEL --train_data scenes/train.json --output_dir runs/lora \\
        --use_peft true --group_by_image true

Whole scenes at the size at which they are painted, and parts of images with objects of a few native pixels, at these pixels.
Their seeds are those of no other stage, and of no test.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..common.commands import check_range, tells_errors
from ..common.files import whole_files
from ..common.outputs import Output, check_outputs
from ..scenes.layout import WIDTH, make_scene
from ..scenes.native import native_scene, picture_of
from ..scenes.painting import paint
from ..training.tiny.plain_pictures import View, native_window

FIRST_SEED = 4_000_000
NATIVE_SEEDS = 500_000  # behind it
WINDOW = 1024  # px, the side of a part of an image with native objects
KINDS = ("ordinary", "native")
MOST_QUESTIONS = 200  # about a scene, which has fewer: they are drawn until there are so many, or for so long


def view_of(kind: str, number: int, rng) -> tuple[View, Image.Image]:
    """What is shown of a scene, and its picture."""
    if kind == "ordinary":
        scene = make_scene(FIRST_SEED + number)
        picture = paint(scene)
        return View(scene, (0, 0, WIDTH, scene.height), picture.size), picture
    scene = native_scene(FIRST_SEED + NATIVE_SEEDS + number)
    image = picture_of(scene)
    top, left, bottom, right = window = native_window(scene, image, rng, WINDOW)
    pixels = image.paint(window, (image.width, image.height))
    box = np.array((left, top, right, bottom)) * WIDTH / image.width
    return View(scene, box, (WINDOW, WINDOW)), Image.fromarray(pixels)


def picture_name(kind: str, number: int) -> str:
    return f"{kind}_{number}.png"


def write(kind: str, number: int, questions: int, folder: Path) -> list[dict]:
    """Rows about a scene, whose picture is written."""
    rng = np.random.default_rng([FIRST_SEED + number, KINDS.index(kind)])
    view, picture = view_of(kind, number, rng)
    asked, name = view.questions(questions, rng, kind == "ordinary"), picture_name(kind, number)
    if asked:
        picture.save(folder / name)
    return [{"image": name, "question": one.text, "answer": f" {one.answer}"} for one in asked]


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for train.json and its pictures")
    for kind, number in zip(KINDS, (300, 150)):
        parser.add_argument(f"--{kind}", type=int, default=number, metavar="N", help=f"{kind} scenes")
    parser.add_argument("--questions", type=int, default=16, help="about each, at most")
    args = parser.parse_args(arguments)
    check_range(args, 0, NATIVE_SEEDS, *KINDS)
    check_range(args, 1, MOST_QUESTIONS, "questions")
    scenes = [(kind, number) for kind in KINDS for number in range(getattr(args, kind))]
    if not scenes:
        raise ValueError("No scene is asked for: give --ordinary or --native a number above 0.")
    pictures = (picture_name(*scene) for scene in scenes)
    check_outputs((), Output("--output", args.output, names=("train.json", *pictures)))
    with whole_files(args.output) as built:
        bar = tqdm(scenes, desc="Painting scenes", unit="scene")
        rows = [row for kind, number in bar for row in write(kind, number, args.questions, built)]
        if not rows:
            raise ValueError(
                f"None of {len(scenes)} scenes shows what a question needs. Ask for more scenes or --questions."
            )
        (built / "train.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"{args.output / 'train.json'}: {len(rows)} questions about {len({row['image'] for row in rows})} pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
