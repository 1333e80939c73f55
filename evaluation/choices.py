"""Choices of visual tokens that are compared: rules of the model's own compression, rules that do not know the
question, and the image made small.
"""

import copy

import torch

from ..export.build_tiny import BUDGETS
from ..export.build_tiny import RULES as SHIPPED
from ..geometry_uhr_bat import patch_centres
from ..modeling_layers_uhr_bat import UHRBatScaleEmbedding
from ..token_compression_uhr_bat import cluster_regions, merge_tokens
from ..token_selectors_uhr_bat import uniform
from .reducers import conditional_diversity, diversity, dominant_and_contextual, similarity_merging

PAPER, TOP_K, DISTINCT, REFINED = "preserve-and-merge", "top-k per scale", "distinct", "distinct, refined"
# Of each scale after the anchor, how many tokens the question looks at once more, and up to which decoder layer.
REFINEMENT = {name: SHIPPED[name] for name in ("refinement", "refinement_layers")}


def _rules(selector, **changes):
    """All that the rows vary, so that none depends on the configuration's choice."""
    return {"selector": selector, "refinement": [], "refinement_layers": [], "coverage": False, **changes}


# Proportions in which the scales share the tokens: the paper's, and such that leave more to the finest scale.
PROPORTIONS, FINE_PROPORTIONS = (16, 24, 40, 66), tuple(BUDGETS)
# Rules by which the model's own `compress` is each row, and the proportions; None is one budget for all scales.
RULES = {
    PAPER: (_rules("preserve_and_merge"), PROPORTIONS),
    "with coverage": (_rules("preserve_and_merge", coverage=True), PROPORTIONS),
    TOP_K: (_rules("top_k"), PROPORTIONS),
    "top-k, one budget": (_rules("top_k"), None),
    DISTINCT: (_rules("distinct"), None),
    "distinct, budgets per scale": (_rules("distinct"), FINE_PROPORTIONS),
    "distinct, regions told of": (_rules("distinct", coverage=True), None),
    REFINED: (_rules("distinct", **REFINEMENT), None),
    "distinct, refined, budgets per scale": (_rules(**SHIPPED), FINE_PROPORTIONS),
    "CDPruner": (_rules(conditional_diversity), PROPORTIONS),
    "VisionZip": (_rules(dominant_and_contextual), PROPORTIONS),
}
# Blind to the question: chosen once per image.
BLIND = {"DivPrune": diversity, "ToMe": similarity_merging, "uniform": uniform}
CHOICES = (*BLIND, "k-means merge")
DOWNSAMPLING = "downsampling"
# By the rules of REFINED, but of the tiles behind the anchor's only the quarter is encoded where the question looks.
ZOOMED, ENCODED_SHARE = "distinct, refined, a quarter of the tiles", 1 / 4
ROWS = (*RULES, ZOOMED, *CHOICES, DOWNSAMPLING)


def encode_share(model, processor, image):
    """The image, encoded where a question looks, a share of its tiles behind the anchor's."""
    (pyramid,) = processor.image_processor(image, max_tiles=10**6)["image_pyramids"]
    anchor, *finer = [int((pyramid.num_shown(idx) > 0).sum()) for idx in range(len(pyramid.scales))]
    return model.encode_image(image_pyramids=[pyramid.with_max_tiles(anchor + round(ENCODED_SHARE * sum(finer)))])[0]


def choose(method, model, features, counts) -> list[torch.Tensor]:
    """Slots long[V] of every scale by a rule that does not know the question."""
    slots = []
    for scale, (tokens, positions, count) in enumerate(zip(features.tokens, features.positions, counts)):
        if method == "k-means merge":
            coords = patch_centres(positions, model.config.grids[scale])
            slots.append(cluster_regions(tokens, coords, count, coord_weight=model.config.coord_weight))
        else:
            nothing = torch.zeros(len(tokens), dtype=torch.long)  # no importance, one region
            slots.append(BLIND[method](nothing, nothing, tokens, count))
    return slots


def gather(features, slots) -> torch.Tensor:
    """float[n, D], the visual tokens of all scales."""
    merged = [
        merge_tokens(tokens, slot, int(slot.max()) + 1)
        for tokens, slot in zip(features.tokens, slots)
        if int(slot.max()) >= 0
    ]
    return torch.cat(merged)


def alone(slots) -> torch.Tensor:
    """bool[N]: the tokens of a scale, slots long[N], that have a place of their own."""
    sizes = torch.bincount(slots[slots >= 0], minlength=1)
    return (slots >= 0) & (sizes[slots.clamp_min(0)] == 1)


def keeps(slots, positions, evidence) -> bool:
    """Whether each object, a list of its (scale, position), has a slot of its own in one of them.

    `slots`: long[V] per scale; `positions`: long[V] per scale, where these tokens stand on the grid.
    """
    single = [set(where[alone(slot)].tolist()) for slot, where in zip(slots, positions)]
    return all(any(position in single[scale] for scale, position in one) for one in evidence)


def one_scale_model(model, side):
    """The same weights for an image of one scale; of the scale vectors the one of the scale nearest to it."""
    single = copy.deepcopy(model)
    config = single.config
    nearest = min(range(len(config.scales)), key=lambda scale: abs(config.scales[scale] - side))
    config.scales, config.native_scales, config.budgets = [side], [], [(side // config.patch_size) ** 2]
    embedding = UHRBatScaleEmbedding(config).to(model.device)
    embedding.load_state_dict(
        {
            "table": model.model.scale_embedding.table,
            "scale_vectors": model.model.scale_embedding.scale_vectors[[nearest]],
        }
    )
    single.model.scale_embedding = embedding
    return single.eval()


class Downsampling:
    """The image resized to the largest single scale that is within a number of tokens."""

    def __init__(self, processor, model):
        self.image_processor, self.model, self.models = processor.image_processor, model, {}

    def __call__(self, image, num_tokens) -> torch.Tensor:
        """float[n, D], at most `num_tokens` of the letterboxed square and those that show the image."""
        config = self.model.config
        patches_per_side = config.tile_size // config.patch_size
        side = max(1, int(num_tokens**0.5) // patches_per_side) * config.tile_size
        if side not in self.models:
            self.models[side] = one_scale_model(self.model, side)
        tiles = self.image_processor(image, scales=[side], return_tensors="pt").to(self.model.device)
        return self.models[side].encode_image(**tiles)[0].tokens[0]
