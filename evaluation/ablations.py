"""The paper's Table 4 and its ablations, each by one command, on UHR-BAT-Tiny or on any model folder and suite.

    uhr-bat evidence ablations NAME [--suite scenes] [--data DIR] [--model MODEL] [--limit 60] [--output DIR]

NAME is one of table-4 (tokens, FLOPs, memory, seconds; for the 7B model by formula), figure-3-clusters, figure-3-tokens, table-5 (tokens and image
resolution), table-6, which is figure 4 (the budget of one scale, 0 and decreasing ones too), table-7 (k), table-8
(regions), keep-rules; of a model with LRS-VQA's module focus-pruning (the module against chance and likeness to the thumbnail),
focus-alpha and focus-n-max. Every row is asked the same questions; accuracy has 95 % of a bootstrap over images, differences
from the first row are paired. Writes NAME.json, NAME.md and NAME.png.

Budgets are those of the paper as fractions of all 131,328 tokens of its geometry, so that a model of another geometry
compresses as much. Seconds are those of this machine, beside whatever else it did.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..budgets_uhr_bat import is_one_budget
from ..common.budgets import counts_of_fraction
from ..common.commands import tells_errors
from ..common.images import image_options
from ..common.loading import load_model
from ..common.measured import told_as_measured
from ..common.models import ROOT, model_in_words, model_name
from ..common.tables import table
from ..configuration_uhr_bat import RegionFocus, UHRBatConfig
from ..modeling_uhr_bat import UHRBatForConditionalGeneration
from ..planning import planner_of
from ..planning.costs import ANSWER_TOKENS
from .evaluate import add_suite_arguments, check_suite, prompt_of
from .reports import finish, plot, report, summarise
from .rows import (
    PAPER,
    PROPORTIONS,
    PRUNED_BY,
    RULES,
    Row,
    Views,
    choose,
    count_flops,
    measure_groups,
    records_of,
    row_of,
    say,
    without_regions,
)
from .suites import SUITES

PAPER_TOKENS = 131_328
PAPER_RULE = RULES[PAPER][0]
SAYS = """{questions} questions about {images} images, scored by {scorer}. Percent, with 95 % intervals of a bootstrap over \
images; differences are paired by question. GFLOPs of one question from the tiles to the answer, by torch's counter. \
Compress: importance, regions and selection. Kept: every object that the question needs has a token of its own, unmerged, \
at one of the two finest scales."""
TABLE_4 = (4, 5, 6, 8, 10, 11, 12)  # thousands of kept tokens


def fraction_of(thousands):
    """Counts of a number of the paper's tokens, in its proportions of scales."""
    return partial(counts_of_fraction, thousands * 1000 / PAPER_TOKENS, proportions=PROPORTIONS)


def spend(budgets):
    return lambda available: [min(pair) for pair in zip(budgets, available)]


def tokens_rows(config, thousands):
    return [Row(f"{number}k", number, fraction_of(number), PAPER_RULE) for number in thousands]


def clusters_rows(config, numbers):
    budgets = default_budgets(config)
    return [
        Row(f"k = {k}", k, spend(budgets), PAPER_RULE | {"region_method": "kmeans", "num_regions": k}) for k in numbers
    ]


def resolution_rows(config):
    return [
        Row(
            f"{number}k, {share:g} of the width",
            number,
            fraction_of(number),
            PAPER_RULE,
            line=f"{share:g} of the width",
            view=("resized", share) if share < 1 else ("whole",),
        )
        for share in (1.0, 0.5)
        for number in (3, 4)
    ]


def scale_rows(config):
    """The budget of one scale at a time, from nothing to three times what it is, the other ones as they are."""
    budgets, rows = default_budgets(config), []
    for scale, side in enumerate(config.scales):
        for factor in (1, 0, 1 / 3, 2 / 3, 2, 3):
            own = [round(factor * budget) if at == scale else budget for at, budget in enumerate(budgets)]
            rows.append(Row(f"{side} px: {own[scale]}", own[scale], spend(own), PAPER_RULE, f"{side} px"))
    return rows


def region_rows(config):
    return [
        Row(f"{method}, {number}k", number, fraction_of(number), PAPER_RULE | {"region_method": method}, method)
        for method in ("kmeans", "birch", "grid", "none")
        for number in (4, 6, 8, 10)
    ]


def keep_rows(config):
    return [
        replace(row_of(name, fraction), name=f"{name}, {100 * fraction:g} %")
        for name in RULES
        for fraction in (0.01, 0.02, 0.04)
    ]


def focus_row(name, x, line="", pruned_by="module", **changes):
    return Row(name, x, lambda available: None, None, line, ("descended", pruned_by, tuple(changes.items())))


def pruning_rows(config):
    """By whom the tokens are chosen, at several shares of each level."""
    return [
        focus_row(f"{by}, {share:g}", share, by, by, alpha_select=share, alpha_keep=share)
        for by in PRUNED_BY
        for share in (0.05, 0.1, 0.25)
    ]


def alpha_rows(config):
    shares = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of all tokens the descent ends where N_max does not hold them
    rows = [focus_row(f"alpha {one:g}", one, alpha_select=one, alpha_keep=one) for one in shares]
    return [
        *rows,
        focus_row("as configured", (config.region_focus or {}).get("alpha_select", RegionFocus.alpha_select)),
    ]


def n_max_rows(config):
    return [focus_row(f"N_max {number}", number, n_max=number) for number in (10, 20, 40, 80, 160)]


def default_budgets(config) -> list[int]:
    """The configuration's budgets; one number for all scales is shared in the paper's proportions."""
    if is_one_budget(config.budgets):
        number = len(config.scales)
        return counts_of_fraction(1 / number, [config.budgets] * number, PROPORTIONS)
    return list(config.budgets)


# Name: (rows of a configuration, what the axis of the plot says).
ABLATIONS = {
    "table-4": (lambda config: tokens_rows(config, TABLE_4), "kept tokens of 131, thousands"),
    "figure-3-clusters": (lambda config: clusters_rows(config, (10, 20, 50, 120, 240)), "k"),
    "figure-3-tokens": (lambda config: tokens_rows(config, (3, 4, 5, 6, 8, 10)), "kept tokens of 131, thousands"),
    "table-5": (resolution_rows, "kept tokens of 131, thousands"),
    "table-6": (scale_rows, "tokens of the scale"),
    "table-7": (lambda config: clusters_rows(config, (10, 50, 120, 240, 360, 480, 600, 720, 1000)), "k"),
    "table-8": (region_rows, "kept tokens of 131, thousands"),
    "keep-rules": (keep_rows, "visual tokens, % of all"),
    "focus-pruning": (pruning_rows, "share of a level's tokens"),
    "focus-alpha": (alpha_rows, "share of a level's tokens"),
    "focus-n-max": (n_max_rows, "tiles of a level at most"),
}


# ---- Measuring -------------------------------------------------------------------------------------------------------


def flops_of(pair, suite, prompt, rows, sample, options) -> dict[str, float]:
    """{row: FLOPs} of one question about an image from its tiles to the answer, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    image = pair[0].image_processor.process_image(suite.open(sample.pictures[0]), **options)
    if rows[0].view[0] == "descended":  # tiles are encoded where a question looks
        found = count_flops(pair, image, rows, suite.prompts[prompt](sample), suite.max_new_tokens)
        return {row.name: flops for row, flops in zip(rows, found)}
    views, question, limit, found = Views(pair, image), suite.prompts[prompt](sample), suite.max_new_tokens, {}
    with FlopCounterMode(display=False) as counter:
        views.seen()
    encoding = counter.get_total_flops()
    for row in rows:
        with FlopCounterMode(display=False) as counter:
            inputs, kept = choose(views, replace(row, view=("whole",)), question)
            say(views.seen(), inputs, [kept], max_new_tokens=limit)
        found[row.name] = encoding + counter.get_total_flops()
    return found


# ---- Prices ---------------------------------------------------------------------------------------------------------


def prices(config, thousands, dtype, device) -> list[dict]:
    """Table 4 by formula: a question about a square image with `ANSWER_TOKENS` of answer, for a model without weights; memory
    from its tiles on, on a kind of device."""
    with torch.device("meta"):
        planner = planner_of(UHRBatForConditionalGeneration(config).to(dtype), device)
    found = []
    for number in thousands:
        question = planner.plan((max(config.scales),) * 2, seconds=False).question
        counts = fraction_of(number)(question.available)
        plan = planner.plan_question(replace(question, budgets=counts), seconds=False)
        found.append({
            "kept": sum(counts), "total": sum(question.available), "flops": sum(plan.flops.values()),
            "bytes": max(sum(terms.values()) for stage, terms in plan.memory.items() if stage != "preprocess"),
            "weights": planner.weights,
        })  # fmt: skip
    return found


def prices_table(of_models) -> str:
    header = ["model", "kept tokens", "of", "TFLOPs", "memory (GB)", "weights of it (GB)"]
    cells = [
        [name, f"{row['kept']:,}", f"{row['total']:,}", f"{row['flops'] / 1e12:.4g}", f"{row['bytes'] / 1e9:.3g}"]
        + [f"{row['weights'] / 1e9:.3g}"]
        for name, rows in of_models.items()
        for row in rows
    ]
    note = (
        f"By formula (`uhr-bat plan`): a square image from its tiles to {ANSWER_TOKENS} tokens of answer, and the peak."
    )
    return f"{note}\n\n{table(header, cells)}"


# ---- The command -----------------------------------------------------------------------------------------------------


def measure(args) -> dict:
    suite = SUITES[args.suite]
    prompt = prompt_of(suite, args.prompt)
    suite.scorers[0].prepare()
    samples = [sample for sample in suite.load(args.data, args.limit) if len(sample.pictures) == 1]
    if not samples:
        raise ValueError(f"{args.suite} has no question about a single image here.")
    pair = load_model(args.model, **args.set)
    model = pair[1].eval()
    make_rows, axis = ABLATIONS[args.name]
    if args.name.startswith("focus") and model.config.region_focus is None:
        raise ValueError(f"{args.model} has no region focus module (`uhr-bat tiny focus`).")
    rows, options, flops = make_rows(model.config), image_options(args), {}

    def ask(group):
        found = records_of(pair, suite, prompt, rows, group, options, apart=True)
        if not flops:
            flops.update(flops_of(pair, suite, prompt, rows, group[0], options))
        return found

    records, errors = measure_groups(samples, ask, args.name)
    if not records:
        raise ValueError(f"No image could be asked about. The first failure: {errors[0]['error']}")
    name, images, scorer = model_name(args.model), len({record["image"] for record in records}), suite.scorers[0].name
    about = {
        **told_as_measured(args.model, args.set), "axis": axis, "suite": args.suite, "data": args.data, "model": name,
        "prompt": prompt, "says": SAYS.format(questions=len(records) // len(rows), images=images, scorer=scorer),
    }  # fmt: skip
    if bare := without_regions(model.config, rows):
        about["says"] += f" {bare}"
    about["title"] = f"{args.name}: {args.suite}, {model_in_words(about)}"
    found = [row | {"flops": flops[row["name"]]} for row in summarise(records, {rows[0].name: rows[0].x})]
    result = {"about": about, "rows": found, "errors": errors}
    if args.name == "table-4":
        big = UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
        own = f"{name}, {str(model.dtype).removeprefix('torch.')}"
        result["prices"] = {
            "7B, bfloat16": prices(big, TABLE_4, torch.bfloat16, "cuda"),
            own: prices(model.config, TABLE_4, model.dtype, "cpu"),
        }
        result["more"] = [prices_table(result["prices"])]
    return result


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence ablations", description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", choices=ABLATIONS, help=", ".join(ABLATIONS))
    parser.add_argument("--suite", default="scenes", choices=SUITES, metavar="SUITE", help="default: scenes")
    add_suite_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("ablations_out"), metavar="DIR", help="default: ablations_out"
    )
    args = parser.parse_args(arguments)
    check_suite(args, args.name)
    result = measure(args)
    finish(args.output, args.name, result, report(result), plot(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
