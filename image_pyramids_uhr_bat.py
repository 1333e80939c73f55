# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT image pyramids: levels of an image whose tiles are read when they are asked for, and which tiles these are.

Which tiles (decisions alone, which know no model and no image). The anchor is encoded whole. What the question looks at
there says which tiles of the next level are read and encoded, what it looks at in these says which of the level after,
and so on down to the image's own resolution:

    level 0, whole      level 1: two tiles      level 2: five of those that lie on these
    +---+---+           +-+-+-+-+               . . . . . . . .
    | * |   |           |#| | | |               . # . . . . . .
    +---+---+    ->     +-+-+-+-+        ->     . # # . . . . .
    |   | * |           | | |#| |               . . . . # . . .
    +---+---+           +-+-+-+-+               . . . . # . . .

How many tiles each level gets follows from their numbers alone (`split_tiles`), so the number of visual tokens is known
before the model runs (`least_tokens`).

[`ImagePyramid`]: a level is a view of the letterboxed square, as the scales are, but nothing of it exists before somebody
asks for some of its tiles. These are then read from the file by window, from the coarsest overview that is no smaller, or
cut from an image in memory. Tiles of a level are numbered row by row; tokens have positions on the level's grid.

[`DynamicPyramid`]: an image as the system of LRS-VQA has it (arXiv 2503.07588, "Dynamic Image Pyramid"). A thumbnail of
one tile, and levels that keep the image's proportions: its own size, half of it, a quarter, down to the level whose long
side is `MINIMUM_TILES` tiles. Each is stretched until one side is whole tiles and padded below and on the right. Each
tile's tokens are pooled 2 x 2 and every row of tokens ends with a newline.

    4000 x 4000 px, tiles of 336 px of 24 x 24 patches:
    thumbnail 336 px, 1 tile    level 1: 1008 px, 3 x 3 tiles, 36 x 36 tokens    level 2: 6 x 6    level 3: 12 x 12

Letters: L levels, T tiles of a level, V tokens, p patches a side of a tile. Sizes are (height, width).
"""

import threading
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import torch
from PIL import Image

from .budgets_uhr_bat import share_in_order
from .geometry_uhr_bat import PAD_COLOR, grids, letterbox, pyramid_scales, shown_lines
from .image_pictures_uhr_bat import PlainImage
from .image_reading_uhr_bat import kind_of
from .image_sources_uhr_bat import ImageSource
from .image_views_uhr_bat import cut_tiles, mark_shown, normalize_tiles, part_of_view, valid_patches


def split_tiles(num_tiles: Sequence[int], max_tiles: int) -> list[int]:
    """int[L], tiles of every level that go through the vision tower: all of the anchor, and of what is left an equal share
    for every finer level; what a level cannot use goes to the finer ones.

    Args:
        num_tiles: int[L], tiles of every level that show the image.
        max_tiles: of all levels together, the anchor's included.

    Raises:
        ValueError: the anchor alone has more tiles.
    """
    if max_tiles < num_tiles[0]:
        raise ValueError(
            f"`max_tiles` is {max_tiles}, but the {num_tiles[0]} tiles of the anchor are always encoded, and count."
        )
    anchor, *finer = num_tiles
    return [anchor, *share_in_order(max_tiles - anchor, [1] * len(finer), finer, rounding=floor)]


def least_tokens(num_shown: np.ndarray, num_tiles: int, counts: np.ndarray | None = None) -> int:
    """Tokens that some tiles of a level have at least, whichever are chosen of those that show the image.

    Args:
        num_shown: long[T], tokens of every tile that show the image.
        num_tiles: how many tiles are chosen.
        counts: long[T], how many tiles each of these stands for; by default one.
    """
    counts = np.ones_like(num_shown) if counts is None else counts
    order = np.argsort(num_shown)[np.count_nonzero(num_shown <= 0) :]
    fewest, counts = num_shown[order], counts[order]
    taken = (num_tiles - (counts.cumsum() - counts)).clip(0, counts)
    return int((fewest * taken).sum())


def overlapping_tiles(tile_idx: torch.Tensor, width: int, finer_width: int) -> torch.Tensor:
    """long[T'], ascending: the tiles of a finer level that lie on some tiles of this one, at least with a part.

    Args:
        tile_idx: long[T], of a level that is `width` tiles wide.
        finer_width: width of the finer level in tiles.
    """
    reach = -(-finer_width // width) + 1  # a tile overlaps no more of them in a row
    steps = torch.arange(reach, device=tile_idx.device)
    found = []
    for idx in (tile_idx // width, tile_idx % width):
        first, last = idx * finer_width // width, ((idx + 1) * finer_width - 1) // width
        found.append((first[:, None] + steps).minimum(last[:, None]))
    rows, columns = found
    return (rows[:, :, None] * finer_width + columns[:, None]).flatten().unique()


def best_tiles(
    scores: torch.Tensor, tile_idx: torch.Tensor, num_tiles: int, num_shown: np.ndarray | None
) -> torch.Tensor:
    """long[num_tiles], ascending: the tiles of greatest score, of equals the first.

    Where there are fewer candidates, further tiles of the level that show the image are taken, the first of them: the
    number of tiles, and with it that of the visual tokens, is a promise.

    Args:
        scores: float[T] of the candidates.
        tile_idx: long[T], ascending, which they are; all show the image.
        num_tiles: how many to choose, no more than the level has.
        num_shown: long[tiles of the level], tokens of every tile that show the image; looked at only where there are fewer
            candidates.
    """
    chosen = tile_idx[scores.argsort(descending=True, stable=True)[:num_tiles]]
    if len(chosen) < num_tiles:
        others = torch.from_numpy(np.setdiff1d(np.flatnonzero(num_shown), chosen.cpu().numpy()))
        chosen = torch.cat((chosen, others[: num_tiles - len(chosen)].to(chosen)))
    return chosen.sort().values


# ---- Levels of the letterboxed square ------------------------------------------------------------


# Side in pixels up to which a level's masks are known without its tiles being read, where the file has a mask: the
# overview of this side is read for them, once.
MASK_SIDE = 4096


class UnreadImage(ImageSource):
    """An image of which the size alone is known."""

    def __init__(self, height: int, width: int):
        self.height, self.width, self.filename = height, width, "image"


class _Pyramid:
    """An image whose tiles are read when they are asked for. Several threads may ask it at once. A file must stay as it is.

    Args:
        image: 8-bit RGB in memory, or a raster or other source (`read_image`, `open_image`).
        tile_size, patch_size: pixels a side.
        pad_color, resample: of the letterbox and the views, as in `image_to_tiles`.
        arithmetic: (rescale_factor, mean, std) of `normalize_tiles`.

    Attributes:
        image, tile_size, patch_size: as above.
        image_size: (height, width) of the image in pixels.
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
        self.image: ImageSource = PlainImage(image) if isinstance(image, Image.Image) else image
        self.image_size = self.image.height, self.image.width
        self.tile_size, self.patch_size = tile_size, patch_size
        self._pad_color, self._resample, self._arithmetic = tuple(pad_color), resample, arithmetic

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    def _reduced(self, scale):
        """What a level is made from where the image is a JPEG and the level needs less than all of it; else None."""
        return self.image.reduced(self.scales).get(scale) if kind_of(self.image) == "jpeg" else None


class ImagePyramid(_Pyramid):
    """The levels of one image, coarse to fine; see the file.

    Args:
        image, tiles: see [`_Pyramid`].
        scales: sides of the levels in pixels, ascending multiples of the tile; None: from `anchor` to the image's own
            resolution (`pyramid_scales`).
        anchor: side of the coarsest level, where `scales` is None.
        mask_padding: whether patches that show the letterbox alone, or pixels that a raster has no data for, are left out.
        max_tiles: tiles that go through the vision tower for a question, those of the anchor included.

    Attributes:
        kind: "pyramid".
        scales, max_tiles: as above.
        grids: (height, width) in tokens of every level.
        num_chosen: int[L], tiles of every level that a question uses, exactly; None without `max_tiles`, as the next.
        available: int[L], tokens of every level that these have at least, whichever they are. 0 of a level whose masks are
            not known before its tiles are read.

    Raises:
        ValueError: no pixel of the image is valid, or the anchor alone has more tiles.
    """

    kind = "pyramid"

    def __init__(
        self,
        image,
        scales: Sequence[int] | None = None,
        *,
        anchor: int | None = None,
        mask_padding: bool = True,
        max_tiles: int | None = None,
        **tiles,
    ):
        super().__init__(image, **tiles)
        self.scales = list(scales or pyramid_scales(max(self.image_size), anchor, self.tile_size))
        self.grids = grids(self.scales, self.patch_size)
        self.mask_padding = mask_padding
        self._masked = mask_padding and self.image.masked
        self._lines = [shown_lines(self.image_size, grid) for grid in self.grids]
        self._lock = threading.Lock()
        self.num_chosen = self.available = None
        # Of a masked image: bool[p, p] of tiles that were read; bool[H, W] of whole levels, once they are asked for.
        self._shown, self._shown_levels, self._num_shown = {}, None, {}
        if self._masked and not self.num_shown(0).any():
            raise ValueError(f"{self.image.filename}: none of its pixels is valid, so there is nothing to show.")
        self._set_max_tiles(max_tiles)

    def __getstate__(self):
        """What a copy has, here or in another process: all but the lock."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def _set_max_tiles(self, max_tiles):
        self.max_tiles = max_tiles
        if max_tiles is not None:
            tallies = [self._tally(level_idx) for level_idx in range(len(self.scales))]
            self.num_chosen = split_tiles([int(counts[numbers > 0].sum()) for numbers, counts in tallies], max_tiles)
            self.available = [
                least_tokens(numbers, chosen, counts) if self.is_known(level_idx) else 0
                for level_idx, ((numbers, counts), chosen) in enumerate(zip(tallies, self.num_chosen))
            ]

    def with_max_tiles(self, max_tiles: int) -> "ImagePyramid":
        """The same image for questions that may use another number of tiles. Raises `ValueError` where the anchor alone
        has more."""
        if max_tiles == self.max_tiles:
            return self
        changed = copy(self)
        changed._set_max_tiles(max_tiles)
        return changed

    def num_tiles(self, level_idx: int) -> int:
        """All tiles of a level, those of the letterbox too."""
        return (self.scales[level_idx] // self.tile_size) ** 2

    # Masks

    def is_known(self, level_idx: int) -> bool:
        """Whether it is known of every tile of a level which of its patches show the image, before the tile is read."""
        return not self._masked or self.scales[level_idx] <= max(MASK_SIDE, self.scales[0])

    def num_shown(self, level_idx: int, tile_idx: Sequence[int] | None = None) -> np.ndarray:
        """long[tiles of the level], or long[T] of some of them: patches of every tile that show the image; of a level
        whose masks are not known (`is_known`), those that lie on it, valid or not. A level of a large image has
        millions of tiles: ask for some."""
        if level_idx in self._num_shown or self._masked and self.is_known(level_idx):
            if level_idx not in self._num_shown:
                shown, p = self._known_levels()[level_idx], self.patches_per_side
                self._num_shown[level_idx] = shown.reshape(len(shown) // p, p, -1, p).sum((1, 3)).ravel()
            number = self._num_shown[level_idx]
            return number if tile_idx is None else number[tile_idx]
        rows, columns = self._num_lines(level_idx)
        if tile_idx is None:
            return (rows[:, None] * columns).ravel()
        row, column = np.divmod(np.asarray(tile_idx, np.int64), len(columns))
        return rows[row] * columns[column]

    def _num_lines(self, level_idx):
        """Rows and columns of patches that show the image: long of each row, and of each column of tiles."""
        p = self.patches_per_side
        if not self.mask_padding:
            return (np.full(self.scales[level_idx] // self.tile_size, p),) * 2
        return tuple(line.reshape(-1, p).sum(1) for line in self._lines[level_idx])

    def _tally(self, level_idx):
        """(patches that show the image, how many tiles have so many): long of each number that there is."""
        if self._masked and self.is_known(level_idx):
            return np.unique(self.num_shown(level_idx), return_counts=True)
        (rows, num_rows), (columns, num_columns) = (
            np.unique(line, return_counts=True) for line in self._num_lines(level_idx)
        )
        return (rows[:, None] * columns).ravel(), (num_rows[:, None] * num_columns).ravel()

    def shown(self, level_idx: int, tile_idx: Sequence[int]) -> np.ndarray:
        """bool[T, p, p]: which patches of some tiles of a level show the image, and neither the letterbox alone nor
        pixels without data alone. Of a level whose masks are not known, the tiles are read for it unless they were
        before."""
        p = self.patches_per_side
        tile_idx = np.asarray(tile_idx, np.int64).reshape(-1)
        if not self.mask_padding:
            return np.ones((len(tile_idx), p, p), bool)
        rows, columns = np.divmod(tile_idx, self.scales[level_idx] // self.tile_size)
        if not self._masked:
            down, across = (line.reshape(-1, p) for line in self._lines[level_idx])
            return down[rows][:, :, None] & across[columns][:, None]
        if self.is_known(level_idx):
            shown = self._known_levels()[level_idx].reshape(len(self._lines[level_idx][0]) // p, p, -1, p)
            return shown.transpose(0, 2, 1, 3)[rows, columns]
        missing = [tile for tile in tile_idx.tolist() if (level_idx, tile) not in self._shown]
        if missing:
            self.pixels(level_idx, missing)
        return (
            np.stack([self._shown[level_idx, tile] for tile in tile_idx.tolist()])
            if len(tile_idx)
            else np.ones((0, p, p), bool)
        )

    def _known_levels(self):
        """[bool[H, W]] of the levels whose masks are known, from one pass over the overview of the finest of them."""
        with self._lock:
            if self._shown_levels is None:
                known = [np.zeros(grid, bool) for idx, grid in enumerate(self.grids) if self.is_known(idx)]
                image = self.image.for_scale(self.scales[len(known) - 1])
                side, top, left = letterbox((image.height, image.width))
                for strip, valid in image.masked_strips(self.tile_size):
                    mark_shown(known, valid, (strip.height, strip.width), (top, left), side)
                    top += strip.height
                self._shown_levels = known
            return self._shown_levels

    # Pixels

    def tiles(self, level_idx: int, tile_idx: Sequence[int]) -> np.ndarray:
        """float32[T, 3, tile, tile] of some tiles of a level in the order asked for, as `pixel_values` are.

        Raises what `pixels` raises."""
        return normalize_tiles(self.pixels(level_idx, tile_idx), *self._arithmetic)

    def pixels(self, level_idx: int, tile_idx: Sequence[int]) -> np.ndarray:
        """uint8[T, 3, tile, tile] of some tiles of a level, in the order asked for.

        Bit-equal to the tiles of the whole view (`image_to_tiles` of the same image or overview). Neighbours in a row are
        read at once, rows from top to bottom.

        Raises:
            OSError: the file of a raster turns out to be damaged.
        """
        tile_idx = np.asarray(tile_idx, np.int64).reshape(-1)
        scale, size = self.scales[level_idx], self.tile_size
        if reduced := self._reduced(scale):
            side, *corner = letterbox(self.image_size)
            view = reduced.view((side, side), corner, (scale, scale), self._pad_color, self._resample)
            return cut_tiles(view, size)[tile_idx]
        wanted, where = np.unique(tile_idx, return_inverse=True)
        image = self.image.for_scale(scale)
        found = np.empty((len(wanted), 3, size, size), np.uint8)
        start = 0
        with image.parts() as read:
            for row, first, last in _runs(wanted, scale // size):
                part, shown = self._read_run(read, image, level_idx, row, first, last)
                stop = start + last - first
                found[start:stop] = part.reshape(size, last - first, size, 3).transpose(1, 3, 0, 2)
                if shown is not None:
                    width = scale // size
                    self._shown |= {(level_idx, row * width + first + idx): one for idx, one in enumerate(shown)}
                start = stop
        return found[where]

    def _read_run(self, read, image, level_idx, row, first, last):
        """uint8[tile, tiles * tile, 3] of neighbouring tiles of a row, and bool[tiles, p, p] where a mask was read."""
        scale, p = self.scales[level_idx], self.patches_per_side
        spans = [(edge * self.tile_size, stop * self.tile_size) for edge, stop in ((row, row + 1), (first, last))]
        size = image.height, image.width
        side, *corner = letterbox(size)
        part, valid, (top, left, height, width) = part_of_view(
            read, size, (side, side), corner, (scale, scale), *spans, self._pad_color, self._resample
        )
        if not self._masked or self.is_known(level_idx):
            return part, None
        patches = [(row * p, (row + 1) * p), (first * p, last * p)]
        shown = valid_patches(valid, (height, width), (top, left), side, self.grids[level_idx], *patches)
        return part, shown.reshape(p, last - first, p).transpose(1, 0, 2)

    def __repr__(self):
        return f"ImagePyramid({self.image_size[0]} x {self.image_size[1]}, levels {self.scales})"


def _runs(tile_idx: np.ndarray, width: int) -> Iterator[tuple[int, int, int]]:
    """(row, first, last + 1) of neighbouring tiles of a row, from ascending tile indices."""
    starts = np.flatnonzero(np.diff(tile_idx, prepend=-2) != 1)
    breaks = np.union1d(starts, np.flatnonzero(tile_idx % width == 0))
    for start, stop in zip(breaks, [*breaks[1:], len(tile_idx)]):
        row, first = divmod(int(tile_idx[start]), width)
        yield row, first, first + int(stop - start)


# ---- Levels of LRS-VQA's system ------------------------------------------------------------


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


class DynamicPyramid(_Pyramid):
    """The thumbnail and the levels of one image, coarse to fine; see the file. Arguments are those of [`_Pyramid`].

    Attributes:
        kind: "dynamic".
        levels: [`DynamicLevel`] of each level; what `tiles` calls level 0 is the thumbnail, the first of these is 1.
    """

    kind = "dynamic"

    def __init__(self, image, **tiles):
        super().__init__(image, **tiles)
        self.levels = dynamic_levels(self.image_size, self.tile_size, self.patch_size)

    @property
    def scales(self) -> list[int]:
        """Long side of the thumbnail and of every level in pixels."""
        return [self.tile_size, *(max(level.size) for level in self.levels)]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(height, width) in tokens of the thumbnail and of every level."""
        return [(self.patches_per_side,) * 2, *(level.grid for level in self.levels)]

    def tiles(self, level_idx: int, tile_idx: Sequence[int]) -> np.ndarray:
        """float32[T, 3, tile, tile] of some tiles of a level, row by row numbered, as `pixel_values` are.

        Raises:
            OSError: the file of a raster turns out to be damaged.
        """
        level = self.levels[level_idx - 1] if level_idx else None
        size, width = (level.size, level.tiles[1]) if level else (thumbnail_size(self.image_size, self.tile_size), 1)
        image, side = self.image.for_scale(max(size)), self.tile_size
        canvas = image.height, image.width
        if reduced := self._reduced(max(size)):
            view = reduced.view(canvas, (0, 0), size, self._pad_color, self._resample)
            padded = np.empty((*(-(-length // side) * side for length in size), 3), np.uint8)
            padded[:] = self._pad_color
            padded[: size[0], : size[1]] = view
            return normalize_tiles(cut_tiles(padded, side)[np.asarray(tile_idx, np.int64)], *self._arithmetic)
        found = np.empty((len(tile_idx), side, side, 3), np.uint8)
        found[:] = self._pad_color
        with image.parts() as read:
            for place in np.argsort(tile_idx, kind="stable"):  # from top to bottom
                row, column = divmod(int(tile_idx[place]), width)
                spans = [(side * at, min(side * (at + 1), end)) for at, end in zip((row, column), size)]
                part, _, _ = part_of_view(read, canvas, canvas, (0, 0), size, *spans, self._pad_color, self._resample)
                found[place, : part.shape[0], : part.shape[1]] = part
        return normalize_tiles(found.transpose(0, 3, 1, 2), *self._arithmetic)

    def __repr__(self):
        sizes = ", ".join(f"{height} x {width}" for height, width in (level.size for level in self.levels))
        return f"DynamicPyramid({self.image_size[0]} x {self.image_size[1]}, levels of {sizes or 'nothing but the thumbnail'})"
