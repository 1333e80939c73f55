"""UHR-BAT pyramid: an image from the anchor down to its own resolution, whose tiles are read when they are asked for.

A level is a view of the letterboxed square, as the scales are, but nothing of it exists before somebody asks for some of
its tiles: these are then read from the file by window, from the coarsest overview that is no smaller, or cut from an
image in memory. Tiles of a level are numbered row by row, tokens have positions on the level's grid as everywhere.

Letters: T tiles, p patches a side of a tile. Sizes are (height, width).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
from PIL import Image

from .geometry_uhr_bat import grids, letterbox, pyramid_scales, shown_lines
from .image_reading_uhr_bat import ImageSource, kind_of
from .image_views_uhr_bat import PAD_COLOR, mark_shown, normalize_tiles, part_of_view, valid_patches
from .zooming_uhr_bat import least_tokens, split_tiles

# Side in pixels up to which a level's masks are known without its tiles being read, where the file has a mask: the
# overview of this side is read for them, once.
MASK_SIDE = 4096


class HeldImage(ImageSource):
    """An RGB image in memory."""

    def __init__(self, image: Image.Image):
        self.image, self.height, self.width, self.filename = image, image.height, image.width, "image"

    @contextmanager
    def parts(self):
        def read(top, left, bottom, right):
            part = Image.new("RGB", (right - left, bottom - top))
            part.paste(self.image, (-left, -top))  # pasting does not ask for Pillow's limit, as cropping does
            return part, None

        yield read


class UnreadImage(ImageSource):
    """An image of which the size alone is known."""

    def __init__(self, height: int, width: int):
        self.height, self.width, self.filename = height, width, "image"


class ImagePyramid:
    """The levels of one image, coarse to fine; see the file.

    Several threads may ask it at once. A file must stay as it is.

    Args:
        image: 8-bit RGB in memory, or a raster or other source (`read_image`, `open_image`).
        scales: sides of the levels in pixels, ascending multiples of the tile; None: from `anchor` to the image's own
            resolution (`pyramid_scales`).
        anchor: side of the coarsest level, where `scales` is None.
        tile_size, patch_size: pixels a side.
        pad_color, resample: of the letterbox and the views, as in `image_to_tiles`.
        mask_padding: whether patches that show the letterbox alone, or pixels that a raster has no data for, are left out.
        arithmetic: (rescale_factor, mean, std) of `normalize_tiles`.
        max_tiles: tiles that go through the vision tower for a question, those of the anchor included.

    Attributes:
        image, scales, tile_size, patch_size, max_tiles: as above.
        grids: (height, width) in tokens of every level.
        num_chosen: int[L], tiles of every level that a question uses, exactly; None without `max_tiles`, as the next.
        available: int[L], tokens of every level that these have at least, whichever they are. 0 of a level whose masks are
            not known before its tiles are read.
        image_size: (height, width) of the image in pixels.

    Raises:
        ValueError: no pixel of the image is valid, or the anchor alone has more tiles.
    """

    def __init__(
        self,
        image,
        scales: Sequence[int] | None = None,
        *,
        anchor: int | None = None,
        tile_size: int,
        patch_size: int,
        pad_color: Sequence[int] = PAD_COLOR,
        resample: int = Image.Resampling.BICUBIC,
        mask_padding: bool = True,
        arithmetic: tuple = (),
        max_tiles: int | None = None,
    ):
        image = image.image if kind_of(image) == "picture" else image
        self.image = HeldImage(image) if isinstance(image, Image.Image) else image
        self.image_size = self.image.height, self.image.width
        self.scales = list(scales or pyramid_scales(max(self.image_size), anchor, tile_size))
        self.tile_size, self.patch_size = tile_size, patch_size
        self.grids = grids(self.scales, patch_size)
        self.mask_padding = mask_padding
        self._pad_color, self._resample, self._arithmetic = tuple(pad_color), resample, arithmetic
        self._masked = mask_padding and self.image.masked
        self._lines = [shown_lines(self.image_size, grid) for grid in self.grids]
        self._lock = threading.Lock()
        self.num_chosen = self.available = None
        # Of a masked image: bool[p, p] of tiles that were read; bool[H, W] of whole levels, once they are asked for.
        self._shown, self._shown_levels, self._num_shown = {}, None, {}
        if self._masked and not self.num_shown(0).any():
            raise ValueError(f"{self.image.filename}: none of its pixels is valid, so there is nothing to show.")
        self._set_max_tiles(max_tiles)

    def __copy__(self):
        """The same image, and what was found out of it."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __getstate__(self):
        """What travels to another process: all but the lock."""
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

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

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
        part, valid, (top, left, height, width) = part_of_view(
            read, size, scale, *spans, self._pad_color, self._resample
        )
        if not self._masked or self.is_known(level_idx):
            return part, None
        patches = [(row * p, (row + 1) * p), (first * p, last * p)]
        side, grid = max(size), self.grids[level_idx]
        shown = valid_patches(valid, (height, width), (top, left), side, grid, *patches)
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


__all__ = ["HeldImage", "ImagePyramid", "UnreadImage"]
