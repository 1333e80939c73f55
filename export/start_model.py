"""Models to start from: a vision-language model of the LLaVA family becomes a UHR-BAT whose new parts are not trained.

The layouts are transformers' own (LLaVA, LLaVA-NeXT, LLaVA-OneVision), the released one of LongVA without the parts of
UHR-BAT, and that of LRS-VQA, with its region focus module. Only facts of these layouts stand here; the weights go through `convert_checkpoint.py`, like any others.

What is new begins as nothing: the scale embedding as zeros, and so do biases that a projector lacks. The decoder then
reads the tokens of a tile as those that the start model made of it.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig
from uhr_bat.configuration_uhr_bat import DECODERS, VISION_TOWERS, UHRBatConfig
from uhr_bat.image_raster_files_uhr_bat import reason

from . import released_layout
from .checkpoint_files import Checkpoint, CheckpointError, TensorInfo, read_json
from .model_folder import meta_model

MODEL_TYPES = ("llava", "llava_next", "llava_onevision")
# A side of each scale in tiles: those of the paper's 672, 1344, 2688 and 4032 px in tiles of 336.
TILES_A_SIDE = (2, 4, 8, 12)

# Beginning of a name -> beginning of the name here, in files of any release of transformers: the first that fits.
RENAMES = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower.vision_model."),
    (r"(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"(language_model\.)?lm_head\.", "lm_head."),
    (r"language_model\.model\.|model\.language_model\.(model\.)?", "model.language_model."),
)
# The mark at the end of a row of tiles, which has no place among compressed tokens; SigLIP's pooling, which no token
# comes through; and buffers that are computed.
DROPPED = re.compile(r"(model\.)?image_newline$|.*vision_tower\.(vision_model\.)?head\.|.*\.(position_ids|inv_freq)$")
# Of a CLIP model of its own, beside a checkpoint without a tower.
TOWER_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")


class Contents(NamedTuple):
    """A checkpoint as the exporter reads it: configuration, notes, tensors, the new name of each (see `make_plan`), and
    whether its layout is that of the released checkpoints, LongVA's."""

    config: UHRBatConfig
    notes: list[str]
    tensors: "TensorsOf"
    rename: Callable
    is_released: bool


class TensorsOf:
    """The tensors of several sources, read like those of a [`Checkpoint`]."""

    def __init__(self, *sources):
        self.tensors = {name: info for source in sources for name, info in source.tensors.items()}
        self._source_of = {name: source for source in sources for name in source.tensors}

    def read(self, name: str) -> torch.Tensor:
        return self._source_of[name].read(name)


class GrownTables:
    """Tensors of the released layout whose embedding table and head get rows up to a number: the mean of the others.

    Llama's table has no row to spare for "<image>". Nothing reads the new rows, and as means they are no answer.
    """

    GROWN = "model.embed_tokens.weight", "lm_head.weight"

    def __init__(self, source, num_rows: int):
        self._source, self.tensors = source, dict(source.tensors)
        for name in self.GROWN:
            if info := source.tensors.get(name):
                self.tensors[name] = replace(info, shape=(num_rows, *info.shape[1:]))

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        if name not in self.GROWN:
            return tensor
        mean = tensor.float().mean(0).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(self.tensors[name].shape[0] - len(tensor), -1)))


class Zeros:
    """New parameters, as if a file held them."""

    def __init__(self, shapes: dict[str, tuple], dtype: torch.dtype):
        self.tensors = {name: TensorInfo(Path("new"), tuple(shape), dtype) for name, shape in shapes.items()}

    def read(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        return torch.zeros(info.shape, dtype=info.dtype)


def read_start(
    folder: Path, checkpoint: Checkpoint, scales=None, budgets=None, vision_tower=None, vision_heads=None
) -> Contents:
    """A start model, whatever its layout.

    Args:
        folder, checkpoint: the start model's.
        scales, budgets: of the configuration; None for `TILES_A_SIDE` and the paper's.
        vision_tower: folder of a CLIP model, where a checkpoint of LongVA's layout holds no tower.
        vision_heads: attention heads of the tower, where only its tensors say what it is.

    Raises:
        CheckpointError: another layout, or a part that the model does not take.
    """
    settings = read_json(folder / "config.json")
    present, rename, vision_config, layer = checkpoint, rename_family, None, None
    is_released = released_layout.is_released_config(settings)
    if is_released:
        rename = released_layout.rename
        if vision_tower is not None:
            vision_config, beside = _tower_beside(vision_tower)
            present, vision_heads = TensorsOf(checkpoint, beside), vision_config.num_attention_heads
            layer = settings.get("mm_vision_select_layer") or -2  # of a whole tower
        released, notes = released_layout.make_config(settings, present.tensors, vision_heads)
        fields = {
            "vision_feature_layer": layer or released.vision_feature_layer,
            "image_token_index": released.image_token_index,
            "tie_word_embeddings": released.tie_word_embeddings,
            "text_config": released.text_config,
            "region_focus": released.region_focus,
        }
        if (
            released.region_focus is None
        ):  # LongVA's mark at the end of a row of tiles has no place among compressed tokens
            rename = drop_newline
    else:
        if vision_tower is not None:
            raise CheckpointError("--vision-tower is for the layout of LongVA: here the checkpoint holds its tower.")
        vision_config, fields, notes = _read_family(folder, settings)
    config = _make_config(vision_config or released.vision_config, fields, scales, budgets, notes)
    new = _new_parts(config, set(map(rename_known(rename), present.tensors)), _dtype_of(checkpoint))
    notes.append(f"new, zero at the start: {', '.join(new.tensors)}")
    return Contents(
        config, notes, TensorsOf(present, new), lambda name: name if name in new.tensors else rename(name), is_released
    )


def drop_newline(name: str) -> str | None:
    """The released layout's name here, without the newline."""
    return None if DROPPED.match(name) else released_layout.rename(name)


def rename_known(rename) -> Callable:
    """The same, but None for a name that is unknown: the plan names all of those at once."""

    def renamed(name):
        try:
            return rename(name)
        except KeyError:
            return None

    return renamed


def rename_family(name: str) -> str | None:
    """The name here of a tensor of transformers' layouts; None for what is dropped. Raises `KeyError`."""
    if DROPPED.match(name):
        return None
    for pattern, here in RENAMES:
        if match := re.match(pattern, name):
            return here + name[match.end() :]
    raise KeyError(name)


def _read_family(folder, settings):
    """(vision configuration, fields of ours, notes) of one of `MODEL_TYPES`."""
    if settings.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"{folder / 'config.json'}: model type {settings.get('model_type')!r} is no start. Known: "
            f"{', '.join(MODEL_TYPES)}, and the flat layout of LongVA."
        )
    start = _auto_config(folder)
    vision, text = start.vision_config, start.text_config
    notes = []
    if text.model_type == "mistral":
        fields, notes = released_layout.full_attention(text.to_dict())
        text = AutoConfig.for_model(**fields)
    for part, known in ((vision, tuple(VISION_TOWERS)), (text, DECODERS)):
        if part.model_type not in known:
            raise CheckpointError(
                f"{folder / 'config.json'}: a part is of the model type {part.model_type!r}; known are "
                f"{', '.join(known)}. SigLIP 2 of a fixed resolution is `siglip_vision_model`."
            )
    if not isinstance(start.vision_feature_layer, int):
        raise CheckpointError(f"`vision_feature_layer` is {start.vision_feature_layer}: only one layer can be read.")
    drops_first = start.vision_feature_select_strategy == "default"
    if VISION_TOWERS[vision.model_type].num_class_tokens and not drops_first:
        notes.append('its class token ("full") is not read: it shows no patch')
    if not VISION_TOWERS[vision.model_type].num_class_tokens and drops_first:
        notes.append('its first patch is read too, which "default" drops although it is no class token')
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False  # older releases read this field too, but do not name it
    fields = {
        "vision_feature_layer": start.vision_feature_layer,
        "image_token_index": start.image_token_id,
        "tie_word_embeddings": bool(start.tie_word_embeddings or text.tie_word_embeddings),
        "projector_hidden_act": start.projector_hidden_act,
        "text_config": text,
    }
    return vision, fields, notes


def _auto_config(folder):
    """The library's configuration of a folder."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a field of a wrong type fails wherever it is used first
        raise CheckpointError(f"{folder / 'config.json'}: {reason(error)}") from error


def _tower_beside(folder):
    """(vision configuration, its tensors by the released names) of a CLIP model in a folder of its own."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"--vision-tower {folder}: there is no such folder.")
    vision = _auto_config(folder)
    vision = getattr(vision, "vision_config", vision)
    if vision.model_type not in VISION_TOWERS:
        raise CheckpointError(
            f"{folder}: the tower is of the model type {vision.model_type!r}. Known are {', '.join(VISION_TOWERS)}."
        )
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False
    return vision, _Renamed(Checkpoint(folder))


class _Renamed:
    """The tower's tensors of a CLIP model, under the names that the released layout gives them."""

    def __init__(self, checkpoint):
        self._checkpoint, self._old, self.tensors = checkpoint, {}, {}
        for name, info in checkpoint.tensors.items():
            part = name.removeprefix("vision_model.")
            if part.startswith(TOWER_PARTS) and not part.endswith(released_layout.DROPPED_SUFFIXES):
                self._old[released_layout.VISION_TOWER + part] = name
                self.tensors[released_layout.VISION_TOWER + part] = info

    def read(self, name):
        return self._checkpoint.read(self._old[name])


def _make_config(vision, fields, scales, budgets, notes) -> UHRBatConfig:
    """New settings of the paper; `selector="distinct"` keeps tokens in the order in which the start model reads them."""
    image, patch = vision.image_size, vision.patch_size
    # SigLIP's so400m has 384 px and patches of 14: its convolution never reads the last 6 px.
    tile = vision.image_size = image // patch * patch
    if not tile:
        raise CheckpointError(f"The tower's image of {image} px is smaller than its patch of {patch} px.")
    if tile != image:
        notes.append(f"tile: {tile} px, the {tile // patch} x {tile // patch} whole patches of the tower's {image} px")
    scales = scales or [tile * number for number in TILES_A_SIDE]
    if budgets is None:
        window = fields["text_config"].max_position_embeddings
        budgets, note = released_layout.paper_budgets(scales, patch, window)
        notes.append(note)
    try:
        return UHRBatConfig(
            vision_config=vision,
            scales=scales,
            budgets=budgets,
            selector="distinct",
            scale_embedding_grid=tile // patch,
            **fields,
        )
    except ValueError as error:
        raise CheckpointError(f"The start model does not fit: {error}") from error


def _new_parts(config, present, dtype) -> Zeros:
    """What the model has and the start model has not: only the scale embedding and biases of the projector."""
    new = (
        "model.scale_embedding.",
        "model.multi_modal_projector.linear_1.bias",
        "model.multi_modal_projector.linear_2.bias",
    )
    expected = meta_model(config).state_dict()
    return Zeros(
        {name: tensor.shape for name, tensor in expected.items() if name.startswith(new) and name not in present}, dtype
    )


def _dtype_of(checkpoint):
    """The type of the start model's own projector."""
    for name, info in checkpoint.tensors.items():
        if "projector" in name:
            return info.dtype
    raise CheckpointError("The start model has no projector: of its tensors none has a name with `projector`.")
