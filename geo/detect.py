"""Find all objects of a kind in a large image: windows at its own resolution are asked one by one, and joined.

    uhr-bat detect IMAGE "ships" --output ships.geojson|.gpkg|.csv --model MODEL [--max-windows 32 | --everywhere]
        [--max-new-tokens 1024] [--max-tiles N [--native]] [--window 0,0,4096,4096]

The question looks at the whole image first, level by level, and the windows where it looks most are asked. Each is one tile of the
model, kept whole: what a window says is what the model by itself says of that part. Answers are kept as they come, and the same
command goes on where it was stopped.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np

from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.images import add_image_arguments, add_tile_arguments, image_options, tile_options
from ..common.loading import check_image, is_host, load_model, load_processor
from ..common.measured import told_as_measured
from ..common.models import add_model_argument, base_of, find_model, model_name, stay_offline
from ..common.objects import POINTING, Objects, labelled
from ..common.outputs import Output, check_outputs
from ..common.resizing import resize_image
from ..common.runs import Line, alone, lines_of_run
from ..geometry_uhr_bat import PAD_COLOR, pixel_tokens
from ..hosts.settings import FAMILIES
from .georeference import Georeference
from .joining import join, windows_of
from .objects import OBJECT_FILES, check_objects, write_objects

# Samples of the importance to a window's side, and of the image at most: an object is smaller than its window.
SAMPLES, MOST_SAMPLES = 8, 4096


def question_of(things: str, folder: Path) -> str:
    """The question by which a model is asked for all `things` of a picture, in the words of its family.

    Raises:
        ValueError: it writes no boxes in a form that is known (`common.objects`).
    """
    folder = base_of(folder) or folder
    if is_host(folder):
        from transformers import PreTrainedConfig

        model_type = PreTrainedConfig.get_config_dict(str(folder))[0]["model_type"]
        if model_type in POINTING:
            return POINTING[model_type].prompt.format(things=things)
        why = f"how models of the type {model_type!r} write boxes is not known"
    else:  # its pointer, if it has one, learnt what stands at a place that a question names, in the whole image
        why = "it answers in words, and what it points to it has from a question about the whole image (`ask --objects`)"
    known = ", ".join(name for name in POINTING if name in FAMILIES)
    raise ValueError(f"{model_name(folder)} cannot be asked for boxes: {why}. Ask one of these families: {known}.")


def looked_at(compressed, image_size: tuple[int, int], windows: np.ndarray) -> np.ndarray:
    """float64[W]: how much a question looks into windows int64[W, 4], at the token that it looks at most, by what `compress`
    returned for the image. Each level tells how its share of the coarser one is spread."""
    step = max(1, (windows[0, 2:] - windows[0, :2]).max() // SAMPLES, -(-max(image_size) // MOST_SAMPLES))
    size = tuple(-(-length // step) for length in image_size)
    values = np.ones(size)
    for scale_idx, importance in enumerate(compressed.importance[0]):
        tokens = pixel_tokens(image_size, tuple(importance.shape), size)
        seen = compressed.importance[0].present(scale_idx).cpu().numpy().ravel()[tokens]
        level = importance.detach().double().cpu().numpy().ravel()[tokens]
        if seen.any() and level[seen].any():
            values[seen] = level[seen] * values[seen].mean() / level[seen].mean()
    steps = np.array(image_size)[::-1] / size[::-1]
    low = np.floor(windows[:, :2] / steps).astype(int)
    high = np.maximum(np.ceil(windows[:, 2:] / steps).astype(int), low + 1)
    return np.array([values[y0:y1, x0:x1].max() for (x0, y0), (x1, y1) in zip(low.tolist(), high.tolist())])


class Asker:
    """Asks a model about windows of one image.

    Args:
        question: of `question_of`.
        things: the label of what the model calls nothing.
        image: opened.
    """

    def __init__(self, processor, model, question: str, things: str, image, max_new_tokens: int):
        self.processor, self.model, self.question, self.things = processor, model, question, things
        self.image, self.max_new_tokens = image, max_new_tokens
        self.size = image.height, image.width

    def choose(self, windows: np.ndarray, number: int, options: dict) -> np.ndarray:
        """int64[n, 4], of all windows those that the question looks into most, the most first."""
        from ..common import asking

        features = asking.encode(self.model, self.processor.image_processor(self.image, return_tensors="pt", **options))
        compressed = asking.compress(
            self.model, asking.write_prompts(self.model, self.processor, [self.question], [features])
        )
        values = looked_at(compressed, self.size, windows)
        return windows[np.argsort(-values, kind="stable")[:number]]

    def objects(self, window: tuple[int, int, int, int]) -> Objects:
        """What the model finds in a window, in pixels of the image."""
        from ..common import asking

        left, top, right, bottom = window
        picture = resize_image(self.image, (bottom - top, right - left), (top, left, bottom, right))
        if self.image.masked and (np.asarray(picture) == PAD_COLOR).all():
            return Objects(text="")  # none of its pixels is part of the image
        side, tile = self.processor.image_processor.scales[0], self.processor.image_processor.crop_size["height"]
        # The anchor alone, whose side the window has: one level, all of it.
        options = {"max_tiles": (side // tile) ** 2, "native": True}
        features = asking.encode(self.model, self.processor.image_processor(picture, return_tensors="pt", **options))
        inputs = asking.write_prompts(
            self.model, self.processor, [self.question], [features], sum(features[0].available)
        )
        compressed = asking.compress(self.model, inputs)
        ids = asking.generate(self.model, inputs, compressed, max_new_tokens=self.max_new_tokens)
        (text,) = asking.answer_texts(self.processor, ids)
        found = asking.answer_objects(self.model, text, compressed, self.size, part=window)
        return labelled(found, self.things)


def lines_path(path: Path) -> Path:
    """Of the answers of a run that goes on: a line of settings, one of the windows, then a line for each of them."""
    return path.with_name(f"{path.name}.lines.jsonl")


def ask_windows(path: Path, settings: dict, choose, objects) -> list[tuple[tuple, Objects]]:
    """(window, its objects) of all windows, in their order; those that an earlier run asked are read from its lines.

    Args:
        path: of the lines.
        settings: which must be those of the earlier run.
        choose: () -> int64[n, 4], the windows, where no earlier run has chosen them.
        objects: window -> [`Objects`].

    Raises:
        ValueError: the earlier run had other settings.
    """
    from tqdm import tqdm

    lines = lines_of_run(path, settings)
    chosen = next((line["windows"] for line in lines if "windows" in line), None)
    done = {tuple(line["window"]): Objects.of_record(line, line["text"]) for line in lines if "window" in line}
    windows = choose().tolist() if chosen is None else chosen
    lines = Line(path, settings)
    with lines.file:
        if chosen is None:
            lines.write({"windows": windows})
        with tqdm(total=len(windows), initial=len(done), desc="Asking", unit="window") as bar:
            for window in map(tuple, windows):
                if window not in done:
                    done[window] = objects(window)
                    lines.write({"window": window, "text": done[window].text, **done[window].record()})
                    bar.update()
    return [(window, done[window]) for window in map(tuple, windows)]


def detect(args, question):
    """Ask, join, write the objects, and print how many there are."""
    print("Reading ...", file=sys.stderr, flush=True)
    processor = load_processor(args.model, args.set)
    image = processor.image_processor.open_image(args.image, **image_options(args))
    georeference = Georeference.of(image, args.image)
    check_objects(args.output, georeference)
    size = image.height, image.width
    every = windows_of(size, processor.image_processor.scales[0])
    settings = {
        **told_as_measured(args.model.resolve(), args.set),
        "image": args.image,
        "state": _state(args.image),
        "size": size,
        "things": args.things,
        "max_windows": None if args.everywhere else args.max_windows,
        "max_new_tokens": args.max_new_tokens,
        "reading": image_options(args) | tile_options(args),
    }
    lines = lines_path(args.output)
    with alone(lines):
        lines_of_run(lines, settings)  # before the weights are loaded
        print("Loading ...", file=sys.stderr, flush=True)
        processor, model = load_model(args.model, **args.set)
        asker = Asker(processor, model, question, args.things, image, args.max_new_tokens)

        def choose():
            if args.everywhere or len(every) <= args.max_windows:
                return every
            print("Looking ...", file=sys.stderr, flush=True)
            return asker.choose(
                every, args.max_windows, {"max_image_pixels": args.max_image_pixels, **tile_options(args)}
            )

        asked = ask_windows(lines, settings, choose, asker.objects)
        refused = [one for _, found in asked for one in found.refused]
        joined = join([(window, one) for window, found in asked for one in found], size)
        texts = [found.text for _, found in asked if found.text]
        found = Objects(joined, next(iter(texts), ""), refused)
        share = f"{len(asked):,} of {len(every):,}"
        about = {"image": Path(args.image).name, "question": question, "windows": share}
        write_objects(found, args.output, about, georeference)
        lines.unlink(missing_ok=True)
    print(f"{len(found):,} objects in {share} windows of {processor.image_processor.scales[0]} px: {args.output}")
    tell_refused(found)


def tell_refused(found):
    """Prints what was refused, or why there is nothing."""
    from ..common.asking import printable

    if found.note and not found.refused:
        print(f"No window has an object. Of the first: {printable(found.note)}")
    elif found.refused:
        print(f"{len(found.refused):,} were refused, as {printable(str(found.refused[0]))}")


def _state(image: str):
    """Of an image file: its size and the time of its last change, by which a run knows that it is the same."""
    if not os.path.isfile(image):
        return None
    stat = os.stat(image)
    return [stat.st_size, stat.st_mtime_ns]


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat detect", description=__doc__.splitlines()[0])
    parser.add_argument("image", metavar="IMAGE", help="file or URL")
    parser.add_argument("things", metavar="THINGS", help="what is sought, as ships")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".geojson, .gpkg or .csv")
    parser.add_argument("--everywhere", action="store_true", help="ask all windows, not those where the question looks")
    parser.add_argument(
        "--max-windows",
        type=int,
        default=32,
        metavar="N",
        help="that are asked, those where the question looks (default: 32)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=1024, metavar="N", help="of the answer about a window (default: 1024)"
    )
    add_model_argument(parser)
    add_image_arguments(parser)
    add_tile_arguments(parser)
    args = parser.parse_args(arguments)
    stay_offline(args.model)
    check_image(args.image)
    check_range(args, 1, math.inf, "max_windows", "max_new_tokens")
    if not args.things.strip():
        raise ValueError('Nothing is sought: name it, as "ships".')
    args.model = find_model(args.model)
    require("geo", "rasterio", "geopandas", "pyogrio")
    check_outputs(
        (args.image, args.model, args.area),
        Output("--output", args.output, OBJECT_FILES),
        Output("--output", lines_path(args.output)),
    )
    detect(args, question_of(args.things.strip(), args.model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
