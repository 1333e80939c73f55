"""What differs from family to family of vision-language models, and the settings that a host has, each with its reason.

A host is a model of the library's own classes behind UHR-BAT's doors. Most of what a family needs is read from its
configuration and its image processor, so that a family that is not in the table may be tried, too.
"""

from dataclasses import dataclass, fields, replace
from math import isqrt
from types import SimpleNamespace

PLACES = ("grid", "levels", "rectangle")
OLDEST = "5.18"  # the first release whose families take images that are encoded already, as far as these were tried


@dataclass(frozen=True)
class HostSettings:
    """Numbers of a host that no checkpoint states.

    Attributes:
        tile: side in pixels of what the tower sees at once; None: the side that its image processor is set to, or 16 rows.
        anchor: tiles a side of the coarsest level. One: what the model was trained to see as a whole image.
        levels: how many there are, each twice as large as the one before; four, as the paper's.
        budgets: visual tokens of a prompt, for which all levels compete, or one number per level.
        max_tiles: tiles that are encoded for a question, the anchor's included; None encodes all of all levels.
        look: share of the decoder's depth whose nearest layer of full attention is looked at. Early layers look at what is
            near, the last ones at what is written next.
        refinement: rows of each finer level that are looked at once more; 0: the anchor's look is all there is.
        places: where M-RoPE has the rows of an image. "grid": all levels on the finest one's, coarse rows between its
            places. "levels": each level an image of its own. "rectangle": in their order, on a square of their own.
        marks: whether words say of each tile which it is, in families whose decoder knows the order of rows alone.
    """

    tile: int | None = None
    anchor: int = 1
    levels: int = 4
    budgets: int | tuple[int, ...] = 600
    max_tiles: int | None = 32
    look: float = 0.6
    refinement: int = 256
    places: str = "grid"
    marks: bool = False

    def changed(self, changes: dict) -> "HostSettings":
        """With other values. Raises `ValueError` for one that cannot be."""
        for name, value in changes.items():
            if not self._is_kind(name, value):
                raise ValueError(f"`{name}` is no {type(value).__name__}. Got {value!r}.")
        made = replace(self, **changes)
        for name in ("tile", "anchor", "levels", "max_tiles"):
            value = getattr(made, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1. Got {value}.")
        if not 0 < made.look <= 1:
            raise ValueError(f"`look` is a share of the decoder's depth, above 0 and at most 1. Got {made.look}.")
        if made.refinement < 0:
            raise ValueError(f"`refinement` counts rows, 0 for none. Got {made.refinement}.")
        if made.places not in PLACES:
            raise ValueError(f"`places` is one of {', '.join(PLACES)}. Got {made.places!r}.")
        return made

    @staticmethod
    def _is_kind(name, value) -> bool:
        if name in ("places", "marks"):
            return isinstance(value, (str, bool)[name == "marks"])
        if name == "budgets" and isinstance(value, (list, tuple)):
            return all(type(one) is int for one in value)
        return (
            type(value) is int
            or name == "look"
            and type(value) is float
            or name in ("tile", "max_tiles")
            and value is None
        )


@dataclass(frozen=True)
class Prompts:
    """What stands around the image tokens of a prompt. `{name}` is an attribute of the tokenizer.

    Attributes:
        marker: what the chat template writes for an image; "": the image token itself.
        before, after: the run of image tokens.
        row_end: token after each row but the last of an image that is kept whole; pruned images have none.
    """

    marker: str = ""
    before: str = ""
    after: str = ""
    row_end: str = ""


@dataclass(frozen=True)
class Family:
    """A family's prompts and settings, and how many of its tiles are encoded at once."""

    prompts: Prompts = Prompts()
    settings: HostSettings = HostSettings()
    chunk: int = 16


# By model type. None of the numbers was measured on trained weights.
FAMILIES = {
    "gemma4": Family(Prompts(before="{boi_token}", after="{eoi_token}")),
    "gemma3": Family(Prompts("{boi_token}", "\n\n{boi_token}", "{eoi_token}\n\n")),
    "qwen2_5_vl": Family(),
    "qwen3_vl": Family(),
    "qwen3_vl_moe": Family(),
    "qwen3_5": Family(),
    "qwen3_5_moe": Family(),
    "internvl": Family(Prompts(before="{start_image_token}", after="{end_image_token}")),
    # A context window of 4,096: no more than the 576 rows of the one image that it was trained with.
    "llava": Family(settings=HostSettings(budgets=576)),
    "llava_onevision": Family(),
    # 64 rows a tile: half the tokens show as many tiles as those of others.
    "smolvlm": Family(
        Prompts(before="{fake_image_token}{global_image_token}", after="{fake_image_token}"),
        HostSettings(budgets=300, refinement=128),
    ),
    # Its tower lays all tiles of a call end to end, and its mask grows with the square of them.
    "mistral3": Family(Prompts(after="[IMG_END]", row_end="[IMG_BREAK]"), chunk=1),
}

# Model types that cannot be hosts, and why.
REFUSED = {
    "llava_next": "it counts patches by the configuration's pinpoints, so its tiles cannot be encoded one by one. LLaVA 1.5 "
    "and LLaVA-OneVision can",
    "llava_next_video": "it counts patches by the configuration's pinpoints, so its tiles cannot be encoded one by one",
    "internvl_chat": "its code is its repository's own and takes no encoded images. Load the repository whose name ends in "
    "-hf, as OpenGVLab/InternVL3-8B-hf",
    "llavaonevision1_5": "its code is its repository's own and takes no encoded images. Load a LLaVA-OneVision repository "
    "whose name ends in -hf, as llava-hf/llava-onevision-qwen2-7b-ov-hf",
}


def family_of(model_type: str) -> Family:
    """The family, or what is taken for one that is not known. Raises `ValueError` for one that cannot be a host."""
    if model_type in REFUSED:
        raise ValueError(f"A model of the type {model_type!r} cannot be asked through UHR-BAT: {REFUSED[model_type]}.")
    return FAMILIES.get(model_type, Family())


def split_changes(changes: dict, others) -> tuple[dict, dict]:
    """Those that are fields of [`HostSettings`], and the rest, which are among `others`. Raises `ValueError` for one that is
    neither."""
    own = {one.name for one in fields(HostSettings)}
    if unknown := sorted(set(changes) - own - set(others)):
        raise ValueError(
            f"A host has no setting {', '.join(unknown)}. It has {', '.join(sorted(own))}, and of UHR-BAT's configuration "
            f"{', '.join(sorted(others))}."
        )
    return {key: changes[key] for key in changes if key in own}, {k: changes[k] for k in changes if k not in own}


# ---- Tiles -------------------------------------------------------------------------------------------------------------


def _pair(value) -> int:
    """A side, of what processors and configurations write as a number, a pair or a dictionary."""
    if isinstance(value, (list, tuple)):
        return value[0]
    return value if isinstance(value, int) else value["height"]


def tile_side(config, image_processor, wanted: int | None) -> tuple[int, dict]:
    """Side in pixels of a tile that the image processor leaves as it is, and the options of its call that see to it.

    Args:
        wanted: a side instead of the family's own.

    Raises:
        ValueError: a side that the family's tower cannot have, with those that it can.
    """
    given, vision = SimpleNamespace(**image_processor.to_dict()), config.vision_config
    flags = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan")
    options = {name: False for name in flags if hasattr(image_processor, name)}
    size = dict(getattr(given, "size", None) or {})
    if hasattr(given, "max_soft_tokens"):  # Gemma 4: as many rows as its numbers of tokens have in a square
        cell = given.patch_size * given.pooling_kernel_size
        sides = {isqrt(number) * cell: number for number in (70, 140, 280, 560, 1120)}
        side = isqrt(given.max_soft_tokens) * cell if wanted is None else wanted
        if side not in sides and side != isqrt(given.max_soft_tokens) * cell:
            raise ValueError(f"`tile` is one of {', '.join(map(str, sides))} px with this model. Got {side}.")
        return side, options | {"max_soft_tokens": sides.get(side, given.max_soft_tokens)}
    cell = None
    if hasattr(given, "temporal_patch_size"):  # Qwen-VL and its like take any side; `size` counts pixels
        cell = _pair(given.patch_size) * given.merge_size
    elif hasattr(config, "spatial_merge_size"):  # Mistral 3 takes any side, too
        cell = _pair(vision.patch_size) * config.spatial_merge_size
    if cell is not None:
        side = 16 * cell if wanted is None else wanted
        if side % cell:
            raise ValueError(f"`tile` is a multiple of {cell} px with this model. Got {side}.")
        if hasattr(given, "temporal_patch_size"):
            return side, options | {"size": {"shortest_edge": side**2, "longest_edge": side**2}}
        return side, options | {"size": {"longest_edge": side}, "patch_size": {"height": cell, "width": cell}}
    if getattr(given, "max_image_size", None):  # SmolVLM
        side = dict(given.max_image_size)["longest_edge"]
        options["size"] = {"longest_edge": side}
    elif getattr(given, "do_center_crop", None) and getattr(given, "crop_size", None):
        side = _pair(dict(given.crop_size))
    else:
        # What the tower's whole patches cover: of LLaVA-OneVision's 384 px these are 378.
        patch = _pair(vision.patch_size)
        side = (size.get("height") or _pair(vision.image_size)) // patch * patch
        options["size"] = {"height": side, "width": side}
    if wanted not in (None, side):
        raise ValueError(f"`tile` is {side} px with this model, whose tower has one size. Got {wanted}.")
    return side, options


def rows_a_side(config, side: int) -> int | None:
    """Rows a side of a tile, as the configurations of the known families have it; None for another one."""
    if config.model_type not in FAMILIES:
        return None
    if hasattr(config, "mm_tokens_per_image"):  # Gemma 3
        return isqrt(config.mm_tokens_per_image)
    vision = config.vision_config
    cell = (
        _pair(vision.patch_size) * getattr(vision, "spatial_merge_size", 1) * getattr(vision, "pooling_kernel_size", 1)
    )
    cell *= getattr(config, "spatial_merge_size", 1) * getattr(config, "scale_factor", 1)  # Mistral 3; SmolVLM
    return round(side / cell * getattr(config, "downsample_ratio", 1))  # InternVL's is a half


def largest_side(image_processor) -> int | None:
    """Pixels a side of the largest square that a processor of any size makes; None where that is not stated."""
    if hasattr(image_processor, "temporal_patch_size"):
        return isqrt(dict(image_processor.size)["longest_edge"])
    return None
