"""What differs from family to family of hosts, and their settings, each with its reason. Most of what a family needs is read
from its configuration and its image processor, so that one that is not in the table may be tried, too."""

import json
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

PLACES = ("grid", "levels", "rectangle")
SETTINGS_FILE = "uhr_bat_host.json"  # beside an adapter of any family, or a host, that was trained with them
MOST_LEVELS = 12  # the last of which is 2,048 times as large as the first
# Settings that state in full what others say in short, or that fit these alone: where these are said later, they go.
INSTEAD = {
    "scales": {"anchor", "levels"},
    "importance_layer": {"look"},
    "refinement_layers": {"levels", "scales", "refinement"},
}
OLDEST = 5, 18  # the first release whose families take images that are encoded already, as far as these were tried


@dataclass(frozen=True)
class HostSettings:
    """Numbers of a host that no checkpoint states.

    Attributes:
        tile: side in pixels of what the tower sees at once; None: what its image processor is set to, or 16 rows.
        anchor: tiles a side of the coarsest level; one, as the model was trained to see a whole image.
        levels: each twice as large as the one before; four, as the paper's.
        budgets: visual tokens of a prompt, for which all levels compete, or one number per level.
        max_tiles: tiles that are encoded for a question, the anchor's included; None encodes all of all levels.
        look: share of the depth whose nearest full layer is looked at: early ones look near, the last at what is next written.
        refinement: rows of each finer level that are looked at once more; 0: the anchor's look is all there is.
        places: where M-RoPE has rows: "grid", all levels on the finest one's, coarse rows between its places; "levels", each an
            image of its own; "rectangle", in their order on a square of their own.
        marks: whether words say of each tile which it is, where a decoder knows the order of rows alone.
        relative_attention: whether a look is divided by that of an empty question, see `looks.relative_attention`.
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
    relative_attention: bool = False

    def changed(self, changes: dict) -> "HostSettings":
        """With other values. Raises `ValueError` for one that cannot be."""
        kinds = {"places": str, "look": (int, float), "budgets": (int, list, tuple)}
        for name, value in changes.items():
            is_flag = isinstance(getattr(self, name), bool)
            fits = isinstance(value, kinds.get(name, int)) and isinstance(value, bool) == is_flag
            if not fits and not (value is None and name in ("tile", "max_tiles")):
                raise ValueError(f"`{name}` is no {type(value).__name__}. Got {value!r}.")
        made = replace(self, **changes)
        for name in ("tile", "anchor", "levels", "max_tiles", "refinement"):
            least = int(name != "refinement")
            if getattr(made, name) is not None and getattr(made, name) < least:
                raise ValueError(f"`{name}` must be at least {least}. Got {getattr(made, name)}.")
        if made.levels > MOST_LEVELS:
            raise ValueError(f"`levels` must be at most {MOST_LEVELS}. Got {made.levels}.")
        if not 0 < made.look <= 1:
            raise ValueError(f"`look` is a share of the decoder's depth, above 0 and at most 1. Got {made.look}.")
        if made.places not in PLACES:
            raise ValueError(f"`places` is one of {', '.join(PLACES)}. Got {made.places!r}.")
        return made


class Prompts(NamedTuple):
    """What stands around the image tokens of a prompt; `{name}` is an attribute of the tokenizer. `marker`: what the chat
    template writes for an image, "" for the image token itself. `row_end`: after each row but the last of an image that is kept
    whole; pruned ones have none."""

    marker: str = ""
    before: str = ""
    after: str = ""
    row_end: str = ""


class Family(NamedTuple):
    """A family's prompts and settings, and how many of its tiles are encoded at once."""

    prompts: Prompts = Prompts()
    settings: HostSettings = HostSettings()
    chunk: int = 16


# By model type. None of the numbers was measured on trained weights.
FAMILIES = {
    "gemma4": Family(Prompts(before="{boi_token}", after="{eoi_token}")),
    "gemma3": Family(Prompts("{boi_token}", "\n\n{boi_token}", "{eoi_token}\n\n")),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "llava_onevision"), Family()),
    "internvl": Family(Prompts(before="<img>", after="</img>")),
    # A context window of 4,096: no more than the 576 rows of the one image that it was trained with.
    "llava": Family(settings=HostSettings(budgets=576)),
    # 64 rows a tile: half the tokens show as many tiles as those of others.
    "smolvlm": Family(
        Prompts("", "<fake_token_around_image><global-img>", "<fake_token_around_image>"), HostSettings(budgets=300)
    ),
    # Its tower lays all tiles of a call end to end, and its mask grows with the square of them.
    "mistral3": Family(Prompts(after="[IMG_END]", row_end="[IMG_BREAK]"), chunk=1),
}


def over(before: dict, after: dict) -> dict:
    """Settings with others over them, see `INSTEAD`."""
    return {name: value for name, value in before.items() if not INSTEAD.get(name, set()) & set(after)} | after


def write_settings(folder, settings: dict):
    """Beside an adapter or a model, those that it was trained with."""
    Path(folder, SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def family_of(model_type: str) -> Family:
    """The family, or what is taken for one that is not known. Raises `ValueError` for one that cannot be a host."""
    if model_type.startswith("llava_next"):
        why = "it counts patches by the configuration's pinpoints, not tile by tile. LLaVA 1.5 and LLaVA-OneVision can"
        raise ValueError(f"A model of the type {model_type!r} cannot be asked: {why}.")
    return FAMILIES.get(model_type, Family())


def _pair(value) -> int:
    """A side, of what processors and configurations write as a number, a pair or a dictionary."""
    return value if isinstance(value, int) else value["height"] if isinstance(value, dict) else value[0]


def tile_side(config, image_processor, wanted: int | None) -> tuple[int, dict]:
    """Side in pixels of a tile that the image processor leaves as it is, `wanted` or the family's own, and the options of its
    call that see to it. Raises `ValueError` for a side that the family's tower cannot have."""
    given, vision, cell, size = SimpleNamespace(**image_processor.to_dict()), config.vision_config, None, {}
    flags = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan")
    options = {name: False for name in flags if hasattr(image_processor, name)}
    if hasattr(given, "temporal_patch_size"):  # Qwen-VL and its like take any side
        cell = _pair(given.patch_size) * given.merge_size
    elif hasattr(config, "spatial_merge_size"):  # Mistral 3 takes any side, too
        cell = _pair(vision.patch_size) * config.spatial_merge_size
        options["patch_size"] = {"height": cell, "width": cell}
    if cell is not None:
        side = 16 * cell if wanted is None else wanted
        if side % cell:
            raise ValueError(f"`tile` is a multiple of {cell} px with this model. Got {side}.")
        pixels = {"shortest_edge": side**2, "longest_edge": side**2}  # its `size` counts them
        return side, options | {"size": pixels if hasattr(given, "temporal_patch_size") else {"longest_edge": side}}
    if hasattr(given, "max_soft_tokens"):  # Gemma 4: as many rows as its numbers of tokens have in a square
        cell = given.patch_size * given.pooling_kernel_size
        sides = {isqrt(number) * cell: number for number in (70, 140, 280, 560, 1120)}
        side = isqrt(given.max_soft_tokens) * cell if wanted is None else wanted
        if side not in sides:
            raise ValueError(f"`tile` is one of {', '.join(map(str, sides))} px with this model. Got {side}.")
        return side, options | {"max_soft_tokens": sides[side]}
    if getattr(given, "max_image_size", None):  # SmolVLM
        side = dict(given.max_image_size)["longest_edge"]
        size = {"longest_edge": side}
    elif getattr(given, "do_center_crop", None) and getattr(given, "crop_size", None):
        side = _pair(dict(given.crop_size))
    else:  # what the tower's whole patches cover: of LLaVA-OneVision's 384 px these are 378
        patch = _pair(vision.patch_size)
        side = (dict(given.size or {}).get("height") or _pair(vision.image_size)) // patch * patch
        size = {"height": side, "width": side}
    if wanted not in (None, side):
        raise ValueError(f"`tile` is {side} px with this model, whose tower has one size. Got {wanted}.")
    return side, options | ({"size": size} if size else {})


def rows_a_side(config, side: int) -> int:
    """Rows a side of a tile, as the configurations of the known families have it."""
    vision = config.vision_config
    if hasattr(config, "mm_tokens_per_image"):  # Gemma 3
        return isqrt(config.mm_tokens_per_image)
    cell = (
        _pair(vision.patch_size) * getattr(vision, "spatial_merge_size", 1) * getattr(vision, "pooling_kernel_size", 1)
    )
    # Of Mistral 3, SmolVLM and InternVL, which has a half.
    cell *= getattr(config, "spatial_merge_size", 1) * getattr(config, "scale_factor", 1)
    return round(side / cell * getattr(config, "downsample_ratio", 1))
