# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT image views: an RGB image to the square view of every scale, cut into tiles and normalised (section 3.3).

The image is letterboxed to a square (centred, the mean colour), the square is resized to every scale with Pillow's
bicubic, and each of these views is cut into tiles, row by row. The square itself is never built, and a raster is never
held whole either: rows go through as strips, and a view is finished band by band. What comes in is what `read_image`
gave out and `check_scales` let pass; nothing is checked here.

Letters: T tiles of a scale. Sizes are (height, width).
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from .geometry_uhr_bat import PAD_COLOR, letterbox
from .image_rasters_uhr_bat import RasterImage

# Pixels of one strip of rows on its way to the scales. Pillow prepares every strip anew, so larger strips are faster;
# of a raster, strips are a good part of the memory.
STRIP_PIXELS, STREAMED_STRIP_PIXELS = 2**21, 2**19
# Rows of a view that are resized together, at least. Neighbouring bands overlap by the filter's reach.
BAND_ROWS = 96
# Bytes of the rows that wait for their vertical pass. Above this, scales are done in several passes over the image.
# Needed only where side and scale are coprime and large.
WINDOW_BYTES = 2**29
# Pixels on each side that the widest of Pillow's filters, Lanczos, reads.
WIDEST_FILTER = 3
# Of a narrow image in its square, Pillow can resize parts that begin where a pixel of the square and one of the view do.
# Where such a part is so many times as wide as what is needed, it is resized here instead.
OWN_PASS, COLUMNS_PER_BLOCK = 6, 64
# Products of matrices up to so many factors are computed by one thread: those of BLAS spin while they wait for each other.
SMALL_PRODUCT = 2**22
# Pillow resizes outside of Python's lock. More threads hold more strips and wait for the one that reads.
NUM_THREADS = min(4, os.cpu_count() or 1)


def _run(pool, calls):
    """Call functions in threads, `calls` being (function, *arguments), and wait for them."""
    for call in [pool.submit(*call) for call in calls]:
        call.result()  # raises what a thread raised


# Strips: the rows that come in


def _strips(image, pad_color, columns, strip_pixels):
    """(strip of rows of the letterboxed square, which of its pixels show the image), from top to bottom.

    Args:
        columns: (first, last + 1) of the square that a strip has.

    Yields:
        (RGB, bool[h, w] or None): pixels that are no part of the image have the letterbox's colour; the second is of the
        image's own columns, None where it has all of them.
    """
    side, _, left = letterbox((image.height, image.width))
    in_memory = isinstance(image, Image.Image)
    width = columns[1] - columns[0]
    num_rows = max(1, (strip_pixels or (STRIP_PIXELS if in_memory else STREAMED_STRIP_PIXELS)) // width)
    starts = range(0, image.height, num_rows)
    # Pasting clips, and does not ask for Pillow's limit as cropping does.
    parts = ((image, None) for _ in starts) if in_memory else image.masked_strips(num_rows)
    for start, (part, valid) in zip(starts, parts):
        strip = Image.new("RGB", (width, min(num_rows, image.height - start)), pad_color)
        corner = left - columns[0], -start if in_memory else 0
        strip.paste(part, corner, None if valid is None else Image.fromarray(valid))
        yield strip, valid


def _read_ahead(strips):
    """The strips of a generator, each read while the one before it is resized."""
    with ThreadPoolExecutor(1) as reader:  # one thread from first to last, as `RasterImage.masked_strips` asks
        coming = reader.submit(next, strips, None)
        while (strip := coming.result()) is not None:
            coming = reader.submit(next, strips, None)
            yield strip


def mark_shown(shown: Iterable[np.ndarray], valid: np.ndarray | None, size, corner, side: int):
    """Notes which patches show a part of the image that came in: the rule of `shown_patches`, for any set of pixels.

    Args:
        shown: bool[H, W] of some scales over the letterboxed square; set to True where a patch shows a valid pixel.
        valid: bool[h, w], pixels that are part of the image; None where all are.
        size: (height, width) of these pixels.
        corner: (row, column) of the first of them in the square.
        side: of the square in pixels.
    """
    for patches in shown:
        H, W = patches.shape
        rows = corner[0] * H // side, -(-(corner[0] + size[0]) * H // side)
        patches[slice(*rows)] |= valid_patches(valid, size, corner, side, (H, W), rows, (0, W))


def valid_patches(valid: np.ndarray | None, size, corner, side: int, grid, rows, columns) -> np.ndarray:
    """Which patches of a part of a scale show any valid pixel.

    Args:
        valid, size, corner, side: as in `mark_shown`.
        grid: (height, width) of the scale in tokens, over the letterboxed square.
        rows, columns: (first, last + 1) of the patches.

    Returns:
        bool[rows, columns]
    """
    edges = []
    for length, start, num_patches, (first, last) in zip(size, corner, grid, (rows, columns)):
        idx = np.arange(first, last, dtype=np.int64)
        low, high = idx * side // num_patches - start, -(-(idx + 1) * side // num_patches) - start
        edges.append((low.clip(0, length), high.clip(0, length)))
    (top, bottom), (left, right) = edges
    if valid is None:
        return (bottom > top)[:, None] & (right > left)
    # Valid pixels above and to the left of each corner between pixels.
    counts = np.zeros((size[0] + 1, size[1] + 1), np.int32)
    valid.cumsum(axis=0, dtype=np.int32, out=counts[1:, 1:]).cumsum(axis=1, out=counts[1:, 1:])
    in_rows = counts[bottom] - counts[top]
    return in_rows[:, right] > in_rows[:, left]


# Bands: the rows that go out


class _Band(NamedTuple):
    """Rows or columns (first, last + 1) that are resized together: of the view, of the square that they show, and of the
    square with what the filter reaches on both sides."""

    view: tuple[int, int]
    square: tuple[int, int]
    window: tuple[int, int]


def _reach(side, scale):
    """Pixels of the square that the filter reads on each side of what a pixel of the view shows."""
    return math.ceil(WIDEST_FILTER * max(1, side / scale)) + 1


def _band(side, scale, start, stop) -> _Band:
    """From part `start` up to part `stop` of the gcd(side, scale) parts of the square.

    Parts start where a pixel of the square and one of the view do; otherwise Pillow's coefficients differ in the last
    bit. Where side and scale are coprime, there is one part.
    """
    num_parts, reach = math.gcd(side, scale), _reach(side, scale)
    view, square = ((start * length // num_parts, stop * length // num_parts) for length in (scale, side))
    return _Band(view, square, (max(0, square[0] - reach), min(side, square[1] + reach)))


def _bands(side, scale, band_rows) -> list[_Band]:
    """Bands of `band_rows` or more rows of the view, from top to bottom."""
    num_parts = math.gcd(side, scale)
    step = math.ceil(band_rows * num_parts / scale)
    return [_band(side, scale, start, min(start + step, num_parts)) for start in range(0, num_parts, step)]


def _columns(side, scale, left, width) -> _Band:
    """The columns of the view that show any of an image: the others have the letterbox's colour."""
    num_parts, reach = math.gcd(side, scale), _reach(side, scale)
    start = max(0, (left - reach) * num_parts // side)
    stop = min(num_parts, -(-(left + width + reach) * num_parts // side))
    return _band(side, scale, start, stop)


def _bicubic(side, scale, first, last) -> list[tuple[int, np.ndarray]]:
    """Pillow's bicubic of a row of `side` pixels to `scale`, for the columns from `first` to `last`, in blocks.

    The weights are those of Pillow's Resample.c to the last bit: computed in float64, summed in order, rounded to whole
    numbers of 22 bits. So the columns of any part can be had without the rest, which Pillow's `box` does only for parts
    that begin at a whole pixel.

    Returns:
        [(low, float64[columns, pixels])]: whole numbers for the pixels of the row from `low` on.
    """
    ratio = side / scale
    stretch = max(ratio, 1.0)
    support, blocks = 2.0 * stretch, []
    for start in range(first, last, COLUMNS_PER_BLOCK):
        centre = (np.arange(start, min(start + COLUMNS_PER_BLOCK, last)) + 0.5) * ratio
        low = (centre - support + 0.5).astype(np.int64).clip(0)
        high = (centre + support + 0.5).astype(np.int64).clip(None, side)
        pixels = low[:, None] + np.arange((high - low).max())
        x = np.abs((pixels - centre[:, None] + 0.5) * (1.0 / stretch))
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (pixels < high[:, None])
        weights /= weights.cumsum(axis=1)[:, -1:]
        weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)) * (pixels < high[:, None])
        block = np.zeros((len(centre), int(pixels.max()) + 1 - low[0]))
        np.put_along_axis(block, pixels - low[0], weights, axis=1)
        blocks.append((int(low[0]), block[:, : high.max() - low[0]]))
    return blocks


def _weigh(pixels: np.ndarray, left: int, blocks) -> np.ndarray:
    """uint8[..., columns] by the weights of `_bicubic`, from uint8[..., w] that begin at column `left` of the square."""
    parts = []
    for low, weights in blocks:
        read = np.ascontiguousarray(pixels[..., low - left : low - left + weights.shape[1]], np.float64)
        # One product of matrices. Sums of whole numbers below 2^53 are exact, and so is a power of two.
        rows, small = read.reshape(-1, weights.shape[1]), read.size * len(weights) <= SMALL_PRODUCT
        sums = np.einsum("rp,cp->rc", rows, weights) if small else rows @ weights.T
        parts.append(np.floor((sums + 2**21) * 2.0**-22).reshape(*read.shape[:-1], -1))
    return np.concatenate(parts, axis=-1).clip(0, 255).astype(np.uint8)


def _resize_columns(strip, left, blocks) -> Image.Image:
    """The horizontal pass of a strip that starts at column `left` of the square, by the weights of `_bicubic`."""
    return Image.fromarray(_weigh(np.asarray(strip).swapaxes(1, 2), left, blocks).swapaxes(1, 2).copy())


def _passes(scales, side, band_rows, window_bytes):
    """The scales in groups whose bands take no more than `window_bytes`."""
    groups, taken = [[]], 0
    for scale in scales:
        windows = [band.window for band in _bands(side, scale, band_rows)]
        needed = 4 * scale * max(last - first for first, last in windows)
        if groups[-1] and taken + needed > window_bytes:
            groups.append([])
            taken = 0
        groups[-1].append(scale)
        taken += needed
    return groups


class _View:
    """The square view of one scale and its tiles, resized while the rows of the image come in.

    Pillow resizes rows first, rounds to 8 bits, then columns. Here every strip is made narrow when it comes, and the
    columns of a band follow as soon as its rows are there: only these are held, and of the letterbox beside the image
    none.
    """

    def __init__(self, image_size, scale, tile_size, pad_color, resample, band_rows):
        side, _, left = letterbox(image_size)
        self.tile_size, self.scale, self.pad_color, self.resample = tile_size, scale, pad_color, resample
        self.columns, self.weights = _columns(side, scale, left, image_size[1]), None
        reach = _reach(side, scale)
        start, stop = max(0, left - reach), min(side, left + image_size[1] + reach)
        if resample == Image.Resampling.BICUBIC and OWN_PASS * (stop - start) < np.diff(self.columns.square):
            columns = start * scale // side, -(-stop * scale // side)
            self.weights = _bicubic(side, scale, *columns)
            self.columns = _Band(columns, (start, stop), (max(0, start - 2 * reach), min(side, stop + 2 * reach)))
        # Bands whose rows are not all in yet, from top to bottom.
        self.bands = _bands(side, scale, band_rows)
        # The narrowed rows, so far, of every band that has some.
        self.windows = {}
        self.tiles = np.empty((scale // tile_size, scale // tile_size, 3, tile_size, tile_size), np.uint8)

    def narrow(self, strip, top, left):
        """The horizontal pass of a strip whose first pixel is at row `top` and column `left` of the square."""
        (start, stop), (first, last) = self.columns.square, self.columns.view
        if self.weights:
            strip = _resize_columns(strip, left, self.weights)
        else:
            box = start - left, 0, stop - left, strip.height
            strip = strip.resize((last - first, strip.height), self.resample, box)
        for band in self.bands:
            if band.window[0] < top + strip.height:
                if band not in self.windows:
                    size = last - first, band.window[1] - band.window[0]
                    self.windows[band] = Image.new("RGB", size, self.pad_color)
                self.windows[band].paste(strip, (0, top - band.window[0]))

    def finish(self, bottom):
        """[(band, its window, None without any of the image)] of the bands that need no row from row `bottom` of the
        square on."""
        finished = [band for band in self.bands if band.window[1] <= bottom]
        self.bands = self.bands[len(finished) :]
        return [(band, self.windows.pop(band, None)) for band in finished]

    def cut(self, band, window, column):
        """The vertical pass of one column of tiles in a band."""
        rows, left = np.arange(*band.view), column * self.tile_size
        tiles, rows_in_tile = rows // self.tile_size, rows % self.tile_size
        first, last = self.columns.view
        if window is None or last <= left or first >= left + self.tile_size:
            self.tiles[tiles, column, :, rows_in_tile] = np.array(self.pad_color, np.uint8)[:, None]
            return
        columns = Image.new("RGB", (self.tile_size, window.height), self.pad_color)
        columns.paste(window, (first - left, 0))
        box = 0, band.square[0] - band.window[0], self.tile_size, band.square[1] - band.window[0]
        for channel, pixels in enumerate(columns.resize((self.tile_size, len(rows)), self.resample, box).split()):
            self.tiles[tiles, column, channel, rows_in_tile] = pixels


# A part of a view by itself


# Tiles of a level stand in the same few rows and columns; the weights of a tile are small.
_weights_of_part = lru_cache(maxsize=512)(_bicubic)


class _Part(NamedTuple):
    """Pixels (first, last + 1) of the view along one axis, and how they come from pixels `window` of the square: by
    Pillow as a band, or where that is much wider than what is needed, by weights."""

    view: tuple[int, int]
    window: tuple[int, int]
    band: _Band | None
    weights: list | None

    @classmethod
    def of(cls, side, scale, first, last, resample):
        num_parts = math.gcd(side, scale)
        band = _band(side, scale, first * num_parts // scale, -(-last * num_parts // scale))
        needed = math.ceil((last - first) * side / scale) + 2 * _reach(side, scale)
        if resample != Image.Resampling.BICUBIC or np.diff(band.square) <= OWN_PASS * needed:
            return cls((first, last), band.window, band, None)
        weights = _weights_of_part(side, scale, first, last)
        low, high = min(low for low, _ in weights), max(low + block.shape[1] for low, block in weights)
        return cls((first, last), (low, high), None, weights)

    def resize(self, pixels: Image.Image, resample, axis) -> Image.Image:
        """An image that has `window` along one axis (0: width, 1: height), resized along it."""
        if self.weights:
            turned = pixels if axis == 0 else pixels.transpose(Image.Transpose.TRANSPOSE)
            resized = _resize_columns(turned, self.window[0], self.weights)
            return resized if axis == 0 else resized.transpose(Image.Transpose.TRANSPOSE)
        size, box, (start, stop) = list(pixels.size), [0, 0, *pixels.size], self.band.square
        size[axis] = self.band.view[1] - self.band.view[0]
        box[axis], box[axis + 2] = start - self.window[0], stop - self.window[0]
        cut = [0, 0, *size]
        cut[axis], cut[axis + 2] = (edge - self.band.view[0] for edge in self.view)
        return pixels.resize(size, resample, box).crop(cut)


def part_of_view(
    read: Callable,
    image_size: tuple[int, int],
    canvas: tuple[int, int],
    corner: tuple[int, int],
    view: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    pad_color: Sequence[int],
    resample: int,
) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int, int, int]]:
    """A part of a canvas that is resized to a view, bit-equal to the same part of the whole view, from the pixels that it
    needs.

    Args:
        read: (top, left, bottom, right) in pixels of the image -> (uint8[h, w, 3] or RGB image, bool[h, w] of those that
            are part of it; None for all, of any box or of none). Asked for boxes from top to bottom.
        image_size, canvas, view: (height, width) of the image, of what it lies in (the letterboxed square, or the image
            itself), and of what that becomes.
        corner: (row, column) of the canvas where the image begins.
        rows, columns: (first, last + 1) of the part in the view.
        pad_color, resample: as in `image_to_tiles`.

    Returns:
        (uint8[rows, columns, 3]; which of the pixels that were read are part of the image, bool[h, w] or None; where in the
        canvas these are: row and column of the first one, height and width).
    """
    (top, left), (height, width) = corner, image_size
    down = _Part.of(canvas[0], view[0], *rows, resample)
    across = _Part.of(canvas[1], view[1], *columns, resample)
    low, high = max(down.window[0], top), min(down.window[1], top + height)
    first, last = max(across.window[0], left), min(across.window[1], left + width)
    height, width = down.window[1] - down.window[0], across.window[1] - across.window[0]
    inside = (low, high, first, last) == (*down.window, *across.window)
    if inside and down.weights and across.weights and height * width <= STREAMED_STRIP_PIXELS:
        # The same as below, without Pillow's copies.
        pixels, valid = read(low - top, first - left, high - top, last - left)
        pixels = pixels if valid is None else np.where(valid[..., None], pixels, np.array(pad_color, np.uint8))
        narrowed = _weigh(np.asarray(pixels).swapaxes(1, 2), first, across.weights)
        part = _weigh(narrowed.transpose(1, 2, 0), low, down.weights)
        return part.transpose(2, 1, 0), valid, (low, first, height, width)
    narrowed = Image.new("RGB", (columns[1] - columns[0], height), tuple(pad_color))
    masks, step = [], max(1, STREAMED_STRIP_PIXELS // width)
    for row in range(low, high, step) if last > first else ():
        stop = min(row + step, high)
        pixels, valid = read(row - top, first - left, stop - top, last - left)
        strip = Image.new("RGB", (width, stop - row), tuple(pad_color))
        pixels = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        strip.paste(pixels, (first - across.window[0], 0), None if valid is None else Image.fromarray(valid))
        narrowed.paste(across.resize(strip, resample, 0), (0, row - down.window[0]))
        masks.append(valid)
    part = np.asarray(down.resize(narrowed, resample, 1))
    box = low, first, max(high - low, 0), max(last - first, 0)
    valid = None if not masks or masks[0] is None else np.concatenate(masks)
    return part, valid, box


# Tiles


def image_to_tiles(
    image: Image.Image | RasterImage,
    scales: Sequence[int],
    tile_size: int,
    pad_color: Sequence[int] = PAD_COLOR,
    resample: int = Image.Resampling.BICUBIC,
    *,
    shown: dict[int, np.ndarray] | None = None,
    strip_pixels: int | None = None,
    band_rows: int = BAND_ROWS,
    window_bytes: int = WINDOW_BYTES,
) -> dict[int, np.ndarray]:
    """The view of every scale of an image, cut into tiles row by row.

    Bit-equal to pasting the image into its letterboxed square and resizing that, whatever the last three arguments,
    which bound the memory. The image is gone through in strips, once for all scales that fit `window_bytes` together.
    Of a `JPEGImage` the coarse views are made from smaller pictures of it.

    Args:
        image: 8-bit RGB, in memory, a raster or a JPEG (`read_image`).
        scales: sides of the views in pixels, ascending multiples of the tile (`check_scales`).
        tile_size: pixels a side of a tile.
        pad_color: RGB of the letterbox, 0..255.
        resample: Pillow's filter.
        shown: {scale: bool[H, W]} over the grid of each scale, where given; set to True where a patch shows a pixel that
            is part of the image (`RasterImage.masked`).
        strip_pixels: pixels that are read at once; by default `STRIP_PIXELS`, or `STREAMED_STRIP_PIXELS` of a raster.
        band_rows: rows of a view that are resized together, at least.
        window_bytes: bytes of the rows that wait to be resized.

    Returns:
        {scale: uint8[T, 3, tile, tile]} with T = (scale / tile)^2.

    Raises:
        OSError: the file of a raster turns out to be damaged.
    """
    pad_color, size = tuple(pad_color), (image.height, image.width)
    side, top, left = letterbox(size)
    if getattr(image, "kind", None) == "jpeg":
        tiles = {
            scale: cut_tiles(picture.view((side, side), (top, left), (scale, scale), pad_color, resample), tile_size)
            for scale, picture in image.reduced(scales).items()
        }
        if rest := [scale for scale in scales if scale not in tiles]:
            bounds = {"strip_pixels": strip_pixels, "band_rows": band_rows, "window_bytes": window_bytes}
            tiles |= image_to_tiles(image.image, rest, tile_size, pad_color, resample, **bounds)
        return {scale: tiles[scale] for scale in scales}
    passes, tiles = _passes(scales, side, band_rows, window_bytes), {}
    total = len(passes) * image.height
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        logging.tqdm(total=total, desc="Resizing", unit="row", delay=2, leave=False) as progress,
    ):
        for group in passes:
            # The longest work first.
            views = [_View(size, scale, tile_size, pad_color, resample, band_rows) for scale in reversed(group)]
            windows = [view.columns.window for view in views]
            columns = min(first for first, _ in windows), max(last for _, last in windows)
            row = top
            for strip, valid in _read_ahead(_strips(image, pad_color, columns, strip_pixels)):
                calls = [(view.narrow, strip, row, columns[0]) for view in views]
                if shown is not None:
                    grids = [shown[scale] for scale in group]
                    calls.append((mark_shown, grids, valid, (strip.height, size[1]), (row, left), side))
                _run(pool, calls)
                row += strip.height
                bottom = row if row < top + image.height else side
                finished = [(view, *part) for view in views for part in view.finish(bottom)]
                cuts = [(view.cut, *part, column) for view, *part in finished for column in range(len(view.tiles))]
                _run(pool, cuts)
                progress.update(strip.height)
            tiles |= {view.scale: view.tiles.reshape(-1, *view.tiles.shape[2:]) for view in views}
    return {scale: tiles[scale] for scale in scales}


def cut_tiles(view: np.ndarray, tile_size: int) -> np.ndarray:
    """uint8[T, 3, tile, tile], row by row, of a view uint8[h, w, 3] of whole tiles."""
    rows, columns = (length // tile_size for length in view.shape[:2])
    tiles = view.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(tiles).reshape(-1, 3, tile_size, tile_size)


def normalize_tiles(
    tiles: np.ndarray,
    rescale_factor: float | None = 1 / 255,
    mean: Sequence[float] | float | None = OPENAI_CLIP_MEAN,
    std: Sequence[float] | float | None = OPENAI_CLIP_STD,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """`(tiles * rescale_factor - mean) / std`, bit-equal to CLIP's processor, whose product is rounded once, from
    float64.

    Args:
        tiles: uint8[..., 3, tile, tile].
        rescale_factor: None leaves the product out.
        mean, std: of one or of three channels; a mean of None leaves both out.
        out: float32 of the same shape, written to where given.

    Returns:
        float32[..., 3, tile, tile].
    """
    out = np.empty(tiles.shape, np.float32) if out is None else out
    if rescale_factor is None:
        out[...] = tiles
    else:
        np.multiply(tiles, rescale_factor, out=out, dtype=np.float64, casting="same_kind")
    if mean is not None:
        np.subtract(out, np.asarray(mean, np.float32).reshape(-1, 1, 1), out=out)
        np.divide(out, np.asarray(std, np.float32).reshape(-1, 1, 1), out=out)
    return out


def normalize_views(tiles: dict[int, np.ndarray], arithmetic: tuple, out: np.ndarray):
    """The tiles of all scales as one array, normalised in threads. Scales are taken out of `tiles` on the way: the
    largest 8-bit tiles are dropped first.

    Args:
        tiles: {scale: uint8[T, 3, tile, tile]}, ascending (`image_to_tiles`); empty afterwards.
        arithmetic: (rescale_factor, mean, std) of `normalize_tiles`.
        out: float32[sum of all T, 3, tile, tile], written to.
    """
    ends = np.cumsum([len(tiles_of_scale) for tiles_of_scale in tiles.values()])
    parts = dict(zip(tiles, np.split(out, ends[:-1])))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for scale in reversed(parts):
            pairs = zip(tiles.pop(scale), parts[scale])
            _run(pool, [(normalize_tiles, tile, *arithmetic, part) for tile, part in pairs])
