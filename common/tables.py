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
    drawn = drawn_anew(len(sums), rng)
    low, high = np.percentile(drawn @ sums / (drawn @ counts), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def drawn_anew(num_groups: int, rng) -> np.ndarray:
    """long[RESAMPLES, G]: how often each of the groups is among as many that are drawn from them, the bootstrap's draws."""
    draws = (rng.integers(num_groups, size=num_groups) for _ in range(RESAMPLES))
    return np.stack([np.bincount(draw, minlength=num_groups) for draw in draws])


def wilson(share: float, trials: int) -> tuple[float, float, float]:
    """A share, 0 to 1, of so many independent trials, and Wilson's 95 % of it: not empty at 0, at 1 and of one
    trial."""
    z = 1.959964
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(max(share * (1 - share), 0) / trials + (z / (2 * trials)) ** 2)
    return float(share), max(float(middle - half), 0.0), min(float(middle + half), 1.0)


def mean_of_intervals(intervals, signs=None) -> tuple[float, float, float]:
    """The mean of independent (mean, low, high), or their sum with `signs` +1 and -1 for a difference, with 95 % of it
    (Zou and
    Donner 2008, MOVER)."""
    values, lows, highs = np.array(intervals, float).T
    weights = np.full(len(values), 1 / len(values)) if signs is None else np.array(signs, float)
    down = np.where(weights > 0, values - lows, highs - values) * weights
    up = np.where(weights > 0, highs - values, values - lows) * weights
    mean = float(weights @ values)
    return mean, mean - float(np.sqrt((down**2).sum())), mean + float(np.sqrt((up**2).sum()))


def percent_interval(mean_low_high, signed=False) -> str:
    """What `interval` returns, in percent."""
    mean, low, high = (100 * number for number in mean_low_high)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" if signed else f"{mean:.1f} [{low:.1f}, {high:.1f}]"
