"""UHR-BAT raster reading: GeoTIFF and whatever else GDAL opens becomes 8-bit RGB, some rows at a time.

How files are opened, and their bands and parts chosen, is in `raster_files_uhr_bat.py`. Sizes are (height, width),
coordinates (row, column).

Letters: C bands, h and w height and width in pixels.
"""

import io
import math
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from .raster_files_uhr_bat import (
    CHUNK_BYTES,
    SEQUENTIAL,
    check_page,
    check_value_range,
    choose_bands,
    complaints_are_errors,
    gdal_settings,
    import_rasterio,
    is_dataset,
    largest_page,
    open_dataset,
    reason,
    tiff_pages,
    upright_by,
)
from .raster_windows_uhr_bat import choose_window, compose, upright_transform, wkt_names_file

# CLIP's mean colour in 8 bits, the letterbox of the released code; what is no part of an image takes it too.
PAD_COLOR = (122, 116, 104)
# Pixels that are looked at for percentiles, all of a smaller image; and, where a larger one has no overviews, the blocks
# a side that they are spread over.
SAMPLE_PIXELS, SAMPLE_BLOCKS = 2**22, 8
# Subdatasets that an error names.
MAX_NAMED = 50
# Percent of the values below and above the range of `value_range="percentile"`.
PERCENTILES = (2, 98)
# 16-bit data below this part of their range are as good as black where the full range is shown.
DARK = 1 / 4


def _stretch(values, low, high):
    """float values to uint8, low -> 0 and high -> 255, to the nearest; what lies outside is cut off."""
    level = (np.nan_to_num(values.astype(np.float64), nan=low) - low) * (255 / (high - low))
    return np.rint(level.clip(0, 255)).astype(np.uint8)


# The image


class ImageSource:
    """An image that is read part by part and never held whole: what the views and the pyramid ask of it. A raster, or a
    class of your own that makes pixels when they are asked for.

    Attributes:
        height, width: in pixels.
        filename: what errors call it.
        masked: whether some of its pixels may be no part of the image.
        kind: what it is, in a word: remote code has classes of its own, so that no class is asked for.
        crs, transform: where it lies, as rasterio has it; None: nowhere.
    """

    kind = "source"
    filename = "image"
    masked = False
    crs = transform = None

    def for_scale(self, side: int) -> "ImageSource":
        """The image to make views of at most `side` pixels from: itself, or a smaller copy that has at least so many."""
        return self

    def parts(self):
        """A context manager that gives a function: (top, left, bottom, right) in pixels of this image -> (uint8[h, w, 3],
        bool[h, w] of those that are part of it; None of an image that is not `masked`)."""
        raise NotImplementedError

    def masked_strips(self, num_rows: int) -> Iterator[tuple[Image.Image, np.ndarray | None]]:
        """The image from top to bottom in strips of `num_rows` rows, the last one of what is left: RGB, and which of its
        pixels are part of the image, bool[h, w], or None where all are."""
        with self.parts() as read:
            for start in range(0, self.height, num_rows):
                pixels, valid = read(start, 0, min(start + num_rows, self.height), self.width)
                yield pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), valid


class GivenSource(ImageSource):
    """Pixels of somebody's own: an object with `height`, `width` and `parts()`, and perhaps `for_scale(side)`, `filename`
    and `masked`, of which what it gives is checked."""

    def __init__(self, source: Any):
        self.source, self.height, self.width = source, int(source.height), int(source.width)
        self.filename = str(getattr(source, "filename", "") or type(source).__name__)
        self.masked = bool(getattr(source, "masked", False))
        self.crs, self.transform = getattr(source, "crs", None), getattr(source, "transform", None)

    def for_scale(self, side: int) -> ImageSource:
        smaller = self.source.for_scale(side) if hasattr(self.source, "for_scale") else self.source
        return self if smaller is self.source else as_source(smaller)

    @contextmanager
    def parts(self):
        with self.source.parts() as given:

            def read(top, left, bottom, right):
                pixels, valid = given(top, left, bottom, right)
                pixels = np.asarray(pixels)
                for what, found, dtype, shape in (("pixels", pixels, np.uint8, (3,)), ("mask", valid, np.bool_, ())):
                    wanted = bottom - top, right - left, *shape
                    if found is not None and (found.dtype != dtype or found.shape != wanted):
                        raise ValueError(
                            f"{self.filename}: `parts()` gave {what} of {found.dtype} {found.shape} for the box "
                            f"{top, left, bottom, right}, and must give {np.dtype(dtype)} {wanted}."
                        )
                if self.masked and valid is None:
                    valid = np.ones(pixels.shape[:2], bool)
                return np.ascontiguousarray(pixels), valid if self.masked else None

            yield read


def as_source(image: Any) -> Any:
    """An [`ImageSource`] of an object that has `parts`, whatever its class."""
    whole = all(hasattr(image, name) for name in ("kind", "masked", "filename", "masked_strips", "for_scale"))
    return image if whole else GivenSource(image)


class RasterImage(ImageSource):
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
        page: of a TIFF that has several, from 1; None for the largest.
        overviews: "auto" reads views of the image from the file's overviews where it has them, "off" never does.
        start: the first bytes of a file that does not lie on this machine, for pages and orientation of a TIFF.
        name: what errors call the image.
        driver: GDAL's that opens it; by default whichever knows the file.

    Attributes:
        height, width: of the part that is read, in pixels.
        crs, transform: rasterio's coordinate system, and affine from (column, row) of that part to coordinates; None
            where the file has none.

    Raises:
        ImportError: rasterio is not installed.
        OSError: the file cannot be opened.
        ValueError: bands, values, a window or pages that do not make one RGB image.
    """

    kind = "raster"

    def __init__(
        self,
        source: Any,
        *,
        bands: Sequence[int | str] | int | str | None = None,
        value_range: str | Sequence | None = None,
        window: Any = None,
        page: int | None = None,
        overviews: str | None = None,
        start: bytes | None = None,
        name: str | None = None,
        driver: str | None = None,
    ):
        if overviews not in (None, "auto", "off"):
            raise ValueError(f"`overviews` is 'auto' or 'off'. Got {overviews!r}.")
        self._given = source if is_dataset(source) else None
        if page is not None and self._given is not None:
            raise ValueError(f"`page` is for files, and {name or source.name} is open already.")
        self._lock = threading.Lock() if self._given is not None else None
        self._elsewhere = isinstance(source, bytes) or start is not None
        self._driver = driver
        self._factor, self._file = 1, None
        if self._given is not None:
            self.filename = name or source.name
            self._setup(source, bands, value_range, window, overviews, 1)
            return
        if isinstance(source, bytes):
            self._file = import_rasterio().MemoryFile(source)  # lives as long as the image
            self.filename, self._source = name or "image", self._file.name
            self._file_name = self._file.name
        else:
            self._source = os.fspath(source)
            self.filename = name or self._source
        pages = self._pages(source, start)
        page = largest_page(pages, self.filename) if page is None else check_page(page, pages, self.filename)
        if page:
            self._source = f"GTIFF_DIR:{page + 1}:{self._source}"
        dataset = open_dataset(self._source, self.filename, driver)
        orientation = pages[page].get(274) if pages else dataset.tags().get("EXIF_Orientation")
        orientation = int(orientation or 1)
        orientation = orientation if orientation in range(1, 9) else 1
        try:
            self._setup(dataset, bands, value_range, window, overviews, orientation)
        finally:
            dataset.close()

    def __copy__(self):
        """The same file, and the same lock where a dataset was given."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __getstate__(self):
        """What travels to another process, where the file is opened again by its name, or from its bytes."""
        state = dict(self.__dict__)
        if self._file is not None:
            state["_file"] = bytes(self._file.getbuffer())
        if self._given is not None:
            state |= {"_given": None, "_lock": None, "_source": self._given.name}
            if not (os.path.exists(self._given.name) or re.match(r"[\w+]+://|/vsi(?!mem/)", self._given.name)):
                raise TypeError(
                    f"{self.filename}: an open dataset that is no file cannot be sent to another process, nor copied. "
                    "Give its path, or the bytes of its file."
                )
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self._file is not None:
            self._file = import_rasterio().MemoryFile(self._file)
            self._source = self._source.replace(self._file_name, self._file.name)
            self._file_name = self._file.name

    @staticmethod
    def _pages(source, start):
        """Tags of the pages of a TIFF, where its bytes are at hand."""
        if isinstance(source, bytes) or start is not None:
            return tiff_pages(io.BytesIO(source if start is None else start))
        if os.path.isfile(source):
            with open(source, "rb") as file:
                return tiff_pages(file)
        return []

    def _setup(self, dataset, bands, value_range, window, overviews, orientation):
        self._sequential = dataset.driver in SEQUENTIAL
        self._settings = gdal_settings(dataset.name, dataset.driver)
        self._transposed, self._rows_reversed, self._columns_reversed = upright = upright_by(orientation)
        size = dataset.shape[::-1] if self._transposed else dataset.shape
        if not dataset.count and dataset.subdatasets:
            raise ValueError(
                f"{self.filename}: it has no bands of its own, but subdatasets. Pass one of them: "
                f"{', '.join(dataset.subdatasets[:MAX_NAMED])}."
            )
        if not dataset.count or min(size) < 1:
            raise ValueError(f"{self.filename}: {dataset.count} bands of {size[0]} x {size[1]} pixels show nothing.")
        crs, transform = self._place_of(dataset)
        transform = transform and upright_transform(transform, upright, size)
        self._part = choose_window(dataset, crs, window, size, self.filename, transform)
        top, left, bottom, right = self._part
        self.height, self.width = bottom - top, right - left
        self.crs = crs
        self.transform = transform and compose(transform, transform.translation(left, top))

        self.bands = choose_bands(dataset, bands, self.filename)
        blocks = dataset.block_shapes[self.bands[0] - 1]
        self._block_rows = blocks[1] if self._transposed else blocks[0]
        self._dtype = np.dtype(dataset.dtypes[self.bands[0] - 1])
        # JPEG's are not those that a whole reading would give, and PNG has none. A turned image is read as it is.
        usable = overviews != "off" and not self._sequential and not any(upright)
        self._overviews = dataset.overviews(self.bands[0]) if usable else []
        self._sampled_overviews = dataset.overviews(self.bands[0]) if not self._sequential else []
        flags = [dataset.mask_flag_enums[band - 1] for band in self.bands]
        # Pillow's pictures have no mask: alpha is dropped.
        self.masked = not self._sequential and (
            self._dtype.kind == "f" or any("all_valid" not in [flag.name for flag in band] for band in flags)
        )
        self._set_values(dataset, value_range)

    def _place_of(self, dataset):
        """(coordinate system, transform of the stored pixels), None where the file says nothing of them."""
        crs, transform = dataset.crs, dataset.transform
        if transform.is_identity:
            return None, None
        # A file that came from elsewhere may name others in it.
        if self._elsewhere and crs is not None and wkt_names_file(crs.to_wkt()):
            warnings.warn(
                f"{self.filename}: its coordinate system may name files of this machine, which are not opened: it is left "
                f"out.",
                stacklevel=2,
            )
            crs = None
        return crs, transform

    def _set_values(self, dataset, value_range):
        """What makes 8 bits of the values: a table for small integers, or lows and highs."""
        band, dtype = self.bands[0], self._dtype
        structure = dataset.tags(ns="IMAGE_STRUCTURE") | dataset.tags(band, ns="IMAGE_STRUCTURE")
        bits = int(structure.get("NBITS", 8 * dtype.itemsize))
        self._inverted = structure.get("MINISWHITE") == "YES"
        self._tables = self._ranges = None
        if dtype.kind not in "uif":
            raise ValueError(f"{self.filename}: pixels are {dtype}, which no range of values makes an image of.")
        value_range = check_value_range(value_range, len(self.bands), self.filename)
        in_words = value_range is None or isinstance(value_range, str)
        if in_words and len(self.bands) == 1 and dataset.colorinterp[band - 1].name == "palette":
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
        dataset = open_dataset(self._source, self.filename, self._driver)
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
            with rasterio.Env(**self._settings), complaints_are_errors():
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
        for start, stop in pairwise(edges):
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

    @contextmanager
    def parts(self):
        """A function for a `with` block that reads boxes (top, left, bottom, right) in pixels of this image: (uint8[h, w,
        3], bool[h, w] of those that are part of it; None of an image that is not `masked`). One thread reads all boxes of
        a block. Raises `OSError` where the file turns out to be damaged."""
        top, left, bottom, right = self._part
        # 1 but for overviews, whose pixels may be no whole number of the file's.
        steps = (bottom - top) / self.height, (right - left) / self.width
        with self._dataset() as dataset:

            def read(*box):
                size = box[2] - box[0], box[3] - box[1]
                if self._factor == 1:
                    box = [edge + start for edge, start in zip(box, (top, left) * 2)]
                else:
                    box = [edge * step + start for edge, step, start in zip(box, steps * 2, (top, left) * 2)]
                values, valid = self._read(dataset, box, size)
                return self._to_rgb(values), valid

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
            reduced.transform = compose(self.transform, self.transform.scale(*steps))
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


__all__ = ["PAD_COLOR", "GivenSource", "ImageSource", "RasterImage", "as_source"]
