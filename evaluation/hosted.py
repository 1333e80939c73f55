"""A model of another family by itself, with tiling, and behind UHR-BAT's calls, from equally many visual tokens.

    uhr-bat evidence hosted --model MODEL [--scenes 40] [--native-scenes 40] [--also NAME=VALUE ...] [--output DIR]

Questions about made-up scenes that nothing was trained on, ordinary ones and such with objects of a few native pixels. A killed
run goes on. Writes hosted.json, hosted.md and hosted.png, hosted.jsonl, the lines that a run goes on with, and hosted.csv, one
line an answer. Intervals are 95 % of a bootstrap over scenes, differences are paired by question.
"""

import csv
import math
import sys
from dataclasses import fields, replace
from functools import partial

import torch

from ..common.commands import check_range, tells_errors
from ..common.files import whole_files
from ..common.loading import host_settings, is_host
from ..common.measured import told_as_measured
from ..common.models import Each, as_given, base_of, model_name, model_option, setting
from ..common.runs import alone
from ..common.tables import percent_interval, table
from ..scenes.layout import TEST_SEEDS
from .evidence import SIZES, check_scenes, samples_of, scenes_parser
from .native import GROUPS, SUITE, TILES
from .native import ZOOM as DESCENDED
from .plain import OWN, PLAIN, own_tiles
from .reports import TITLES, draw_lines, finish, report, summarise
from .rows import ALL, DISTINCT, ENCODED, ENCODED_SHARE, PAPER, REFINED, REFINEMENT, TOP_K, Kept, Row, ask_rows, row_of
from .running import versions

NAME, FRACTIONS = "hosted", (0.01, 0.02, 0.04, 0.1)
ORDINARY, TILING = "scenes", "tiling"
METHODS = ("uniform", TOP_K, "CDPruner", "VisionZip", PAPER, DISTINCT, REFINED)
GRIDS = (1, 2, 3, 4)
# Rows by which tiling's FLOPs are compared: the default rule, of all tiles and of those where the question looks.
DEFAULTS = (REFINED, DESCENDED)
GROUPS_OF = {
    ORDINARY: (SIZES, "the smallest object that a question needs, side of a square of its area at the finest scale"),
    SUITE: (GROUPS, "the smallest object that a question needs, in pixels of the image and of the finest fixed scale"),
}
SAYS = f"""{{questions}} questions about {{scenes}} made-up scenes that nothing was trained on. Made by `{{command}}`. Percent, with \
95 % intervals of a bootstrap over scenes; differences are paired by question. Tokens are parts of all those of the levels, GFLOPs \
those of the first question, counted. {PLAIN}: the model's own image processor and `generate`, the whole picture brought down to at \
most as many visual tokens, or to as few as there can be{{tiles}}. {OWN}: as many as it takes of its own accord. {TILING}: a view of one \
tile and a grid of tiles, as LLaVA-NeXT has them, all rows kept; others are compared with the finest grid that has no more tokens. \
{DESCENDED}: {{zoom}}, by the rule of "{REFINED}", the default. What stands behind a semicolon is a setting that differs from \
the run's. Kept: every object that a question needs has a token of its own, unmerged, at one of the two finest levels; of pictures \
that were brought down, where they are as fine as these."""


# ---- Rows ------------------------------------------------------------------------------------------------------------


def rows_of(fractions, view, grids, also, pair) -> list[Row]:
    """All rows of a host.

    Args:
        view: of coarse to fine.
        grids: tiles a side of tiling; None for those of `GRIDS` that take at most half of the context window.
        also: (name, value) of settings, each of which makes rows more.

    Raises:
        ValueError: tiling that the context window does not hold.
    """
    model = pair[1]
    window, cells = model.context_window or math.inf, model.patches_per_side**2
    total = sum((scale // model.tile_size) ** 2 for scale in model.config.scales)
    rows = [Row(OWN, 100.0, list, None, "", (PLAIN, OWN))]
    for grid in grids or GRIDS:
        number, sides = 1 + grid**2 * (grid > 1), sorted({model.tile_size, grid * model.tile_size})
        if grids and number * cells >= window:
            raise ValueError(
                f"Tiling of {grid} x {grid} takes {number * cells} tokens; the context window has {window}."
            )
        if grids or 2 * number * cells <= window:
            x = 100 * number / total
            x = round(x, 2 if x >= 1 else 5)  # a row of its own of however many levels
            rows.append(Row(TILING, x, list, ALL, TILING, settings={"scales": sides}))
    for fraction in fractions:
        refined = row_of(REFINED, fraction)
        closer = Row(DESCENDED, refined.x, refined.counts, refined.rules, DESCENDED, view)
        rows += [Row(PLAIN, refined.x, refined.counts, None, PLAIN, (PLAIN,))]
        rows += [*(row_of(method, fraction) for method in METHODS), closer]
        others = others_of(model)
        for name, value in others + [one for one in also if one not in others]:
            # A row's rules go over the configuration's.
            own = name in refined.rules and name not in REFINEMENT
            says = {"settings": {name: value}, "rules": refined.rules | ({name: value} if own else {})}
            named = [(one, f"{one.name}; {name}={value}") for one in (refined, closer)]
            rows += [replace(one, name=text, line=text, **says) for one, text in named]
    return rows


def others_of(model) -> list[tuple[str, object]]:
    """(name, value) of what a host can be asked by beside its own settings: rules of places, or marks, and all that is on or
    off."""
    from ..hosts.settings import PLACES

    own = model.settings
    switches = [
        one.name for one in fields(own) if isinstance(one.default, bool) and (one.name != "marks" or not model.mrope)
    ]
    places = [("places", rule) for rule in PLACES if rule != own.places] if model.mrope else []
    return places + [(name, not getattr(own, name)) for name in switches]


# ---- Reports ---------------------------------------------------------------------------------------------------------


def summary(suite, records) -> list[dict]:
    """Rows with what they are worth beside the plain model, from as many tokens and as it comes, and beside tiling."""
    rungs = sorted({record["x"] for record in records if record["row"] == TILING})

    def finest(x):
        return max((rung for rung in rungs if rung <= x), default=None)

    return summarise(records, {TILING: finest, OWN: 100.0, PLAIN: None}, GROUPS_OF[suite][0])


def flops_table(rows) -> str:
    """FLOPs of a first question at the accuracy of tiling, or a better one: the cheapest row of `DEFAULTS` that has it."""
    counted = [row for row in rows if "first_question_flops" in row]
    lines = []
    for rung in (row for row in counted if row["name"] in (TILING, OWN)):
        equal = [row for row in counted if row["name"] in DEFAULTS and row["accuracy"][0] >= rung["accuracy"][0]]
        best = min(equal, key=lambda row: row["first_question_flops"], default=None)
        cells = [rung["name"], f"{rung['tokens']:.0f}", percent_interval(rung["accuracy"]), giga(rung)]
        times = best and rung["first_question_flops"] / best["first_question_flops"]
        other = ["none", "", "", "", ""]
        if best is not None:
            accuracy = percent_interval(best["accuracy"])
            other = [f"{best['name']}, {best['x']:g} %", f"{best['tokens']:.0f}", accuracy, giga(best), f"{times:.2f}"]
        lines.append(cells + other)
    head = ["row", "tokens", "accuracy", "GFLOPs", "cheapest default that is as good", "tokens", "accuracy", "GFLOPs"]
    return table([*head, "times fewer"], lines)


def giga(row) -> str:
    return f"{row['first_question_flops'] / 1e9:.3g}"


def plot(suites: dict):
    """Accuracy and evidence kept over the budget, the plain model against the host: a line of axes for each suite."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5 * len(suites)), layout="constrained")
    for (name, result), line in zip(suites.items(), figure.subplots(len(suites), 2, squeeze=False)):
        for (field, title), axes in zip(TITLES.items(), line):
            lines = {}
            for row in result["rows"]:
                if row["line"] and row[field] is not None:
                    lines.setdefault(row["line"], []).append((row["x"], row[field]))
            (own,) = (row for row in result["rows"] if row["name"] == OWN)
            if field == "accuracy":
                axes.axhline(
                    100 * own[field][0], color="black", linestyle=":", label=f"{OWN}: {own['tokens']:.0f} tokens"
                )
            draw_lines(axes, lines, [one for one in lines if ";" in one], log=True)
            axes.set(xlabel="visual tokens, % of all", ylabel="%", title=f"{result['about']['title']}: {title.lower()}")
    figure.legend(*line[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def write_answers(folder, records: dict):
    """hosted.csv, one line an answer."""
    names = ("sample", "task", "row", "x", "tokens", "answer", "right", "kept", "pixels", "native")
    with whole_files(folder) as built, open(built / f"{NAME}.csv", "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("suite", *names))
        lines.writerows([suite, *map(one.get, names)] for suite, found in records.items() for one in found)


# ---- The command -----------------------------------------------------------------------------------------------------


def check_host(args):
    """Raises `ValueError` for a model of UHR-BAT's own family, or settings that it cannot have; image processor of the host."""
    from transformers import AutoImageProcessor

    from ..hosts.loading import check_settings

    base = base_of(args.model)
    folder = base or args.model
    if not is_host(folder):
        raise ValueError(
            f"{model_name(args.model)} is UHR-BAT's own and has no plain call. `uhr-bat evidence` measures it. Name a model of "
            "another family with --model."
        )
    if stated := sorted({"budgets", "max_tiles"} & set(dict(args.also))):
        raise ValueError(f"--also {stated[0]} would change no row: --fractions and --tiles say how much each spends.")
    if encoded := sorted(ENCODED & set(dict(args.also))):
        raise ValueError(
            f"--also {encoded[0]} would encode other tiles, of which there are other numbers. Give --set and a run more."
        )
    measured = host_settings(args.model, base)
    config = check_settings(folder, measured, **args.set)
    for name, value in args.also:
        check_settings(folder, measured, **args.set | {name: value})
    anchor = (config.scales[0] // config.tile_size) ** 2
    if args.native_scenes and args.tiles < anchor:
        raise ValueError(f"--tiles must be at least {anchor}, those of the coarsest level. Got {args.tiles}.")
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def measure(args, tiles: str) -> tuple[dict, dict]:
    """({suite: result}, {suite: records})."""
    seeds = range(args.first_seed, args.first_seed + max(args.scenes, args.native_scenes))
    views = {ORDINARY: ("share", args.share), SUITE: ("native", args.tiles)}
    numbers = {ORDINARY: args.scenes, SUITE: args.native_scenes}
    jobs = {
        suite: (
            samples_of(suite, seeds[:number]),
            partial(rows_of, args.fractions, views[suite], args.grids, args.also),
        )
        for suite, number in numbers.items()
        if number
    }
    settings = {
        **told_as_measured(args.model, args.set), "versions": versions(), "first_seed": args.first_seed,
        "fractions": args.fractions, "grids": args.grids, "tiles": args.tiles, "also": [list(one) for one in args.also],
        # Of another machine it is another; None as in runs that did not say it.
        "dtype": "auto" if torch.accelerator.is_available() else None,
        "share": args.share if args.share != ENCODED_SHARE else None,
    }  # fmt: skip
    lines, dtype = args.output / f"{NAME}.jsonl", settings["dtype"] or torch.float32
    with alone(lines):
        found = ask_rows(args.model, jobs, args.workers, None, args.set, dtype, Kept(lines, settings), count=True)
    zooms = {
        ORDINARY: f"{args.share:.4g} of the tiles behind the coarsest level's",
        SUITE: f"{args.tiles} tiles of an image's own levels",
    }
    command = (
        f"uhr-bat evidence hosted{model_option(args.model, settings['model_settings'] or {})} --scenes {args.scenes}"
    )
    command += f" --native-scenes {args.native_scenes} --first-seed {args.first_seed} --tiles {args.tiles}"
    command += f" --share {args.share}" * (args.share != ENCODED_SHARE)
    for option, values in ("fractions", args.fractions), ("grids", args.grids or []):
        command += f" --{option} {' '.join(map(str, values))}" * bool(values)
    command += "".join(f" --also {as_given(one)}" for one in args.also)
    results = {}
    for suite, (records, errors) in found.items():
        questions = len({record["sample"] for record in records})
        about = {"command": command, "scenes": numbers[suite], "questions": questions, "groups": GROUPS_OF[suite][1]}
        about |= {"title": f"{model_name(args.model)}, {'native' if suite == SUITE else 'ordinary'} scenes"}
        about["says"] = SAYS.format(**about, tiles=tiles, zoom=zooms[suite])
        rows = summary(suite, records)
        more = ["## FLOPs of a first question at the accuracy of tiling", flops_table(rows)]
        results[suite] = {"about": about, "rows": rows, "errors": errors, "more": more}
    return results, {suite: records for suite, (records, _) in found.items()}


@tells_errors
def main(arguments=None) -> int:
    parser = scenes_parser("uhr-bat evidence hosted", __doc__.splitlines()[0], "hosted_out")
    parser.set_defaults(scenes=40, **({"workers": 1} if torch.accelerator.is_available() else {}))
    parser.add_argument("--native-scenes", type=int, default=40, help="of objects of a few native pixels (default: 40)")
    parser.add_argument(
        "--first-seed", type=int, default=TEST_SEEDS.start, help=f"of the scenes (default: {TEST_SEEDS.start})"
    )
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=FRACTIONS, metavar="X", help="of all tokens of the levels"
    )
    parser.add_argument("--tiles", type=int, default=TILES, help="of native levels that may be encoded for a question")
    parser.add_argument(
        "--share", type=float, default=ENCODED_SHARE, help="of the tiles behind the coarsest level's, on ordinary scenes"
    )
    parser.add_argument(
        "--grids", type=int, nargs="+", metavar="G", help="tiles a side of tiling (default: 1 2 3 4, where they fit)"
    )
    parser.add_argument(
        "--also", type=setting, action=Each, default=[], metavar="NAME=VALUE",
        help="rows of the default rule with another setting, as look=0.4; may be repeated, with the same name, too",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    # What is asked for twice is one row.
    args.fractions = list(dict.fromkeys(args.fractions))
    args.grids = args.grids and list(dict.fromkeys(args.grids))
    args.also = [one for idx, one in enumerate(args.also) if one not in args.also[:idx]]
    check_range(args, 0, 1, "fractions", "share", above=True)
    if args.share != ENCODED_SHARE and not args.scenes:
        raise ValueError(f"--share is of ordinary scenes, of which --scenes 0 asks for none. Got --share {args.share}.")
    check_range(args, 1, math.inf, "tiles", *(["grids"] if args.grids else []))
    check_range(args, 0, len(TEST_SEEDS), "native_scenes")
    if args.first_seed < TEST_SEEDS.start:
        raise ValueError(
            f"Scenes before {TEST_SEEDS.start} were trained on, or chosen by. Got --first-seed {args.first_seed}."
        )
    check_scenes(args, NAME, more=(f"{NAME}.jsonl", f"{NAME}.csv"), least=int(not args.native_scenes))
    own = own_tiles(check_host(args))
    results, records = measure(args, "; this family cuts tiles of its own, so that this is its own tiling" * own)
    write_answers(args.output, records)
    finish(args.output, NAME, results, "\n".join(map(report, results.values())), plot(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
