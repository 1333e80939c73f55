"""Numbers as text: percent, intervals, tables in Markdown; and numbers from the text of a command."""

import numpy as np

RESAMPLES = 2000


def table(header, rows) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def percent(fraction) -> str:
    return f"{100 * fraction:.1f}"


def interval(values, groups, rng) -> tuple[float, float, float]:
    """Mean of values, and 95 % of it when whole groups (scenes) are drawn anew."""
    values, groups = np.asarray(values, float), np.unique(groups, return_inverse=True)[1]
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def percent_interval(mean_low_high, signed=False) -> str:
    """What `interval` returns, in percent."""
    mean, low, high = (100 * number for number in mean_low_high)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" if signed else f"{mean:.1f} [{low:.1f}, {high:.1f}]"
