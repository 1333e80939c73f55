# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT raster values: what becomes 8 bits of the values of a file, and which of them are no part of the image.

Letters: C bands, h and w height and width in pixels. Sizes are (height, width).
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

# Pixels that are looked at for percentiles, all of a smaller image; and, where a larger one has no overviews, the blocks
# a side that they are spread over.
SAMPLE_PIXELS, SAMPLE_BLOCKS = 2**22, 8
# Percent of the values below and above the range of `value_range="percentile"`.
PERCENTILES = (2, 98)
# 16-bit data below this part of their range are as good as black where the full range is shown.
DARK = 1 / 4
# A stated range that leaves more than this part of the values outside shows next to nothing.
CUT_OFF = 0.95
# Cells along the longer side of the grid on which what lies beside the border is told from the rest.
COLLAR_SIDE = 1024
# Of a collar that is warned of: its part of the image, and how far JPEG takes its pixels, of 255.
COLLAR_PART, COLLAR_NOISE = 1 / 3, 15


def stretch(values, low, high):
    """float values to uint8, low -> 0 and high -> 255, to the nearest; what lies outside is cut off."""
    level = (np.nan_to_num(values.astype(np.float64), nan=low) - low) * (255 / (high - low))
    return np.rint(level.clip(0, 255)).astype(np.uint8)


def check_value_range(value_range, num_bands: int, name: str):
    """What `value_range` says: None, "dtype", "percentile", or float[C, 2] lows and highs. Raises `ValueError`."""
    if value_range is None or (isinstance(value_range, str) and value_range in ("dtype", "percentile")):
        return value_range
    try:
        ranges = np.asarray(value_range, float)
        ranges = np.broadcast_to(ranges, (num_bands, 2))
        with np.errstate(over="ignore"):
            widths = ranges[:, 1] - ranges[:, 0]
        if (widths > 0).all() and np.isfinite(widths).all():
            return ranges
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"{name}: `value_range` is 'dtype', 'percentile', (low, high) or such a pair for each of {num_bands} bands, finite "
        f"numbers, low below high. Got {str(value_range)[:200]}."
    )


# What is no part of the image


def check_nodata(nodata: Any, name: str) -> tuple[float, float] | None:
    """(value, tolerance) of a number or of both. Raises `ValueError`."""
    if nodata is None:
        return None
    try:
        value, tolerance = (nodata, 0) if np.ndim(nodata) == 0 else nodata
        value, tolerance = float(value), float(tolerance)
        if math.isfinite(value) and 0 <= tolerance < math.inf:
            return value, tolerance
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"{name}: `nodata` is a number, or (value, tolerance) with a tolerance of 0 or more. Got {str(nodata)[:200]}."
    )


def is_close(values: np.ndarray, value: float, tolerance: float) -> np.ndarray:
    """bool[h, w]: where all bands of values [C, h, w] are within a tolerance of a value."""
    if tolerance == 0:
        return (values == value).all(axis=0)
    return (np.abs(values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64) - value) <= tolerance).all(
        axis=0
    )


def beside_border(close: np.ndarray) -> np.ndarray:
    """bool[h, w]: the cells that are connected to the border through cells of `close`, and the neighbours of these."""
    reached = np.zeros_like(close)
    reached[[0, -1]], reached[:, [0, -1]] = close[[0, -1]], close[:, [0, -1]]
    before = -1
    while (now := np.count_nonzero(reached)) != before:
        before = now
        for grid, allowed in ((reached, close), (reached.T, close.T)):
            for order in (range(1, len(grid)), range(len(grid) - 2, -1, -1)):
                for row in order:
                    grid[row] |= grid[row - 1 if order.step > 0 else row + 1] & allowed[row]
    padded = np.pad(reached, 1)
    height, width = close.shape
    return np.any(
        [padded[row : row + height, column : column + width] for row in range(3) for column in range(3)], axis=0
    )


def at_pixels(cells: np.ndarray, box, size: tuple[int, int], whole: tuple[int, int]) -> np.ndarray:
    """bool[size]: cells that lie over a whole image, looked up at the pixels of a box (top, left, bottom, right) of it that
    is read in `size`."""
    places = []
    for axis in (0, 1):
        step = (box[axis + 2] - box[axis]) / size[axis]
        pixels = box[axis] + (np.arange(size[axis]) + 0.5) * step
        places.append((pixels * cells.shape[axis] / whole[axis]).astype(np.int64).clip(0, cells.shape[axis] - 1))
    return cells[np.ix_(*places)]


# Values to 8 bits


def value_tables(
    dataset, bands: list[int], value_range: Any, look: Callable, name: str, warn_of_collars: bool
) -> tuple[list[np.ndarray] | None, np.ndarray | None, bool]:
    """What makes 8 bits of the values.

    Args:
        dataset: rasterio's.
        bands: numbers from 1.
        value_range: as of `RasterImage`.
        look: a function without arguments that gives some values [C, h, w] and which of them are valid, bool[h, w].
        name: of the image in errors.
        warn_of_collars: whether to look for a border of one colour.

    Returns:
        (a table of uint8 for every band of small integers, of a palette three, else None; float[C, 2] lows and highs, None
        of a palette; whether 0 is white).

    Raises:
        ValueError: types and ranges that no image can be made of.
    """
    band, dtype = bands[0], np.dtype(dataset.dtypes[bands[0] - 1])
    structure = dataset.tags(ns="IMAGE_STRUCTURE") | dataset.tags(band, ns="IMAGE_STRUCTURE")
    bits = int(structure.get("NBITS", 8 * dtype.itemsize))
    inverted = structure.get("MINISWHITE") == "YES"
    if dtype.kind not in "uif":
        raise ValueError(f"{name}: pixels are {dtype}, which no range of values makes an image of.")
    value_range = check_value_range(value_range, len(bands), name)
    in_words = value_range is None or isinstance(value_range, str)
    if in_words and len(bands) == 1 and dataset.colorinterp[band - 1].name == "palette":
        colours = dataset.colormap(band)
        size = np.iinfo(dtype).max + 1
        tables = [np.array([colours.get(value, (0, 0, 0))[c] for value in range(size)], np.uint8) for c in range(3)]
        return tables, None, inverted
    if (value_range is None or in_words and value_range == "dtype") and dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{name}: pixels are {dtype}, whose full range says nothing about black and white. Pass "
            f"value_range=(low, high), the values that become black and white, or value_range='percentile'."
        )
    seen = None
    if not in_words or value_range == "percentile" or value_range is None and bits > 8 or warn_of_collars:
        values, valid = look()
        seen = values[:, valid]
        seen = [band[np.isfinite(band)] for band in seen]
    if warn_of_collars:
        _warn_of_collar(values, valid, name)
    if value_range is None and bits > 8:
        _warn_of_darkness(_any_of(seen, name), bits, name)
    if value_range is None or in_words and value_range == "dtype":
        ranges = np.array([[0, 2**bits - 1]] * len(bands))
    elif in_words:
        low, high = np.percentile(_any_of(seen, name), PERCENTILES)
        ranges = np.array([[low, max(high, low + 1e-9 * max(1, abs(low)))]] * len(bands))
    else:
        ranges = _stored(value_range, [(dataset.scales[band - 1], dataset.offsets[band - 1]) for band in bands])
        _warn_of_cut_off(seen, ranges, value_range, name)
    tables = None
    if dtype in (np.uint8, np.uint16):
        tables = [stretch(np.arange(np.iinfo(dtype).max + 1), low, high) for low, high in ranges]
    return tables, ranges, inverted


def _any_of(seen, name):
    values = np.concatenate(seen)
    if not values.size:
        raise ValueError(f"{name}: no pixel that was looked at is valid: there is nothing to show.")
    return values


def _stored(ranges, scales):
    """Ranges in the units that scale and offset of the bands make of stored values, as stored values."""
    return np.stack([(limits - offset) / (scale or 1) for limits, (scale, offset) in zip(ranges, scales)])


def _warn_of_cut_off(seen, ranges, stated, name):
    num_values = sum(map(len, seen))
    outside = sum(np.count_nonzero((band < min(limits)) | (band > max(limits))) for band, limits in zip(seen, ranges))
    if num_values and outside > CUT_OFF * num_values:
        lows, highs = ([getattr(band, which)() for band in seen if len(band)] for which in ("min", "max"))
        scaled = (
            "" if np.array_equal(ranges, stated) else ", whose scale and offset make value_range one of stored values"
        )
        warnings.warn(
            f"{name}: {outside / num_values:.0%} of the values lie outside value_range={np.round(stated, 6).tolist()}{scaled}, "
            f"so that nearly nothing is to be seen: stored values go from {min(lows):.6g} to {max(highs):.6g}, black and "
            f"white are {np.round(ranges, 6).tolist()}. Pass another range, or value_range='percentile'.",
            stacklevel=2,
        )


def _warn_of_darkness(values, bits, name):
    brightest, white = int(values.max(initial=0)), 2**bits - 1
    if brightest < DARK * white:
        wanted = 2 ** max(8, brightest.bit_length()) - 1
        warnings.warn(
            f"{name}: {bits}-bit values go up to {brightest} of {white}, so that the image is dark. Pass the "
            f"values of black and white, as value_range=(0, {wanted}), or value_range='percentile'; "
            f"value_range='dtype' keeps the full range and says nothing.",
            stacklevel=2,
        )


def _warn_of_collar(values, valid, name):
    """One warning where more than `COLLAR_PART` of the image is one colour at its edge, that nothing says is no data."""
    step = -(-max(valid.shape) // (COLLAR_SIDE // 4))
    values, valid = values[:, ::step, ::step], valid[::step, ::step]
    if min(valid.shape) < 2:
        return
    edge = np.concatenate([values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1]], axis=1)
    grey = edge[0, (edge == edge[0]).all(axis=0) & np.isfinite(edge).all(axis=0)]
    if 4 * len(grey) < edge.shape[1]:
        return
    levels, counts = np.unique(grey, return_counts=True)
    value, finite = levels[counts.argmax()], values[np.isfinite(values)].astype(float)
    span = np.abs(finite - float(value)).max()
    tolerance = COLLAR_NOISE / 255 * span
    close = is_close(values, float(value), tolerance) | ~valid
    collar = beside_border(close) & close
    exact = is_close(values, float(value), tolerance / COLLAR_NOISE) | ~valid
    left = collar & valid  # of a collar that the file knows, nothing or what JPEG made of it
    if (
        collar.mean() <= COLLAR_PART
        or left.sum() < 0.02 * collar.sum()
        or exact[collar].mean() < 0.5
        or left.sum() < 16
    ):
        return
    noise = np.abs(values[:, left].astype(float) - float(value)).max()
    number = int(value) if float(value).is_integer() else float(value)
    wanted = number if noise == 0 else (number, math.ceil(tolerance))
    warnings.warn(
        f"{name}: {collar.mean():.0%} of the image is one colour at its edge, {number} in all bands, and visual tokens will "
        f"be spent on it. If it is no part of the image, pass nodata={wanted}.",
        stacklevel=2,
    )
