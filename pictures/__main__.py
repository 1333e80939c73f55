"""Draw what the model looked at and what it kept.

    uhr-bat pictures IMAGE "QUESTION" [--output DIR] [--budgets 32,64,128,256 ...] [--model MODEL]

Writes attention.png, regions.png, kept.png (the first budget), budgets.png (all of them), pruning.png (85, 95 and
97.5 % fewer tokens at every scale), without --max-tiles tsne.png, and objects.png where the answer points to objects.
"""

import argparse
import sys
from pathlib import Path

from ..budgets_uhr_bat import is_one_budget
from ..common.budgets import scale_budgets
from ..common.commands import add_question_arguments, tells_errors
from ..common.extras import require
from ..common.files import whole_files
from ..common.images import image_options, tile_options
from ..common.loading import check_image, load_model, load_processor
from ..common.models import find_model, stay_offline
from ..common.outputs import Output, check_outputs
from . import attention_picture, budgets_picture, kept_picture, objects_picture, regions_picture, tsne_picture

PRUNING = (85, 95, 97.5)
FILES = tuple(f"{name}.png" for name in ("attention", "regions", "kept", "budgets", "pruning", "tsne", "objects"))


def budget_name(budgets):
    if is_one_budget(budgets):
        return f"{budgets:,} tokens"
    return f"{sum(budgets):,} tokens ({', '.join(map(str, budgets))})"


def draw(args):
    """Write the pictures into the output folder, and print their names."""
    print("Reading ...", file=sys.stderr, flush=True)
    from ..common import asking
    from ..modeling_outputs_uhr_bat import check_letterboxes

    image_processor = load_processor(args.model, args.set).image_processor
    image = image_processor.open_image(args.image, **image_options(args))
    options = {"max_image_pixels": args.max_image_pixels, **tile_options(args)}
    image_inputs = image_processor(image, return_tensors="pt", **options)
    check_letterboxes(image_inputs)

    print("Loading ...", file=sys.stderr, flush=True)
    processor, model = load_model(args.model, **args.set)
    budgets = args.budgets or [model.config.budgets]

    print("Encoding ...", file=sys.stderr, flush=True)
    features = asking.encode(model, image_inputs)

    def inputs(budgets):
        return asking.write_prompts(model, processor, [args.question], [features], budgets)

    def compressed(budgets):
        return asking.compress(model, inputs(budgets))

    seen = features[0].available
    if args.native:  # levels of its own, which share one budget
        budgets, seen = [budget if is_one_budget(budget) else sum(budget) for budget in budgets], sum(seen)
    chosen = {budget_name(budget): compressed(budget) for budget in budgets}
    pruned = {f"Prune {percent:g} %": compressed(scale_budgets(seen, 1 - percent / 100)) for percent in PRUNING}

    first = next(iter(chosen.values()))
    print("Answering ...", file=sys.stderr, flush=True)
    ids = asking.generate(model, inputs(budgets[0]), first, max_new_tokens=args.max_new_tokens)
    (text,) = asking.answer_texts(processor, ids)
    objects = asking.answer_objects(model, text, first, (image.height, image.width), ids=ids)
    question, width, pruning = args.question, args.width, "What is left as ever more tokens are pruned"
    drawings = {
        "attention": lambda: attention_picture(first, image, question, width=width),
        "regions": lambda: regions_picture(first, image, width=width),
        "kept": lambda: kept_picture(first, image, question, width=width),
        "budgets": lambda: budgets_picture(chosen, image, question, width=width),
        "pruning": lambda: budgets_picture(pruned, image, question, title=pruning, width=width),
    }
    if features[0].kind == "whole":  # of tokens that are all there, whatever the question
        drawings["tsne"] = lambda: tsne_picture(first, features[0].tokens[-1], width=width)
    if objects:
        drawings["objects"] = lambda: objects_picture(objects, image, question, width=width)
    with whole_files(args.output) as built:
        for name, drawing in drawings.items():
            drawing().save(built / f"{name}.png")
    for name in drawings:
        print(args.output / f"{name}.png", flush=True)


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat pictures", description=__doc__.splitlines()[0])
    parser.add_argument("image", metavar="IMAGE", help="file or URL")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--output", type=Path, default=Path("pictures_out"), metavar="DIR", help="default: pictures_out"
    )
    parser.add_argument("--width", type=int, default=1400, metavar="PX", help="width of the pictures (default: 1400)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of the answer (default: 64)")
    add_question_arguments(parser, several=True)
    args = parser.parse_args(arguments)
    stay_offline(args.model)
    check_image(args.image)
    args.model = find_model(args.model)
    check_outputs((args.image, args.model, args.area), Output("--output", args.output, names=FILES))
    if args.width < 600:
        raise ValueError(f"--width must be at least 600 pixels for the titles to fit. Got {args.width}.")
    require("pictures", "matplotlib", "sklearn")
    draw(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
