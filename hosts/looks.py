"""The look: what the question pays to the rows of an image, read inside the model's own attention.

A kernel of ours stands behind the decoder's attention modules, by the library's `AttentionInterface`. It hands each call to the
model's own kernel, but for the module that a look is for: there it computes the question's rows, after all that the family does
to queries and keys, and ends the pass. The look travels with its call as a keyword: no other thread sees it, nothing is set.
"""

import sys
from copy import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..modeling_layers_uhr_bat import QUESTION_BLOCK

KERNEL = KEYWORD = "uhr_bat_look"


class Looked(Exception): ...  # the pass has seen what it was made for


def look_kernel(module, query, key, value, attention_mask, **kwargs):
    """As [`AttentionInterface`] has kernels: the model's own, or the look."""
    look = kwargs.pop(KEYWORD, None)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if look is not None and look.module is module:
        # The family's own eager attention knows its scaling, caps, sinks and groups of heads.
        position, window = torch.arange(query.shape[2], device=query.device), kwargs.get("sliding_window")
        look.seen = 0
        for rows in position[look.question_start :].split(QUESTION_BLOCK):
            distance = rows[:, None] - position
            unseen = (distance < 0) | (distance >= (window or len(position)))
            mask = torch.zeros_like(distance, dtype=query.dtype).masked_fill(unseen, torch.finfo(query.dtype).min)
            seen = eager(module, query[:, :, rows], key, value, mask[None, None], **kwargs)[1]
            look.seen += seen[0].float().mean(0).sum(0) / (len(position) - look.question_start)
        raise Looked
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(module.config.kernel_of._attn_implementation, eager)
    return kernel(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(KERNEL, look_kernel)


def attention_modules(decoder) -> dict[int, nn.Module]:
    """{layer: its attention module} of those layers of a decoder that attend to everything before them.

    All attention modules ask for our kernel from here on, by a configuration of their own: masks and what is saved follow from
    the model's, which stays as it is.
    """
    types = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    found = {}
    for layer_idx, (layer, kind) in enumerate(zip(decoder.layers, types)):
        modules = (one for one in layer.modules() if "Attention" in type(one).__name__ and hasattr(one, "config"))
        module = next(modules, None)
        if module is not None and not hasattr(module.config, "kernel_of"):
            own = copy(module.config)
            own.kernel_of, own._attn_implementation_internal = module.config, KERNEL
            module.config = own
        if module is not None and kind == "full_attention":
            found[layer_idx] = module
    return found


def look(base, attention, question_start, **inputs) -> torch.Tensor:
    """float32[M]: mean attention of the question to every position of one prompt, at one of `attention_modules` of the host
    without its head, `base`; `inputs` of its forward."""
    one = SimpleNamespace(module=attention, question_start=question_start, seen=None)
    try:
        base(**inputs, use_cache=False, **{KEYWORD: one})
    except Looked:
        return one.seen
    raise ValueError(f"{type(base).__name__} does not hand keywords down to its attention, so it cannot be looked at.")
