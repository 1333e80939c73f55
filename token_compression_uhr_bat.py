# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT token compression: sections 3.3 and 3.4 of the paper, appendices C.1 to C.3, as pure functions.

Bring the importance to the grid of a scale (`align_importance`), decide which tokens stay and which are merged in every
region (`select_tokens`), and apply that decision to the tokens (`merge_tokens`); the regions themselves come out of
`token_clustering_uhr_bat.py`. Nothing here knows a model. The decision is made of indices only, so it can be applied to any
tensor of the scale, and it is the provenance of every visual token.

Axes: N tokens of a scale in raster order, D width of a token, R regions, H and W height and width of a grid of tokens.
All sorts are stable and all sums run in a fixed order, so that the same input gives the same tokens on every run, on a
GPU too: `index_add_` there does not.
"""

import torch
import torch.nn.functional as F

from .token_clustering_uhr_bat import block_length, cluster_regions, grid_regions, runs_of, vote_labels, vote_regions

# Types of devices that have no float64.
WITHOUT_FLOAT64 = ("mps",)


def _to_float64(tensor):
    """The tensor in float64, on the CPU where its own device has none: a few thousand numbers of a scale."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor).double()


def align_importance(anchor_importance: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Importance of every token of a scale, read from the anchor's map (eq. 6-7 and 16).

    Bilinear between the centres of the anchor's tokens, constant beyond the outermost ones. A token covers one cell
    of the grid, so the mean of eq. 7 is that cell.

    Args:
        anchor_importance: float[..., h, w], importance of the anchor's tokens.
        grid: (height, width) of the scale in tokens, H and W.

    Returns:
        float[..., H, W] in the dtype and on the device of `anchor_importance`.

    Raises:
        ValueError: the map has fewer than two axes, or the map or the grid has an empty side.
    """
    if anchor_importance.dim() < 2 or 0 in anchor_importance.shape or min(grid) < 1:
        raise ValueError(
            "anchor_importance must be a map [..., height, width] and grid (height, width), no side of them 0. "
            f"Got shape {tuple(anchor_importance.shape)} and grid {tuple(grid)}."
        )
    *leading, h, w = anchor_importance.shape
    # float64: in float32 the four weights do not sum to one, a constant map comes back with two values in it, and its
    # regions are no longer constant (Lemma 1).
    maps = _to_float64(anchor_importance).reshape(-1, 1, h, w)
    aligned = F.interpolate(maps, size=tuple(grid), mode="bilinear", align_corners=False)
    return aligned.to(anchor_importance.dtype).to(anchor_importance.device).reshape(*leading, *grid)


@torch.no_grad()
def distinctiveness(tokens: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """How much each token differs from its region: what merging it into the region would lose.

    d_i = max(0, 1 - cos(u_i, m)), with u_i the unit vector of token i and m the mean of the unit vectors of its region.

    Args:
        tokens: float[N, D]; only their direction counts. A zero vector has the distinctiveness 1.
        regions: long[N], label of the region of every token; not negative, not necessarily without gaps.

    Returns:
        float32[N] in [0, 2]; 0 for a token that is alone in its region.

    Raises:
        ValueError: shapes that do not agree, or no tokens.
    """
    if tokens.dim() != 2 or regions.shape != tokens.shape[:1] or not len(tokens):
        raise ValueError(
            "tokens must be [N, D] and regions [N] with the same N, at least 1. "
            f"Got {tuple(tokens.shape)} and {tuple(regions.shape)}."
        )
    labels, regions = regions.unique(return_inverse=True)
    order = regions.argsort(stable=True)
    starts, _ = runs_of(regions[order], len(labels))
    # In blocks of columns: a float32 copy of all tokens never exists.
    columns = tokens.split(block_length(len(tokens), tokens.device), dim=1)
    norms = sum(block.float().square().sum(1) for block in columns).sqrt().clamp_min(1e-12)
    weights = norms[order].reciprocal()
    along, lengths = torch.zeros_like(norms), norms.new_zeros(len(labels))
    for block in columns:
        block = block.float()
        sums = F.embedding_bag(order, block, starts, mode="sum", per_sample_weights=weights)
        lengths += sums.square().sum(1)
        along += (block * sums[regions]).sum(1)
    cosine = along / norms / lengths.sqrt().clamp_min(1e-12)[regions]
    alone = torch.bincount(regions, minlength=len(labels))[regions] == 1  # rounding leaves 1e-7 of it
    return (1 - cosine).clamp(0, 2).masked_fill(alone & (norms > 1e-12), 0)


THRESHOLDS = {"ge": torch.ge, "gt": torch.gt}


def _region_importance(importance, regions, sizes):
    """Mean importance mu_m of every region (eq. 8): float64[R]."""
    order = regions.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    mean = F.embedding_bag(order, importance[:, None], starts, mode="sum")[:, 0] / sizes
    # Rounding can lift the mean over every member (three times 0.1 in float64), which would then all be redundant.
    lowest = torch.zeros_like(mean).scatter_reduce(0, regions, importance, "amin", include_self=False)
    highest = torch.zeros_like(mean).scatter_reduce(0, regions, importance, "amax", include_self=False)
    return mean.clamp(lowest, highest)


def _count_along(order, mask):
    """For every token, how many of `mask` stand up to and with it in `order`: long[N]."""
    counts = mask[order].cumsum(0)
    return torch.empty_like(counts).scatter(0, order, counts)


@torch.no_grad()
def select_tokens(
    importance: torch.Tensor, regions: torch.Tensor, budget: int, *, threshold: str = "ge", coverage: bool = False
) -> torch.Tensor:
    """Decide which tokens of a scale are preserved, merged or dropped (eq. 8-12, algorithm 1).

    The tokens of a region that reach its mean importance are candidates on their own; the rest, the redundant ones,
    are one candidate together, their mean. Candidates are ordered by region (mean importance descending, ties by
    label), in a region by importance (descending, ties by index), the merged one last, and cut at the budget. Where
    there are fewer candidates than that, the most important redundant tokens are preserved as well (ties by index, the
    least important one of a region never), so that the budget is always spent.

    The paper claims that a budget of R tokens reaches every region; in its own order, early regions can use it up.
    With `coverage` they cannot: the merged token of every region, or its best one if nothing is redundant, is taken
    first, and preserved tokens share what is left, in the order above. The order of the output is the same.

    Six tokens, two regions, threshold "ge":

        token         0     1     2     3     4     5
        region        0     0     0     1     1     1       mean importance of region 0: 4, of region 1: 2
        importance    8     2     2     5     1     0
        preserved    yes                yes                  at least the mean
        candidates    0   (1   &   2)   3   (4   &   5)      in this order: region 0 has the higher mean

    >>> importance = torch.tensor([8.0, 2.0, 2.0, 5.0, 1.0, 0.0])
    >>> regions = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> select_tokens(importance, regions, 4).tolist()  # every candidate has a slot
    [0, 1, 1, 2, 3, 3]
    >>> select_tokens(importance, regions, 2).tolist()  # cut at the budget: nothing is left of region 1
    [0, 1, 1, -1, -1, -1]
    >>> select_tokens(importance, regions, 5).tolist()  # one more than candidates: token 1 leaves its merged token
    [0, 1, 2, 3, 4, 4]
    >>> select_tokens(importance, regions, 2, coverage=True).tolist()  # the merged token of either region
    [-1, 0, 0, -1, 1, 1]

    Args:
        importance: float[N], finite; means and comparisons are in float64.
        regions: long[N], label of the region of every token; not negative, not necessarily without gaps.
        budget: tokens that may be spent.
        threshold: "ge" preserves tokens of at least the mean (eq. 9), "gt" only those above it.
        coverage: whether every region is guaranteed a token.

    Returns:
        `slots` long[N] on the device of `importance`, the output position 0..n-1 of every token with
        n = min(budget, N). Tokens in the same slot are to be merged, -1 is dropped, no slot is empty.

    Raises:
        ValueError: shapes that do not agree, no tokens, a budget below 1 or, with `coverage`, below the number of
            regions, an unknown threshold, importance that is not finite, negative labels.
    """
    if importance.dim() != 1 or importance.shape != regions.shape or not len(importance):
        raise ValueError(
            "importance and regions must be vectors of the same length, at least 1. "
            f"Got shapes {tuple(importance.shape)} and {tuple(regions.shape)}."
        )
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token. Got {budget}.")
    if threshold not in THRESHOLDS:
        raise ValueError(f"Unknown threshold {threshold!r}. Known thresholds: {', '.join(THRESHOLDS)}.")
    device = importance.device
    importance = _to_float64(importance)
    regions = regions.to(importance.device)
    num_odd, lowest = torch.stack([(~importance.isfinite()).sum(), regions.min()]).tolist()
    if num_odd:
        raise ValueError(f"importance must be finite. Got {num_odd} of {len(importance)} values that are not.")
    if lowest < 0:
        raise ValueError(f"Labels of regions must not be negative. Got {lowest}.")
    labels, regions, sizes = regions.unique(return_inverse=True, return_counts=True)
    R = len(labels)
    if coverage and budget < R:
        raise ValueError(f"A token for every region needs a budget of at least {R} for {R} regions. Got {budget}.")

    region_importance = _region_importance(importance, regions, sizes)
    preserved = THRESHOLDS[threshold](importance, region_importance[regions])

    # From here on regions are numbered in the order of eq. 12, and tokens of a region lie together in `order`.
    by_region_importance = region_importance.argsort(descending=True, stable=True)
    regions, sizes = by_region_importance.argsort()[regions], sizes[by_region_importance]
    by_importance = importance.argsort(descending=True, stable=True)
    order = by_importance[regions[by_importance].argsort(stable=True)]
    ends = sizes.cumsum(0)
    best, least = order[ends - sizes], order[ends - 1]

    # A candidate is written as one token: a preserved one as itself, a merged one as the least important token of its
    # region, in the example 2 for (1 & 2) and 5 for (4 & 5). The least important token is redundant if any is, and it
    # ends its region in `order`, where eq. 12 has the merged token.
    candidate = preserved.scatter(0, least, True)
    candidate = candidate | (_count_along(by_importance, ~candidate) <= budget - candidate.sum())
    first = torch.zeros_like(candidate)
    if coverage:
        first = first.scatter(0, torch.where(preserved[least], best, least), True)
    rest = candidate & ~first
    taken = first | (rest & (_count_along(order, rest) <= budget - first.sum()))

    slots = torch.where(taken, _count_along(order, taken) - 1, -1)
    return torch.where(candidate, slots, slots[least[regions]]).to(device)


def merge_tokens(tokens: torch.Tensor, slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Mean of the tokens of every slot (eq. 10); a preserved token is alone in its slot and comes out unchanged.

    Differentiable with respect to `tokens`.

    Args:
        tokens: float[N, D], the tokens of the scale.
        slots: long[N], output position of every token, -1 if it is dropped (`select_tokens`).
        num_slots: number of output positions, n.

    Returns:
        float[num_slots, D] in the dtype of `tokens`, accumulated in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not agree, a slot outside -1..num_slots-1, or one that no token is in.
    """
    if tokens.dim() != 2 or slots.shape != tokens.shape[:1] or not len(slots):
        raise ValueError(
            "tokens must be [N, D] and slots [N] with the same N, at least 1. "
            f"Got {tuple(tokens.shape)} and {tuple(slots.shape)}."
        )
    order = slots.argsort(stable=True)
    starts, sizes = runs_of(slots[order], num_slots)
    numbers = [slots.min(), slots.max(), (slots < 0).sum(), (sizes == 0).sum()]
    lowest, highest, num_dropped, num_empty = torch.stack(numbers).tolist()
    if lowest < -1 or highest >= num_slots:
        raise ValueError(f"slots must lie in -1..{num_slots - 1} for {num_slots} slots. Got {lowest}..{highest}.")
    if num_empty:
        raise ValueError(f"Every slot needs a token, but {num_empty} of {num_slots} slots are empty.")

    # Only the tokens that stay are gathered, a block of columns at a time in float32.
    kept, starts = order[num_dropped:], starts - num_dropped
    rows = torch.arange(len(kept), device=kept.device)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    columns = tokens.split(block_length(len(kept), tokens.device), dim=1)
    merged = [F.embedding_bag(rows, c.index_select(0, kept).to(dtype), starts, mode="mean") for c in columns]
    return torch.cat(merged, dim=1).to(tokens.dtype)


__all__ = [
    "align_importance",
    "cluster_regions",
    "grid_regions",
    "vote_labels",
    "vote_regions",
    "select_tokens",
    "merge_tokens",
    "distinctiveness",
]
