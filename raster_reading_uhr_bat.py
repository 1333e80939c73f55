"""UHR-BAT raster reading: GeoTIFF and whatever else GDAL opens becomes 8-bit RGB, some rows at a time.

rasterio, the extra `geo`, is imported where a raster is opened; the model loads without it. In this order: GDAL, what a
file says about itself, which bands and which part are asked for, values to 8 bits, the image. Sizes are (height, width),
coordinates (row, column).

Letters: C bands, h and w height and width in pixels.
"""

import io
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

# CLIP's mean colour in 8 bits, the letterbox of the released code; what is no part of an image takes it too.
PAD_COLOR = (122, 116, 104)
# Bytes of the rows that are asked of GDAL at once, at least one row of blocks: no block is decoded twice.
CHUNK_BYTES = 2**25
# Pixels that are looked at for percentiles, all of a smaller image; and, where a larger one has no overviews, the blocks
# a side that they are spread over.
SAMPLE_PIXELS, SAMPLE_BLOCKS = 2**22, 8
# Percent of the values below and above the range of `value_range="percentile"`.
PERCENTILES = (2, 98)
# 16-bit data below this part of their range are as good as black where the full range is shown.
DARK = 1 / 4
# Their decoders go from top to bottom, and start anew whenever the file is opened again.
SEQUENTIAL = ("JPEG", "PNG")

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JP2_SIGNATURES = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xffO\xffQ")


def reason(error: BaseException) -> str:
    """The error's type and text: the type says what an empty text, as that of a MemoryError, does not."""
    return f"{type(error).__name__}: {error}"


# GDAL


def import_rasterio():
    """The optional library, or `ImportError` with what to install."""
    try:
        import rasterio
    except ImportError as error:
        raise ImportError('Reading GeoTIFF and other rasters needs rasterio: pip install "uhr-bat[geo]"') from error
    return rasterio


def _settings(source, driver="") -> dict:
    """GDAL's options while a file is opened and read."""
    settings = {"GDAL_ERROR_ON_LIBJPEG_WARNING": "YES", "GDAL_ALLOW_LARGE_LIBJPEG_MEM_ALLOC": "YES"}
    if driver in SEQUENTIAL:
        settings["GDAL_CACHEMAX"] = CHUNK_BYTES  # nothing is read twice
    if "://" in str(source) or str(source).startswith("/vsi"):
        # No request for the files beside it, and none that a signed URL does not allow.
        settings |= {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "CPL_VSIL_CURL_USE_HEAD": "NO"}
    return settings


class _Complaints(logging.Handler):
    """What GDAL warns of in this thread. A warning is how its decoders say that pixels are damaged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.thread, self.texts = threading.get_ident(), []

    def emit(self, record):
        if record.thread == self.thread:
            self.texts.append(record.getMessage())


@contextmanager
def _no_warning_taken():
    """Raises `OSError` for a warning of GDAL inside a `with` block."""
    complaints, logger = _Complaints(), logging.getLogger("rasterio")
    logger.addHandler(complaints)
    try:
        yield
    finally:
        logger.removeHandler(complaints)
    if complaints.texts:
        raise OSError("; ".join(complaints.texts))


def _open_dataset(source, name, drivers=None):
    """rasterio's dataset of a path or a name that GDAL knows. Raises `OSError`."""
    rasterio = import_rasterio()
    from rasterio.errors import NotGeoreferencedWarning

    try:
        with warnings.catch_warnings(), rasterio.Env(**_settings(source)):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a plain image is welcome
            return rasterio.open(source, driver=list(drivers) if drivers else None)
    except Exception as error:
        raise OSError(f"{name}: the image cannot be opened ({reason(error)}).") from error


# What a file says about itself


def is_raster(start: bytes) -> bool:
    """Whether a file with these first 16 bytes is TIFF or JPEG 2000, which GDAL reads and Pillow reads in part."""
    return start.startswith((*TIFF_SIGNATURES, *JP2_SIGNATURES))


def is_dataset(source: Any) -> bool:
    """Whether it is an open dataset of rasterio, which need not be installed to ask."""
    return hasattr(source, "read_masks") and hasattr(source, "colorinterp")


def tiff_tags(file: io.IOBase) -> dict:
    """Tags of the first page of a TIFF; empty for what is none, or where they lie beyond the bytes that are there."""
    try:
        file.seek(0)
        header = file.read(8)
        if header[:4] not in TIFF_SIGNATURES:
            return {}
        header += file.read(8) if header[2] + header[3] == 43 else b""  # BigTIFF
        tags = ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        return dict(tags)
    except Exception:  # what cannot be read here is said by whatever decodes the image
        return {}


def _largest_page(dataset, source, name):
    """Number of the page of a TIFF that is the image, from 1. A thumbnail may come before it, or behind.

    Raises `ValueError` where several pages are as large: which of them, or whether they are bands, is not known.
    """
    sizes, pages = [dataset.shape], {int(page.split(":")[1]) for page in dataset.subdatasets}
    while True:
        try:
            page = _open_dataset(f"GTIFF_DIR:{len(sizes) + 1}:{source}", name)
        except OSError:
            break
        sizes.append(page.shape)
        page.close()
    largest = max(range(len(sizes)), key=lambda idx: (math.prod(sizes[idx]), -idx))
    same = [page for page in pages if sizes[page - 1] == sizes[largest]]
    if len(same) > 1:
        height, width = sizes[largest]
        raise ValueError(
            f"{name}: {len(same)} pages have {height} x {width} pixels: are they bands, or images? Pass the one that is "
            f"meant as 'GTIFF_DIR:{same[0]}:{source}', or write red, green and blue into one page."
        )
    return largest + 1


def _upright(orientation) -> tuple[bool, bool, bool]:
    """(transposed, rows reversed, columns reversed): what is done in this order to stored pixels by their EXIF tag."""
    return {
        1: (False, False, False),
        2: (False, False, True),
        3: (False, True, True),
        4: (False, True, False),
        5: (True, False, False),
        6: (True, False, True),
        7: (True, True, True),
        8: (True, True, False),
    }[orientation]


# Which bands and which part are asked for


def _colours(dataset) -> list[str]:
    return [colour.name for colour in dataset.colorinterp]


def choose_bands(dataset, bands: Sequence[int | str] | int | str | None, name: str) -> list[int]:
    """One band (grey) or three (red, green, blue), as numbers from 1.

    Args:
        bands: numbers, descriptions or colours ("red", "nir"); None takes what the file says: its red, green and blue
            wherever they stand, or its only band beside alpha. Where it says nothing, of two bands the first is grey,
            and of three or four the first three are red, green and blue.

    Raises:
        ValueError: names the bands of the file where the choice is not clear.
    """
    colours = _colours(dataset)
    descriptions = [(text or "").lower() for text in dataset.descriptions]
    there = ", ".join(
        f"{number} {text or colour}" for number, (text, colour) in enumerate(zip(dataset.descriptions, colours), 1)
    )
    if bands is not None:
        chosen = []
        for band in [bands] if isinstance(bands, (int, str)) else bands:
            if isinstance(band, str) and not band.isdigit():
                wanted = band.lower()
                named = descriptions if wanted in descriptions else colours
                wanted = "gray" if wanted == "grey" else wanted
                if named.count(wanted) != 1:
                    found = "no band" if wanted not in named else "more than one band"
                    raise ValueError(f"{name}: {found} is called {band!r}. Its bands are {there}.")
                chosen.append(named.index(wanted) + 1)
            else:
                chosen.append(int(band))
        if len(chosen) not in (1, 3) or not all(1 <= band <= dataset.count for band in chosen):
            raise ValueError(
                f"{name}: `bands` is one band or three, numbers from 1 to {dataset.count}. Got {bands}. Its bands are "
                f"{there}."
            )
        return chosen
    if all(colour in colours for colour in ("red", "green", "blue")):
        return [colours.index(colour) + 1 for colour in ("red", "green", "blue")]
    visible = [number for number, colour in enumerate(colours, 1) if colour != "alpha"]
    stated = [colour for colour in colours if colour not in ("gray", "undefined", "alpha", "palette")]
    if len(visible) == 1 or (len(visible) == 2 and not stated):
        return visible[:1]
    if stated or not 3 <= len(visible) <= 4:
        raise ValueError(
            f"{name}: which of {dataset.count} bands are red, green and blue? Pass `bands`, three numbers or names, or "
            f"one for grey. Its bands are {there}."
        )
    return visible[:3]


def choose_window(dataset, window, size: tuple[int, int], name: str) -> tuple[int, int, int, int]:
    """The part of an image that is read, (top, left, bottom, right) in pixels.

    Args:
        window: None is all of the image; (top, left, bottom, right) in pixels, rasterio's ((top, bottom), (left, right))
            or its `Window`; (west, south, east, north, crs) for bounds, which are cut off at the image's border and
            rounded outwards to whole pixels.
        size: (height, width) of the whole image.

    Raises:
        ValueError: a part that is empty or not inside the image; bounds for an image without coordinates.
    """
    height, width = size
    if window is None:
        return 0, 0, height, width
    if hasattr(window, "toranges"):
        window = window.toranges()
    if len(window) == 5:
        *bounds, crs = window
        if dataset.crs is None:
            raise ValueError(f"{name}: it has no coordinate system that bounds could be given in. Pass pixels.")
        from rasterio.warp import transform_bounds

        west, south, east, north = transform_bounds(crs, dataset.crs, *map(float, bounds))
        corners = [
            ~dataset.transform * corner for corner in ((west, south), (west, north), (east, south), (east, north))
        ]
        columns, rows = zip(*corners)
        # A millionth of a pixel is what the inverse rounds by.
        edges = [math.floor(min(rows) + 1e-6), math.floor(min(columns) + 1e-6)]
        edges += [math.ceil(max(rows) - 1e-6), math.ceil(max(columns) - 1e-6)]
        part = max(edges[0], 0), max(edges[1], 0), min(edges[2], height), min(edges[3], width)
        if part[0] >= part[2] or part[1] >= part[3]:
            raise ValueError(
                f"{name}: the bounds {window} lie outside the image, whose own are {tuple(dataset.bounds)}."
            )
        return part
    if len(window) == 2:
        (top, bottom), (left, right) = window
    else:
        top, left, bottom, right = window
    top, left, bottom, right = (int(edge) for edge in (top, left, bottom, right))
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise ValueError(
            f"{name}: the window (top {top}, left {left}, bottom {bottom}, right {right}) is not inside the image of "
            f"{height} x {width} pixels (height x width)."
        )
    return top, left, bottom, right


# Values to 8 bits


def check_value_range(value_range, num_bands: int):
    """What `value_range` says: None, "dtype", "percentile", or float[C] lows and highs. Raises `ValueError`."""
    if value_range is None or (isinstance(value_range, str) and value_range in ("dtype", "percentile")):
        return value_range
    try:
        ranges = np.asarray(value_range, float)
        ranges = np.broadcast_to(ranges, (num_bands, 2))
        if (ranges[:, 0] < ranges[:, 1]).all():
            return ranges
    except ValueError:
        pass
    raise ValueError(
        f"`value_range` is 'dtype', 'percentile', (low, high) or such a pair for each of {num_bands} bands, low below "
        f"high. Got {value_range}."
    )


def _stretch(values, low, high):
    """float values to uint8, low -> 0 and high -> 255, to the nearest; what lies outside is cut off."""
    level = (np.nan_to_num(values.astype(np.float64), nan=low) - low) * (255 / (high - low))
    return np.rint(level.clip(0, 255)).astype(np.uint8)


# The image


class RasterImage:
    """A raster that is read from top to bottom, some rows at a time, and never held whole.

    What the views ask of it is `height`, `width`, `masked` and `masked_strips`; errors name `filename`. It is read again
    for every pass, so the file must stay as it is. Several threads may read it at once.

    8-bit RGB as everything here. One band is grey or goes through its palette. A pixel is no part of the image where
    nodata, the mask, alpha or NaN say so in all chosen bands.

    Args:
        source: a path or any other name that GDAL knows ("/vsicurl/https://...", "s3://...", "GTIFF_DIR:2:a.tif"); the
            bytes of a file; or an open dataset of rasterio, which must stay open and is read by one thread at a time.
        bands: see `choose_bands`.
        value_range: what becomes 0 and 255. "dtype" is the full range of 8 or 16 bits, or of as many as the file says
            that it uses (`NBITS`); (low, high) of all bands, or a pair for each; "percentile" the 2nd and the 98th of all
            chosen bands together without nodata, of all pixels up to `SAMPLE_PIXELS`, otherwise of an overview or of
            blocks spread over the image, the same whatever `overviews` says. None is "dtype" with a warning where 16
            bits show less than a quarter of their range.
        window: see `choose_window`.
        overviews: "auto" reads views of the image from the file's overviews where it has them, "off" never does.
        orientation: EXIF's, 1 to 8, of a file whose stored pixels are turned.
        name: what errors call the image.
        drivers: GDAL's that may open it, all where none is given.

    Attributes:
        height, width: of the part that is read, in pixels.
        crs, transform: rasterio's coordinate system, and affine from (column, row) of that part to coordinates; None
            where the file has none.

    Raises:
        ImportError: rasterio is not installed.
        OSError: the file cannot be opened.
        ValueError: bands, values, a window or pages that do not make one RGB image.
    """

    def __init__(
        self,
        source: Any,
        *,
        bands: Sequence[int | str] | int | str | None = None,
        value_range: str | Sequence | None = None,
        window: Any = None,
        overviews: str | None = None,
        orientation: int = 1,
        name: str | None = None,
        drivers: Sequence[str] | None = None,
    ):
        if overviews not in (None, "auto", "off"):
            raise ValueError(f"`overviews` is 'auto' or 'off'. Got {overviews!r}.")
        self._given = source if is_dataset(source) else None
        self._lock = threading.Lock()
        self._drivers = drivers
        self._factor = 1
        if self._given is not None:
            self.filename = name or source.name
            self._setup(source, bands, value_range, window, overviews, orientation)
            return
        if isinstance(source, bytes):
            self._file = import_rasterio().MemoryFile(source)  # lives as long as the image
            self.filename, self._source = name or "image", self._file.name
        else:
            self._source = os.fspath(source)
            self.filename = name or self._source
        dataset = _open_dataset(self._source, self.filename, drivers)
        if dataset.driver == "GTiff" and not self._source.startswith("GTIFF_DIR:"):
            page = _largest_page(dataset, self._source, self.filename)
            if page != 1:
                dataset.close()
                self._source = f"GTIFF_DIR:{page}:{self._source}"
                dataset = _open_dataset(self._source, self.filename, drivers)
        try:
            self._setup(dataset, bands, value_range, window, overviews, orientation)
        finally:
            dataset.close()

    def _setup(self, dataset, bands, value_range, window, overviews, orientation):
        self._sequential = dataset.driver in SEQUENTIAL
        self._settings = _settings(dataset.name, dataset.driver)
        self._transposed, self._rows_reversed, self._columns_reversed = upright = _upright(orientation)
        size = dataset.shape[::-1] if self._transposed else dataset.shape
        if not dataset.count or min(size) < 1:
            raise ValueError(f"{self.filename}: {dataset.count} bands of {size[0]} x {size[1]} pixels show nothing.")
        self._part = choose_window(dataset, window, size, self.filename)
        top, left, bottom, right = self._part
        self.height, self.width = bottom - top, right - left
        placed = not dataset.transform.is_identity and not any(upright)
        self.crs = dataset.crs if placed else None
        self.transform = dataset.transform * dataset.transform.translation(left, top) if placed else None

        self.bands = choose_bands(dataset, bands, self.filename)
        blocks = dataset.block_shapes[self.bands[0] - 1]
        self._block_rows = blocks[1] if self._transposed else blocks[0]
        self._dtype = np.dtype(dataset.dtypes[self.bands[0] - 1])
        # JPEG's are not those that a whole reading would give, and PNG has none. A turned image is read as it is.
        usable = overviews != "off" and not self._sequential and not any(upright)
        self._overviews = dataset.overviews(self.bands[0]) if usable else []
        self._sampled_overviews = dataset.overviews(self.bands[0]) if not self._sequential else []
        flags = [dataset.mask_flag_enums[band - 1] for band in self.bands]
        plain = dataset.driver in SEQUENTIAL  # Pillow's pictures have no mask: alpha is dropped
        self.masked = not plain and (
            self._dtype.kind == "f" or any("all_valid" not in [flag.name for flag in band] for band in flags)
        )
        self._set_values(dataset, value_range)

    def _set_values(self, dataset, value_range):
        """What makes 8 bits of the values: a table for small integers, or lows and highs."""
        band, dtype = self.bands[0], self._dtype
        structure = dataset.tags(ns="IMAGE_STRUCTURE") | dataset.tags(band, ns="IMAGE_STRUCTURE")
        bits = int(structure.get("NBITS", 8 * dtype.itemsize))
        self._inverted = structure.get("MINISWHITE") == "YES"
        self._tables = self._ranges = None
        if dtype.kind not in "uif":
            raise ValueError(f"{self.filename}: pixels are {dtype}, which no range of values makes an image of.")
        value_range = check_value_range(value_range, len(self.bands))
        if value_range is None and len(self.bands) == 1 and _colours(dataset)[band - 1] == "palette":
            colours = dataset.colormap(band)
            size = np.iinfo(dtype).max + 1
            self._tables = [
                np.array([colours.get(value, (0, 0, 0))[c] for value in range(size)], np.uint8) for c in range(3)
            ]
            return
        if value_range is None or isinstance(value_range, str) and value_range == "dtype":
            if dtype not in (np.uint8, np.uint16):
                raise ValueError(
                    f"{self.filename}: pixels are {dtype}, whose full range says nothing about black and white. Pass "
                    f"value_range=(low, high), the values that become black and white, or value_range='percentile'."
                )
            if value_range is None and bits > 8:
                self._warn_of_darkness(dataset, bits)
            value_range = np.array([[0, 2**bits - 1]] * len(self.bands))
        elif isinstance(value_range, str):
            low, high = np.percentile(self._sample(dataset), PERCENTILES)
            value_range = np.array([[low, max(high, low + 1e-9 * max(1, abs(low)))]] * len(self.bands))
        self._ranges = value_range
        if dtype in (np.uint8, np.uint16):
            self._tables = [_stretch(np.arange(np.iinfo(dtype).max + 1), low, high) for low, high in value_range]

    def _warn_of_darkness(self, dataset, bits):
        values = self._sample(dataset)
        brightest, white = int(values.max(initial=0)), 2**bits - 1
        if brightest < DARK * white:
            wanted = 2 ** max(8, brightest.bit_length()) - 1
            warnings.warn(
                f"{self.filename}: {bits}-bit values go up to {brightest} of {white}, so that the image is dark. Pass the "
                f"values of black and white, as value_range=(0, {wanted}), or value_range='percentile'; "
                f"value_range='dtype' keeps the full range and says nothing.",
                stacklevel=2,
            )

    # Reading

    @contextmanager
    def _dataset(self):
        """The dataset to read from: a new one, so that its cached blocks go when it is closed, or the one given."""
        if self._given is not None:
            with self._lock:
                yield self._given
            return
        dataset = _open_dataset(self._source, self.filename, self._drivers)
        try:
            yield dataset
        finally:
            dataset.close()

    def _read(self, dataset, box, size, resampling="nearest"):
        """Values [C, h, w] and which are valid, bool[h, w] or None, of a box (top, left, bottom, right) of the file's
        upright pixels in `size` (height, width). Raises `OSError`."""
        rasterio = import_rasterio()
        top, left, bottom, right = box
        full = dataset.shape[::-1] if self._transposed else dataset.shape
        if self._rows_reversed:
            top, bottom = full[0] - bottom, full[0] - top
        if self._columns_reversed:
            left, right = full[1] - right, full[1] - left
        if self._transposed:
            top, left, bottom, right, size = left, top, right, bottom, size[::-1]
        options = {
            "window": rasterio.windows.Window(left, top, right - left, bottom - top),
            "resampling": rasterio.enums.Resampling[resampling],
        }
        try:
            with rasterio.Env(**self._settings), _no_warning_taken():
                values = dataset.read(self.bands, out_shape=(len(self.bands), *size), **options)
                masks = dataset.read_masks(self.bands, out_shape=values.shape, **options) if self.masked else None
        except Exception as error:
            raise OSError(f"{self.filename}: the image cannot be decoded whole ({reason(error)}).") from error
        valid = None
        if masks is not None:
            valid = masks.any(axis=0)
            if values.dtype.kind == "f":
                valid &= np.isfinite(values).any(axis=0)
        return self._turn(values), valid if valid is None else self._turn(valid)

    def _turn(self, pixels):
        """Stored pixels [..., h, w] upright."""
        if self._transposed:
            pixels = pixels.swapaxes(-1, -2)
        if self._rows_reversed:
            pixels = pixels[..., ::-1, :]
        return pixels[..., ::-1] if self._columns_reversed else pixels

    def _sample(self, dataset) -> np.ndarray:
        """Valid values of all chosen bands, in one dimension."""
        top, left, bottom, right = self._part
        boxes = [(self._part, (self.height, self.width))]
        num_pixels = self.height * self.width
        if num_pixels > SAMPLE_PIXELS:
            factors = [factor for factor in self._sampled_overviews if num_pixels >= SAMPLE_PIXELS / 16 * factor**2]
            if factors:
                factor = max(factors)
                boxes = [(self._part, (-(-self.height // factor), -(-self.width // factor)))]
            else:
                side = math.isqrt(SAMPLE_PIXELS // SAMPLE_BLOCKS**2)
                corners = (
                    (int(row), int(column))
                    for row in np.linspace(top, max(top, bottom - side), SAMPLE_BLOCKS)
                    for column in np.linspace(left, max(left, right - side), SAMPLE_BLOCKS)
                )
                boxes = [(row, column, min(row + side, bottom), min(column + side, right)) for row, column in corners]
                boxes = [(box, (box[2] - box[0], box[3] - box[1])) for box in boxes]
        parts = []
        for box, size in boxes:
            values, valid = self._read(dataset, box, size)
            values = values.reshape(len(values), -1) if valid is None else values[:, valid]
            parts.append(values[np.isfinite(values)])
        values = np.concatenate(parts)
        if not values.size:
            raise ValueError(f"{self.filename}: no pixel that was looked at is valid: there is nothing to show.")
        return values

    def _to_rgb(self, values):
        """uint8[h, w, 3] from values [C, h, w]."""
        if self._tables is None:
            rgb = np.stack([_stretch(band, *limits) for band, limits in zip(values, self._ranges)], axis=-1)
        else:
            values = np.broadcast_to(values, (len(self._tables), *values.shape[1:]))  # a palette has three tables
            rgb = np.stack([table[band] for table, band in zip(self._tables, values)], axis=-1)
        rgb = np.broadcast_to(rgb, (*rgb.shape[:2], 3))
        return 255 - rgb if self._inverted else rgb

    def _chunks(self):
        """(uint8[h, w, 3], bool[h, w] or None) from top to bottom, in rows of whole blocks."""
        top, left, bottom, right = self._part
        row_bytes = self.width * len(self.bands) * self._dtype.itemsize
        rows = self._block_rows * max(1, CHUNK_BYTES // (self._block_rows * row_bytes))
        first = rows - top // self._factor % self._block_rows
        edges = [0, *range(first, self.height, rows), self.height]
        step = (bottom - top) / self.height  # 1 but for overviews
        for start, stop in zip(edges, edges[1:]):
            box = top + start * step, left, top + stop * step, right
            if self._factor == 1:
                box = top + start, left, top + stop, right
            yield box, (stop - start, self.width)

    def masked_strips(self, num_rows: int) -> Iterator[tuple[Image.Image, np.ndarray | None]]:
        """The image from top to bottom in strips of `num_rows` rows, the last one of what is left.

        One thread must ask for all strips of a pass.

        Yields:
            (RGB, bool[h, w]): a strip, and which of its pixels are part of the image; None instead where all are.

        Raises:
            OSError: the file turns out to be damaged.
        """
        chunks = self._read_chunks()
        pixels, valid = next(chunks)
        for start in range(0, self.height, num_rows):
            size = min(num_rows, self.height - start), self.width
            strip, mask = np.empty((*size, 3), np.uint8), np.ones(size, bool) if self.masked else None
            row = 0
            while row < size[0]:
                if not len(pixels):
                    pixels, valid = next(chunks)
                taken = min(len(pixels), size[0] - row)
                strip[row : row + taken], pixels = pixels[:taken], pixels[taken:]
                if mask is not None:
                    mask[row : row + taken], valid = valid[:taken], valid[taken:]
                row += taken
            yield Image.fromarray(strip), None if mask is None or mask.all() else mask

    def _read_chunks(self):
        with self._pass() as read:
            for box, size in self._chunks():
                values, valid = read(box, size)
                yield self._to_rgb(values), valid

    @contextmanager
    def _pass(self):
        """A function that reads boxes: from one dataset where the file is decoded from top to bottom, else from a new one
        each time, whose cached blocks go with it."""
        if self._sequential:
            with self._dataset() as dataset:
                yield lambda *box: self._read(dataset, *box)
        else:

            def read(*box):
                with self._dataset() as dataset:
                    return self._read(dataset, *box)

            yield read

    def strips(self, num_rows: int) -> Iterator[Image.Image]:
        """As `masked_strips`, RGB alone: what is no part of the image has the letterbox's colour."""
        for strip, valid in self.masked_strips(num_rows):
            yield _fill(strip, valid)

    def for_scale(self, side: int) -> "RasterImage":
        """The image to make views of at most `side` pixels from: itself, or as its coarsest overview that is no smaller
        shows it."""
        factors = [factor for factor in self._overviews if max(self.height, self.width) >= factor * side]
        if not factors or self._factor != 1:
            return self
        reduced = copy(self)
        reduced._factor = max(factors)
        reduced.height, reduced.width = (-(-length // reduced._factor) for length in (self.height, self.width))
        if self.transform is not None:
            steps = self.width / reduced.width, self.height / reduced.height
            reduced.transform = self.transform * self.transform.scale(*steps)
        return reduced

    def picture(self, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Image.Image:
        """An RGB copy in another size (height, width), to look at; of a box (top, left, bottom, right) in pixels where
        one is given. Pixels are averaged, and overviews used where the file has them."""
        top, left, _, _ = self._part
        box = box or (0, 0, self.height, self.width)
        box = box[0] + top, box[1] + left, box[2] + top, box[3] + left
        averaged = self._ranges is not None  # the mean of two entries of a palette is a third
        with self._dataset() as dataset:
            values, valid = self._read(dataset, box, size, "average" if averaged else "nearest")
        return _fill(Image.fromarray(self._to_rgb(values)), valid)

    def __array__(self, dtype=None, copy=None):
        """uint8[height, width, 3], held whole."""
        pixels = np.concatenate([np.asarray(strip) for strip in self.strips(max(1, CHUNK_BYTES // (3 * self.width)))])
        return pixels if dtype is None else pixels.astype(dtype)

    def __repr__(self):
        return f"RasterImage({self.filename!r}, {self.height} x {self.width}, bands {self.bands})"


def _fill(strip, valid):
    """The strip with the letterbox's colour where it is not valid."""
    if valid is not None:
        strip.paste(PAD_COLOR, mask=Image.fromarray(~valid))
    return strip


__all__ = ["PAD_COLOR", "RasterImage", "import_rasterio", "is_dataset", "is_raster", "reason", "tiff_tags"]
