# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT compression of one image: the rules of a configuration, applied to what the question looks at (section 3.4).

Importance of every scale (eq. 6-7), its regions (eq. 13-15), which tokens stay (`token_selectors_uhr_bat.py`), and their
means (eq. 10). It knows no model: the rules come as arguments, the image as features.

Axes: S scales, N tokens of a scale, V of them that show the image, H and W height and width of a grid, D decoder width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import NamedTuple

import torch
from transformers.utils import logging

from .budgets_uhr_bat import anchor_tokens, bounds_of_regions, first_with_tokens
from .configuration_uhr_bat import check_selector
from .geometry_uhr_bat import patch_centres
from .modeling_outputs_uhr_bat import TokenMaps, UHRBatImageFeatures, on_grid
from .token_clustering_uhr_bat import cluster_regions, grid_regions, vote_regions
from .token_compression_uhr_bat import WITHOUT_FLOAT64, align_importance, merge_tokens
from .token_selectors_uhr_bat import SELECTORS, check_slots, name_of

logger = logging.get_logger(__name__)

# Fewer places of a grid than one in so many are looked up one by one.
FEW = 16


@dataclass(frozen=True)
class CompressionRules:
    """The fields of the configuration that decide which tokens stay; each is explained there. `selector` is a name or, in a
    call, a function (importance, regions, tokens, budget) -> slots, see `token_selectors_uhr_bat.py`."""

    selector: str | Callable
    distinctiveness_power: float
    refinement: list[int]
    refinement_layers: list[int]
    anchor_share: float
    superseded_weight: float
    region_method: str
    num_regions: int | None
    kmeans_iterations: int
    coord_weight: float
    coord_frame: str
    threshold: str
    coverage: bool

    @classmethod
    def of(cls, config, changes: dict | None = None) -> "CompressionRules":
        """The rules of a configuration, with other values for this call where `changes` has them.

        Raises:
            ValueError: a rule that there is not, a selector that is neither a name nor a function, or a value that the
                configuration could not have.
        """
        changes = dict(changes or {})
        rules = {one.name: getattr(config, one.name) for one in fields(cls)}
        if unknown := sorted(set(changes) - set(rules)):
            raise ValueError(f"There is no rule {unknown[0]!r}. There are: {', '.join(rules)}.")
        if "refinement" in changes and not changes["refinement"]:  # no looks have no layers
            changes.setdefault("refinement_layers", [])
        rules |= changes
        if not callable(rules["selector"]):
            check_selector(rules["selector"])
        if changes and hasattr(config, "check_rules"):  # a model of another class may have fields alone
            config.check_rules({name: value for name, value in changes.items() if not callable(value)})
        return cls(**rules)


class CompressedImage(NamedTuple):
    """One image after the compression, each of S entries; see [`UHRBatCompressionOutput`] for them."""

    tokens: list[torch.Tensor]
    importance: Sequence[torch.Tensor]
    regions: Sequence[torch.Tensor]
    slots: Sequence[torch.Tensor]


def look_up(importance, positions, grid, finer_positions, finer_grid) -> torch.Tensor:
    """Importance of the tokens of a finer scale, read from that of a coarser one (eq. 6-7).

    Args:
        importance: float[V], of the coarser scale's tokens.
        positions: long[V], their places on its grid, ascending.
        finer_positions: long[V'], places on `finer_grid`.

    Returns:
        float[V']
    """
    if len(finer_positions) * FEW < finer_grid[0] * finer_grid[1]:
        return _look_up_few(importance, positions, grid, finer_positions, finer_grid)
    shown = on_grid(torch.ones_like(importance), positions, grid, fill=0)
    # Divide by the interpolated mask: the mean over those cells that show the image. Of chosen tokens alone: what shows
    # none of it is 0 / 0, which no mask takes out of a gradient.
    aligned = align_importance(on_grid(importance, positions, grid, fill=0), finer_grid).flatten()[finer_positions]
    return aligned / align_importance(shown, finer_grid).flatten()[finer_positions]


def _look_up_few(importance, positions, grid, finer_positions, finer_grid):
    """`look_up` without either grid, which at an image's own resolution has millions of cells: the four neighbours of each
    place are found among the tokens that there are."""
    precise = torch.float32 if importance.device.type in WITHOUT_FLOAT64 else torch.float64
    corners = []
    for idx, length, finer_length in zip(
        (finer_positions // finer_grid[1], finer_positions % finer_grid[1]), grid, finer_grid
    ):
        place = ((idx.to(precise) + 0.5) * length / finer_length - 0.5).clamp(0, length - 1)
        low = place.long()
        part = place - low
        corners.append(((low, 1 - part), ((low + 1).clamp(max=length - 1), part)))
    values, total, mass = importance.to(precise), 0, 0
    for (row, down), (column, across) in product(*corners):
        wanted = row * grid[1] + column
        found = torch.searchsorted(positions, wanted).clamp(max=len(positions) - 1)
        weight = torch.where(positions[found] == wanted, down * across, 0)
        total, mass = total + weight * values[found], mass + weight
    return (total / mass).to(importance)


def partition(image: UHRBatImageFeatures, scale_idx: int, budget: int, model, rules: CompressionRules) -> torch.Tensor:
    """long[V]: the one place where a region partition is chosen (eq. 4, appendix C.2); kept with the image. The arguments
    are those of `compress_image`."""
    if image.regions is not None:
        key = (scale_idx, "given")
    else:
        num_regions = rules.num_regions or budget
        if rules.coverage:
            num_regions = min(num_regions, budget)
        how = (rules.region_method, rules.kmeans_iterations, rules.coord_weight, rules.coord_frame)
        key = (scale_idx, num_regions, *how)
    if key not in image.partitions:
        positions, grid = image.positions[scale_idx], image.grids[scale_idx]
        if image.regions is not None:
            regions = vote_regions(image.regions[scale_idx][None], patch_size=1)
        elif rules.region_method == "none":
            regions = torch.arange(len(positions), device=positions.device)
        elif rules.region_method == "grid":
            regions = grid_regions(positions, grid, num_regions)
        else:
            extent = (model.patches_per_side,) * 2 if rules.coord_frame == "tile" else None
            regions = cluster_regions(
                model.features_of(image.tokens[scale_idx]).detach(),
                patch_centres(positions, grid, extent),
                num_regions,
                method=rules.region_method,
                coord_weight=rules.coord_weight,
                num_iterations=rules.kmeans_iterations,
            )
        image.partitions[key] = regions
    return image.partitions[key]


def choose_tokens(importance, regions, tokens, budget, rules: CompressionRules) -> torch.Tensor:
    """`slots` long[N] of N tokens by the selector of the rules."""
    if callable(rules.selector):
        # Regions are kept for the next question. So are tokens, of which there are too many to copy them.
        versions = [] if tokens.is_inference() else [tokens._version]
        slots = rules.selector(importance.clone(), regions.clone(), tokens, budget)
        if versions and versions != [tokens._version]:
            raise ValueError(
                f"The selector {name_of(rules.selector)} changed the tokens that it was given, which later questions need too. "
                "Let it work on `tokens.clone()`, and encode the image again."
            )
        return check_slots(slots, rules.selector, tokens, budget)
    select, settings = SELECTORS[rules.selector]
    return select(importance, regions, tokens, budget, **{name: getattr(rules, name) for name in settings})


def choose_of_all_scales(importance, regions, tokens, budget, rules: CompressionRules):
    """Slots where the tokens of all scales compete for one budget, or those of all finer ones for what the anchor's share
    leaves; the arguments are lists over scales.

    Returns:
        (`slots` long[V_s] of every scale, int[S] places of each scale).

    Raises:
        ValueError: the selector merges tokens of different scales, which have no scale to stand in.
    """
    available = list(map(len, tokens))
    if own := anchor_tokens(budget, available, rules.anchor_share):
        anchor = first_with_tokens(available)
        slots = [torch.full_like(one, -1) for one in regions]
        slots[anchor] = choose_tokens(importance[anchor], regions[anchor], tokens[anchor], own, rules)
        counts, finer = [0] * anchor + [own] + [0] * (len(tokens) - anchor - 1), slice(anchor + 1, None)
        if rest := min(budget - own, sum(available[finer])):
            scales = importance[finer], regions[finer], tokens[finer]
            slots[finer], counts[finer] = choose_of_all_scales(*scales, rest, replace(rules, anchor_share=0))
        return slots, counts
    numbers = [int(region.max()) + 1 if len(region) else 0 for region in regions]
    apart = [region + sum(numbers[:scale_idx]) for scale_idx, region in enumerate(regions)]
    joined = choose_tokens(torch.cat(importance), torch.cat(apart), torch.cat(tokens), budget, rules)
    slots, counts = [], []
    for scale in joined.split([len(one) for one in tokens]):
        # The place among all visual tokens becomes the place among those of the scale, in the same order.
        kept = scale >= 0
        places, rank = scale[kept].unique(return_inverse=True)
        slots.append(torch.full_like(scale, -1).masked_scatter(kept, rank))
        counts.append(len(places))
    if sum(counts) != min(budget, len(joined)):
        raise ValueError(
            f"The selector {name_of(rules.selector)} merges tokens of different scales. Give it `budgets` per scale instead "
            f"of one of {budget} tokens."
        )
    return slots, counts


def check_coverage(regions, budget: int, available: list[int], rules: CompressionRules):
    """Raises `ValueError` where either part of one budget, the anchor's own (`anchor_share`) or what is left of it, has fewer tokens
    than there are regions that each get one. The selectors see one part, and would name its tokens as the budget."""
    own, anchor = anchor_tokens(budget, available, rules.anchor_share), first_with_tokens(available)
    if not own or not rules.coverage or "coverage" not in SELECTORS.get(rules.selector, ((), ()))[1]:
        return
    numbers = [len(of_scale.unique()) if of_scale.numel() and of_scale.max() >= 0 else 0 for of_scale in regions]
    R, R_rest, rest = numbers[anchor], sum(numbers[anchor + 1 :]), budget - own
    if R <= own and R_rest <= rest:
        return
    lowest, highest = math.ceil(100 * R / budget) / 100, math.floor(100 * (budget - R_rest) / budget) / 100
    mend = f"Lower `anchor_share` to at most {max(highest, 0):g}, or raise the budget"
    if R > own:
        fits = R + R_rest <= budget
        mend = f"Raise `anchor_share` to at least {lowest:g}" if fits else f"Raise the budget to at least {R + R_rest}"
    raise ValueError(
        f"`coverage` gives each region a token, and the coarsest scale has {R}, the finer ones have {R_rest} regions. Of the budget of "
        f"{budget} tokens `anchor_share` {rules.anchor_share:g} gives them {own} and {rest}. {mend}, or leave `coverage` out."
    )


def tell_idle_share(config, budgets=None, changes: dict | None = None):
    """A warning, once, for budgets of every scale where somebody asked for an anchor's share, which is one of a budget of all scales.

    Args:
        config: of the model. A share that is its family's default, as it says, was asked for by nobody.
        budgets: of a call, or the counts of its images; None for those of the model.
        changes: rules of the call.
    """
    budgets = config.budgets if budgets is None else budgets
    budgets = budgets.tolist() if isinstance(budgets, torch.Tensor) else budgets
    while isinstance(budgets, list | tuple) and budgets and isinstance(budgets[0], list | tuple):
        budgets = budgets[0]
    if not isinstance(budgets, list | tuple) or len(budgets) < 2:
        return
    default = 0 if getattr(config, "anchor_share_by_default", False) else config.anchor_share
    if share := (changes or {}).get("anchor_share", default):
        logger.warning_once(
            f"`anchor_share` {share:g} is a part of one budget of all scales, and has no effect on budgets of every scale. Give one "
            "number of `budgets`, or no `anchor_share`."
        )


def compress_image(
    image: UHRBatImageFeatures, importance: list[torch.Tensor], counts: list[int], model, rules: CompressionRules
) -> CompressedImage:
    """Tokens, importance, regions and slots of every scale of one image (eq. 8-12).

    Args:
        image: the encoded image.
        importance: float32[V_s] of every scale, what the question pays to its tokens.
        counts: int[S], exact visual tokens of every scale, or int[1], of all scales together.
        model: [`VisionLanguageModel`], for `patches_per_side` of its tile and what of a row its `features_of` are.
        rules: which tokens stay.
    """
    one_budget = len(counts) < len(image.grids)
    with torch.no_grad():
        budgets = counts
        if one_budget:
            budgets = bounds_of_regions(counts[0], image.available, rules.anchor_share)
        # A scale that spends nothing has no regions either.
        regions = [
            partition(image, scale_idx, budget, model, rules) if budget else torch.full_like(positions, -1)
            for scale_idx, (positions, budget) in enumerate(zip(image.positions, budgets))
        ]
        features = [model.features_of(tokens) for tokens in image.tokens]
        if one_budget:
            check_coverage(regions, counts[0], image.available, rules)
            slots, counts = choose_of_all_scales(importance, regions, features, counts[0], rules)
        else:
            slots = [
                choose_tokens(*scale, budget, rules) if budget else torch.full_like(scale[1], -1)
                for *scale, budget in zip(importance, regions, features, counts)
            ]
    tokens = [
        merge_tokens(tokens, slot, count) if count else tokens[:0]
        for tokens, slot, count in zip(image.tokens, slots, counts)
    ]
    places = image.positions, image.grids
    return CompressedImage(
        tokens,
        TokenMaps(importance, *places, fill=0),
        TokenMaps(regions, *places, fill=-1, flat=True),
        TokenMaps(slots, *places, fill=-1, flat=True),
    )
