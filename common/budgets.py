"""Budgets as commands take them, and a fraction of an image's tokens as numbers of tokens."""

import numpy as np


def budgets(text: str, separator=",") -> list[int] | int:
    """[16, 24, 40, 66] from "16,24,40,66", one number for all scales from "146"."""
    numbers = [int(part) for part in text.split(separator)]
    return numbers if len(numbers) > 1 else numbers[0]


def counts_of_fraction(fraction, available, proportions=None) -> list[int]:
    """int[S], the tokens that each scale spends where a fraction of all tokens is wanted, at least one each; or int[1],
    those of all scales together, as many.

    Args:
        fraction: of all tokens, 0 to 1.
        available: int[S], tokens of every scale that show the image.
        proportions: of the scales; what a scale does not hold goes to the next finer ones. None: one budget for all.
    """
    total, counts = max(round(fraction * sum(available)), len(available)), []
    if proportions is None:
        return [total]
    weights = np.asarray(proportions, float)
    for scale, limit in enumerate(available):
        wanted = round((total - sum(counts)) * weights[scale] / weights[scale:].sum())
        counts.append(min(max(wanted, 1), limit))
    # Coarser scales take what the finest cannot hold.
    for scale in reversed(range(len(available))):
        counts[scale] = min(available[scale], counts[scale] + max(total - sum(counts), 0))
    return counts
