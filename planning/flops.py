"""FLOPs of what a model does, counted while it does it."""

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _cdist_flops(points, centres, *args, out_shape=None, **kwargs) -> int:
    """As the product of [N, D] and [D, R] that it is at these sizes."""
    return 2 * points[0] * points[1] * centres[0]


def _sdpa_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """The two products over the whole square, the causal half that is skipped included, as torch counts the others."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


# What torch's own counter passes over on a CPU.
UNCOUNTED = {
    aten._cdist_forward: _cdist_flops,
    aten._euclidean_dist: _cdist_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    aten._scaled_dot_product_fused_attention_overrideable: _sdpa_flops,
}


class FlopMeter(FlopCounterMode):
    """torch's counter of products and convolutions, and what it passes over. Element-wise work is not counted."""

    def __init__(self):
        super().__init__(display=False, custom_mapping=UNCOUNTED)


__all__ = ["FlopMeter"]
