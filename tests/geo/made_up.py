"""A compression without a model: what `compress` returns, from slots, regions and importance that a test states."""

import numpy as np
import torch
from uhr_bat.geometry_uhr_bat import shown_patches
from uhr_bat.modeling_outputs_uhr_bat import UHRBatCompressionOutput

SCALES, GRIDS = (8, 16, 24), ((2, 2), (4, 4), (6, 6))
# Turned by 30 degrees, pixels of 2 m and mirrored as north-up rasters are; in UTM zone 54 north.
ROTATED = (1.7320508075688772, 1.0, 375000.0, 1.0, -1.7320508075688772, 3908000.0)
ABOUT = {"image": "scene.tif", "question": 'Where is "<b>Köln</b>"?', "answer": "here & there"}


def compression(image_size, slots=None, regions=None, seed=0, grids=GRIDS):
    """Random importance; every token that shows the image keeps a slot and is a region of its own, unless said."""
    result = UHRBatCompressionOutput(importance=[[]], regions=[[]], slots=[[]])
    rng = np.random.default_rng(seed)
    for scale_idx, grid in enumerate(grids):
        shown = shown_patches(image_size, grid).ravel()
        own = np.where(shown, shown.cumsum() - 1, -1)
        importance = np.where(shown, rng.random(shown.shape) + 0.1, 0)
        result.importance[0].append(torch.tensor(importance, dtype=torch.float32).view(grid))
        result.regions[0].append(torch.tensor(own if regions is None else regions[scale_idx]))
        result.slots[0].append(torch.tensor(own if slots is None else slots[scale_idx]))
    return result
