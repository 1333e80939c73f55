"""How the families write where an object is, and how they are asked for it: the words and units of their makers' own examples.

A box or a point is written as text, in a unit that the text does not state: the same four numbers are thousandths of the picture
to one model and pixels to the next.
"""

from typing import NamedTuple

from .settings import PLACES

PIXELS = None  # the unit of a family that counts pixels of the picture that it was shown


class Pointing(NamedTuple):
    """Attributes:
    unit: what the side of a picture counts; `PIXELS` where numbers are pixels.
    prompt: that asks for boxes of {things}.
    """

    unit: int | None
    prompt: str


_QWEN = 'Locate every instance that belongs to the following categories: "{things}". Report bbox coordinates in JSON format.'
_GEMMA = (
    "Detect all {things}. Return a JSON list, an entry for each: the 2D bounding box in `box_2d`, as [y0, x0, y1, x1] "
    "normalized to 0-1000, and its name in `label`."
)
# Without its tags: in a question they are text, not the tokens that it learnt.
_INTERNVL = "Please detect and label all {things} in the following image and mark their positions."

POINTING = {
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), Pointing(1000, _QWEN)),
    "qwen2_5_vl": Pointing(PIXELS, _QWEN),
    **dict.fromkeys(("gemma3", "gemma4"), Pointing(1000, _GEMMA)),
    "internvl": Pointing(1000, _INTERNVL),
    "paligemma": Pointing(1024, "detect {things}"),
    "molmo": Pointing(100, "Point to all {things}."),
}


def family_name(model) -> str:
    """The `model_type` of a host, or of one of our own models."""
    return model.family_name if hasattr(model, "host") else model.config.model_type


def picture_side(model, grids) -> int | None:
    """Pixels a side of the square picture that a model takes an image for, whose levels have `grids` in rows; None where it
    takes it for several, or for none: M-RoPE alone tells a model of pixels, and with `places` "grid" of one picture."""
    if not hasattr(model, "host") or not model.mrope or (model.settings.places != PLACES[0] and len(grids) > 1):
        return None
    largest = model.reader.largest_rows
    rows = max(min(max(grid), largest or max(grid)) for grid in grids)
    return rows * model.tile_size // model.patches_per_side
