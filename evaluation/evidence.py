"""Does question-guided, region-faithful compression keep evidence of few pixels? Accuracy against visual tokens.

    uhr-bat evidence [--model MODEL] [--scenes 60] [--seeds 3] [--output DIR]

Questions about made-up scenes that nothing was trained on, each answered from every choice of visual tokens at 0.5, 1,
2, 4 and 8 % of them, and from all of them; and about two sets of harder scenes, crowded ones and some with bright
specks all over, at 1 %. Writes evidence.json, evidence.md and evidence.png. Evidence is kept where every object that a
question needs has a visual token of its own, unmerged, at one of the two finest scales. Intervals are 95 % of a
bootstrap over scenes, differences are paired by question.
"""

import argparse
import math
import os
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..common.asking import answers
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files, write_report
from ..common.loading import load_model
from ..common.models import add_model_argument, find_model, model_option
from ..common.outputs import Output, check_outputs
from ..common.tables import percent, percent_interval, table
from ..scenes.layout import FINETUNING_SEED, TEST_SEEDS
from ..scenes.questions import KINDS
from .rows import (
    BLIND,
    DISTINCT,
    DOWNSAMPLING,
    FULL,
    PAPER,
    REFINED,
    RULES,
    TOP_K,
    ZOOMED,
    ask_rows,
    draw_over_fractions,
    list_errors,
    row_of,
    summarise,
)
from .suites import SUITES

FRACTIONS = (0.005, 0.01, 0.02, 0.04, 0.08)
NO_IMAGE, TEXT_ONLY = "model without image", "text-only control"
ROWS = (*RULES, ZOOMED, *BLIND, DOWNSAMPLING)
# What a row is compared with, paired by question, at the same number of tokens or at all.
BASELINES = {FULL: (FULL, 1.0), PAPER: (PAPER, None), TOP_K: (TOP_K, None)}
# Harder scenes are asked from all tokens and by these rows.
STRESS, STRESS_ROWS, STRESS_FRACTIONS = ("scenes-crowded", "scenes-specks"), (PAPER, TOP_K, DISTINCT, REFINED), (0.01,)
SIZES = {"1-2": (0, 2.5), "3-4": (2.5, 4.5), "5-8": (4.5, 99)}  # px, bins of the rounded size
CONTROL_SCENES = 5000


def rows_of(methods, fractions):
    """From all tokens first, then every row at every fraction."""
    return [row_of(FULL, 1.0), *(row_of(method, fraction) for fraction in fractions for method in methods)]


def samples_of(suite: str, seeds) -> list:
    return [sample for seed in seeds for sample in SUITES[suite].samples_of_seed(seed)]


def in_bins(field: str, bins: dict) -> dict:
    """{label: record -> whether its `field` lies in the bin}, for `summarise`."""

    def belongs(low, high, record):
        return record[field] is not None and low <= record[field] < high

    return {label: partial(belongs, *bounds) for label, bounds in bins.items()}


# ---- Controls --------------------------------------------------------------------------------------------------------


def text_only(num_scenes, first_seed=FINETUNING_SEED) -> dict[str, str]:
    """The best a reader of the questions alone can do: the most frequent answer to every text in training."""
    found = defaultdict(Counter)
    for seed in tqdm(range(first_seed, first_seed + num_scenes), desc="Text-only control", unit="scene"):
        for sample in SUITES["scenes"].samples_of_seed(seed):
            found[sample.question][sample.answer] += 1
    return {text: counts.most_common(1)[0][0] for text, counts in found.items()}


@torch.no_grad()
def control_records(folder, records, samples, num_scenes) -> list[dict]:
    """What is said to the same questions from their texts alone, by the best reader of texts and by the model."""
    control, found = text_only(num_scenes), []
    processor, model = load_model(folder, torch.float32)
    about = {record["sample"]: record for record in records if record["row"] == FULL}
    for sample in samples:
        ((said, _),) = answers(
            model, processor, [sample.question], [[]], max_new_tokens=SUITES["scenes"].max_new_tokens
        )
        for row, text in (TEXT_ONLY, control.get(sample.question)), (NO_IMAGE, said):
            if sample.id in about:
                own = {"row": row, "x": 0.0, "tokens": 0, "right": text == sample.answer}
                found.append(about[sample.id] | own | {"kept": False if sample.boxes else None})
    return found


# ---- Reports ---------------------------------------------------------------------------------------------------------


def report(result) -> str:
    """Markdown: the tables of evidence.md."""
    rows, about = result["rows"], result["about"]

    def cells(row, *values):
        return [f"{100 * row['x']:g} %", row["name"], *values]

    def difference(row, name):
        return percent_interval(row["differences"][name], signed=True) if name in row["differences"] else ""

    def figures(row, *names):
        return (
            percent_interval(row["accuracy"]),
            percent_interval(row["kept"]),
            *(difference(row, name) for name in names),
        )

    compared = (PAPER, TOP_K, FULL)
    lost = [
        cells(row, *[f"{part['lost']} of {part['held']}" for part in row["groups"].values()])
        for row in rows
        if row["name"] in STRESS_ROWS
    ]
    stress = [
        [name.removeprefix("scenes-"), *cells(row, *figures(row, FULL))]
        for name, hard in result["stress"].items()
        for row in hard
    ]
    parts = [
        "# Evidence kept and questions answered, by visual tokens",
        f"UHR-BAT-Tiny on {about['questions']} questions about {about['scenes']} made-up scenes that nothing was "
        f"trained on, in {about['seeds']} seeded sets. Made by `{about['command']}`. Percent, with 95 % intervals of a "
        "bootstrap over scenes. Kept: every object that the question needs has a token of its own at one of the two "
        "finest scales (questions that need an object only). Differences of accuracy are paired by question. Scales "
        "share the tokens 16:24:40:66, or 4:8:40:94 (distinct with budgets per scale; refined, that is UHR-BAT-Tiny's "
        "default), or compete for them (top-k with one budget, distinct, distinct with its regions told of, distinct "
        "and refined, from all tiles or from a quarter of those behind the anchor's, chosen by the question).",
        table(
            ["tokens", "method", "mean number", "accuracy", "kept", *(f"minus {name}" for name in compared)],
            [cells(row, f"{row['tokens']:.0f}", *figures(row, *compared)) for row in rows],
        ),
        "## By kind of question",
        table(
            ["tokens", "method", *KINDS],
            [
                cells(row, *[percent(row["by_task"][kind]) if kind in row["by_task"] else "" for kind in KINDS])
                for row in rows
            ],
        ),
        "## What the compression loses, by size",
        "Questions that are answered right from all tokens and wrong from some of them, by the smallest object that "
        "they need, in pixels of the finest scale (side of a square of its area).",
        table(["tokens", "method", *[f"{name} px" for name in SIZES]], lost),
        "## Harder scenes",
        "Crowded: 100 to 160 objects outside the sites instead of 20 to 40. Specks: 700 bright specks, of the size of "
        "the smallest objects, anywhere.",
        table(["scenes", "tokens", "method", "accuracy", "kept", f"minus {FULL}"], stress),
        list_errors(result["errors"]),
    ]
    return "\n\n".join(parts) + "\n"


def plot(result, path):
    """Accuracy and evidence kept against the fraction of visual tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    titles = {"accuracy": "Questions answered right", "kept": "Evidence kept"}
    for axes, (field, title) in zip(figure.subplots(1, 2), titles.items()):
        of = {name: [(row["x"], row[field]) for row in result["rows"] if row["name"] == name] for name in ROWS}
        dashed = (*BLIND, DOWNSAMPLING)
        draw_over_fractions(
            axes, {name: points for name, points in of.items() if points}, dashed, ylabel="%", title=title
        )
        if field == "accuracy":
            for row in result["rows"]:
                if row["name"] in (FULL, TEXT_ONLY):
                    style = "-" if row["name"] == FULL else ":"
                    axes.axhline(100 * row[field][0], color="black", linestyle=style, label=row["name"])
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


# ---- The command -----------------------------------------------------------------------------------------------------


def measure(
    folder, samples, harder, fractions=FRACTIONS, methods=ROWS, workers=1, control_scenes=CONTROL_SCENES
) -> dict:
    """{"rows", "stress", "errors"}: the rows of samples of "scenes", and of those of `harder` {suite: samples}."""
    jobs = {"scenes": (samples, rows_of(methods, fractions))}
    jobs |= {name: (hard, rows_of(STRESS_ROWS, STRESS_FRACTIONS)) for name, hard in harder.items()}
    found = ask_rows(folder, jobs, workers)
    errors, records = [one for _, failed in found.values() for one in failed], found.pop("scenes")[0]
    sizes, first = in_bins("pixels", SIZES), (FULL, TEXT_ONLY, NO_IMAGE)
    rows = summarise(records + control_records(folder, records, samples, control_scenes), BASELINES, sizes)
    rows.sort(key=lambda row: first.index(row["name"]) if row["name"] in first else len(first))
    stress = {name: summarise(hard, BASELINES, sizes) for name, (hard, _) in found.items()}
    return {"rows": rows, "stress": stress, "errors": errors}


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence", description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("--scenes", type=int, default=60, help="per seed, with up to six questions each")
    parser.add_argument("--seeds", type=int, default=3, help="independent sets of scenes")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--output", type=Path, default=Path("evidence_out"), metavar="DIR", help="default: evidence_out"
    )
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "scenes", "seeds", "workers")
    require("evaluate", "matplotlib")
    args.model = find_model(args.model)
    check_outputs((args.model,), Output("--output", args.output, names=report_files("evidence")))
    if args.scenes * args.seeds > len(TEST_SEEDS):
        raise ValueError(f"There are {len(TEST_SEEDS)} test scenes, but {args.scenes} x {args.seeds} are asked for.")
    seeds = TEST_SEEDS[: args.scenes * args.seeds]
    # The harder scenes are laid out from the first set of seeds.
    harder = {name: samples_of(name, seeds[: args.scenes]) for name in STRESS}
    result = measure(args.model, samples_of("scenes", seeds), harder, workers=args.workers)
    result["about"] = {
        "command": f"uhr-bat evidence{model_option(args.model)} --scenes {args.scenes} --seeds {args.seeds}",
        "questions": result["rows"][0]["questions"],
        "scenes": len(seeds),
        "seeds": args.seeds,
        "fractions": FRACTIONS,
    }
    text = report(result)
    write_report(args.output, "evidence", result, text, partial(plot, result))
    print(text)
    print(f"Written: {args.output}/evidence.json, evidence.md, evidence.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
