# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT selectors: rules that decide which tokens stay, as pure functions of one shape.

A selector takes what is known of N tokens, of one scale or of all scales one after the other, and a budget, and returns
`slots`: the place in the prompt of every token, several tokens in one place are averaged, -1 is dropped. Everything
behind it (merging, pictures, evidence, provenance) reads slots alone. A configuration names one of `SELECTORS`; a call
takes any function of this shape, `rules={"selector": function}`, and checks its slots. It leaves its arguments as they are.

Axes: N tokens, row by row and scale after scale; D width of a token; R regions; n = min(budget, N).
"""

import torch

from .token_compression_uhr_bat import distinctiveness, select_tokens


def check_arguments(importance, regions, tokens, budget) -> int:
    """n, or `ValueError` for what no selector can choose from."""
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


def best_tokens(score, n):
    """bool[N]: the n tokens of greatest score, the first of equals."""
    return torch.zeros_like(score, dtype=torch.bool).scatter(0, score.argsort(descending=True, stable=True)[:n], True)


def slots_in_order(kept):
    """Slots long[N] of tokens bool[N] that each keep a place of their own, in their order."""
    return torch.where(kept, kept.cumsum(0) - 1, -1)


def name_of(selector) -> str:
    """Of a selector, a name or a function, as messages have it."""
    return repr(selector if isinstance(selector, str) else getattr(selector, "__name__", type(selector).__name__))


def check_slots(slots, selector, tokens, budget) -> torch.Tensor:
    """What `selector` returned for N tokens and a budget, on their device.

    Raises:
        TypeError: it is no tensor of whole numbers, torch.int64.
        ValueError: it is not [N], or its slots are not all of 0..n-1 and -1; both numbers are named.
    """
    of, n = f"The selector {name_of(selector)}", min(budget, len(tokens))
    if not isinstance(slots, torch.Tensor) or slots.dtype != torch.long:
        got = slots.dtype if isinstance(slots, torch.Tensor) else f"a {type(slots).__name__}"
        raise TypeError(f"{of} must return slots as a tensor of torch.int64, one for each token. Got {got}.")
    if slots.shape != (len(tokens),):
        raise ValueError(
            f"{of} must return a slot for each of {len(tokens)} tokens. Got the shape {list(slots.shape)}."
        )
    lowest, highest, number = torch.stack([slots.min(), slots.max(), (slots[slots >= 0].unique() >= 0).sum()]).tolist()
    if lowest < -1 or highest >= n:
        raise ValueError(f"{of} must return slots in -1..{n - 1} for a budget of {budget}. Got {lowest}..{highest}.")
    if number != n:
        raise ValueError(
            f"{of} must fill all {n} slots of a budget of {budget} for {len(tokens)} tokens. Got {number}."
        )
    return slots.to(tokens.device)


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
    n = check_arguments(importance, regions, tokens, budget)
    score = importance * distinctiveness(tokens, regions).to(importance).pow(distinctiveness_power)
    if not coverage:
        return slots_in_order(best_tokens(score, n))
    labels, regions = regions.unique(return_inverse=True)
    R = len(labels)
    if n < R:
        raise ValueError(f"A token for every region needs a budget of at least {R} for {R} regions. Got {n}.")
    # The least token of each region stands for its merged token, as in `select_tokens`.
    order = score.argsort(descending=True, stable=True)
    order = order[regions[order].argsort(stable=True)]
    least = order[torch.bincount(regions, minlength=R).cumsum(0) - 1]
    lasts = torch.zeros_like(regions, dtype=torch.bool).scatter(0, least, True)
    kept = lasts | best_tokens(score.masked_fill(lasts, -torch.inf), n - R)
    slots = slots_in_order(kept)
    return torch.where(kept, slots, slots[least[regions]])


@torch.no_grad()
def top_k(importance, regions, tokens, budget) -> torch.Tensor:
    """The most attended tokens: the criterion of FastV (Chen et al., ECCV 2024) at the interface layer."""
    return slots_in_order(best_tokens(importance, check_arguments(importance, regions, tokens, budget)))


@torch.no_grad()
def uniform(importance, regions, tokens, budget) -> torch.Tensor:
    """Every so many tokens one, whatever they show: the middle of each of n equal stretches."""
    n, N = check_arguments(importance, regions, tokens, budget), len(tokens)
    chosen = (2 * torch.arange(n, device=tokens.device) + 1) * N // (2 * n)
    return slots_in_order(torch.zeros(N, dtype=torch.bool, device=tokens.device).scatter(0, chosen, True))


# Name in the configuration -> the rule, and the settings of the configuration that it takes.
SELECTORS = {
    "preserve_and_merge": (preserve_and_merge, ("threshold", "coverage")),
    "distinct": (distinct, ("distinctiveness_power", "coverage")),
    "top_k": (top_k, ()),
    "uniform": (uniform, ()),
}
