"""Ask a model the questions of a benchmark, and score its answers.

    uhr-bat evaluate SUITE --data DIR --model MODEL [--budgets 16,24,40,66] [--max-tiles 128 --native]
                             [--selector NAME] [--output DIR]
    accelerate launch --multi_gpu -m uhr_bat evaluate SUITE ...     the same lines, sooner; torchrun does as well

Writes into the output folder: settings.json, predictions.jsonl (a line an answer), figures.json and figures.md. What is
there already is not asked again.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from ..budgets_uhr_bat import split_budgets
from ..common.budgets import budgets as read_budgets
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files
from ..common.images import add_image_arguments, add_tile_arguments, image_options
from ..common.loading import load_model, load_processor, selector_of
from ..common.measured import told_as_measured
from ..common.models import add_model_argument, find_model, stay_offline
from ..common.outputs import Output, check_outputs
from ..common.runs import alone
from . import figures
from .other_answers import other_answers
from .reducers import find_selector
from .running import (
    IMAGE,
    PREDICTIONS,
    SETTINGS,
    Settings,
    check_settings,
    looking_closer,
    process_state,
    run,
    versions,
)
from .suites import SUITES

# What is in the folder of a run.
FILES = (*figures.FILES, SETTINGS, PREDICTIONS)


def scorers_of(suite, names):
    """The scorers of a suite by name, all where none is named, after what they need was looked for."""
    known = {scorer.name: scorer for scorer in suite.scorers}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"{suite.name} has no score {unknown[0]!r}. It has: {', '.join(known)}.")
    chosen = [known[name] for name in names or known]
    for scorer in chosen:
        scorer.prepare()
    return chosen


def prompt_of(suite, name):
    if name is not None and name not in suite.prompts:
        raise ValueError(f"{suite.name} has no prompt {name!r}. It has: {', '.join(suite.prompts)}.")
    return name or next(iter(suite.prompts))


def add_suite_arguments(parser):
    """What a suite is loaded from, who is asked, and what."""
    parser.add_argument("--data", metavar="DIR", help="file, folder or id of a data set on the Hub; none for scenes")
    add_model_argument(parser)
    parser.add_argument("--prompt", metavar="NAME", help="one of the suite's prompts (default: its first)")
    parser.add_argument("--limit", type=int, metavar="N", help="samples, evenly spaced (default: all)")
    add_image_arguments(parser)


def check_suite(args, name: str):
    """What can be known of a report about a suite before anything is loaded; `args.model` becomes its folder."""
    check_range(args, 1, math.inf, "limit")
    stay_offline(args.model, args.data)
    require("evaluate", "matplotlib", "datasets")
    args.model = find_model(args.model)
    check_outputs((args.data, args.model, args.area), Output("--output", args.output, names=report_files(name)))


def parser():
    parser = argparse.ArgumentParser(prog="uhr-bat evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("suite", metavar="SUITE", choices=SUITES, help=", ".join(SUITES))
    add_suite_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the run (default: runs/SUITE)")
    parser.add_argument(
        "--budgets", type=read_budgets, help="visual tokens per scale, as 16,24,40,66, or of all, as 146"
    )
    parser.add_argument("--selector", help="which tokens stay (default: the model's)")
    parser.add_argument("--scorers", nargs="+", metavar="NAME", help="some of the suite's scores (default: all)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: the suite's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="questions that are answered together (default: 1)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read images (default: 1)")
    add_tile_arguments(parser)
    parser.add_argument("--retry", action="store_true", help="ask again what failed")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="score these answers (lmms-eval's samples, VLMEvalKit's tables, JSON lines), ask nothing",
    )
    return parser


def ask_suite(args, suite, samples, prompt):
    """The lines of a run, asked or found, and its settings."""
    folder = find_model(args.model)
    processor = load_processor(folder, args.set)
    default = processor.default_budgets
    tiles, budgets = looking_closer(args.budgets, default, args.max_tiles, args.native)
    budgets = default if budgets is None else budgets
    split_budgets(budgets, processor.image_processor.scales)
    read = {name: value for name, value in image_options(args).items() if value is not None}
    read = json.loads(json.dumps(read, default=str))  # as settings.json holds them
    settings = Settings(
        suite=suite.name, data=args.data, **told_as_measured(folder, args.set), prompt=prompt,
        budgets=budgets, selector=args.selector or selector_of(folder, **args.set),
        seed=args.seed, max_new_tokens=args.max_new_tokens or suite.max_new_tokens, limit=args.limit,
        versions=versions(), **tiles, image=read or None,
        batch_size=args.batch_size, dates=suite.two_dates or None,
    )  # fmt: skip
    find_selector(settings.selector, budgets)
    check_settings(args.output, settings)
    state = process_state()
    # Each process has the whole model on its own device.
    device_map = "auto" if state.num_processes == 1 else {"": state.device}
    processor, model = load_model(folder, device_map=device_map, **args.set)
    with alone(args.output / f"predictions-{state.process_index}.jsonl"):
        return run(model.eval(), processor, suite, samples, settings, args.output, args.workers, args.retry)


def check_answered(lines, where):
    """Raises `ValueError` where no sample was answered with its image: that is no score of 0 %."""
    errors = [line["error"] for (_, view), line in lines.items() if view == IMAGE]
    if errors and all(error is not None for error in errors):
        raise ValueError(f"No sample of {len(errors)} was answered. The first failure: {errors[0]} ({where})")


def check_options(args):
    """Raises `ValueError` where a number is none that can be asked for."""
    check_range(args, 1, math.inf, "limit", "max_new_tokens", "batch_size", "max_tiles")
    check_range(args, 0, math.inf, "workers")
    if args.max_image_pixels is not None and args.max_image_pixels < 1:
        raise ValueError(f"--max-pixels must be at least 1. Got {args.max_image_pixels}.")
    check_range(args, 0, 2**32 - 1, "seed")


@tells_errors
def main(arguments=None) -> int:
    args = parser().parse_args(arguments)
    check_options(args)
    stay_offline(args.model, args.data)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    suite = SUITES[args.suite]
    args.output = args.output or Path("runs", suite.name)
    check_outputs((args.data, args.model, args.predictions, args.area), Output("--output", args.output, names=FILES))
    if args.predictions and (args.output / SETTINGS).exists():
        raise ValueError(
            f"{args.output} holds a run, whose figures --predictions would replace. Give another --output."
        )
    require("evaluate", "datasets")
    scorers, prompt = scorers_of(suite, args.scorers), prompt_of(suite, args.prompt)
    samples = suite.load(args.data, args.limit)
    if args.predictions:
        every = samples if args.limit is None else suite.load(args.data)
        lines = other_answers(args.predictions, samples, every)
        settings = {"model": f"of {args.predictions}", "budgets": 0, "selector": "unknown", "prompt": "unknown"}
        settings |= {"seed": "unknown", "limit": args.limit}
    else:
        lines = ask_suite(args, suite, samples, prompt)
        settings = figures.read_settings(args.output)
        if not process_state().is_main_process:
            return 0
    check_answered(lines, args.predictions or args.output)
    result = figures.evaluate(suite, samples, lines, scorers)
    print(figures.write(suite, result, settings, args.output))
    print(f"Written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
