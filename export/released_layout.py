"""The layout of the released checkpoints (LLaVA/LongVA style): its tensor names and its config, and what they become.

Only facts of that layout stand here; nothing reads or writes a file.
"""

from math import isqrt

import torch
from uhr_bat.configuration_uhr_bat import PAPER_BUDGETS, PAPER_SCALES, UHRBatConfig

from .checkpoint_files import CheckpointError


VISION_TOWER = "model.vision_tower.vision_tower.vision_model."

# Beginning of a released name -> beginning of the name here, the rest stays. The copy of the token MLP outside `model.`
# is a second name of the same tensors.
RENAMES = {
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
    VISION_TOWER: "model.vision_tower.vision_model.",
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
SEPARATORS, MAX_TILES = {"qwen2": 25, "llama": 29901}, {"qwen2": 80, "llama": 40}

# Parts that the released code makes and never uses, and buffers that are computed.
DROPPED_PREFIXES = ("text_to_vision_proj.", "tile_pos_residuals.")
DROPPED_SUFFIXES = (".position_ids", ".inv_freq")

# Fields of the decoder that are taken as they are; without the first five there is no model.
TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_FIELDS = (
    "num_key_value_heads",
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
    for prefix, here in RENAMES.items():
        if name.startswith(prefix):
            return here + name.removeprefix(prefix)
    raise KeyError(name)


def is_released_config(released: dict) -> bool:
    """Whether a config.json is of this layout: a flat Qwen2 config, where this project's holds one per tower."""
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
    family = "llama" if "llama" in released.get("model_type", "") else "qwen2"
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

    vision_config, heads_note = _vision_config(tensors, vision_heads)
    tied = released.get("tie_word_embeddings", False)
    text_config = {name: released[name] for name in TEXT_SIZES + TEXT_FIELDS if name in released}
    # The released code switches rope scaling off, whatever its config says.
    rope_theta = released.get("rope_parameters", released).get("rope_theta", 10000.0)
    text_config |= {
        "model_type": family,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": tied,
    }
    window = released.get("max_position_embeddings", 32768)
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
        vision_feature_layer=released.get("mm_vision_select_layer", -2),
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
    return config, [heads_note, budgets_note]


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


def _vision_config(tensors, heads):
    """CLIP's sizes from its tensors; the number of heads is in none of them."""

    def shape(name, num_axes):
        if VISION_TOWER + name not in tensors:
            raise CheckpointError(f"Tensor {VISION_TOWER + name!r} is missing: it tells the size of the vision tower.")
        info = tensors[VISION_TOWER + name]
        if len(info.shape) != num_axes or 0 in info.shape:
            raise CheckpointError(f"{info.path}: tensor {VISION_TOWER + name!r} has the shape {list(info.shape)}.")
        return info.shape

    width, _, _, patch_size = shape("embeddings.patch_embedding.weight", 4)
    positions = shape("embeddings.position_embedding.weight", 2)[0]
    intermediate_size = shape("encoder.layers.0.mlp.fc1.weight", 2)[0]
    start = VISION_TOWER + "encoder.layers."
    layers = {name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)}
    note = f"{heads} attention heads, as asked for"
    if heads is None:
        head = 64 if width >= 768 else 16
        heads = max(1, width // head)
        note = f"{heads} attention heads of width {head}, the rule for {'CLIP' if head == 64 else 'small towers'}"
        note += " (the layout does not record it; --vision-heads sets another number)"
    if heads < 1 or width % heads:
        raise CheckpointError(f"The vision tower is {width} wide, which {heads} attention heads do not divide.")
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "image_size": isqrt(positions - 1) * patch_size,
        "patch_size": patch_size,
    }
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
