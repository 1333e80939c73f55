"""Drawing on an image, one scale at a time: `draw_attention`, `draw_regions`, `draw_kept` return an image of its size.

What they draw on may be a smaller or larger copy of the image that the model saw: they take the size of that as
`image_size`, (height, width).

The model sees the image in a letterboxed square. The letterbox is never drawn: every pixel of the image is asked which
token shows it. Colours are told apart by colour-blind readers (a map that grows brighter, Okabe and Ito's palette).

Letters: H and W height and width of a grid of tokens, N = H * W. Sizes are (height, width).
"""

import numpy as np
from PIL import Image

from ..common.resizing import resize_image
from ..geometry_uhr_bat import pixel_tokens, tokens_of_points

# Okabe and Ito, without black and without the yellow that is lost on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7F4FC9", "#8C6D31")
ATTENTION_COLOURS = "inferno"

# What is left of the image where a token was merged and where it was dropped, and the tint of what was merged.
MERGED_BRIGHTNESS, DROPPED_BRIGHTNESS = 0.55, 0.08
# Violet: neither land nor sea.
MERGED_TINT = (150, 60, 215)
# A line between regions takes a pixel: narrower tokens would vanish behind their lines.
TOKEN_OF_LINES = 8


def screen_image(image, longest: int, box=None) -> Image.Image:
    """RGB of an image of any kind that `read_image` gives, or of a box (top, left, bottom, right) of it in pixels, with
    the longer side at most `longest` pixels."""
    top, left, bottom, right = box or (0, 0, image.height, image.width)
    factor = min(1, longest / max(bottom - top, right - left))
    height, width = (max(1, round(length * factor)) for length in (bottom - top, right - left))
    return resize_image(image, (height, width), box, Image.Resampling.LANCZOS, reducing_gap=2)


def _tokens_of_pixels(picture, grid, image_size, box=None):
    """int64[height, width], the token that shows each pixel of a picture of an image of `image_size`, or of a box of it."""
    picture_size = picture.height, picture.width
    if box is None:
        return pixel_tokens(image_size or picture_size, grid, picture_size)
    rows, columns = (
        low + (np.arange(number) + 0.5) * (high - low) / number
        for low, high, number in zip(box[:2], box[2:], picture_size)
    )
    return tokens_of_points(np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1), image_size, grid)


def count_slots(slots) -> np.ndarray:
    """How many tokens share the slot of each token, int64[N]; 0 where it was dropped."""
    slots = np.asarray(slots)
    sizes = np.bincount(slots[slots >= 0], minlength=1)
    return np.where(slots >= 0, sizes[slots], 0)


def draw_attention(
    image: Image.Image, importance, low: float, high: float, colours=ATTENTION_COLOURS, image_size=None
) -> Image.Image:
    """The importance float[H, W] over a grey image, from the first colour at `low` to the last at `high`."""
    from matplotlib import colormaps

    importance = np.asarray(importance, np.float64)
    strength = (importance - low) / max(high - low, 1e-12)
    strength = strength.ravel()[_tokens_of_pixels(image, importance.shape, image_size)]
    heat = colormaps[colours](strength.clip(0, 1))[..., :3] * 255
    grey = np.asarray(image.convert("L"), np.float64)[..., None]
    return Image.fromarray((0.35 * grey + 0.65 * heat).astype(np.uint8))


def draw_regions(image: Image.Image, regions, grid: tuple[int, int], image_size=None) -> Image.Image:
    """Regions long[N] as tints, with lines between them where tokens are large; tokens that are a region of their own
    stay grey, and what was not encoded is dark."""
    regions = np.asarray(regions)
    sizes = np.bincount(regions[regions >= 0], minlength=1)
    tints = np.array([parse_colour(colour) for colour in PALETTE])[np.arange(len(sizes)) % len(PALETTE)]
    labels = regions[_tokens_of_pixels(image, grid, image_size)]
    own, unseen = (sizes == 1)[labels.clip(0)], labels < 0

    grey = np.asarray(image.convert("L"), np.float64)[..., None]
    drawn = np.where(own[..., None], grey, 0.5 * grey + 0.5 * tints[labels])
    drawn = np.where(unseen[..., None], DROPPED_BRIGHTNESS * grey, drawn)
    line = np.zeros(labels.shape, bool)
    line[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    line[1:] |= labels[1:] != labels[:-1]
    # No net of lines where every token is a region, or too small for one.
    line &= ~own & (max(image.size) / max(grid) >= TOKEN_OF_LINES)
    return Image.fromarray(np.where(line[..., None], 255, drawn).astype(np.uint8))


def draw_kept(image: Image.Image, slots, grid: tuple[int, int], image_size=None, box=None) -> Image.Image:
    """What is left of the image after the selection, from slots long[N].

    Tokens with a slot of their own show the image as it is, merged ones a dim violet one, dropped ones are dark. `box` (top,
    left, bottom, right) in pixels: the part of the image that is drawn on; None for all of it.
    """
    sharing = count_slots(slots)[_tokens_of_pixels(image, grid, image_size, box)][..., None]
    pixels = np.asarray(image.convert("RGB"), np.float64)
    grey = np.asarray(image.convert("L"), np.float64)[..., None]
    merged = MERGED_BRIGHTNESS * (0.5 * grey + 0.5 * np.array(MERGED_TINT))
    drawn = np.select([sharing == 1, sharing > 1], [pixels, merged], DROPPED_BRIGHTNESS * pixels)
    return Image.fromarray(drawn.astype(np.uint8))


def parse_colour(colour):
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
