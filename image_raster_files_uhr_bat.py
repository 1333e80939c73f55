# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT raster files: what GDAL opens, what a file says about itself, which bands are asked for.

rasterio, the extra `geo`, is imported where a raster is opened; the model loads without it. Sizes are (height, width),
coordinates (row, column).
"""

import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

# Tags of a TIFF that are looked at: kind of page, width, height, what Pillow may misread, orientation.
READ_TAGS = (254, 256, 257, 258, 262, 274, 277, 284, 338, 339, 42112, 42113)
# Bytes that are asked of GDAL at once, and that it keeps of a file which it reads from top to bottom.
CHUNK_BYTES = 2**23
# Their decoders go from top to bottom, and start anew whenever the file is opened again.
SEQUENTIAL = ("JPEG", "PNG")
# What GDAL opens without being a file here: a virtual file system, a store, a part of a file (rasterio writes its driver in
# small letters). One letter is a drive of Windows.
GDAL_NAME = re.compile(r"/vsi|[A-Za-z][A-Za-z0-9_+]+:")
# A file beside that of an image, where GDAL writes overviews.
BESIDE = re.compile(r"\w[\w. -]*")
# First bytes of files, and the driver of GDAL that reads them.
SIGNATURES = {
    "GTiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "JP2OpenJPEG": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xffO\xffQ"),
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
}


def reason(error: BaseException) -> str:
    """The error's type and text: the type says what an empty text, as that of a MemoryError, does not."""
    return f"{type(error).__name__}: {error}"


# GDAL


def import_rasterio(part: str = ""):
    """The optional library, or a module of it; or `ImportError` with what to install. By its name in a string: of a model on
    the Hub, transformers asks for whatever an `import` names."""
    try:
        return import_module(f"rasterio.{part}" if part else "rasterio")
    except ImportError as error:
        raise ImportError('Reading GeoTIFF and other rasters needs rasterio: pip install "uhr-bat[geo]"') from error


def gdal_settings(source, driver="") -> dict:
    """GDAL's options while a file is opened and read."""
    settings = {"GDAL_ERROR_ON_LIBJPEG_WARNING": "YES", "GDAL_ALLOW_LARGE_LIBJPEG_MEM_ALLOC": "YES"}
    if driver in SEQUENTIAL:
        settings["GDAL_CACHEMAX"] = CHUNK_BYTES  # nothing is read twice
    if "://" in str(source) or "/vsi" in str(source):
        settings["GDAL_DISABLE_READDIR_ON_OPEN"] = "EMPTY_DIR"  # no request for files beside it
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
def complaints_are_errors():
    """Raises `OSError` for a warning of GDAL inside a `with` block."""
    complaints, logger = _Complaints(), logging.getLogger("rasterio")
    logger.addHandler(complaints)
    try:
        yield
    finally:
        logger.removeHandler(complaints)
    if complaints.texts:
        raise OSError("; ".join(complaints.texts))


def open_dataset(source, name, driver=None):
    """rasterio's dataset of a path or a name that GDAL knows. Raises `OSError`."""
    rasterio = import_rasterio()
    try:
        with warnings.catch_warnings(), rasterio.Env(**gdal_settings(source)):
            warnings.simplefilter(
                "ignore", import_rasterio("errors").NotGeoreferencedWarning
            )  # a plain image is welcome
            dataset = rasterio.open(source, driver=driver)
    except Exception as error:
        raise OSError(f"{name}: the image cannot be opened ({reason(error)}).") from error
    check_overviews(dataset, name)
    return dataset


def check_overviews(dataset, name):
    """Raises `OSError` for a file whose metadata has its overviews elsewhere: GDAL would open whatever is named there, be it
    an address, as soon as it is asked for overviews. A file beside it is welcome, which is how GDAL writes them."""
    named = dataset.get_tag_item("OVERVIEW_FILE", "OVERVIEWS")  # as GDAL itself looks for it, in letters of any case
    if named is None:
        return
    beside = os.path.dirname(named) == os.path.dirname(dataset.name) and BESIDE.fullmatch(os.path.basename(named))
    # A folder that is a raster (Zarr) has them in it.
    within = dataset.driver == "Zarr" and named == os.path.normpath(named) and f"{os.sep}." in named
    if not beside and not (within and named.startswith(_folder_of(dataset) + os.sep)):
        dataset.close()
        raise OSError(
            f"{name}: its metadata names {named[:100]!r} as the file of its overviews, which is not opened. Write the image "
            f"without it: gdal_translate -nomd."
        )


def _folder_of(dataset) -> str:
    """The folder of a Zarr store, of its path or of the name of one of its arrays."""
    return re.sub(r'^ZARR:"?|"?(:.*)?$', "", dataset.name)


# What a file says about itself


def driver_of(start: bytes) -> str | None:
    """GDAL's driver for a file with these first 16 bytes, of TIFF, JPEG 2000, JPEG and PNG."""
    return next((driver for driver, signatures in SIGNATURES.items() if start.startswith(signatures)), None)


def is_raster(start: bytes) -> bool:
    """Whether a file with these first 16 bytes is TIFF or JPEG 2000, which GDAL reads and Pillow reads in part."""
    return driver_of(start) in ("GTiff", "JP2OpenJPEG")


def is_dataset(source: Any) -> bool:
    """Whether it is an open dataset of rasterio, which need not be installed to ask."""
    return hasattr(source, "read_masks") and hasattr(source, "colorinterp")


def tiff_pages(file: io.IOBase) -> list[dict]:
    """Tags of every page of a TIFF; none for what is none, or for pages that lie beyond the bytes that are there."""
    pages, offsets = [], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of bytes that are not there
        try:
            file.seek(0)
            header = file.read(8)
            if driver_of(header) != "GTiff":
                return []
            header += file.read(8) if 43 in header[2:4] else b""  # BigTIFF
            tags = ImageFileDirectory_v2(header)
            while tags.next and tags.next not in offsets:
                offsets.add(tags.next)
                file.seek(tags.next)
                tags = ImageFileDirectory_v2(header)
                tags.load(file)
                page = {tag: tags[tag] for tag in READ_TAGS if tag in tags}
                if not {256, 257} <= set(page):
                    break
                pages.append(page)
        except Exception:  # what cannot be read here is said by whatever decodes the image
            pass
    return pages


def largest_page(pages: list[dict], name: str) -> int:
    """The page of a TIFF that is the image, from 0. A thumbnail may come before it, or behind.

    Raises `ValueError` where several pages are as large: which of them, or whether they are bands, is not known.
    """
    images = {idx: page[256] * page[257] for idx, page in enumerate(pages) if not page.get(254, 0) & 4}  # 4: a mask
    largest = max(images, key=lambda idx: (images[idx], -idx), default=0)
    same = [idx for idx in images if images[idx] == images[largest] and not pages[idx].get(254, 0) & 1]  # 1: reduced
    if len(same) > 1:
        raise ValueError(
            f"{name}: {len(same)} pages have {pages[largest][257]} x {pages[largest][256]} pixels: are they bands, or "
            f"images? Pass the one that is meant as `page`, as {same[0] + 1}, or write red, green and blue into one page."
        )
    return largest


def check_page(page: int, pages: list[dict], name: str) -> int:
    """A page from 1, as it is named, from 0. Raises `ValueError` where the file has no such page."""
    if not 1 <= page <= max(1, len(pages)):
        raise ValueError(f"{name}: `page` is from 1 to {max(1, len(pages))}, the pages of the file. Got {page}.")
    return page - 1


def upright_by(orientation) -> tuple[bool, bool, bool]:
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


# Which bands are asked for


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
        wanted_bands = [bands] if isinstance(bands, (int, str)) or not hasattr(bands, "__iter__") else list(bands)
        for band in wanted_bands:
            if isinstance(band, str) and not band.isdigit():
                wanted = band.lower()
                named = descriptions if wanted in descriptions else colours
                wanted = "gray" if wanted == "grey" else wanted
                if named.count(wanted) != 1:
                    found = "no band" if wanted not in named else "more than one band"
                    raise ValueError(f"{name}: {found} is called {band!r}. Its bands are {there}.")
                chosen.append(named.index(wanted) + 1)
            else:
                try:
                    chosen.append(int(band) if int(band) == float(band) and not isinstance(band, bool) else 0)
                except (TypeError, ValueError, OverflowError):  # None, NaN
                    chosen.append(0)
        if len(chosen) not in (1, 3) or not all(1 <= band <= dataset.count for band in chosen):
            raise ValueError(
                f"{name}: `bands` is one band or three, numbers from 1 to {dataset.count}. Got {str(bands)[:200]}. Its bands "
                f"are {there}."
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
