"""Published rules that decide which tokens stay, at an exact budget, for comparison: selectors of the signature that the
model's `compress` takes, `rules={"selector": diversity}`. The model itself knows none of them.

Axes: as in `token_selectors_uhr_bat.py`.
"""

import torch
import torch.nn.functional as F

from ..budgets_uhr_bat import is_one_budget
from ..token_clustering_uhr_bat import block_length
from ..token_selectors_uhr_bat import SELECTORS, best_tokens, check_arguments, slots_in_order


def _unit(tokens):
    """float32[N, D], rows of length 1."""
    return F.normalize(tokens.float(), dim=1)


@torch.no_grad()
def diversity(importance, regions, tokens, budget) -> torch.Tensor:
    """DivPrune (Alvar et al., CVPR 2025): tokens as far from each other as possible, blind to the question.

    Greedy max-min: the token whose nearest neighbour is farthest comes first, then always the one that is farthest
    from all that are chosen. Distance is 1 - cosine.
    """
    n = check_arguments(importance, regions, tokens, budget)
    unit = _unit(tokens)
    length, numbers = block_length(len(unit), unit.device), torch.arange(len(unit), device=unit.device)
    blocks = zip(unit.split(length), numbers.split(length))
    nearest = [(rows @ unit.T).scatter(1, own[:, None], -torch.inf).amax(1) for rows, own in blocks]
    chosen = [torch.cat(nearest).argmin()]
    similarity = unit @ unit[chosen[0]]
    for _ in range(n - 1):
        similarity[chosen[-1]] = torch.inf
        chosen.append(similarity.argmin())
        similarity = torch.maximum(similarity, unit @ unit[chosen[-1]])
    return slots_in_order(torch.zeros_like(importance, dtype=torch.bool).scatter(0, torch.stack(chosen), True))


@torch.no_grad()
def conditional_diversity(importance, regions, tokens, budget) -> torch.Tensor:
    """CDPruner (Zhang et al., NeurIPS 2025): a determinantal point process of diversity, conditioned on the question.

    Kernel diag(r) S diag(r) with S the cosines of the tokens and r the importance between its least and greatest value;
    greedy maximum a posteriori by Cholesky updates (Chen, Zhang and Zhou, NeurIPS 2018). The original takes r from
    CLIP's text encoder, which this model does not have; here it is the question's attention.
    """
    n = check_arguments(importance, regions, tokens, budget)
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
    return slots_in_order(torch.zeros_like(importance, dtype=torch.bool).scatter(0, torch.stack(chosen), True))


@torch.no_grad()
def similarity_merging(importance, regions, tokens, budget) -> torch.Tensor:
    """ToMe (Bolya et al., ICLR 2023): the most similar pairs become one, round after round, blind to the question.

    Bipartite soft matching: every other token looks for the most similar one of the rest, the best pairs are merged,
    means weighted by what they hold. A round halves the tokens at most.
    """
    n = check_arguments(importance, regions, tokens, budget)
    slots = torch.arange(len(tokens), device=tokens.device)
    merged, sizes = tokens.float(), torch.ones(len(tokens), device=tokens.device)
    while len(merged) > n:
        unit = F.normalize(merged, dim=1)
        sources, targets = unit[::2], unit[1::2]
        rows = block_length(max(1, len(targets)), targets.device)
        best = [(block @ targets.T).max(1) for block in sources.split(rows)]
        similarity, partner = (torch.cat(parts) for parts in zip(*best))
        gone = best_tokens(similarity, min(len(merged) - n, len(targets)))
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
    n, N = check_arguments(importance, regions, tokens, budget), len(tokens)
    num_contextual = min(round(n * contextual), N - n)
    dominant = best_tokens(importance, n - num_contextual)
    if not num_contextual:
        return slots_in_order(dominant)
    rest = (~dominant).nonzero()[:, 0]
    stops = (2 * torch.arange(num_contextual, device=tokens.device) + 1) * len(rest) // (2 * num_contextual)
    anchors = rest[stops]
    slots = slots_in_order(dominant.scatter(0, anchors, True))
    unit = _unit(tokens)
    rows = block_length(num_contextual, tokens.device)
    nearest = torch.cat([(unit[block] @ unit[anchors].T).argmax(1) for block in rest.split(rows)])
    nearest[stops] = torch.arange(num_contextual, device=tokens.device)
    return slots.scatter(0, rest, slots[anchors[nearest]])


# By name, as commands take them beside the model's own.
REDUCERS = {
    one.__name__: one for one in (diversity, conditional_diversity, similarity_merging, dominant_and_contextual)
}
# Those that average tokens wherever they lie: a mean of tokens of two scales has no place in either.
MERGING = ("similarity_merging", "dominant_and_contextual")


def find_selector(name: str, budgets=None):
    """What `compress` takes as `selector`: a rule of the model by its name, one of these as a function.

    Raises:
        ValueError: there is none of this name, or it merges tokens of the scales that compete for one number `budgets`.
    """
    if name not in (*SELECTORS, *REDUCERS):
        raise ValueError(f"There is no selector {name!r}. There are: {', '.join((*SELECTORS, *REDUCERS))}.")
    if name in MERGING and budgets is not None and is_one_budget(budgets):
        raise ValueError(
            f"The selector {name!r} merges tokens of different scales, which a budget of one number makes compete. Give it "
            f"budgets per scale instead of one of {budgets}."
        )
    return REDUCERS.get(name, name)
