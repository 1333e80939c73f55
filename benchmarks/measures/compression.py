"""Clustering and selection: synchronisations, seconds, memory.

Letters: N tokens, D width, R regions.
"""

from functools import partial

import torch

from ...configuration_uhr_bat import PAPER_BUDGETS, PAPER_SCALES
from ...token_clustering_uhr_bat import cluster_regions
from ...token_compression_uhr_bat import merge_tokens, select_tokens
from .. import meters, sides, straightforward
from ..compare import Row, alternate, check_regions, check_tokens, ratios, show_ratio

# The tokens of a 4,032 px view, and of a 2,688 px view.
FINEST, SECOND = 82_944, 36_864
WIDTH_7B = 3584


# Made-up tokens


def random_features(N, D, num_kinds, seed=0) -> torch.Tensor:
    """float32[N, D]: tokens of `num_kinds` kinds, of which some are more alike than others, as those of an image.

    Kinds and the variation inside them live in 96 directions of falling strength; an eighth of the variation lies in all
    directions.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = min(96, D)
    strength = torch.arange(1, rank + 1) ** -0.5
    kinds = torch.randn(num_kinds, rank, generator=generator)
    kind = torch.randint(num_kinds, (N,), generator=generator)
    inner = (kinds[kind] + torch.randn(N, rank, generator=generator)) * strength
    features = inner @ torch.randn(rank, D, generator=generator)
    return features.add_(torch.randn(N, D, generator=generator), alpha=0.125)


def grid_coords(N) -> torch.Tensor:
    """float32[N, 2], centres of the tokens of a square grid."""
    side = round(N**0.5)
    place = torch.arange(N)
    return torch.stack(((place // side + 0.5) / side, (place % side + 0.5) / side), dim=1)


# Measures


def synchronisations(sizes) -> list[Row]:
    """Clustering and selection of the paper's four scales with 10 iterations; 16 wide, which changes no count."""
    shrink = 8 if sizes.quick else 1
    counts = {}
    for name in sides.SIDES:
        with meters.SyncMeter() as meter:
            for scale, budget in zip(PAPER_SCALES, PAPER_BUDGETS):
                N, R, n = (scale // 14 // shrink) ** 2, 600 // shrink**2, max(1, budget // shrink**2)
                features, coords, importance = torch.randn(N, 16), grid_coords(N), torch.rand(N)
                if name == "ours":
                    regions = cluster_regions(features, coords, R)
                    merge_tokens(features, select_tokens(importance, regions, n), n)
                else:
                    regions = straightforward.cluster(features, coords, R, 10, 0.05)
                    straightforward.select(features, importance, regions, n, "ge")
        counts[name] = meter.count
    result = f"{counts['ours']} against {counts['straightforward']:,}"
    return [Row("Device synchronisations, clustering and selection", "<= 200", result, counts["ours"] <= 200, counts)]


def selection(sizes) -> list[Row]:
    """Selection and merging at the finest scale, as wide as the 7B decoder."""
    N, R, budget, D = (2304, 100, 100, 32) if sizes.quick else (FINEST, 2000, 2000, WIDTH_7B)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(N, D, generator=generator)
    importance = torch.rand(N, generator=generator)
    regions = torch.randint(R, (N,), generator=generator)
    functions = {
        "ours": lambda: merge_tokens(tokens, select_tokens(importance, regions, budget), budget),
        "straightforward": partial(straightforward.select, tokens, importance, regions, budget, "ge"),
    }
    seconds, results = alternate(functions, sizes.repetitions, "selection")
    check_tokens([results["ours"]], [results["straightforward"]])
    ratio = ratios(seconds)
    name = f"Selection and merging, N = {N:,}, k = B = {R:,}, D = {D:,}, the same tokens"
    return [Row(name, ">= 12x", show_ratio(ratio), ratio["median"] >= 12, {"ratio": ratio, "seconds": seconds})]


def kmeans(sizes) -> list[Row]:
    """k-means as wide as the scaled model, from the same initial centres."""
    rows = []
    for N, R, goal in ((2304, 80, 2.0), (SECOND, 600, 1.4)):
        N, R, D = (N // 16, R // 16, 32) if sizes.quick else (N, R, 256)
        problem = random_features(N, D, 2 * R), grid_coords(N), R
        functions = {
            "ours": partial(cluster_regions, *problem),
            "straightforward": partial(straightforward.cluster, *problem, 10, 0.05),
        }
        seconds, results = alternate(functions, sizes.repetitions, f"k-means, N = {N:,}")
        fraction = check_regions([results["ours"]], [results["straightforward"]])
        ratio = ratios(seconds)
        rows.append(
            Row(
                f"k-means, N = {N:,}, k = {R}, D = {D}, same labels",
                f">= {goal}x",
                f"{show_ratio(ratio)}, {100 * fraction:.2f} % of the labels the same",
                ratio["median"] >= goal,
                {"ratio": ratio, "seconds": seconds, "same_labels": fraction},
            )
        )
    return rows


def kmeans_memory(sizes) -> list[Row]:
    """Resident memory that k-means takes beside its inputs, each side in a process of its own; two iterations."""
    N, R, D = (2304, 60, 256) if sizes.quick else (FINEST, 2000, WIDTH_7B)
    with sides.process_pair() as pair:
        extra = {name: pair[name].submit(extra_memory_of_kmeans, name, N, R, D).result() for name in pair}
    result = f"{extra['ours'] / 1e6:.0f} MB against {extra['straightforward'] / 1e6:,.0f} MB"
    name = f"Extra memory of k-means, {N:,} x {D:,}, k = {R:,}"
    return [Row(name, "<= 200 MB", result, extra["ours"] <= 200e6, extra)]


def extra_memory_of_kmeans(name, N, R, D) -> int:
    """Bytes, inside a process."""
    features, coords = torch.randn(N, D), grid_coords(N)
    cluster_regions(features[:4096], coords[:4096], 100, num_iterations=2)  # what the first call sets up
    before = meters.reset_peak()
    if name == "ours":
        cluster_regions(features, coords, R, num_iterations=2)
    else:
        straightforward.cluster(features, coords, R, 2, 0.05)
    return meters.peak_bytes() - before
