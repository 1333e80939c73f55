"""What is answered about two dates of a place and kept of them, compared with each other and each by itself.

    uhr-bat evidence dates [--model two_dates] [--scenes 30] [--shift 1]

Questions about pairs of made-up scenes (`scenes/dates.py`), on whose seeds nothing was trained. Evidence is kept if every object that a
question needs, and every place where one appeared or went, has a token at one of the two finest scales, at each date that is
needed. With `--shift` the same is asked where the second picture lies as the first, and answers that differ are counted.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..common import asking
from ..common.budgets import counts_of_fraction
from ..common.commands import check_range, tells_errors
from ..common.loading import load_model
from ..common.models import add_model_argument, find_model, stay_offline
from ..common.tables import interval, percent, percent_interval, table
from ..export.build_tiny import BUDGETS
from ..image_registration_uhr_bat import register
from ..scenes import dates
from ..scenes.evidence import site_tokens
from ..scenes.layout import WIDTH

FRACTIONS = (1.0, 0.04, 0.02, 0.01)  # of all tokens; of 1, nothing is selected
WINDOW = 8192  # tokens of a prompt
APART, COMPARED = "each date by itself", "both dates compared"
COLUMNS = ("right", "evidence kept", "tokens on changed ground", "tokens on ground that changed or is asked about")


@dataclass(frozen=True)
class Asked:
    """A question about a pair: what was said, and `figures` of COLUMNS, 0 to 1."""

    seed: int
    kind: str
    said: str
    figures: tuple[float, ...]


def kept_tokens(compressed) -> list[set[tuple[int, int]]]:
    """{(scale, position), ...} of the kept tokens of each image."""
    found = []
    for maps in compressed.slots:
        each = zip(maps.values, maps.positions)
        found.append({(scale, token) for scale, (slots, at) in enumerate(each) for token in at[slots >= 0].tolist()})
    return found


def measure(pair_of_model, seeds, shift=None) -> dict[tuple, list[Asked]]:
    """{(way, fraction): every question}. `shift`: in tokens of the finest scale, of the second picture to the right; None for what a
    pair draws."""
    (processor, model), found = pair_of_model, defaultdict(list)
    finest = processor.image_processor.scales[-1] // processor.image_processor.patch_size
    for seed in tqdm(seeds, desc="Asking", unit="pair"):
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
                    if fraction == 1 and way == APART:
                        continue
                    options = {"counts": counts, "dates": both, "max_new_tokens": 8}
                    ids, compressed = asking.generated(model, processor, [question.text], [features], **options)
                    (said,) = asking.answer_texts(processor, ids)
                    kept = kept_tokens(compressed)
                    is_kept = all(kept[date] & set(tokens) for date, tokens in evidence)
                    spent = sum(map(len, kept))
                    shares = [sum(len(kept[date] & of[date]) for date in (0, 1)) / spent for of in (changed, asked)]
                    figures = said == question.answer, is_kept, *shares
                    found[way, fraction].append(Asked(seed, question.kind, said, figures))
    return found


def report(found) -> str:
    """Markdown: a row for each way and share of the tokens, in percent; and what is right of each kind, compared."""
    rows, kinds = [], defaultdict(list)
    for (way, fraction), asked in sorted(found.items(), key=lambda one: -one[0][1]):
        seeds, figures = [one.seed for one in asked], zip(*(one.figures for one in asked))
        cells = [percent_interval(interval(values, seeds, np.random.default_rng(0))) for values in figures]
        rows.append([f"{100 * fraction:g} %", way if fraction < 1 else "all", *cells])
        for kind in dates.KINDS if way == COMPARED else ():
            right = [one.figures[0] for one in asked if one.kind == kind]
            kinds[kind].append(percent(np.mean(right)) if right else "-")
    header = [
        "right",
        *(f"{100 * fraction:g} %" for way, fraction in sorted(found, key=lambda one: -one[1]) if way == COMPARED),
    ]
    by_kind = table(header, [[kind, *cells] for kind, cells in kinds.items()])
    return table(["tokens", "selection", *COLUMNS], rows) + f"\n\n{by_kind}"


def differing(found, unmoved) -> str:
    """A line for each share of the tokens: how many answers differ between two measurements of the same questions."""
    lines = []
    for (way, fraction), asked in found.items():
        number = sum(one.said != other.said for one, other in zip(asked, unmoved[way, fraction], strict=True))
        lines.append(
            f"{100 * fraction:g} % of the tokens, {way}: {number} of {len(asked)} answers differ from those without a shift."
        )
    return "\n".join(lines)


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
    model = load_model(find_model(args.model), **args.set)
    # All tokens of a square pair are more than the context window of 4,096 holds; the positions of the decoder have no end.
    decoder = model[1].config.get_text_config()
    decoder.max_position_embeddings = max(decoder.max_position_embeddings, WINDOW)
    found = measure(model, seeds, args.shift)
    number = len(next(iter(found.values())))
    print(f"{number} questions about {args.scenes} pairs, percent, with 95 % intervals of a bootstrap over pairs.\n")
    print(report(found))
    if args.shift:
        print(f"\n{differing(found, measure(model, seeds, 0.0))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
