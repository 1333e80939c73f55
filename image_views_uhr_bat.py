"""UHR-BAT image views: an RGB image to the square view of every scale, cut into tiles and normalised (section 3.3).

The image is letterboxed to a square (centred, the mean colour), the square is resized to every scale with Pillow's
bicubic, and each of these views is cut into tiles, row by row. The square itself is never built, and an image that is
streamed is never held whole either: rows go through as strips, and a view is finished band by band. What comes in is
what `read_image` gave out and `check_scales` let pass; nothing is checked here.

Letters: T tiles of a scale. Sizes are (height, width).
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from .geometry_uhr_bat import letterbox
from .raster_reading_uhr_bat import PAD_COLOR, RasterImage

# Pixels of one strip of rows on its way to the scales. Pillow prepares every strip anew, so larger strips are faster;
# of a streamed image, strips are a good part of the memory.
STRIP_PIXELS, STREAMED_STRIP_PIXELS = 2**21, 2**19
# Rows of a view that are resized together, at least. Neighbouring bands overlap by the filter's reach.
BAND_ROWS = 96
# Bytes of the rows that wait for their vertical pass. Above this, scales are done in several passes over the image.
# Needed only where side and scale are coprime and large.
WINDOW_BYTES = 2**29
# Pixels on each side that the widest of Pillow's filters, Lanczos, reads.
WIDEST_FILTER = 3
# Pillow resizes outside of Python's lock. More threads hold more strips and wait for the one that reads.
NUM_THREADS = min(4, os.cpu_count() or 1)


def _run(pool, calls):
    """Call functions in threads, `calls` being (function, *arguments), and wait for them."""
    for call in [pool.submit(*call) for call in calls]:
        call.result()  # raises what a thread raised


# Strips: the rows that come in


def _strips(image, pad_color, strip_pixels):
    """Strips of rows as wide as the letterboxed square, from top to bottom, of an image in memory or in a file."""
    side, _, left = letterbox((image.height, image.width))
    in_memory = isinstance(image, Image.Image)
    num_rows = max(1, (strip_pixels or (STRIP_PIXELS if in_memory else STREAMED_STRIP_PIXELS)) // side)
    if in_memory:
        # Pasting clips, and does not ask for Pillow's limit as cropping does.
        parts = ((image, (left, -start)) for start in range(0, image.height, num_rows))
    else:
        parts = ((part, (left, 0)) for part in image.strips(num_rows))
    for start, (part, corner) in zip(range(0, image.height, num_rows), parts):
        strip = Image.new("RGB", (side, min(num_rows, image.height - start)), pad_color)
        strip.paste(part, corner)
        yield strip


def _read_ahead(strips):
    """The strips of a generator, each read while the one before it is resized."""
    with ThreadPoolExecutor(1) as reader:  # one thread from first to last, as `RasterImage.masked_strips` asks
        coming = reader.submit(next, strips, None)
        while (strip := coming.result()) is not None:
            coming = reader.submit(next, strips, None)
            yield strip


# Bands: the rows that go out


class _Band(NamedTuple):
    """Rows (first, last + 1) that are resized together: of the view, of the square that they show, and of the square
    with what the filter reaches on both sides."""

    view: tuple[int, int]
    square: tuple[int, int]
    window: tuple[int, int]


def _bands(side, scale, band_rows) -> list[_Band]:
    """Bands of `band_rows` or more rows of the view, from top to bottom.

    Bands start where a source row and an output row coincide; otherwise Pillow's coefficients differ in the last bit.
    Where side and scale are coprime, the whole view is one band.
    """
    num_parts = math.gcd(side, scale)
    parts_per_band = math.ceil(band_rows * num_parts / scale)
    reach = math.ceil(WIDEST_FILTER * max(1, side / scale)) + 1
    bands = []
    for start in range(0, num_parts, parts_per_band):
        stop = min(start + parts_per_band, num_parts)
        view, square = ((start * rows // num_parts, stop * rows // num_parts) for rows in (scale, side))
        bands.append(_Band(view, square, (max(0, square[0] - reach), min(side, square[1] + reach))))
    return bands


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
    columns of a band follow as soon as its rows are there: only these are held.
    """

    def __init__(self, side, scale, tile_size, pad_color, resample, band_rows):
        self.scale, self.tile_size, self.pad_color, self.resample = scale, tile_size, pad_color, resample
        # Bands whose rows are not all in yet, from top to bottom.
        self.bands = _bands(side, scale, band_rows)
        # The narrowed rows, so far, of every band that has some.
        self.windows = {}
        self.tiles = np.empty((scale // tile_size, scale // tile_size, 3, tile_size, tile_size), np.uint8)

    def narrow(self, strip, top):
        """The horizontal pass of a strip whose first row is row `top` of the square."""
        strip = strip.resize((self.scale, strip.height), self.resample)
        for band in self.bands:
            if band.window[0] < top + strip.height:
                if band not in self.windows:
                    self.windows[band] = self._letterbox(band)
                self.windows[band].paste(strip, (0, top - band.window[0]))

    def finish(self, bottom):
        """[(band, its window)] of the bands that need no row from row `bottom` of the square on."""
        finished = [band for band in self.bands if band.window[1] <= bottom]
        self.bands = self.bands[len(finished) :]
        return [(band, self.windows.pop(band, None) or self._letterbox(band)) for band in finished]

    def _letterbox(self, band):
        """The window of a band before any of the image is in it."""
        return Image.new("RGB", (self.scale, band.window[1] - band.window[0]), self.pad_color)

    def cut(self, band, window, column):
        """The vertical pass of one column of tiles in a band."""
        columns = Image.new("RGB", (self.tile_size, window.height))
        columns.paste(window, (-column * self.tile_size, 0))
        first, last = (row - band.window[0] for row in band.square)
        rows = np.arange(*band.view)
        box = (0, first, self.tile_size, last)
        for channel, pixels in enumerate(columns.resize((self.tile_size, len(rows)), self.resample, box).split()):
            self.tiles[rows // self.tile_size, column, channel, rows % self.tile_size] = pixels


# Tiles


def image_to_tiles(
    image: Image.Image | RasterImage,
    scales: Sequence[int],
    tile_size: int,
    pad_color: Sequence[int] = PAD_COLOR,
    resample: int = Image.Resampling.BICUBIC,
    *,
    strip_pixels: int | None = None,
    band_rows: int = BAND_ROWS,
    window_bytes: int = WINDOW_BYTES,
) -> dict[int, np.ndarray]:
    """The view of every scale of an image, cut into tiles row by row.

    Bit-equal to pasting the image into its letterboxed square and resizing that, whatever the last three arguments,
    which bound the memory. The image is gone through in strips, once for all scales that fit `window_bytes` together.

    Args:
        image: 8-bit RGB, in memory or streamed (`read_image`).
        scales: sides of the views in pixels, ascending multiples of the tile (`check_scales`).
        tile_size: pixels a side of a tile.
        pad_color: RGB of the letterbox, 0..255.
        resample: Pillow's filter.
        strip_pixels: pixels that are read at once; by default `STRIP_PIXELS`, or `STREAMED_STRIP_PIXELS` of a stream.
        band_rows: rows of a view that are resized together, at least.
        window_bytes: bytes of the rows that wait to be resized.

    Returns:
        {scale: uint8[T, 3, tile, tile]} with T = (scale / tile)^2.

    Raises:
        OSError: a streamed file turns out to be damaged.
    """
    pad_color, (side, top, _) = tuple(pad_color), letterbox((image.height, image.width))
    passes, tiles = _passes(scales, side, band_rows, window_bytes), {}
    total = len(passes) * image.height
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        logging.tqdm(total=total, desc="Resizing", unit="row", delay=2, leave=False) as progress,
    ):
        for group in passes:
            # The longest work first.
            views = [_View(side, scale, tile_size, pad_color, resample, band_rows) for scale in reversed(group)]
            row = top
            for strip in _read_ahead(_strips(image, pad_color, strip_pixels)):
                _run(pool, [(view.narrow, strip, row) for view in views])
                row += strip.height
                bottom = row if row < top + image.height else side
                finished = [(view, *part) for view in views for part in view.finish(bottom)]
                cuts = [(view.cut, *part, column) for view, *part in finished for column in range(len(view.tiles))]
                _run(pool, cuts)
                progress.update(strip.height)
            tiles |= {view.scale: view.tiles.reshape(-1, *view.tiles.shape[2:]) for view in views}
    return {scale: tiles[scale] for scale in scales}


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


__all__ = ["PAD_COLOR", "image_to_tiles", "normalize_tiles", "normalize_views"]
