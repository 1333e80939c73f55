"""Evidence recall at budget: of the objects that a question needs, how many does each choice of tokens keep?

    uhr-bat evidence recall SUITE --data DIR --model DIR [--fractions 0.01 0.02 0.04] [--methods ...] [--output DIR]

Objects are the boxes that a suite has: LRS-VQA's hbox, the objects of the made-up scenes, the trees of DeepForest's
pictures (pascal-voc). An object is kept where one of the tokens that show it, at one of the two finest scales, has a
place of its own in the prompt, unmerged; its share is that of its tokens at the finest scale. Writes recall.json,
recall.md and recall.png. Intervals are 95 % of a bootstrap over images.

Letters: N tokens of a scale.
"""

import argparse
import math
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..common.asking import compress, encode, write_prompts
from ..common.budgets import counts_of_fraction
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files, write_report
from ..common.images import image_options
from ..common.loading import check_files, load_model
from ..common.outputs import Output, check_outputs
from ..common.tables import interval, percent_interval, table, wilson
from ..geometry_uhr_bat import letterbox, tokens_of_points
from .choices import CHOICES, PROPORTIONS, RULES, alone, choose
from .evaluate import add_suite_arguments, prompt_of, stay_offline
from .running import list_errors, measure_groups
from .suites import SUITES

FRACTIONS = (0.01, 0.02, 0.04)
METHODS = (*RULES, *CHOICES)
FINEST = 2  # scales at which an object counts as seen
# Side of a square of the box's area, in pixels of the finest scale.
SIZES = {"to 2 px": 2.5, "3-4 px": 4.5, "5-8 px": 8.5, "9-16 px": 16.5, "17-64 px": 64.5, "over 64 px": math.inf}


def tokens_in_box(box, image_size, grid) -> np.ndarray:
    """int64[K]: the tokens of a grid whose centres lie in a box, or the one that shows its middle where none does.

    Args:
        box: (x0, y0, x1, y1) in pixels of the image.
        image_size: (height, width) in pixels.
        grid: (height, width) in tokens.

    Raises:
        ValueError: a box that lies outside the image, or whose edges are turned round or no numbers.
    """
    (x0, y0, x1, y1), (h, w) = box, image_size
    if not (x0 <= x1 and y0 <= y1 and x1 > 0 and y1 > 0 and x0 < w and y0 < h and all(map(math.isfinite, box))):
        raise ValueError(f"The box {box} does not lie in the image of {w} x {h} px (width x height).")
    side, top, left = letterbox(image_size)
    edges = ((max(y0, 0) + top, min(y1, h) + top, grid[0]), (max(x0, 0) + left, min(x1, w) + left, grid[1]))
    # The centre of token i lies (i + 1/2) / number of the side below the edge.
    rows, columns = (
        np.arange(math.ceil(low * number / side - 0.5), math.ceil(high * number / side - 0.5))
        for low, high, number in edges
    )
    if len(rows) and len(columns):
        return (rows[:, None] * grid[1] + columns).ravel()
    middle = (max(y0, 0) + min(y1, h)) / 2, (max(x0, 0) + min(x1, w)) / 2
    return np.atleast_1d(tokens_of_points(middle, image_size, grid))


def size_of(box, image_size, scales) -> float:
    """Side of a square of the box's area, in pixels of the finest scale."""
    return math.sqrt(max((box[2] - box[0]) * (box[3] - box[1]), 0)) * scales[-1] / max(image_size)


@torch.no_grad()
def slots_of(model, processor, question, features, method, fraction) -> list[torch.Tensor]:
    """long[N] of every scale: the places of all tokens of its grid, -1 where dropped."""
    if method in RULES:
        rules, proportions = RULES[method]
        counts = counts_of_fraction(fraction, features.available, proportions)
        inputs = write_prompts(model, processor, [question], [[features]], counts=[counts])
        return compress(model, inputs, rules).slots[0]
    chosen = choose(method, model, features, counts_of_fraction(fraction, features.available, PROPORTIONS))
    sizes = [height * width for height, width in model.config.grids]
    return [
        slots.new_full((size,), -1).index_copy(0, positions, slots)
        for slots, positions, size in zip(chosen, features.positions, sizes)
    ]


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


def records_of(model, processor, suite, prompt, group, fractions, methods, errors, options) -> list[dict]:
    """One record an object, method and fraction: kept, share, pixels; for all questions about one image. Boxes that do
    not lie
    in it are added to `errors`. `options`: of reading."""
    config = model.config
    image = processor.image_processor.process_image(suite.open(group[0].pictures[0]), **options)
    image_size, records = (image.height, image.width), []
    boxes, outside = boxes_of(group, image_size, config.grids)
    errors += outside
    if not any(boxes.values()):
        return []
    (features,) = encode(model, processor.image_processor(image, return_tensors="pt"))
    for sample in group:
        for method in methods if boxes[sample.id] else ():
            for fraction in fractions:
                slots = slots_of(model, processor, suite.prompts[prompt](sample), features, method, fraction)
                single = [alone(one).cpu().numpy() for one in slots]
                for box, of_scales in boxes[sample.id]:
                    shares = [single[scale][positions].mean() for scale, positions in enumerate(of_scales)]
                    records.append({
                        "sample": sample.id, "image": sample.pictures[0].key, "method": method, "fraction": fraction,
                        "kept": bool(max(shares[-FINEST:]) > 0), "share": float(shares[-1]),
                        "pixels": size_of(box, image_size, config.scales),
                    })  # fmt: skip
    return records


def size_bin(pixels: float) -> str:
    return next(name for name, limit in SIZES.items() if pixels < limit)


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
        for name in SIZES:
            of_size = [record for record in found if size_bin(record["pixels"]) == name]
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
        f"{about['model']}. Percent, with 95 % intervals of a bootstrap over images. Kept: one of the object's tokens "
        "at one of the two finest scales has a place of its own in the prompt, unmerged. Share: of its tokens at the "
        "finest scale. Wilson's interval counts an image as one trial, and holds where few or all are kept. By size: the side of a square of the box's area, in pixels of the finest scale, number of "
        "objects in brackets.",
        table(header, lines),
        list_errors(result["errors"]),
        *([list_errors(result["boxes"], "boxes are left out")] if result["boxes"] else []),
    ]) + "\n"  # fmt: skip


def plot(rows, path):
    """Objects kept against the fraction of visual tokens."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, methods = figure.subplots(), list(dict.fromkeys(row["method"] for row in rows))
    for method, colour in zip(methods, colormaps["tab20"].colors):
        own = sorted((row["fraction"], *row["kept"]) for row in rows if row["method"] == method)
        x, mean, low, high = 100 * np.array(own).T
        style = {"marker": "o"} if method in RULES else {"marker": "x", "linestyle": "--"}
        axes.errorbar(x, mean, (mean - low, high - mean), label=method, capsize=2, color=colour, **style)
    axes.set(xscale="log", xlabel="visual tokens, % of all", ylabel="objects kept, %", ylim=(0, 100))
    axes.set_xticks(sorted({100 * row["fraction"] for row in rows}))
    axes.get_xaxis().set_major_formatter("{x:g}")
    axes.minorticks_off()
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def measure(args) -> dict:
    suite = SUITES[args.suite]
    prompt = prompt_of(suite, args.prompt)
    samples = [sample for sample in suite.load(args.data, args.limit) if sample.boxes]
    if not samples:
        raise ValueError(f"No sample of {args.suite} has a box of an object.")
    processor, model = load_model(args.model)
    model.eval()
    outside, options = [], image_options(args)
    records, errors = measure_groups(
        samples,
        lambda group: records_of(
            model, processor, suite, prompt, group, args.fractions, args.methods, outside, options
        ),
        "Measuring",
    )
    if not records:
        first = (errors + outside)[0]["error"]
        raise ValueError(f"No object of {len(samples)} samples could be looked for. The first failure: {first}")
    one = [row for row in records if (row["method"], row["fraction"]) == (args.methods[0], args.fractions[0])]
    about = {
        "suite": args.suite, "data": args.data, "model": str(args.model), "prompt": prompt, "samples": len(samples),
        "objects": len(one), "images": len({row["image"] for row in one}),
    }  # fmt: skip
    return {"about": about, "rows": summarise(records), "errors": errors, "boxes": outside}


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence recall", description=__doc__.splitlines()[0])
    parser.add_argument(
        "suite", metavar="SUITE", choices=SUITES, help="one with boxes: scenes, lrs-vqa, pascal-voc, ..."
    )
    add_suite_arguments(parser)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, metavar="X", help="of all tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="default: all")
    parser.add_argument("--output", type=Path, default=Path("recall_out"), metavar="DIR", help="default: recall_out")
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "limit")
    check_range(args, 0, 1, "fractions", above=True)
    stay_offline(args.data)
    require("evaluate", "matplotlib", "datasets")
    check_files(None, args.model)
    check_outputs((args.data, args.model, args.area), Output("--output", args.output, names=report_files("recall")))
    result = measure(args)
    text = report(result)
    write_report(args.output, "recall", result, text, partial(plot, result["rows"]))
    print(text)
    print(f"Written: {args.output}/recall.json, recall.md, recall.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
