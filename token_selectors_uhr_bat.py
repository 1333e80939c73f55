# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT selectors: rules that decide which tokens stay, by name, as pure functions of one shape.

A selector takes what is known of N tokens, of one scale or of all scales one after the other, and a budget, and returns
`slots`: the place in the prompt of every token, several tokens in one place are averaged, -1 is dropped. Everything
behind it (merging, pictures, evidence, provenance) reads slots alone. Add one by writing it here and listing it in
`SELECTORS`.

The rules of the paper and of this project first, then published reducers that keep an exact budget, for comparison.

Axes: N tokens, row by row and scale after scale; D width of a token; R regions; n = min(budget, N).
"""

import torch
import torch.nn.functional as F

from .token_clustering_uhr_bat import block_length
from .token_compression_uhr_bat import distinctiveness, select_tokens


def _check(importance, regions, tokens, budget):
    N = len(tokens)
    if tokens.dim() != 2 or importance.shape != (N,) or regions.shape != (N,) or not N:
        raise ValueError(
            "importance [N], regions [N] and tokens [N, D] must have the same N, at least 1. Got the shapes "
            f"{tuple(importance.shape)}, {tuple(regions.shape)} and {tuple(tokens.shape)}."
        )
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token. Got {budget}.")
    num_odd = int((~importance.isfinite()).sum())
    if num_odd:
        raise ValueError(f"importance must be finite. Got {num_odd} of {N} values that are not.")
    return min(budget, N)


def _best(score, n):
    """bool[N]: the n tokens of greatest score, the first of equals."""
    return torch.zeros_like(score, dtype=torch.bool).scatter(0, score.argsort(descending=True, stable=True)[:n], True)


def _in_order(kept):
    """Slots long[N] of tokens bool[N] that each keep a place of their own, in their order."""
    return torch.where(kept, kept.cumsum(0) - 1, -1)


def _unit(tokens):
    """float32[N, D], rows of length 1."""
    return F.normalize(tokens.float(), dim=1)


# ---- The paper's rule and this project's -----------------------------------------------------------------------------


@torch.no_grad()
def preserve_and_merge(importance, regions, tokens, budget, *, threshold="ge", coverage=False) -> torch.Tensor:
    """The paper's rule, eq. 8-12: see `select_tokens`, which does not look at the tokens."""
    return select_tokens(importance, regions, budget, threshold=threshold, coverage=coverage)


@torch.no_grad()
def distinct(importance, regions, tokens, budget, *, distinctiveness_power=0.75, coverage=False) -> torch.Tensor:
    """The question says where, what differs from its region says what: the tokens of greatest I_i * d_i^g.

    The paper ranks whole regions by their mean importance. Here a region tells, token by token, what is redundant in
    it: d_i is what merging token i into its region would lose (`distinctiveness`).

    Args:
        importance: float[N], finite. Means of regions are not formed, so any positive scale will do.
        regions: long[N].
        tokens: float[N, D].
        budget: tokens that may be spent.
        distinctiveness_power: g, the weight of the distinctiveness; 0 leaves the importance alone.
        coverage: whether every region is told of: what is dropped of a region then goes into one merged token.

    Returns:
        `slots` long[N], in the order of the tokens; a merged token stands at the least of those that it may hold.

    Raises:
        ValueError: shapes that do not agree, a budget below 1, or below the number of regions with `coverage`.
    """
    n = _check(importance, regions, tokens, budget)
    score = importance * distinctiveness(tokens, regions).to(importance).pow(distinctiveness_power)
    if not coverage:
        return _in_order(_best(score, n))
    labels, regions = regions.unique(return_inverse=True)
    R = len(labels)
    if n < R:
        raise ValueError(f"A token for every region needs a budget of at least {R} for {R} regions. Got {n}.")
    # The least token of each region stands for its merged token, as in `select_tokens`.
    order = score.argsort(descending=True, stable=True)
    order = order[regions[order].argsort(stable=True)]
    least = order[torch.bincount(regions, minlength=R).cumsum(0) - 1]
    lasts = torch.zeros_like(regions, dtype=torch.bool).scatter(0, least, True)
    kept = lasts | _best(score.masked_fill(lasts, -torch.inf), n - R)
    slots = _in_order(kept)
    return torch.where(kept, slots, slots[least[regions]])


# ---- Published reducers, for comparison ------------------------------------------------------------------------------


@torch.no_grad()
def top_k(importance, regions, tokens, budget) -> torch.Tensor:
    """The most attended tokens: the criterion of FastV (Chen et al., ECCV 2024) at the interface layer."""
    return _in_order(_best(importance, _check(importance, regions, tokens, budget)))


@torch.no_grad()
def uniform(importance, regions, tokens, budget) -> torch.Tensor:
    """Every so many tokens one, whatever they show: the middle of each of n equal stretches."""
    n, N = _check(importance, regions, tokens, budget), len(tokens)
    chosen = (2 * torch.arange(n, device=tokens.device) + 1) * N // (2 * n)
    return _in_order(torch.zeros(N, dtype=torch.bool, device=tokens.device).scatter(0, chosen, True))


@torch.no_grad()
def diversity(importance, regions, tokens, budget) -> torch.Tensor:
    """DivPrune (Alvar et al., CVPR 2025): tokens as far from each other as possible, blind to the question.

    Greedy max-min: the token whose nearest neighbour is farthest comes first, then always the one that is farthest
    from all that are chosen. Distance is 1 - cosine.
    """
    n = _check(importance, regions, tokens, budget)
    unit = _unit(tokens)
    nearest = torch.cat(
        [
            (rows @ unit.T).scatter(1, number[:, None], -torch.inf).amax(1)
            for rows, number in zip(
                unit.split(block_length(len(unit), unit.device)),
                torch.arange(len(unit), device=unit.device).split(block_length(len(unit), unit.device)),
            )
        ]
    )
    chosen = [nearest.argmin()]
    similarity = unit @ unit[chosen[0]]
    for _ in range(n - 1):
        similarity[chosen[-1]] = torch.inf
        chosen.append(similarity.argmin())
        similarity = torch.maximum(similarity, unit @ unit[chosen[-1]])
    return _in_order(torch.zeros_like(importance, dtype=torch.bool).scatter(0, torch.stack(chosen), True))


@torch.no_grad()
def conditional_diversity(importance, regions, tokens, budget) -> torch.Tensor:
    """CDPruner (Zhang et al., NeurIPS 2025): a determinantal point process of diversity, conditioned on the question.

    Kernel diag(r) S diag(r) with S the cosines of the tokens and r the importance between its least and greatest value;
    greedy maximum a posteriori by Cholesky updates (Chen, Zhang and Zhou, NeurIPS 2018). The original takes r from
    CLIP's text encoder, which this model does not have; here it is the question's attention.
    """
    n = _check(importance, regions, tokens, budget)
    unit, N = _unit(tokens), len(tokens)
    low, high = importance.aminmax()
    relevance = ((importance - low) / (high - low).clamp_min(1e-12)).float() + 1e-6
    gain = relevance.square()
    factors = unit.new_zeros(n, N)
    chosen = []
    for step in range(n):
        best = gain.argmax()
        chosen.append(best)
        row = relevance[best] * relevance * (unit @ unit[best])
        row = (row - factors[:step, best] @ factors[:step]) / gain[best].clamp_min(1e-12).sqrt()
        factors[step] = row
        # What is chosen already must not come again, whatever rounding leaves of the other gains.
        gain = (gain - row.square()).clamp_min(0).index_fill(0, torch.stack(chosen), -1)
    return _in_order(torch.zeros_like(importance, dtype=torch.bool).scatter(0, torch.stack(chosen), True))


@torch.no_grad()
def similarity_merging(importance, regions, tokens, budget) -> torch.Tensor:
    """ToMe (Bolya et al., ICLR 2023): the most similar pairs become one, round after round, blind to the question.

    Bipartite soft matching: every other token looks for the most similar one of the rest, the best pairs are merged,
    means weighted by what they hold. A round halves the tokens at most.
    """
    n = _check(importance, regions, tokens, budget)
    slots = torch.arange(len(tokens), device=tokens.device)
    merged, sizes = tokens.float(), torch.ones(len(tokens), device=tokens.device)
    while len(merged) > n:
        unit = F.normalize(merged, dim=1)
        sources, targets = unit[::2], unit[1::2]
        rows = block_length(max(1, len(targets)), targets.device)
        best = [(block @ targets.T).max(1) for block in sources.split(rows)]
        similarity, partner = (torch.cat(parts) for parts in zip(*best))
        gone = _best(similarity, min(len(merged) - n, len(targets)))
        into = torch.arange(len(merged), device=tokens.device)
        into[::2] = torch.where(gone, 2 * partner + 1, into[::2])
        labels, into = into.unique(return_inverse=True)
        total = merged.new_zeros(len(labels), merged.shape[1]).index_add(0, into, merged * sizes[:, None])
        sizes = sizes.new_zeros(len(labels)).index_add(0, into, sizes)
        merged, slots = total / sizes[:, None], into[slots]
    return slots


@torch.no_grad()
def dominant_and_contextual(importance, regions, tokens, budget, *, contextual=10 / 64) -> torch.Tensor:
    """VisionZip (Yang et al., CVPR 2025): the most attended tokens, and the rest merged into a few by similarity.

    The contextual tokens are every so many of the rest; what is neither joins the most similar of them. The original
    attention is the vision tower's own; here it is the question's. 54 to 10 of 64 tokens is its default.
    """
    n, N = _check(importance, regions, tokens, budget), len(tokens)
    num_contextual = min(round(n * contextual), N - n)
    dominant = _best(importance, n - num_contextual)
    if not num_contextual:
        return _in_order(dominant)
    rest = (~dominant).nonzero()[:, 0]
    stops = (2 * torch.arange(num_contextual, device=tokens.device) + 1) * len(rest) // (2 * num_contextual)
    anchors = rest[stops]
    slots = _in_order(dominant.scatter(0, anchors, True))
    unit = _unit(tokens)
    rows = block_length(num_contextual, tokens.device)
    nearest = torch.cat([(unit[block] @ unit[anchors].T).argmax(1) for block in rest.split(rows)])
    nearest[stops] = torch.arange(num_contextual, device=tokens.device)
    return slots.scatter(0, rest, slots[anchors[nearest]])


# Name in the configuration -> the rule, and the settings of the configuration that it takes.
SELECTORS = {
    "preserve_and_merge": (preserve_and_merge, ("threshold", "coverage")),
    "distinct": (distinct, ("distinctiveness_power", "coverage")),
    "top_k": (top_k, ()),
    "uniform": (uniform, ()),
    "diversity": (diversity, ()),
    "conditional_diversity": (conditional_diversity, ()),
    "similarity_merging": (similarity_merging, ()),
    "dominant_and_contextual": (dominant_and_contextual, ()),
}
