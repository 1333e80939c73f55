"""The look: what the question pays to the rows of an image, read inside the model's own attention.

A kernel of ours stands behind the decoder's attention modules, by the library's `AttentionInterface`. It hands each call to the
model's own kernel. At the modules that a look is for it also computes the question's rows, after all that the family does to
queries and keys, and ends the pass at the last. The look travels with its call as a keyword: no other thread sees it.

Axes: B prompts, M their tokens, G groups of heads that share a key, V rows of the image.
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
    if look is not None and module in look.modules:
        # The family's own eager attention knows its scaling, caps, sinks and groups of heads.
        position, window = torch.arange(query.shape[2], device=query.device), kwargs.get("sliding_window")
        begin, end = torch.tensor(look.questions, device=query.device).T[:, :, None]
        asking = sorted({row for question in look.questions for row in range(*question)})
        look.seen[module] = 0
        for rows in position[asking].split(QUESTION_BLOCK):
            distance = rows[:, None] - position
            unseen = (distance < 0) | (distance >= (window or len(position)))
            mask = torch.zeros_like(distance, dtype=query.dtype).masked_fill(unseen, torch.finfo(query.dtype).min)
            seen = eager(module, query[:, :, rows], key, value, mask[None, None], **kwargs)[1]
            asks = ((rows >= begin) & (rows < end)) / (end - begin)
            look.seen[module] += (seen.float().unflatten(1, (key.shape[1], -1)).mean(2) * asks[:, None, :, None]).sum(2)
        if len(look.seen) == len(look.modules):
            raise Looked
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(module.config.kernel_of._attn_implementation, eager)
    return kernel(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(KERNEL, look_kernel)


def full_layers(config) -> list[int]:
    """Layers of a decoder's configuration that attend to everything before them."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]


def attention_modules(decoder) -> dict[int, nn.Module]:
    """{layer: its attention module} of those layers of a decoder that attend to everything before them.

    All attention modules ask for our kernel from here on, by a configuration of their own: masks and what is saved follow from
    the model's, which stays as it is.
    """
    full, found = full_layers(decoder.config), {}
    for layer_idx, layer in enumerate(decoder.layers):
        modules = (one for one in layer.modules() if "Attention" in type(one).__name__ and hasattr(one, "config"))
        module = next(modules, None)
        if module is not None and not hasattr(module.config, "kernel_of"):
            own = copy(module.config)
            own.kernel_of, own._attn_implementation_internal = module.config, KERNEL
            module.config = own
        if module is not None and layer_idx in full:
            found[layer_idx] = module
    return found


def look(base, modules, questions, **inputs) -> list[torch.Tensor]:
    """float32[B, G, M] at each of some `attention_modules` of the host without its head, `base`: mean attention of each prompt's
    question, its tokens (begin, end), to every position; `inputs` of a forward, prompts padded on the right."""
    one = SimpleNamespace(modules=modules, questions=questions, seen={})
    try:
        base(**inputs, use_cache=False, **{KEYWORD: one})
    except Looked:
        return [one.seen[module] for module in modules]
    raise ValueError(f"{type(base).__name__} does not hand keywords down to its attention, so it cannot be looked at.")


def relative_attention(asked: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """float32[..., V] of sum 1: a question's look a divided by that of an empty one over the same rows, b, float[..., V] each: what
    is looked at whatever is asked, as sinks and late rows, cancels. w = r / sum(r), r = (a + m) / (b + m), with a and b of sum 1
    and m = median(b), without which rows that neither looks at would be noise. After Zhang et al., arXiv 2502.17422, who divide
    by a general question."""
    asked, empty = (one / one.sum(-1, keepdim=True).clamp(min=1e-30) for one in (asked, empty))
    median = empty.quantile(0.5, dim=-1, keepdim=True).clamp(min=1e-30)
    ratio = (asked + median) / (empty + median)
    return ratio / ratio.sum(-1, keepdim=True)
