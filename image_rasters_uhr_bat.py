# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT raster reading: GeoTIFF and whatever else GDAL opens becomes 8-bit RGB, some rows at a time.

How files are opened, and their bands and parts chosen, is in `image_raster_files_uhr_bat.py`. Sizes are (height, width),
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

from .image_raster_files_uhr_bat import (
    CHUNK_BYTES,
    SEQUENTIAL,
    check_page,
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
from .image_raster_values_uhr_bat import (
    COLLAR_SIDE,
    SAMPLE_BLOCKS,
    SAMPLE_PIXELS,
    at_pixels,
    beside_border,
    check_nodata,
    is_close,
    stretch,
    value_tables,
)
from .image_raster_windows_uhr_bat import (
    area_window,
    check_no_rpcs,
    choose_window,
    compose,
    of_gcps,
    outside_area,
    read_area,
    upright_transform,
    wkt_names_file,
)
from .image_sources_uhr_bat import ImageSource, check_overviews, fill

# Subdatasets that an error names.
MAX_NAMED = 50
# The image


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
        nodata: a value that is no part of the image wherever all chosen bands have it; or (value, tolerance): what is that
            close to it and connected to the image's border, which is what JPEG makes of a collar, and no dark water within.
        area: see `read_area`: what lies outside is no part of the image.
        overviews: "auto" reads views of the image from the file's overviews where it has them, "off" never does.
        start: the first bytes of a file that does not lie on this machine, for pages and orientation of a TIFF.
        name: what errors call the image.
        driver: GDAL's that opens it; by default whichever knows the file.

    Attributes:
        height, width: of the part that is read, in pixels; `part`: of the whole.
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
        nodata: float | tuple[float, float] | None = None,
        area: Any = None,
        start: bytes | None = None,
        name: str | None = None,
        driver: str | None = None,
    ):
        check_overviews(overviews)
        self._given = source if is_dataset(source) else None
        if page is not None and self._given is not None:
            raise ValueError(f"`page` is for files, and {name or source.name} is open already.")
        self._lock = threading.Lock() if self._given is not None else None
        self._elsewhere = isinstance(source, bytes) or start is not None
        self._remote = not isinstance(source, bytes) and ("://" in str(source) or "/vsi" in str(source))
        self._driver = driver
        self._factor, self._file = 1, None
        if self._given is not None:
            self.filename = name or source.name
            self._setup(source, bands, value_range, window, overviews, nodata, area, 1)
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
            self._setup(dataset, bands, value_range, window, overviews, nodata, area, orientation)
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

    def _setup(self, dataset, bands, value_range, window, overviews, nodata, area, orientation):
        self._sequential = dataset.driver in SEQUENTIAL
        self._settings = gdal_settings(dataset.name, dataset.driver)
        self._transposed, self._rows_reversed, self._columns_reversed = upright = upright_by(orientation)
        self._size = size = dataset.shape[::-1] if self._transposed else dataset.shape
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
        self._area = None
        if area is not None:
            check_no_rpcs(dataset, self.filename)
            self._area = read_area(area, crs, transform, size, self.filename)
            inside = area_window(self._area, self.filename)
            self._part = tuple(
                choose(one, other) for choose, one, other in zip((max, max, min, min), self._part, inside)
            )
            top, left, bottom, right = self._part
            if top >= bottom or left >= right:
                raise ValueError(f"{self.filename}: the area {str(area)[:200]} lies outside the image, or the window.")
        self.height, self.width = bottom - top, right - left
        self.part = top / size[0], left / size[1], bottom / size[0], right / size[1]
        self.crs = crs
        self.transform = transform and compose(transform, transform.translation(left, top))

        self.bands = choose_bands(dataset, bands, self.filename)
        blocks = dataset.block_shapes[self.bands[0] - 1]
        self._block_rows = blocks[1] if self._transposed else blocks[0]
        self._dtype = np.dtype(dataset.dtypes[self.bands[0] - 1])
        # JPEG's are by 3 of 255 off those that a whole reading would give, and PNG has none. A turned image is read as it is.
        usable = overviews != "off" and not self._sequential and not any(upright)
        self._overviews = dataset.overviews(self.bands[0]) if usable else []
        self._sampled_overviews = dataset.overviews(self.bands[0]) if not self._sequential else []
        flags = [dataset.mask_flag_enums[band - 1] for band in self.bands]
        # Pillow's pictures have no mask: alpha is dropped.
        self.masked = self._has_mask = not self._sequential and (
            self._dtype.kind == "f" or any("all_valid" not in [flag.name for flag in band] for band in flags)
        )
        self._palette = len(self.bands) == 1 and dataset.colorinterp[self.bands[0] - 1].name == "palette"
        self._nodata = self._stated_nodata = nodata = check_nodata(nodata, self.filename)
        self._collar = None
        if nodata is not None:
            self.masked = True
            if nodata[1]:
                self._collar = self._find_collar(dataset, size)
        if area is not None:
            self.masked = True
        self._tables, self._ranges, self._inverted = value_tables(
            dataset,
            self.bands,
            value_range,
            lambda: self._look(dataset),
            self.filename,
            nodata is None and not (self._remote or self._sequential),  # a request, or the whole file decoded
        )
        own = np.arange(256)
        self._is_plain = self._tables is not None and all(np.array_equal(table, own) for table in self._tables)

    def _place_of(self, dataset):
        """(coordinate system, transform of the stored pixels), None where the file says nothing of them."""
        crs, transform = dataset.crs, dataset.transform
        if transform.is_identity:
            crs, transform = of_gcps(dataset, self.filename)
            if transform is None:
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

    def _find_collar(self, dataset, size):
        """bool[h, w] over the whole file: where pixels that are close to nodata lie beside the image's border."""
        factor = max(1, max(size) / COLLAR_SIDE)
        grid = tuple(max(1, round(length / factor)) for length in size)
        self._nodata = None  # what is read here is all that there is
        values, valid = self._read(dataset, (0, 0, *size), grid, "nearest" if self._palette else "average")
        self._nodata = self._stated_nodata
        close = is_close(values, *self._stated_nodata)
        return beside_border(close if valid is None else close | ~valid)

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
        with import_rasterio().Env(**self._settings):
            return self._read_set(dataset, box, size, resampling)

    def _read_set(self, dataset, box, size, resampling="nearest"):
        """As `_read`, where GDAL has its settings already."""
        rasterio = import_rasterio()
        upright_box = top, left, bottom, right = box
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
            with complaints_are_errors():
                values = dataset.read(self.bands, out_shape=(len(self.bands), *size), **options)
                masks = dataset.read_masks(self.bands, out_shape=values.shape, **options) if self._has_mask else None
        except Exception as error:
            raise OSError(f"{self.filename}: the image cannot be decoded whole ({reason(error)}).") from error
        valid = None
        if masks is not None:
            valid = masks.any(axis=0)
            if values.dtype.kind == "f":
                valid &= np.isfinite(values).any(axis=0)
        values, valid = self._turn(values), valid if valid is None else self._turn(valid)
        for ruled_out in self._ruled_out(values, upright_box):
            valid = ~ruled_out if valid is None else valid & ~ruled_out
        return values, valid

    def _ruled_out(self, values, box):
        """bool[h, w] of the pixels of a box that options rule out, one after the other."""
        if self._nodata is not None:
            ruled_out = is_close(values, *self._nodata)
            if self._collar is not None:
                ruled_out &= at_pixels(self._collar, box, values.shape[1:], self._size)
            yield ruled_out
        if self._area is not None:
            yield outside_area(self._area, box, values.shape[1:])

    def _turn(self, pixels):
        """Stored pixels [..., h, w] upright."""
        if self._transposed:
            pixels = pixels.swapaxes(-1, -2)
        if self._rows_reversed:
            pixels = pixels[..., ::-1, :]
        return pixels[..., ::-1] if self._columns_reversed else pixels

    def _look(self, dataset) -> tuple[np.ndarray, np.ndarray]:
        """Values [C, h, w] and which of them are valid, bool[h, w]: the image, an overview of it, or of a large one
        without overviews blocks that are spread over it, side by side."""
        top, left, bottom, right = self._part
        rows = [[(self._part, (self.height, self.width))]]
        num_pixels = self.height * self.width
        if num_pixels > SAMPLE_PIXELS:
            factors = [factor for factor in self._sampled_overviews if num_pixels >= SAMPLE_PIXELS / 16 * factor**2]
            if factors:
                factor = max(factors)
                rows = [[(self._part, (-(-self.height // factor), -(-self.width // factor)))]]
            else:
                side = math.isqrt(SAMPLE_PIXELS // SAMPLE_BLOCKS**2)
                size = min(side, self.height), min(side, self.width)
                rows = [
                    [
                        ((int(row), int(column), int(row) + size[0], int(column) + size[1]), size)
                        for column in np.linspace(left, max(left, right - side), SAMPLE_BLOCKS)
                    ]
                    for row in np.linspace(top, max(top, bottom - side), SAMPLE_BLOCKS)
                ]
        parts = [[self._read(dataset, box, size) for box, size in row] for row in rows]
        values = np.concatenate([np.concatenate([part for part, _ in row], axis=-1) for row in parts], axis=-2)
        if not self.masked:
            return values, np.ones(values.shape[1:], bool)
        return values, np.concatenate([np.concatenate([part for _, part in row], axis=-1) for row in parts], axis=-2)

    def _to_rgb(self, values):
        """uint8[h, w, 3] from values [C, h, w]."""
        if self._is_plain:
            rgb = np.ascontiguousarray(np.moveaxis(values, 0, -1))
        elif self._tables is None:
            rgb = np.stack([stretch(band, *limits) for band, limits in zip(values, self._ranges)], axis=-1)
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
        with self._dataset() as dataset, import_rasterio().Env(**self._settings):

            def read(*box):
                size = box[2] - box[0], box[3] - box[1]
                if self._factor == 1:
                    box = [edge + start for edge, start in zip(box, (top, left) * 2)]
                else:
                    box = [edge * step + start for edge, step, start in zip(box, steps * 2, (top, left) * 2)]
                values, valid = self._read_set(dataset, box, size)
                return self._to_rgb(values), valid

            yield read

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
        return fill(Image.fromarray(self._to_rgb(values)), valid)

    def __array__(self, dtype=None, copy=None):
        """uint8[height, width, 3], held whole."""
        pixels = np.concatenate([np.asarray(strip) for strip in self.strips(max(1, CHUNK_BYTES // (3 * self.width)))])
        return pixels if dtype is None else pixels.astype(dtype)

    def __repr__(self):
        return f"RasterImage({self.filename!r}, {self.height} x {self.width}, bands {self.bands})"
