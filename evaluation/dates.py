"""What is kept of two dates of a place, compared with each other and each by itself.

    uhr-bat evidence dates [--model MODEL] [--scenes 30] [--shift 1]

Questions about pairs of made-up scenes (`scenes/dates.py`), of which nothing was trained on. Evidence is kept if every object that a
question needs, and every place where one appeared or went, has a token at one of the two finest scales, at each date that is
needed. No question is answered here.
"""

import argparse
import sys
from collections import defaultdict

import numpy as np
from tqdm import tqdm

from ..common import asking
from ..common.budgets import counts_of_fraction
from ..common.commands import check_range, tells_errors
from ..common.loading import load_model
from ..common.models import add_model_argument, find_model, stay_offline
from ..common.tables import interval, percent_interval, table
from ..export.build_tiny import BUDGETS
from ..image_registration_uhr_bat import register
from ..scenes import dates
from ..scenes.evidence import site_tokens
from ..scenes.layout import WIDTH

FRACTIONS = (0.01, 0.02, 0.04)
APART, COMPARED = "each date by itself", "both dates compared"
COLUMNS = ("evidence kept", "tokens on changed ground", "tokens on ground that changed or is asked about")


def kept_tokens(compressed) -> list[set[tuple[int, int]]]:
    """{(scale, position), ...} of the kept tokens of each image."""
    found = []
    for maps in compressed.slots:
        each = zip(maps.values, maps.positions)
        found.append({(scale, token) for scale, (slots, at) in enumerate(each) for token in at[slots >= 0].tolist()})
    return found


def measure(pair_of_model, seeds, shift=None) -> dict:
    """{(way, fraction): [(seed, *figures of COLUMNS), ...]} of every question. `shift`: in tokens of the finest scale, of the second
    picture to the right; None for what a pair draws."""
    (processor, model), found = pair_of_model, defaultdict(list)
    finest = processor.image_processor.scales[-1] // processor.image_processor.patch_size
    for seed in tqdm(seeds, desc="Looking", unit="pair"):
        pair = dates.make_pair(seed, None if shift is None else (shift * WIDTH / finest, 0.0))
        images = [dates.paint_date(pair, date) for date in (0, 1)]
        ways = {APART: None, COMPARED: [register(*images)]}
        features = asking.encode(model, processor.image_processor(images, return_tensors="pt"))
        grids = features[0].grids
        changed = dates.changed_tokens(pair, grids)
        for question in dates.questions_of(pair):
            evidence = dates.evidence_of_pair(pair, question, grids)
            asked = [changed[date] | set(site_tokens(pair.shown[date], question.sites, grids)) for date in (0, 1)]
            for fraction in FRACTIONS:
                counts = [counts_of_fraction(fraction, image.available, BUDGETS) for image in features]
                for way, both in ways.items():
                    inputs = asking.write_prompts(
                        model, processor, [question.text], [features], counts=counts, dates=both
                    )
                    kept = kept_tokens(asking.compress(model, inputs))
                    is_kept = all(kept[date] & set(tokens) for date, tokens in evidence)
                    spent = sum(map(len, kept))
                    shares = [sum(len(kept[date] & of[date]) for date in (0, 1)) / spent for of in (changed, asked)]
                    found[way, fraction].append((seed, is_kept, *shares))
    return found


def report(found) -> str:
    """Markdown: a row for each way and share of the tokens, in percent."""
    rows = []
    for (way, fraction), records in found.items():
        seeds, *figures = zip(*records)
        cells = [percent_interval(interval(values, seeds, np.random.default_rng(0))) for values in figures]
        rows.append([f"{100 * fraction:g} %", way, *cells])
    return table(["tokens", "selection", *COLUMNS], sorted(rows, key=lambda row: row[0]))


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence dates", description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("--scenes", type=int, default=30, help="with up to seven questions each (default: 30)")
    parser.add_argument(
        "--shift", type=float, metavar="N", help="of the second picture in tokens (default: a pixel at most)"
    )
    args = parser.parse_args(arguments)
    stay_offline(args.model)
    check_range(args, 1, len(dates.PAIR_TEST_SEEDS), "scenes")
    check_range(args, -4, 4, "shift")
    seeds = dates.PAIR_TEST_SEEDS[: args.scenes]
    found = measure(load_model(find_model(args.model), **args.set), seeds, args.shift)
    number = len(next(iter(found.values())))
    print(f"{number} questions about {args.scenes} pairs, percent, with 95 % intervals of a bootstrap over pairs.\n")
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
