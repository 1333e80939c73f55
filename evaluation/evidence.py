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
from pathlib import Path

import torch
from tqdm import tqdm

from ..common.asking import answers
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files
from ..common.loading import load_model
from ..common.models import add_model_argument, find_model, model_option
from ..common.outputs import Output, check_outputs
from ..scenes.layout import FINETUNING_SEED, TEST_SEEDS
from .reports import finish, in_bins, plot, report, summarise
from .rows import (
    ALL_TOKENS,
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
    row_of,
)
from .suites import SUITES

FRACTIONS = (0.005, 0.01, 0.02, 0.04, 0.08)
NO_IMAGE, TEXT_ONLY = "model without image", "text-only control"
ROWS = (*RULES, ZOOMED, *BLIND, DOWNSAMPLING)
# What a row is compared with, paired by question, at the same number of tokens or at all.
BASELINES = {PAPER: None, TOP_K: None, FULL: ALL_TOKENS.x}
# Harder scenes are asked from all tokens and by these rows.
HARDER, HARDER_ROWS, HARDER_FRACTIONS = ("scenes-crowded", "scenes-specks"), (PAPER, TOP_K, DISTINCT, REFINED), (0.01,)
SIZES = in_bins("pixels", {"1-2 px": (0, 2.5), "3-4 px": (2.5, 4.5), "5-8 px": (4.5, 99)})  # bins of the rounded size
CONTROL_SCENES = 5000
SAYS = """{questions} questions about {scenes} made-up scenes that nothing was trained on, in {seeds} seeded sets. Made by \
`{command}`. Percent, with 95 % intervals of a bootstrap over scenes. Kept: every object that the question needs has a \
token of its own, unmerged, at one of the two finest scales (questions that need an object only). Differences of accuracy \
are paired by question. Scales share the tokens 16:24:40:66, or 4:8:40:94 (distinct with budgets per scale; refined, that \
is UHR-BAT-Tiny's default), or compete for them (top-k with one budget, distinct, distinct with its regions told of, \
distinct and refined, from all tiles or from a quarter of those behind the anchor's, chosen by the question). Crowded \
scenes have 100 to 160 objects outside the sites instead of 20 to 40."""


def rows_of(methods, fractions):
    """From all tokens first, then every row at every fraction."""
    return [ALL_TOKENS, *(row_of(method, fraction) for fraction in fractions for method in methods)]


def samples_of(suite: str, seeds) -> list:
    return [sample for seed in seeds for sample in SUITES[suite].samples_of_seed(seed)]


# ---- Controls --------------------------------------------------------------------------------------------------------


def text_only(num_scenes, first_seed=FINETUNING_SEED) -> dict[str, str]:
    """The best a reader of the questions alone can do: the most frequent answer to every text in training."""
    found = defaultdict(Counter)
    for seed in tqdm(range(first_seed, first_seed + num_scenes), desc="Text-only control", unit="scene"):
        for sample in SUITES["scenes"].samples_of_seed(seed):
            found[sample.question][sample.answer] += 1
    return {text: counts.most_common(1)[0][0] for text, counts in found.items()}


@torch.no_grad()
def control_records(folder, records, samples, num_scenes, changes=None) -> list[dict]:
    """What is said to the same questions from their texts alone, by the best reader of texts and by the model."""
    control, found = text_only(num_scenes), []
    processor, model = load_model(folder, torch.float32, **(changes or {}))
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


# ---- The command -----------------------------------------------------------------------------------------------------


def measure(
    folder, samples, harder, fractions=FRACTIONS, methods=ROWS, workers=1, control_scenes=CONTROL_SCENES, changes=None
) -> dict:
    """{"rows", "harder", "errors"}: the rows of samples of "scenes", and of those of `harder` {suite: samples}."""
    jobs = {"scenes": (samples, rows_of(methods, fractions))}
    jobs |= {name: (hard, rows_of(HARDER_ROWS, HARDER_FRACTIONS)) for name, hard in harder.items()}
    found = ask_rows(folder, jobs, workers, changes=changes)
    errors, records = [one for _, failed in found.values() for one in failed], found.pop("scenes")[0]
    # All tokens and the controls stand first.
    controls = control_records(folder, records, samples, control_scenes, changes)
    records = [record for record in records if record["row"] == FULL] + controls + [
        record for record in records if record["row"] != FULL
    ]  # fmt: skip
    hard = {name: summarise(hard, BASELINES) for name, (hard, _) in found.items()}
    return {"rows": summarise(records, BASELINES, SIZES), "harder": hard, "errors": errors}


def scenes_parser(prog: str, says: str, output: str):
    """What the commands that ask about made-up scenes have in common."""
    parser = argparse.ArgumentParser(prog=prog, description=says)
    add_model_argument(parser)
    parser.add_argument("--scenes", type=int, default=60, help="with up to six questions each (default: 60)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help=f"default: {output}")
    return parser


def check_scenes(args, name: str, seeds: int = 1, focus=None, more=(), least: int = 1):
    """`args.model` becomes its folder; raises `ValueError` or `FileNotFoundError` before anything is asked of `seeds` sets of
    scenes. `more`: other files that are written."""
    check_range(args, least, math.inf, "scenes")
    check_range(args, 1, math.inf, "workers")
    require("evaluate", "matplotlib")
    args.model = find_model(args.model)
    check_outputs((args.model, focus), Output("--output", args.output, names=(*report_files(name), *more)))
    if args.scenes * seeds > len(TEST_SEEDS):
        raise ValueError(f"There are {len(TEST_SEEDS)} test scenes, but {args.scenes} x {seeds} are asked for.")


@tells_errors
def main(arguments=None) -> int:
    parser = scenes_parser("uhr-bat evidence", __doc__.splitlines()[0], "evidence_out")
    parser.add_argument("--seeds", type=int, default=3, help="independent sets of scenes")
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "seeds")
    check_scenes(args, "evidence", args.seeds)
    seeds = TEST_SEEDS[: args.scenes * args.seeds]
    # The harder scenes are laid out from the first set of seeds.
    harder = {name: samples_of(name, seeds[: args.scenes]) for name in HARDER}
    result = measure(args.model, samples_of("scenes", seeds), harder, workers=args.workers, changes=args.set)
    about = {
        "command": f"uhr-bat evidence{model_option(args.model, args.set)} --scenes {args.scenes} --seeds {args.seeds}",
        "scenes": len(seeds),
    }
    about |= {"seeds": args.seeds, "questions": result["rows"][0]["questions"], "axis": "visual tokens, % of all"}
    about |= {"groups": "the smallest object that a question needs, side of a square of its area at the finest scale"}
    about |= {"title": "Evidence kept and questions answered, by visual tokens", "says": SAYS.format(**about)}
    result = {"about": about, **result}
    figure = plot(result, ("accuracy", "kept"), (*BLIND, DOWNSAMPLING), log=True)
    finish(args.output, "evidence", result, report(result), figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
