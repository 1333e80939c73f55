"""Ask a question about an image, and see where the visual tokens and the seconds go.

    uhr-bat ask [IMAGE] [QUESTION] [--before IMAGE] [--model MODEL [--set NAME=VALUE]] [--budgets 16,24,40,66] [--max-new-tokens 64]
                [--bands 4,3,2] [--value-range 0,2047] [--window 0,0,4096,4096] [--max-pixels N]
                [--max-tiles N [--native]] [--objects out.geojson]

Without an image it asks about the made-up scene, which is painted into the working folder when it is missing.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..budgets_uhr_bat import is_one_budget
from ..common.commands import add_before_argument, add_question_arguments, tells_errors
from ..common.extras import require
from ..common.images import image_options, tile_options
from ..common.loading import WEIGHTS_NOTE, check_image, load_model, load_processor
from ..common.models import find_model, is_tiny, stay_offline
from ..common.outputs import Output, check_outputs
from ..geo import Georeference, check_objects, write_objects
from ..geo.objects import OBJECT_FILES
from ..image_registration_uhr_bat import open_dates
from ..scenes import painting

QUESTION = "What colour is the plane at the runway?"


@contextmanager
def timed(seconds, stage):
    """Measure one stage and say on the error stream that it runs."""
    print(f"{stage} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0) + time.perf_counter() - start


def token_bar(total):
    """A progress bar that `generate` takes for a streamer."""
    from tqdm import tqdm
    from transformers.generation import BaseStreamer

    class TokenBar(BaseStreamer):
        bar = tqdm(total=total, desc="Generating", unit="token", delay=1, leave=False)

        def put(self, ids):
            self.bar.update(ids.numel() == 1)  # the first call brings the prompt

        def end(self):
            self.bar.close()

    return TokenBar()


def ask(args):
    """Run every stage by itself and print the answer and what it cost."""
    seconds = {}
    with timed(seconds, "open"):  # a raster is decoded while it is resized
        image_processor = load_processor(args.model, args.set).image_processor
        read = partial(image_processor.open_image, **image_options(args))
        images, dates = open_dates(read, args.image, args.before)
    image = images[-1]
    if args.objects:
        georeference = Georeference.of(image, args.image)
        check_objects(args.objects, georeference)
    paths = [args.image] if args.before is None else [args.before, args.image]
    for path, one in zip(paths, images):
        print(f"Image: {path}, {one.width:,} x {one.height:,} px")
    if is_tiny(args.model):
        print(WEIGHTS_NOTE)

    with timed(seconds, "preprocess"):  # whatever is wrong with the image is said before the model is loaded
        options = {"max_image_pixels": args.max_image_pixels, **tile_options(args)}
        image_inputs = image_processor(images, return_tensors="pt", **options)
    with timed(seconds, "load"):
        from ..common import asking

        processor, model = load_model(args.model, **args.set)
    with timed(seconds, "encode"):
        features = asking.encode(model, image_inputs)
    both = {"max_tiles": args.max_tiles, "dates": dates}
    inputs = asking.write_prompts(model, processor, [args.question], [features], args.budgets, **both)
    with timed(seconds, "compress"):
        compressed = asking.compress(model, inputs)
    with timed(seconds, "generate"):
        options = {"max_new_tokens": args.max_new_tokens, "streamer": token_bar(args.max_new_tokens)}
        ids = asking.generate(model, inputs, compressed, **options)
    (text,) = asking.answer_texts(processor, ids)
    print(f"\nQuestion: {args.question}\nAnswer: {asking.printable(text)}\n")
    if args.objects:
        objects = asking.answer_objects(model, text, compressed, (image.height, image.width), ids=ids)
        about = {"image": Path(args.image).name, "question": args.question, "answer": asking.printable(text)}
        write_objects(objects, args.objects, about, georeference)
        print_objects(objects, args.objects)
    for number, (path, one) in enumerate(zip(paths, features)):
        if len(paths) > 1:
            print(f"\nOf {path}")
        spent = [len(tokens) for tokens in compressed.tokens[number]]
        counts = inputs["token_counts"][number].tolist() if "token_counts" in inputs else []
        seen = [int((importance > 0).sum()) for importance in compressed.importance[number]]
        usual = None if one.kind == "dynamic" else model.config.budgets
        print_tokens(one, seen, args.budgets or usual, counts, spent)
    print_seconds(seconds)


def print_objects(objects, path):
    """How many there are, and what is wrong with the others."""
    from ..common import asking

    print(f"Objects: {len(objects)}, {path}")
    for line in [objects.note] if objects.note else objects.refusals:
        print(f"  {asking.printable(line)}")
    print()


def print_tokens(image, seen, budgets, counts, spent):
    """Table of the visual tokens of every scale. `seen`: those that the question had to choose from; `counts`: those that
    were promised, of every scale or of all; of a dynamic pyramid nothing is, and `budgets` may be None."""
    row = "{:>9} {:>11} {:>11} {:>8} {:>8}".format
    print(row("scale", "grid", "tokens seen", "budget", "spent"))
    shared = budgets is None or is_one_budget(budgets) or len(counts) < len(spent)
    per_scale = [""] * len(spent) if shared else budgets
    for scale, (height, width), *numbers in zip(image.scales, image.grids, seen, per_scale, spent):
        print(row(f"{scale} px", f"{height} x {width}", *numbers))
    total = "" if budgets is None else budgets if is_one_budget(budgets) else sum(budgets)
    print(row("all", "", sum(seen), total, sum(spent)))
    if image.kind == "pyramid":
        pyramid = image.pyramid
        print(f"Tiles encoded: {sum(pyramid.num_chosen)} of {sum(map(pyramid.num_tiles, range(len(image.scales)))):,}")


def print_seconds(seconds):
    print("\n     stage  seconds")
    for stage, taken in (*seconds.items(), ("all", sum(seconds.values()))):
        print(f"{stage:>10} {taken:>8.2f}")


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat ask", description=__doc__.splitlines()[0])
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="file or URL (default: the made-up scene)")
    parser.add_argument("question", nargs="?", metavar="QUESTION", default=QUESTION, help=f"default: {QUESTION}")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--objects", type=Path, metavar="FILE", help="boxes and points of the answer: .geojson, .gpkg or .csv"
    )
    add_before_argument(parser)
    add_question_arguments(parser)
    args = parser.parse_args(arguments)
    stay_offline(args.model)
    if args.image is None and args.before is not None:
        raise ValueError(
            "--before is earlier than an image, of which there is none: uhr-bat ask IMAGE QUESTION --before EARLIER."
        )
    if args.image is None:
        args.image = str(painting.DEFAULT_PATH)
        if not painting.DEFAULT_PATH.exists():
            print(f"Painting the example scene, once: {args.image}", file=sys.stderr, flush=True)
            painting.write()
    check_image(args.image)
    if args.before is not None:
        check_image(args.before)
    args.model = find_model(args.model)
    if args.objects:
        require("geo", "rasterio", "geopandas", "pyogrio")
        check_outputs((args.image, args.before, args.model, args.area), Output("--objects", args.objects, OBJECT_FILES))
    ask(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
