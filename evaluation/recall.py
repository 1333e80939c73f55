"""Evidence recall at budget: of the objects that a question needs, how many does each choice of tokens keep?

    uhr-bat evidence recall SUITE --data DIR --model MODEL [--fractions 0.01 0.02 0.04] [--methods ...] [--output DIR]

Objects are the boxes that a suite has: the evidence of GeoEvidence-6K and TreeBench, LRS-VQA's hbox, the objects of the
made-up scenes, the trees of DeepForest's pictures (pascal-voc). An object is kept where one of the tokens that show it,
at one of the two finest scales, has a place of its own in the prompt, unmerged; its share is that of its tokens at the
finest scale. Writes recall.json, recall.md and recall.png. Intervals are 95 % of a bootstrap over images.

Letters: N tokens of a scale.
"""

import argparse
import math
import sys
from collections import defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..common.commands import check_range, tells_errors
from ..common.images import image_options
from ..common.loading import load_model
from ..common.measured import told_as_measured
from ..common.models import model_in_words
from ..common.tables import interval, percent_interval, table, wilson
from .evaluate import add_suite_arguments, check_suite, prompt_of
from .reports import draw_lines, finish, in_bins, list_errors
from .rows import (
    BLIND,
    FINEST,
    METHODS,
    Views,
    alone,
    choose,
    keeps,
    measure_groups,
    row_of,
    size_of,
    tokens_in_box,
)
from .suites import SUITES

FRACTIONS = (0.01, 0.02, 0.04)
# Side of a square of the box's area, in pixels of the finest scale.
LIMITS = {"to 2 px": 2.5, "3-4 px": 4.5, "5-8 px": 8.5, "9-16 px": 16.5, "17-64 px": 64.5, "over 64 px": math.inf}
SIZES = in_bins("pixels", dict(zip(LIMITS, pairwise((0, *LIMITS.values())))))


def boxes_of(samples, image_size, grids) -> tuple[dict, list[dict]]:
    """{sample: [(box, its tokens of every grid)]} of the boxes that lie in the image, and {"image", "error"} of the
    others."""
    found, errors = {}, []
    for sample in samples:
        found[sample.id] = []
        for box in sample.boxes:
            try:
                found[sample.id].append((box, [tokens_in_box(box, image_size, grid) for grid in grids]))
            except ValueError as error:
                errors.append({"image": sample.pictures[0].key, "error": f"{sample.id}: {error}"})
    return found, errors


@torch.no_grad()
def records_of(pair, suite, prompt, fractions, methods, errors, options, group) -> list[dict]:
    """One record an object, method and fraction: kept, share, pixels; for all questions about one image. Boxes that do
    not lie in it are added to `errors`. `options`: of reading."""
    image, scales = (
        pair[0].image_processor.process_image(suite.open(group[0].pictures[0]), **options),
        pair[1].config.scales,
    )
    image_size, records = (image.height, image.width), []
    boxes, outside = boxes_of(group, image_size, pair[1].config.grids)
    errors += outside
    if not any(boxes.values()):
        return []
    views = Views(pair, image)
    for sample in group:
        for method in methods if boxes[sample.id] else ():
            for fraction in fractions:
                slots = choose(views, row_of(method, fraction), suite.prompts[prompt](sample))[1].slots[0]
                own = alone(slots[len(scales) - 1]).cpu().numpy()
                for box, of_scales in boxes[sample.id]:
                    tokens = [
                        (len(scales) - n, token) for n in range(1, FINEST + 1) for token in of_scales[-n].tolist()
                    ]
                    records.append({
                        "sample": sample.id, "image": sample.pictures[0].key, "method": method, "fraction": fraction,
                        "kept": keeps(slots, [tokens]), "share": float(own[of_scales[-1]].mean()),
                        "pixels": size_of(box, image_size, scales),
                    })  # fmt: skip
    return records


def summarise(records) -> list[dict]:
    """Recall and share of every method and fraction, and recall by size."""
    rng, rows, by_method = np.random.default_rng(0), [], defaultdict(list)
    for record in records:
        by_method[record["method"], record["fraction"]].append(record)
    for (method, fraction), found in by_method.items():
        images = [record["image"] for record in found]
        row = {"method": method, "fraction": fraction, "objects": len(found)}
        for name in ("kept", "share"):
            row[name] = interval([record[name] for record in found], images, rng)
        row["kept_wilson"] = wilson(row["kept"][0], len(set(images)))
        row["by_size"] = {}
        for name, belongs in SIZES.items():
            of_size = [record for record in found if belongs(record)]
            if of_size:
                kept = interval([one["kept"] for one in of_size], [one["image"] for one in of_size], rng)
                row["by_size"][name] = {"objects": len(of_size), "kept": kept}
        rows.append(row)
    return rows


def report(result) -> str:
    rows, about = result["rows"], result["about"]
    sizes = [name for name in SIZES if any(name in row["by_size"] for row in rows)]
    numbers = rows[0]["by_size"] if rows else {}
    header = ["tokens", "method", "objects kept", "the same, Wilson's", "share of their tokens"]
    header += [f"{name} ({numbers[name]['objects']})" for name in sizes]
    lines = [
        [f"{100 * row['fraction']:g} %", row["method"]]
        + [percent_interval(row[name]) for name in ("kept", "kept_wilson", "share")]
        + [percent_interval(row["by_size"][name]["kept"]) for name in sizes]
        for row in rows
    ]
    return "\n\n".join([
        f"# Evidence recall at budget: {about['suite']}",
        f"{about['objects']} objects of {about['samples']} questions about {about['images']} images, by "
        f"{model_in_words(about)}. Percent, with 95 % intervals of a bootstrap over images. Kept: one of the object's tokens "
        "at one of the two finest scales has a place of its own in the prompt, unmerged. Share: of its tokens at the "
        "finest scale. Wilson's interval counts an image as one trial, and holds where few or all are kept. By size: the side of a square of the box's area, in pixels of the finest scale, number of "
        "objects in brackets.",
        table(header, lines),
        list_errors(result["errors"]),
        *([list_errors(result["boxes"], "boxes are left out")] if result["boxes"] else []),
    ]) + "\n"  # fmt: skip


def plot(rows):
    """Objects kept against the fraction of visual tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, lines = figure.subplots(), defaultdict(list)
    for row in rows:
        lines[row["method"]].append((100 * row["fraction"], row["kept"]))
    draw_lines(axes, lines, BLIND, log=True)
    axes.set(xlabel="visual tokens, % of all", ylabel="objects kept, %")
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def measure_recall(args) -> dict:
    suite = SUITES[args.suite]
    prompt = prompt_of(suite, args.prompt)
    samples = [sample for sample in suite.load(args.data, args.limit) if sample.boxes]
    if not samples:
        found = ""
        if suite.box_fields:
            record = next(iter(suite.records(args.data)))[0]
            found = f" Boxes are read from {', '.join(suite.box_fields)}. The first record has {', '.join(record)}."
        raise ValueError(f"No sample of {args.suite} has a box of an object.{found}")
    pair, outside = load_model(args.model, **args.set), []
    pair[1].eval()
    measure = partial(records_of, pair, suite, prompt, args.fractions, args.methods, outside, image_options(args))
    records, errors = measure_groups(samples, measure, "Measuring")
    if not records:
        first = (errors + outside)[0]["error"]
        raise ValueError(f"No object of {len(samples)} samples could be looked for. The first failure: {first}")
    one = [row for row in records if (row["method"], row["fraction"]) == (args.methods[0], args.fractions[0])]
    about = {
        "suite": args.suite, "data": args.data, **told_as_measured(args.model, args.set), "prompt": prompt, "samples": len(samples),
        "objects": len(one), "images": len({row["image"] for row in one}),
    }  # fmt: skip
    return {"about": about, "rows": summarise(records), "errors": errors, "boxes": outside}


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence recall", description=__doc__.splitlines()[0])
    parser.add_argument(
        "suite", metavar="SUITE", choices=SUITES, help="one with boxes: scenes, geo-evidence, lrs-vqa, pascal-voc, ..."
    )
    add_suite_arguments(parser)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, metavar="X", help="of all tokens")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=tuple(METHODS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--output", type=Path, default=Path("recall_out"), metavar="DIR", help="default: recall_out")
    args = parser.parse_args(arguments)
    check_range(args, 0, 1, "fractions", above=True)
    check_suite(args, "recall")
    result = measure_recall(args)
    finish(args.output, "recall", result, report(result), plot(result["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
