"""Objects of a few native pixels in images of 4,000 to 16,000 px: fixed scales against levels down to the image's own pixels.

    uhr-bat evidence native [--model MODEL] [--focus MODEL] [--scenes 60] [--tiles 128] [--output DIR]

Questions about made-up scenes that nothing was trained on (`scenes/native.py`), each answered from all tokens of the fixed
scales, and from so many of them by the paper's rule and by ours, and of an image's own levels by ours, encoded where the
question looks; with `--focus`, by LRS-VQA's system too, a model that has its module (`uhr-bat tiny focus`). Writes
native.json, native.md and native.png. Intervals are 95 % of a bootstrap over scenes, differences are paired by question.
"""

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path

from ..common.budgets import counts_of_fraction
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files, write_report
from ..common.models import add_model_argument, find_model, model_option
from ..common.outputs import Output, check_outputs
from ..common.tables import percent, percent_interval, table
from ..scenes.layout import NATIVE_WIDTHS, TEST_SEEDS
from ..scenes.questions import KINDS
from .evidence import in_bins, samples_of
from .rows import FULL, PAPER, REFINED, RULES, Row, ask_rows, draw_lines, list_errors, row_of, summarise

SUITE = "scenes-native"
ZOOM, FOCUS = "coarse to fine", "LRS-VQA's mode"
NATIVE_BINS = {"2-3": (2, 3), "3-4.5": (3, 4.5), "4.5-8": (4.5, 8.001)}  # px of the image
FIXED_BINS = {"< 0.25": (0, 0.25), "0.25-0.5": (0.25, 0.5), "0.5-1": (0.5, 1)}  # px of the finest fixed scale
GROUPS = {
    "with an object": lambda record: record["pixels"] is not None,
    **{f"native {label}": one for label, one in in_bins("native", NATIVE_BINS).items()},
    **{f"fixed {label}": one for label, one in in_bins("pixels", FIXED_BINS).items()},
}
FRACTIONS, TILES = (0.01, 0.02, 0.04), 128


def rows_of(fractions, tiles, focus=None) -> list[Row]:
    """From all tokens of the fixed scales, and at every fraction by the paper's rule, by ours, and coarse to fine."""
    rows = [row_of(FULL, 1.0)]
    for fraction in fractions:
        counts = partial(counts_of_fraction, fraction)
        rows += [row_of(PAPER, fraction), row_of(REFINED, fraction)]
        rows.append(Row(ZOOM, fraction, counts, RULES[REFINED][0], view=("native", tiles)))
        if focus:
            rows.append(Row(FOCUS, fraction, counts, None, view=("descended",)))
    return rows


def report(result) -> str:
    """Markdown: the tables of native.md."""
    rows, about = result["rows"], result["about"]

    def name_of(row):
        return [f"{100 * row['x']:g} %", row["name"]]

    def cell(row, group, difference=False):
        part = row["groups"].get(group, {})
        value = part.get("differences", {}).get(FULL) if difference else part.get("accuracy")
        return percent_interval(value, signed=difference) if value else ""

    sizes = list(GROUPS)[1:]
    heads = [label.replace("native ", "").replace("fixed ", "") + " px" for label in sizes]
    heads = [f"{head} of the fixed view" if "fixed" in group else head for head, group in zip(heads, sizes)]
    heads = [f"{head} ({rows[0]['groups'].get(group, {}).get('questions', 0)})" for head, group in zip(heads, sizes)]
    parts = [
        "# Objects of a few native pixels",
        f"{about['questions']} questions about {about['scenes']} made-up scenes that nothing was trained on, images of "
        f"{NATIVE_WIDTHS[0]:,} to {NATIVE_WIDTHS[1]:,} px with objects of 2 to 8 of their pixels. Made by "
        f"`{about['command']}`. Coarse to fine: at most {about['tiles']} tiles of an image's own levels. LRS-VQA's mode: at "
        "most as many tokens as the other rows, thumbnail, separator and newlines included. Tokens are parts of "
        "all those of the fixed scales. Percent, with 95 % intervals of a bootstrap over scenes; differences are paired by "
        "question with all tokens of the fixed scales. Kept: every object that the question needs has a token of its own, "
        "unmerged, at one of the two finest scales or levels.",
        table(
            ["tokens", "method", "mean number", "accuracy", "with an object", "minus all fixed tokens", "kept"],
            [
                [
                    *name_of(row), f"{row['tokens']:.0f}", percent_interval(row["accuracy"]), cell(row, "with an object"),
                    cell(row, "with an object", True), percent_interval(row["kept"]) if row["kept"] else "",
                ]
                for row in rows
            ],
        ),
        "## By size of the smallest object that a question needs (number of questions)",
        table(["tokens", "method", *heads], [[*name_of(row), *(cell(row, group) for group in sizes)] for row in rows]),
        "## By kind of question",
        table(
            ["tokens", "method", *KINDS],
            [[*name_of(row), *(percent(row["by_task"][kind]) for kind in KINDS if kind in row["by_task"])] for row in rows],
        ),
        list_errors(result["errors"]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def plot(result, path):
    """Accuracy against the size of the smallest object, in pixels of the image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, lines = figure.subplots(), {}
    for row in result["rows"]:
        if row["x"] in (1.0, max(result["about"]["fractions"])):
            groups = [row["groups"].get(f"native {label}") for label in NATIVE_BINS]
            points = [(number, group["accuracy"]) for number, group in enumerate(groups) if group]
            lines[f"{row['name']}, {row['tokens']:.0f} tokens"] = points
    draw_lines(axes, {label: points for label, points in lines.items() if points})
    axes.set_xticks(range(len(NATIVE_BINS)), [f"{label} px" for label in NATIVE_BINS])
    axes.set(xlabel="smallest object that is needed, pixels of the image", ylabel="questions answered right, %")
    axes.set_ylim(0, 100)
    axes.legend()
    figure.savefig(path, dpi=110)


def measure(folder, samples, fractions=FRACTIONS, tiles=TILES, workers=1, focus=None) -> dict:
    """{"rows", "errors"} of samples of `SUITE`."""
    rows = rows_of(fractions, tiles, focus)
    ((records, errors),) = ask_rows(folder, {SUITE: (samples, rows)}, workers, focus).values()
    return {"rows": summarise(records, {FULL: (FULL, 1.0)}, GROUPS), "errors": errors}


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence native", description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("--focus", metavar="MODEL", help="one with a region focus module: LRS-VQA's mode")
    parser.add_argument("--scenes", type=int, default=60, help="with up to six questions each")
    parser.add_argument("--tiles", type=int, default=TILES, help="that may be encoded for a question")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output", type=Path, default=Path("native_out"), metavar="DIR", help="default: native_out")
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "scenes", "tiles", "workers")
    require("evaluate", "matplotlib")
    args.model = find_model(args.model)
    args.focus = args.focus and find_model(args.focus)
    check_outputs((args.model, args.focus), Output("--output", args.output, names=report_files("native")))
    if not 1 <= args.scenes <= len(TEST_SEEDS):
        raise ValueError(f"There are {len(TEST_SEEDS)} test scenes, but {args.scenes} are asked for.")
    samples = samples_of(SUITE, TEST_SEEDS[: args.scenes])
    result = measure(args.model, samples, tiles=args.tiles, workers=args.workers, focus=args.focus)
    result["about"] = {
        "command": f"uhr-bat evidence native{model_option(args.model)}"
        f"{' --focus DIR' * bool(args.focus)} --scenes {args.scenes} --tiles {args.tiles}",
        "questions": result["rows"][0]["questions"],
        "scenes": args.scenes,
        "tiles": args.tiles,
        "fractions": FRACTIONS,
    }
    text = report(result)
    write_report(args.output, "native", result, text, partial(plot, result))
    print(text)
    print(f"Written: {args.output}/native.json, native.md, native.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
