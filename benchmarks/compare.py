"""What a measure takes and returns, and how two sides are compared: turns, ratios, and whether they agree.

Goals are ratios or counts of one run. Where the two sides must agree and do not, a measure raises [`Disagreement`], and
the benchmark fails.
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

# Two sums of the same numbers in another order differ by so much in visual tokens, which are of the order of 1.
TOKEN_TOLERANCE = 1e-3
# k-means makes rounding grow: the fraction of the tokens that must be in the same region all the same.
SAME_REGION = 0.99
# CPU time of one thread: equals wall time on an idle machine and ignores other load on a busy one.
CLOCK = time.process_time
GIGABYTE = 1e9
# What stands in a row that only rasters give.
NO_RASTERIO = 'not measured: it needs rasterio, pip install "uhr-bat[geo]"'


class Disagreement(Exception):
    """The two sides do not give the same."""


@dataclass
class Row:
    """One row of the table: `met` is None where nothing was measured, or no goal was set."""

    measure: str
    goal: str
    result: str
    met: bool | None = None
    numbers: dict = field(default_factory=dict)


@dataclass
class Sizes:
    """Sizes of a run. `quick`: those of a test, whose figures mean nothing. `folder`: where test images are written."""

    quick: bool
    repetitions: int
    folder: Path

    @property
    def geometry(self) -> str:
        return "quick" if self.quick else "scaled"


def spread(values) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(seconds) -> dict[str, float]:
    """How many times as long the straightforward side took, repetition by repetition."""
    return spread([slow / fast for fast, slow in zip(seconds["ours"], seconds["straightforward"])])


def show_ratio(ratio) -> str:
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"


def alternate(functions, repetitions, desc, num_warm_up=1) -> tuple[dict[str, list[float]], dict]:
    """Seconds (`CLOCK`) of each side, in turns, and what they returned last. The first turns only warm up."""
    seconds, results = {name: [] for name in functions}, {}
    for turn in tqdm(range(num_warm_up + repetitions), desc=desc, leave=False):
        for name, function in functions.items():
            start = CLOCK()
            results[name] = function()
            if turn >= num_warm_up:
                seconds[name].append(CLOCK() - start)
    return seconds, results


def same_region(first, second) -> float:
    """Fraction of the tokens long[N] that two partitions put together, whatever the names of the regions."""
    R = int(second.max()) + 1
    counts = torch.bincount(first * R + second, minlength=(int(first.max()) + 1) * R)
    return counts.view(-1, R).amax(1).sum().item() / len(first)


def expect(condition, message):
    if not condition:
        raise Disagreement(message)


def check_tokens(ours, reference):
    """Visual tokens float[n, D] of every scale are the same, in the same order."""
    for scale_idx, (first, second) in enumerate(zip(ours, reference, strict=True)):
        expect(first.shape == second.shape, f"Scale {scale_idx}: {list(first.shape)} and {list(second.shape)} tokens.")
        differing = int(((first.float() - second.float()).abs().amax(1) > TOKEN_TOLERANCE).sum())
        expect(not differing, f"Scale {scale_idx}: {differing} of {len(first)} visual tokens are not the same.")


def check_regions(ours, reference) -> float:
    """The least fraction of tokens in the same region, of partitions long[N] of every scale."""
    fraction = min(same_region(first, second) for first, second in zip(ours, reference, strict=True))
    expect(fraction >= SAME_REGION, f"Only {100 * fraction:.2f} % of the tokens are in the same region.")
    return fraction


def check_question(ours, reference) -> dict:
    """What [`ask`] returned on both sides: the same partitions, visual tokens and answer."""
    fraction = check_regions(ours["regions"], reference["regions"])
    check_tokens(ours["visual_tokens"], reference["visual_tokens"])
    answers = ours["answer"], reference["answer"]
    expect(answers[0] == answers[1], f"The answers are not the same: {answers[0]} and {answers[1]}.")
    return {"same_region": fraction, "visual_tokens": sum(map(len, ours["visual_tokens"])), "answer": len(answers[0])}
