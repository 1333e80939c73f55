"""The layout of the released checkpoints (LLaVA/LongVA style): its tensor names and its config, and what they become.

Only facts of that layout stand here; nothing reads or writes a file.
"""

import re
from math import isqrt

import torch
from uhr_bat.configuration_uhr_bat import PAPER_BUDGETS, PAPER_SCALES, UHRBatConfig

from .checkpoint_files import CheckpointError

VISION_TOWER = "model.vision_tower.vision_tower.vision_model."
# The same in files that other releases of the libraries wrote.
ANY_TOWER = re.compile(r"model\.vision_tower\.(vision_tower\.)?(vision_model\.)?")

# Beginning of a released name -> beginning of the name here, the rest stays. The copy of the token MLP outside `model.`
# is a second name of the same tensors.
RENAMES = {
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.scale_pos_residuals.": "model.scale_embedding.tables.",
    "model.multiscale_token_mlp.0.": "model.token_mlp.linear_1.",
    "model.multiscale_token_mlp.2.": "model.token_mlp.linear_2.",
    "multiscale_token_mlp.0.": "model.token_mlp.linear_1.",
    "multiscale_token_mlp.2.": "model.token_mlp.linear_2.",
    # Of LRS-VQA's checkpoints, whose projector holds the region focus module.
    "model.mm_projector.mlp_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.mlp_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.mm_projector.token_pruner.": "model.region_focus.",
    "model.image_newline": "model.image_newline",
}
# What the type of LRS-VQA's projector ends with, and layers that its paper names where a config does not: the module's first one
# begins as the layer before the first of them.
PRUNER, PRUNER_LAYERS = "pruner", [1, 5, 11, 14]
# Id of ":", the separator, and the most tiles of a level, N_max, by the decoder's family.
SEPARATORS, MAX_TILES = {"qwen2": 25, "qwen3": 25, "llama": 29901}, {"qwen2": 80, "qwen3": 80, "llama": 40}
# Word in an architecture's name -> its decoder, the first that is found: `LlavaLlamaForCausalLM`, `GeoChatLlamaForCausalLM`.
FAMILIES = {"mistral": "llama", "llama": "llama", "qwen3": "qwen3", "qwen": "qwen2"}

# Parts that the released code makes and never uses, and buffers that are computed.
DROPPED_PREFIXES = ("text_to_vision_proj.", "tile_pos_residuals.")
DROPPED_SUFFIXES = (".position_ids", ".inv_freq")
POOLING = "head."  # SigLIP's, which no token comes through

# Fields of the decoder that are taken as they are; without the first five there is no model.
TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_FIELDS = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_dropout",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

# Budgets are arguments of the released call and in no checkpoint: the paper's stand in.
BUDGET_OF_SCALE = dict(zip(PAPER_SCALES, PAPER_BUDGETS))


def rename(name: str) -> str | None:
    """The name here; None for what is dropped. Raises `KeyError` for a name that the layout does not know."""
    if name.removeprefix("model.").startswith(DROPPED_PREFIXES) or name.endswith(DROPPED_SUFFIXES):
        return None
    if (part := tower_part(name)) is not None:
        return None if part.startswith(POOLING) else f"model.vision_tower.vision_model.{part}"
    for prefix, here in RENAMES.items():
        if name.startswith(prefix):
            return here + name.removeprefix(prefix)
    raise KeyError(name)


def tower_part(name: str) -> str | None:
    """What a tensor of the vision tower is called inside it; None for any other tensor."""
    match = ANY_TOWER.match(name)
    return name[match.end() :] if match else None


def is_released_config(released: dict) -> bool:
    """Whether a config.json is of this layout: a decoder's flat config, where this project's holds one per tower."""
    return "hidden_size" in released and "text_config" not in released


def make_config(released: dict, tensors: dict, vision_heads: int | None = None) -> tuple[UHRBatConfig, list[str]]:
    """The configuration of this project, and notes on what the layout does not record.

    Args:
        released: its config.json; fields that it leaves out have the defaults of the released code.
        tensors: released name -> TensorInfo. The vision tower has no config: its sizes are those of its tensors.
        vision_heads: attention heads of the vision tower, where the rule below is wrong.

    Raises:
        CheckpointError: a setting that this project cannot reproduce, or a size that is missing.
    """
    released = {name: value for name, value in released.items() if value is not None}
    missing = [name for name in TEXT_SIZES if name not in released]
    if missing:
        raise CheckpointError(f"The released config lacks {missing}.")
    family = _decoder_family(released, tensors)
    region_focus = _region_focus(released, tensors, family)
    expected = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    for name, value in expected.items():
        if released.get(name, value) != value and not (region_focus and name == "mm_projector_type"):
            raise CheckpointError(f"The released config has `{name}` {released[name]!r}; only {value!r} is supported.")
    scales = released.get("multiscale_target_sizes", list(PAPER_SCALES))
    anchor = released.get("multiscale_base_attention_size", 672)
    if not scales or scales[0] != anchor:
        raise CheckpointError(
            f"`multiscale_base_attention_size` is {anchor} (672 where it is not given), but the first of "
            f"`multiscale_target_sizes` {scales} is the anchor here."
        )

    vision_config, *notes = _vision_config(tensors, vision_heads)
    feature_layer = released.get("mm_vision_select_layer", -2)
    if vision_config["model_type"] == "siglip_vision_model" and not _is_whole(vision_config, tensors):
        # The code that made these files cuts off what stands behind the layer that it reads, whatever its config says.
        feature_layer = -1
        notes.append("vision tower: its last layer in the file is the one that is read")
    tied = released.get("tie_word_embeddings", False)
    text_config = {name: released[name] for name in TEXT_SIZES + TEXT_FIELDS if name in released}
    if released.get("rope_scaling"):  # the released code switches it off, whatever its config says
        notes.append(f"not read, as in the released code: `rope_scaling` {released['rope_scaling']}")
    rope_theta = released.get("rope_parameters", released).get("rope_theta", 10000.0)
    text_config |= {
        "model_type": family,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": tied,
    }
    text_config, window_note = full_attention(text_config)
    window = text_config.get("max_position_embeddings", 32768)
    budgets, budgets_note = paper_budgets(scales, vision_config["patch_size"], window)
    image_token = released.get("image_token_index", -200)
    config = UHRBatConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=tied,
        region_focus=region_focus,
        scales=scales,
        budgets=budgets,
        # -200 is no row of the vocabulary. The last row is never read: visual tokens take its place.
        image_token_index=image_token if image_token >= 0 else released["vocab_size"] - 1,
        vision_feature_layer=feature_layer,
        importance_layer=-1,
        question_tokens="last",
        region_method="none",
        num_regions=released.get("kmeans_num_clusters"),
        kmeans_iterations=released.get("kmeans_max_iters", 10),
        coord_weight=released.get("kmeans_coord_scale", 0.05),
        coord_frame="tile",
        threshold="gt",
        coverage=False,
        scale_embedding_form="per_scale",
        scale_embedding_grid=released.get("scale_residual_base", 64),
        scale_embedding_additions=2 if released.get("enable_scale_pos_residual", False) else 0,
        token_mlp=any("multiscale_token_mlp." in name for name in tensors),
        mask_padding=False,
    )
    return config, [*notes, *window_note, budgets_note]


def _decoder_family(released, tensors) -> str:
    """The decoder's model type, by `architectures` or by its tensors: `model_type` may say "llava" of any."""
    layer = "model.layers.0.self_attn."  # a tower has layers, too
    if layer + "q_norm.weight" in tensors:
        return "qwen3"
    architectures = [name.lower() for name in released.get("architectures", ())]
    for word, family in FAMILIES.items():
        if any(word in name for name in architectures):
            return family
    if released.get("hidden_act", "silu") != "silu":  # Gemma's, whose tensors have the names and shapes of Llama's
        raise CheckpointError(
            f"The decoder of `architectures` {released.get('architectures')} with `hidden_act` "
            f"{released['hidden_act']!r} is unknown. Known are {', '.join(FAMILIES)}."
        )
    return "qwen2" if layer + "q_proj.bias" in tensors else "llama"


def full_attention(text: dict) -> tuple[dict, list[str]]:
    """A decoder's fields without Mistral's sliding window, and a note if there was one.

    Mistral is Llama with that window. Up to the window's length both are the same, so the context window becomes no longer than it.
    """
    if text["model_type"] not in ("llama", "mistral"):
        return text, []
    left = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "architectures")
    full = {name: value for name, value in text.items() if name not in left} | {"model_type": "llama"}
    window, longest = text.get("sliding_window"), text.get("max_position_embeddings", 32768)
    if not window or window >= longest:
        return full, []
    full["max_position_embeddings"] = window
    note = f"context window: {window} tokens of {longest}, its sliding window, within which all attention is full"
    return full, [note]


def _region_focus(released, tensors, family) -> dict | None:
    """`region_focus` of the configuration, where the checkpoint is one of LRS-VQA's."""
    start = "model.mm_projector.token_pruner.layers."
    numbers = {name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)}
    if not numbers:
        return None
    kind = released.get("mm_projector_type", "")
    if not (kind.startswith("mlp2x_gelu") and kind.endswith(PRUNER)):
        raise CheckpointError(f"The released config has `mm_projector_type` {kind!r}, but there is a token pruner.")
    layers = released.get("llm_layer_list", PRUNER_LAYERS)
    layers = [max(layers[0] - 1, 0), *layers]
    if numbers != set(map(str, range(len(layers)))):
        raise CheckpointError(
            f"The token pruner has layers {', '.join(sorted(numbers))}, but `llm_layer_list` {layers[1:]} asks for {len(layers)}."
        )
    return {"layers": layers, "n_max": MAX_TILES[family], "separator_token_id": SEPARATORS[family]}


def _is_whole(tower, tensors) -> bool:
    """Whether a SigLIP tower has all of its layers: what comes behind them, or those of so400m."""
    has_pooling = any((tower_part(name) or "").startswith(POOLING) for name in tensors)
    return has_pooling or (tower["hidden_size"], tower["num_hidden_layers"]) == (1152, 27)


def _vision_config(tensors, heads):
    """CLIP's or SigLIP's sizes from its tensors, and a note; the number of heads is in none of them."""
    parts = {part: info for name, info in tensors.items() if (part := tower_part(name)) is not None}

    def shape(name, num_axes):
        if name not in parts:
            raise CheckpointError(
                f"Tensor {VISION_TOWER + name!r} is missing: it tells the size of the vision tower. Where the checkpoint "
                "holds no tower, --start takes its folder by --vision-tower."
            )
        info = parts[name]
        if len(info.shape) != num_axes or 0 in info.shape:
            raise CheckpointError(f"{info.path}: tensor {VISION_TOWER + name!r} has the shape {list(info.shape)}.")
        return info.shape

    width, _, _, patch_size = shape("embeddings.patch_embedding.weight", 4)
    # Only CLIP's has a token that shows no patch; only SigLIP's patches have a bias.
    is_clip = "embeddings.class_embedding" in parts or "embeddings.patch_embedding.bias" not in parts
    num_patches = shape("embeddings.position_embedding.weight", 2)[0] - is_clip
    intermediate_size = shape("encoder.layers.0.mlp.fc1.weight", 2)[0]
    layers = {part.split(".")[2] for part in parts if part.startswith("encoder.layers.")}
    note = f"{heads} attention heads, as asked for"
    if heads is None:
        head = 72 if width == 1152 and not is_clip else 64 if width >= 768 else 16  # 72: SigLIP's so400m
        heads = max(1, width // head)
        known = "small towers" if head == 16 else "CLIP" if is_clip else "SigLIP"
        note = f"{heads} attention heads of width {head}, the rule for {known}"
        note += " (the layout does not record it; --vision-heads sets another number)"
    if heads < 1 or width % heads:
        raise CheckpointError(f"The vision tower is {width} wide, which {heads} attention heads do not divide.")
    config = {
        "model_type": "clip_vision_model" if is_clip else "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "image_size": isqrt(num_patches) * patch_size,
        "patch_size": patch_size,
    }
    if not is_clip:
        config["vision_use_head"] = False
    return config, f"vision tower: {len(layers)} layers, width {width}, {note}"


def paper_budgets(scales, patch_size, window) -> tuple[list[int], str]:
    """The paper's budget of each scale, that of the next coarser one of the paper for a scale between."""
    budgets = [
        max(budget for scale, budget in BUDGET_OF_SCALE.items() if scale <= max(side, PAPER_SCALES[0]))
        for side in scales
    ]
    budgets = [min(budget, (side // patch_size) ** 2) for budget, side in zip(budgets, scales)]
    note = "the paper's"
    if 2 * sum(budgets) > window:
        budgets = [max(1, budget * window // (2 * sum(budgets))) for budget in budgets]
        note = f"the paper's, reduced to half of the context window of {window}"
    return budgets, f"budgets: {budgets}, {note} (the layout does not record them)"


def looks_untrained(table: torch.Tensor) -> bool:
    """Whether a scale table [1, g * g, D] still is the noise it began as, independent with a deviation of 1/sqrt(D).

    A trained table is smooth: neighbouring cells are alike. The bounds are 10 % for the deviation and, for the
    correlation of neighbours, 0.05 plus four times the chance deviation of so many values.
    """
    _, cells, width = table.shape
    side = isqrt(cells)
    table = table.float().view(side, side, width)
    variance = table.var().item()
    num_pairs = side * (side - 1) * width
    if not num_pairs or abs((variance * width) ** 0.5 - 1) > 0.1:
        return False
    table = table - table.mean()
    below, beside = (table[:-1] * table[1:]).mean().item(), (table[:, :-1] * table[:, 1:]).mean().item()
    return max(abs(below), abs(beside)) / variance < 0.05 + 4 * num_pairs**-0.5
