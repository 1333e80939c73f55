# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT geometry: where the pixels of an image, the tiles of a view and the tokens of a scale lie.

An image of any shape stands centred in a square, the letterbox. Every scale is a view of that square, cut into tiles of
the size that the vision tower sees, and these into patches: one patch, one token. Each relation between pixels, tiles
and tokens has one formula, and it stands here.

A position is the row-major index of a token on the grid of its scale. Sizes and grids are (height, width), coordinates
(row, column) or normalised (y, x).

Letters: H and W height and width of a grid in tokens, h and w height and width of an image in pixels, V some tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

# CLIP's mean colour in 8 bits, the letterbox of the released code; what is no part of an image takes it too.
PAD_COLOR = (122, 116, 104)


def check_scales(scales: Sequence[int], tile_size: int, patch_size: int = 1):
    """Raises `ValueError` unless scales are ascending multiples of the tile, and the tile a multiple of the patch.

    Args:
        scales: sides of the square views in pixels, the anchor first.
        tile_size, patch_size: pixels a side.
    """
    if tile_size < 1 or patch_size < 1 or tile_size % patch_size:
        raise ValueError(f"The tile of {tile_size} px is not a positive multiple of the patch of {patch_size} px.")
    if not scales:
        raise ValueError("`scales` is empty: at least the anchor scale is needed.")
    for scale in scales:
        if scale < 1 or scale % tile_size:
            raise ValueError(f"Scale {scale} px is not a positive multiple of the tile of {tile_size} px.")
    if any(low >= high for low, high in zip(scales, scales[1:])):
        raise ValueError(f"`scales` must be ascending, the anchor first. Got {list(scales)}.")


def grids(scales: Sequence[int], patch_size: int) -> list[tuple[int, int]]:
    """(height, width) in tokens of every scale, U_s x V_s in the paper."""
    return [(scale // patch_size, scale // patch_size) for scale in scales]


def pyramid_scales(side: int, anchor: int, tile_size: int) -> list[int]:
    """Sides in pixels of the levels of an image from the anchor to its own resolution, each twice as large as the one
    before.

    The last level is the square that the image stands in, at its own resolution to within a tile; the last but one may
    be hardly smaller. An image that is no larger than the anchor has that alone.

        side 1000, anchor 64, tile 32  ->  64, 128, 256, 512, 1024
        side 1030, anchor 64, tile 32  ->  64, 128, 256, 512, 1024, 1056
    """
    scales = [anchor]
    while 2 * scales[-1] < side:
        scales.append(2 * scales[-1])
    if scales[-1] < side:
        scales.append(-(-side // tile_size) * tile_size)
    return scales


def scale_place(scale, known: Sequence[int]):
    """Where a scale lies among known ones, ascending: i at the i-th of them, in between by its logarithm, and at the
    nearest one outside. What is learnt per scale is interpolated there for levels that have none of their own.

    Args:
        scale: a side in pixels, or an array of them.

    Returns:
        float64 of the same shape, from 0 to len(known) - 1.
    """
    return np.interp(np.log(scale), np.log(known), np.arange(len(known)))


# Image and letterbox


def letterbox(image_size: tuple[int, int]) -> tuple[int, int, int]:
    """(side, top, left) of the square around a (height, width) image, in its pixels: centred, an odd pixel of margin
    goes below and right."""
    h, w = image_size
    side = max(h, w)
    return side, (side - h) // 2, (side - w) // 2


def _margins(image_size):
    """Side of the square, and for rows and columns (pixels before the image, pixels of the image)."""
    side, top, left = letterbox(image_size)
    return side, ((top, image_size[0]), (left, image_size[1]))


def shown_lines(image_size: tuple[int, int], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(bool[H], bool[W]): rows and columns of patches that show any part of an image; `shown_patches` without the
    grid, which is large at the image's own resolution."""
    side, margins = _margins(image_size)
    shown = []
    for (start, length), num_patches in zip(margins, grid):
        # Patch i covers [i * side / num_patches, (i + 1) * side / num_patches) of the square.
        edges = np.arange(num_patches + 1, dtype=np.int64) * side
        shown.append((edges[1:] > start * num_patches) & (edges[:-1] < (start + length) * num_patches))
    return tuple(shown)


def shown_patches(image_size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Which patches of a scale show the image, in exact integers, as an attention mask is read.

    Args:
        image_size: (height, width) in pixels.
        grid: (height, width) of the scale in tokens, over the letterboxed square.

    Returns:
        bool[H, W], True where a patch shows any part of a pixel, False where it shows the letterbox alone.
    """
    rows, columns = shown_lines(image_size, grid)
    return rows[:, None] & columns


# Pixels and tokens


def pixel_tokens(
    image_size: tuple[int, int], grid: tuple[int, int], picture_size: tuple[int, int] | None = None
) -> np.ndarray:
    """The token that shows each pixel of an image: the one whose patch holds the pixel's centre, in exact integers.

    Args:
        image_size: (height, width) in pixels of the image that the model saw.
        grid: (height, width) of the scale in tokens, over the letterboxed square.
        picture_size: (height, width) of a copy of the image in another size, whose pixels are asked instead.

    Returns:
        int64[h, w], a position for every pixel of the image or of its copy.
    """
    side, margins = _margins(image_size)
    tokens = []
    for (start, length), num_pixels, num_patches in zip(margins, picture_size or image_size, grid):
        # The centre of pixel i lies (2 i + 1) / (2 num_pixels) of `length` below `start`.
        centre = (2 * np.arange(num_pixels, dtype=np.int64) + 1) * length + 2 * num_pixels * start
        tokens.append(centre * num_patches // (2 * num_pixels * side))
    return tokens[0][:, None] * grid[1] + tokens[1]


def tokens_of_points(points, image_size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The tokens that show points of an image.

    Args:
        points: float[..., 2], (row, column) in pixels from the image's upper left corner: 0.5 is the first centre.
        image_size: (height, width) in pixels of the image that the model saw.
        grid: (height, width) of the scale in tokens, over the letterboxed square.

    Returns:
        int64[...], the position for every point: that of the token in whose `token_box` it lies.
    """
    side, top, left = letterbox(image_size)
    cells = ((np.asarray(points, float) + (top, left)) * np.array(grid) / side).astype(np.int64)
    return cells[..., 0] * grid[1] + cells[..., 1]


def token_box(positions, image_size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Where on the image tokens lie: the inverse of `pixel_tokens`, and what every map of tokens is drawn from.

    Edges are those of the patch, in pixels from the image's upper left corner, cut off at the border of the image; they
    fall inside a pixel where the side of the square is no multiple of the grid. Boxes of all tokens cover the image
    without a gap or an overlap. A pixel (row, column) is the token's in `pixel_tokens` where its centre
    (row + 0.5, column + 0.5) lies in the box. For a crop that holds every pixel of the patch, round down the upper and
    left and round up the lower and right edge.

    Args:
        positions: an integer, or integers of any shape (an array or a tensor on the CPU).
        image_size: (height, width) in pixels of the image that the model saw.
        grid: (height, width) of the scale in tokens, over the letterboxed square.

    Returns:
        float64[..., 4], (top, left, bottom, right) of every token, top <= row < bottom and left <= column < right. A
        token that shows the letterbox alone has an empty box on the border (`shown_patches` is False).

    Raises:
        ValueError: a position that is no whole number, or none of the grid's.
    """
    positions = np.asarray(positions)
    if positions.size and (
        positions.dtype.kind not in "iu" or not 0 <= positions.min() <= positions.max() < grid[0] * grid[1]
    ):
        raise ValueError(
            f"The tokens of a grid of {grid[0]} x {grid[1]} are whole numbers from 0 to {grid[0] * grid[1] - 1}. Got "
            f"{positions.min()} to {positions.max()}, {positions.dtype}."
        )
    positions = positions.astype(np.int64)
    side, margins = _margins(image_size)
    lows, highs = [], []
    for (start, length), num_patches, idx in zip(margins, grid, divmod(positions, grid[1])):
        # A quotient that is no multiple of 1/2 lies 1 / (2 num_patches) or more from one, which rounding never bridges:
        # comparisons with borders and centres of pixels are exact.
        lows.append(np.clip(idx * side / num_patches - start, 0, length))
        highs.append(np.clip((idx + 1) * side / num_patches - start, 0, length))
    return np.stack([*lows, *highs], axis=-1)


def box_corners(boxes, transform=None) -> np.ndarray:
    """Where on the ground boxes of an image lie: their corners in the coordinates of a georeferenced image.

    Args:
        boxes: float[..., 4], (top, left, bottom, right) in pixels from the image's upper left corner, as `token_box` has them.
        transform: (a, b, c, d, e, f), x = a column + b row + c and y = d column + e row + f, as rasterio's `transform`
            and `affine.Affine` have them: from pixels of the image, (0, 0) being its upper left corner, to coordinates.
            Rotated and mirrored ones too. None: coordinates are pixels.

    Returns:
        float64[..., 4, 2], (x, y) of the upper left, upper right, lower right and lower left corner as the image shows
        them; (column, row) without a transform.
    """
    top, left, bottom, right = np.moveaxis(np.asarray(boxes, float), -1, 0)
    columns, rows = np.stack((left, right, right, left), axis=-1), np.stack((top, top, bottom, bottom), axis=-1)
    a, b, c, d, e, f = (1, 0, 0, 0, 1, 0) if transform is None else tuple(transform)[:6]
    return np.stack((a * columns + b * rows + c, d * columns + e * rows + f), axis=-1)


def token_corners(positions, image_size: tuple[int, int], grid: tuple[int, int], transform=None) -> np.ndarray:
    """The corners of the boxes of tokens (`box_corners`), float64[..., 4, 2]. Tokens that touch share their corners to the last
    bit.

    Args:
        positions, image_size, grid: as in `token_box`.
        transform: as in `box_corners`.
    """
    return box_corners(token_box(positions, image_size, grid), transform)


# Tiles and tokens: the same for arrays and for tensors on any device


def tile_of(positions, width: int, patches_per_side: int) -> tuple:
    """The tile and the place inside it of tokens.

    Args:
        positions: long[V], on a grid that is `width` tokens wide.
        width: of the grid in tokens.
        patches_per_side: patches a side of a tile.

    Returns:
        (tile_idx, patch_idx), long[V] each: row-major index of the tile in the view, and of the patch in its tile.
    """
    p = patches_per_side
    rows, columns = positions // width, positions % width
    return rows // p * (width // p) + columns // p, rows % p * p + columns % p


def positions_of(tile_idx: torch.Tensor, width: int, patches_per_side: int) -> torch.Tensor:
    """The tokens of tiles: the inverse of `tile_of`.

    Args:
        tile_idx: long[T], row-major on a grid that is `width` tokens wide.

    Returns:
        long[T, P], row by row within each tile.
    """
    p = patches_per_side
    patch_idx = torch.arange(p * p, device=tile_idx.device)
    rows, columns = tile_idx // (width // p) * p, tile_idx % (width // p) * p
    return (rows[:, None] + patch_idx // p) * width + columns[:, None] + patch_idx % p


def patch_centres(
    positions: torch.Tensor, grid: tuple[int, int], extent: tuple[int, int] | None = None
) -> torch.Tensor:
    """Centres of patches as normalised coordinates, what regions are clustered by beside features (eq. 13).

    Args:
        positions: long[V], on the grid.
        grid: (height, width) of the scale in tokens.
        extent: (height, width) in tokens of what goes from 0 to 1: the whole scale by default (eq. 13), or one tile, in
            each of which coordinates then begin anew (the released code).

    Returns:
        float32[V, 2], (y, x) in [0, 1], on the device of `positions`.
    """
    height, width = extent or grid
    rows, columns = positions // grid[1] % height, positions % grid[1] % width
    return torch.stack(((rows.float() + 0.5) / height, (columns.float() + 0.5) / width), dim=-1)
