"""UHR-BAT compression of one image: the rules of a configuration, applied scale by scale (section 3.4).

What the question makes of an encoded image: importance of every scale (eq. 6-7), its regions (eq. 13-15), which tokens
stay (eq. 8-12) and what is merged (eq. 10). It knows no model: the rules come as arguments, the image as features.

Axes: S scales, N tokens of a scale, V of them that show the image, H and W height and width of a grid, D decoder width.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from .clustering_uhr_bat import cluster_regions, grid_regions, vote_regions
from .geometry_uhr_bat import patch_centres
from .outputs_uhr_bat import UHRBatImageFeatures
from .token_compression_uhr_bat import align_importance, merge_tokens, select_tokens


@dataclass(frozen=True)
class CompressionRules:
    """The fields of the configuration that decide which tokens stay; each is explained there."""

    region_method: str
    num_regions: int | None
    kmeans_iterations: int
    coord_weight: float
    coord_frame: str
    threshold: str
    coverage: bool

    @classmethod
    def of(cls, config, changes: dict | None = None) -> "CompressionRules":
        """The rules of a configuration, with other values for this call where `changes` has them."""
        return replace(cls(**{one.name: getattr(config, one.name) for one in fields(cls)}), **(changes or {}))


class CompressedImage(NamedTuple):
    """One image after the compression, each list[S]; see [`UHRBatCompressionOutput`] for the entries."""

    tokens: list[torch.Tensor]
    importance: list[torch.Tensor]
    regions: list[torch.Tensor]
    slots: list[torch.Tensor]


def on_grid(values, positions, grid, fill) -> torch.Tensor:
    """[V] -> [H, W], `fill` where no value belongs."""
    height, width = grid
    return values.new_full((height * width,), fill).index_copy(0, positions, values).view(height, width)


def partition(image: UHRBatImageFeatures, scale_idx: int, budget: int, config, rules: CompressionRules) -> torch.Tensor:
    """long[V]: the one place where a region partition is chosen (eq. 4, appendix C.2); kept with the image."""
    if image.regions is not None:
        key = (scale_idx, "given")
    else:
        num_regions = rules.num_regions or budget
        if rules.coverage:
            num_regions = min(num_regions, budget)
        how = (rules.region_method, rules.kmeans_iterations, rules.coord_weight, rules.coord_frame)
        key = (scale_idx, num_regions, *how)
    if key not in image.partitions:
        positions, grid = image.positions[scale_idx], config.grids[scale_idx]
        if image.regions is not None:
            regions = vote_regions(image.regions[scale_idx][None], patch_size=1)
        elif rules.region_method == "none":
            regions = torch.arange(len(positions), device=positions.device)
        elif rules.region_method == "grid":
            regions = grid_regions(positions, grid, num_regions)
        else:
            extent = (config.tile_size // config.patch_size,) * 2 if rules.coord_frame == "tile" else None
            regions = cluster_regions(
                image.tokens[scale_idx].detach(),
                patch_centres(positions, grid, extent),
                num_regions,
                method=rules.region_method,
                coord_weight=rules.coord_weight,
                num_iterations=rules.kmeans_iterations,
            )
        image.partitions[key] = regions
    return image.partitions[key]


def compress_image(
    image: UHRBatImageFeatures, anchor_importance: torch.Tensor, counts: list[int], config, rules: CompressionRules
) -> CompressedImage:
    """Tokens, importance, regions and slots of every scale of one image (eq. 6-12).

    Args:
        image: the encoded image.
        anchor_importance: float32[V_1], what the question pays to each anchor token.
        counts: int[S], exact visual tokens of every scale.
        config: the configuration, for its grids.
        rules: which tokens stay.
    """
    anchor_grid = config.grids[image.anchor_idx]
    shown = on_grid(torch.ones_like(anchor_importance), image.anchor_positions, anchor_grid, fill=0)
    anchor_importance = on_grid(anchor_importance, image.anchor_positions, anchor_grid, fill=0)
    compressed = CompressedImage([], [], [], [])
    for scale_idx, (grid, count) in enumerate(zip(config.grids, counts)):
        positions, tokens = image.positions[scale_idx], image.tokens[scale_idx]
        with torch.no_grad():
            # Divide by the interpolated mask: the mean over those anchor cells that show the image.
            importance = align_importance(anchor_importance, grid) / align_importance(shown, grid)
            importance = importance.flatten()[positions]
            if count:
                regions = partition(image, scale_idx, count, config, rules)
                slots = select_tokens(importance, regions, count, threshold=rules.threshold, coverage=rules.coverage)
            else:  # a scale that spends nothing has no regions either
                slots = torch.full_like(positions, -1)
                regions = torch.full_like(positions, -1)
        compressed.tokens.append(merge_tokens(tokens, slots, count) if count else tokens[:0])
        compressed.importance.append(on_grid(importance, positions, grid, fill=0))
        compressed.regions.append(on_grid(regions, positions, grid, fill=-1).flatten())
        compressed.slots.append(on_grid(slots, positions, grid, fill=-1).flatten())
    return compressed
