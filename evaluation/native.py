"""Objects of a few native pixels in images of 4,000 to 16,000 px: fixed scales against levels down to the image's own pixels.

    uhr-bat evidence native [--model MODEL] [--focus MODEL] [--scenes 60] [--tiles 128] [--output DIR]

Questions about made-up scenes that nothing was trained on (`scenes/native.py`), each answered from all tokens of the fixed
scales, and from so many of them by the paper's rule and by ours, and of an image's own levels by ours, encoded where the
question looks; with `--focus`, by LRS-VQA's system too, a model that has its module (`uhr-bat tiny focus`). Writes
native.json, native.md and native.png. Intervals are 95 % of a bootstrap over scenes, differences are paired by question.
"""

import math
import sys
from functools import partial

from ..common.budgets import counts_of_fraction
from ..common.commands import check_range, tells_errors
from ..common.models import find_model, model_option
from ..scenes.layout import NATIVE_WIDTHS, TEST_SEEDS
from .evidence import check_scenes, samples_of, scenes_parser
from .reports import draw_lines, finish, in_bins, report, summarise
from .rows import ALL_TOKENS, FULL, PAPER, REFINED, RULES, Row, ask_rows, row_of

SUITE = "scenes-native"
ZOOM, FOCUS = "coarse to fine", "LRS-VQA's mode"
# By pixels of the image, and of the finest fixed scale.
NATIVE_BINS = {"2-3 px": (2, 3), "3-4.5 px": (3, 4.5), "4.5-8 px": (4.5, 8.001)}
FIXED_BINS = {"< 0.25 px fixed": (0, 0.25), "0.25-0.5 px fixed": (0.25, 0.5), "0.5-1 px fixed": (0.5, 1)}
GROUPS = {"with an object": lambda record: record["pixels"] is not None}
GROUPS |= in_bins("native", NATIVE_BINS) | in_bins("pixels", FIXED_BINS)
FRACTIONS, TILES = (0.01, 0.02, 0.04), 128
SAYS = f"""{{questions}} questions about {{scenes}} made-up scenes that nothing was trained on, images of \
{NATIVE_WIDTHS[0]:,} to {NATIVE_WIDTHS[1]:,} px with objects of 2 to 8 of their pixels. Made by `{{command}}`. Coarse to \
fine: at most {{tiles}} tiles of an image's own levels. LRS-VQA's mode: at most as many tokens as the other rows, \
thumbnail, separator and newlines included. Tokens are parts of all those of the fixed scales. Percent, with 95 % \
intervals of a bootstrap over scenes; differences are paired by question. Kept: every object that the question needs has \
a token of its own, unmerged, at one of the two finest scales or levels."""


def zoomed_row(fraction: float, tiles: int) -> Row:
    """Coarse to fine, with the rules of `REFINED` and a fraction of the fixed scales' tokens."""
    return Row(ZOOM, 100 * fraction, partial(counts_of_fraction, fraction), RULES[REFINED][0], ZOOM, ("native", tiles))


def rows_of(fractions, tiles, focus=None) -> list[Row]:
    """From all tokens of the fixed scales, and at every fraction by the paper's rule, by ours, and coarse to fine."""
    rows = [ALL_TOKENS]
    for fraction in fractions:
        counts, x = partial(counts_of_fraction, fraction), 100 * fraction
        rows += [row_of(PAPER, fraction), row_of(REFINED, fraction)]
        rows.append(zoomed_row(fraction, tiles))
        if focus:
            rows.append(Row(FOCUS, x, counts, None, FOCUS, ("descended",)))
    return rows


def plot(rows):
    """Accuracy against the size of the smallest object, in pixels of the image, from all and from the most tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, lines, most = figure.subplots(), {}, max(row["x"] for row in rows if row["name"] != FULL)
    for row in rows:
        points = [
            (number, row["groups"][label]["accuracy"])
            for number, label in enumerate(NATIVE_BINS)
            if label in row["groups"]
        ]
        if points and (row["name"] == FULL or row["x"] == most):
            lines[f"{row['name']}, {row['tokens']:.0f} tokens"] = points
    draw_lines(axes, lines)
    axes.set_xticks(range(len(NATIVE_BINS)), NATIVE_BINS)
    axes.set(xlabel="smallest object that is needed, of the image", ylabel="questions answered right, %", ylim=(0, 100))
    axes.legend()
    return figure


def measure(folder, samples, fractions=FRACTIONS, tiles=TILES, workers=1, focus=None, changes=None) -> dict:
    """{"rows", "errors"} of samples of `SUITE`."""
    jobs = {SUITE: (samples, rows_of(fractions, tiles, focus))}
    ((records, errors),) = ask_rows(folder, jobs, workers, focus, changes).values()
    return {"rows": summarise(records, {FULL: ALL_TOKENS.x}, GROUPS), "errors": errors}


@tells_errors
def main(arguments=None) -> int:
    parser = scenes_parser("uhr-bat evidence native", __doc__.splitlines()[0], "native_out")
    parser.add_argument("--focus", metavar="MODEL", help="one with a region focus module: LRS-VQA's mode")
    parser.add_argument("--tiles", type=int, default=TILES, help="that may be encoded for a question")
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "tiles")
    args.focus = args.focus and find_model(args.focus)
    check_scenes(args, "native", focus=args.focus)
    samples = samples_of(SUITE, TEST_SEEDS[: args.scenes])
    result = measure(args.model, samples, tiles=args.tiles, workers=args.workers, focus=args.focus, changes=args.set)
    command = f"uhr-bat evidence native{model_option(args.model, args.set)}{' --focus DIR' * bool(args.focus)}"
    about = {
        "command": f"{command} --scenes {args.scenes} --tiles {args.tiles}",
        "scenes": args.scenes,
        "tiles": args.tiles,
    }
    about |= {
        "groups": "the smallest object that a question needs, in pixels of the image and of the finest fixed scale"
    }
    about |= {"questions": result["rows"][0]["questions"], "title": "Objects of a few native pixels"}
    about["says"] = SAYS.format(**about)
    result = {"about": about, **result}
    finish(args.output, "native", result, report(result), plot(result["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
