"""UHR-BAT dynamic pyramid: an image as the system of LRS-VQA has it (arXiv 2503.07588, "Dynamic Image Pyramid").

A thumbnail of one tile, and levels that keep the image's proportions: its own size, half of it, a quarter, down to the
level whose long side is `MINIMUM_TILES` tiles. Each is stretched until one side is whole tiles and padded below and on the
right; each tile's tokens are pooled 2 x 2 and every row of tokens ends with a newline. Tiles are read by window when asked
for, from an overview where the file has one.

    4000 x 4000 px, tiles of 336 px of 24 x 24 patches:
    thumbnail 336 px, 1 tile    level 1: 1008 px, 3 x 3 tiles, 36 x 36 tokens    level 2: 6 x 6    level 3: 12 x 12

Letters: T tiles, p patches a side of a tile. Sizes are (height, width).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image

from .image_reading_uhr_bat import ImageSource, kind_of
from .image_views_uhr_bat import PAD_COLOR, normalize_tiles, part_of_resized
from .pyramid_uhr_bat import HeldImage

# Long side of the first level in tiles: 1,008 px of 336.
MINIMUM_TILES = 3
# The tokens of a level are means of so many by so many; the thumbnail's are not pooled.
POOLING = 2


@dataclass(frozen=True)
class DynamicLevel:
    """A level of the pyramid.

    Attributes:
        size: of the image on this level in pixels, without padding.
        tiles: rows and columns of tiles.
        grid: rows and columns of pooled tokens that show the image; the padding's are cut off below and on the right.
    """

    size: tuple[int, int]
    tiles: tuple[int, int]
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole level, with a newline at the end of each row."""
        return self.grid[0] * (self.grid[1] + 1)


def thumbnail_size(image_size: tuple[int, int], tile_size: int) -> tuple[int, int]:
    """(height, width) whose long side is a tile."""
    return tuple(max(1, round(side * tile_size / max(image_size))) for side in image_size)


def level_ratios(side: int, tile_size: int) -> list[float]:
    """By how much each level is smaller than the image, whose long side is `side` pixels, the coarsest level first.

    An image that is no larger than a tile has none: its thumbnail shows all of it.
    """
    if side <= tile_size:
        return []
    least = min(1, MINIMUM_TILES * tile_size / side)
    ratios = [1.0]
    while ratios[-1] / 2 >= least:
        ratios.append(ratios[-1] / 2)
    return [least] * (least < ratios[-1]) + ratios[::-1]


def dynamic_levels(image_size: tuple[int, int], tile_size: int, patch_size: int) -> list[DynamicLevel]:
    """The levels of an image of (height, width) pixels from coarse to its own resolution, known from its size alone."""
    p, levels = tile_size // patch_size // POOLING, []
    for ratio in level_ratios(max(image_size), tile_size):
        small = [max(1, round(ratio * side)) for side in image_size]
        stretch = min(tile_size * ceil(side / tile_size) / side for side in small)
        size = tuple(round(stretch * side) for side in small)
        tiles = tuple(ceil(side / tile_size) for side in size)
        levels.append(DynamicLevel(size, tiles, _shown(size, [p * number for number in tiles])))
    return levels


def _shown(size, grid) -> tuple[int, int]:
    """Rows and columns of a grid of tokens that are left without its padding, by the rule of LLaVA's `unpad_image`."""
    (height, width), (rows, columns) = size, grid
    if width * rows > columns * height:
        return max(1, int(height * columns / width)), columns
    return rows, max(1, int(width * rows / height))


class DynamicPyramid:
    """An image whose tiles are read when they are asked for. Threads may share it.

    Args:
        image: RGB image, or any [`ImageSource`], as `UHRBatImageProcessor.process_image` returns it.
        tile_size, patch_size: in pixels.
        pad_color, resample, arithmetic: see [`ImagePyramid`].

    Attributes:
        levels: [`DynamicLevel`] of each level; what `tiles` calls level 0 is the thumbnail, the first of these is 1.
        image_size: of the image in pixels.
    """

    def __init__(
        self,
        image,
        *,
        tile_size: int,
        patch_size: int,
        pad_color: Sequence[int] = PAD_COLOR,
        resample: int = Image.Resampling.BICUBIC,
        arithmetic: tuple = (),
    ):
        image = image.image if kind_of(image) == "picture" else image
        self.image: ImageSource = HeldImage(image) if isinstance(image, Image.Image) else image
        self.image_size = self.image.height, self.image.width
        self.tile_size, self.patch_size = tile_size, patch_size
        self.levels = dynamic_levels(self.image_size, tile_size, patch_size)
        self._pad_color, self._resample, self._arithmetic = tuple(pad_color), resample, arithmetic

    @property
    def scales(self) -> list[int]:
        """Long side of the thumbnail and of every level in pixels."""
        return [self.tile_size, *(max(level.size) for level in self.levels)]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(height, width) in tokens of the thumbnail and of every level."""
        p = self.tile_size // self.patch_size
        return [(p, p), *(level.grid for level in self.levels)]

    def tiles(self, level_idx: int, tile_idx: Sequence[int]) -> np.ndarray:
        """float32[T, 3, tile, tile] of some tiles of a level, row by row numbered, as `pixel_values` are.

        Raises:
            OSError: the file of a raster turns out to be damaged.
        """
        level = self.levels[level_idx - 1] if level_idx else None
        size, width = (level.size, level.tiles[1]) if level else (thumbnail_size(self.image_size, self.tile_size), 1)
        image, side = self.image.for_scale(max(size)), self.tile_size
        found = np.empty((len(tile_idx), side, side, 3), np.uint8)
        found[:] = self._pad_color
        with image.parts() as read:
            for place in np.argsort(tile_idx, kind="stable"):  # from top to bottom
                row, column = divmod(int(tile_idx[place]), width)
                spans = [(side * at, min(side * (at + 1), end)) for at, end in zip((row, column), size)]
                part, _, _ = part_of_resized(
                    read, (image.height, image.width), size, *spans, self._pad_color, self._resample
                )
                found[place, : part.shape[0], : part.shape[1]] = part
        return normalize_tiles(found.transpose(0, 3, 1, 2), *self._arithmetic)

    def __repr__(self):
        sizes = ", ".join(f"{height} x {width}" for height, width in (level.size for level in self.levels))
        return f"DynamicPyramid({self.image_size[0]} x {self.image_size[1]}, levels of {sizes or 'nothing but the thumbnail'})"


def is_dynamic(pyramid) -> bool:
    """Whether it is a [`DynamicPyramid`]: by its looks, as a processor and a model that are loaded as remote code may have two
    classes of this name."""
    return hasattr(pyramid, "levels")


__all__ = ["DynamicLevel", "DynamicPyramid", "dynamic_levels", "is_dynamic", "level_ratios"]
