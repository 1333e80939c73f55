# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT image reading: a file, a URL, base64, a PIL image, an array or a raster becomes 8-bit RGB, or a clear error.

`read_image` is the one door: what comes out of it has been checked, and nothing behind it checks again. Pictures (JPEG,
PNG, WebP and so on) are decoded by Pillow; rasters (TIFF, JPEG 2000, and what Pillow does not know) are read by rasterio
(`image_rasters_uhr_bat.py`). In this order: pixels to 8-bit RGB, files, the door. Sizes are (height, width).
"""

import base64
import binascii
import io
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

from PIL import Image, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, is_torch_tensor, is_valid_image

from .image_pictures_uhr_bat import (
    PICTURE_NAMES,
    PILLOW_ERRORS,
    JPEGImage,
    array_to_image,
    channels_last,
    decode_picture,
    is_reducible,
    is_streamable,
    jpeg_orientation,
    jpeg_reduction,
    open_picture,
    pillow_misreads,
    to_rgb,
    unread_jpeg,
)
from .image_raster_files_uhr_bat import GDAL_NAME, driver_of, import_rasterio, is_dataset, is_raster, reason, upright_by
from .image_raster_mosaics_uhr_bat import is_placed_array, mosaic_vrt, placed_bytes
from .image_rasters_uhr_bat import RasterImage
from .image_sources_uhr_bat import ImageSource, as_source, check_overviews

# What an image is called (`kind`): one whose pixels can be asked for, and one that a model has encoded.
IMAGES, ENCODED = ("raster", "picture", "jpeg", "source"), ("whole", "pyramid", "dynamic")
# Longest side in pixels: the letterboxed square has as many rows and columns, and a file of a few bytes may state
# 1,000,000 x 1 pixels.
MAX_SIDE = 100_000
# Longest side in pixels of the largest view: a raster with overviews is read whole from the one that such a view takes, so
# that this one, and not the raster, has to keep the limits.
VIEW_SIDE = 8192
# Pixels of a JPEG or PNG from which on it is streamed by rasterio where that is installed: decoded it takes 1 GB.
HELD_PIXELS = 2**28
# Seconds without an answer after which a server is given up.
TIMEOUT = 60
# Bytes of a file at a URL that are looked at before it is left to GDAL.
URL_START = 2**16


def check_image_size(image_size: tuple[int, int], max_image_pixels: int, name: str = "image"):
    """Raises `ValueError` for an image that is empty or over the limit, with its name, its size and the limit."""
    height, width = image_size
    if min(height, width) < 1:
        raise ValueError(f"{name}: {height} x {width} pixels (height x width) show nothing.")
    if height * width > max_image_pixels:
        raise ValueError(
            f"{name}: {height} x {width} = {height * width} pixels are over the limit of {max_image_pixels} pixels. "
            f"Raise `max_image_pixels` to read it."
        )
    if max(height, width) > MAX_SIDE:
        raise ValueError(
            f"{name}: {height} x {width} pixels have a side over {MAX_SIDE} pixels, whose letterboxed square would "
            f"take too long. Cut the image into parts."
        )


# The door


class _Opened(NamedTuple):
    """An image of any kind before it is checked; the pixels of a file are still in it. `size` is that of what is read whole."""

    name: str
    size: tuple[int, int]
    decode: Callable[[], Image.Image | RasterImage]


def _of_source(image) -> _Opened:
    whole = image.for_scale(VIEW_SIDE)
    return _Opened(image.filename, (whole.height, whole.width), lambda: image)


class _Reader(NamedTuple):
    """The arguments of `read_image` that say how a source is read."""

    do_convert_rgb: bool
    input_data_format: str | ChannelDimension | None
    options: dict  # bands, value_range, window, page, overviews
    scales: Sequence[int] | None

    @property
    def of_rasters(self) -> list[str]:
        """Names of those options that were given and that only a raster has."""
        return [name for name, value in self.options.items() if value is not None and name != "overviews"]

    def open(self, source, files: ExitStack) -> _Opened:
        """Any source; files are closed by `files`."""
        if isinstance(source, (str, os.PathLike)):
            return self.open_text(os.fspath(source), files)
        if isinstance(source, (list, tuple)) and source and all(isinstance(one, (str, os.PathLike)) for one in source):
            return self.open_mosaic(source, f"mosaic of {len(source)} files")
        if is_placed_array(source):
            return self.open_raster(placed_bytes(source), "array", "GTiff")
        kind = kind_of(source)
        if kind == "picture":
            source = source.image
        if isinstance(source, bytes):
            return self.open_file(io.BytesIO(source), "image")
        if is_dataset(source):
            return self.open_raster(source, source.name)
        if hasattr(source, "read"):
            name = getattr(source, "name", None)  # a file of the operating system has one, others may
            if source.seekable():
                source.seek(0)
            return self.open_file(io.BytesIO(source.read()), name if isinstance(name, str) else "image")
        if not is_image(source):
            raise TypeError(
                f"An image is a PIL image, an array, a tensor, a path, a URL, base64, bytes, a file or an open raster. "
                f"Got {type(source)}."
            )
        if self.of_rasters:
            raise ValueError(
                f"`{self.of_rasters[0]}` is for files and open datasets, and this image is in memory or open already "
                f"({type(source).__name__}). Pass its path, or the option to `open_image`."
            )
        if kind in ("raster", "source"):
            return _of_source(as_source(source))
        if kind == "jpeg":
            size = source.height, source.width
            return _Opened(source.filename, size, lambda: self.jpeg_or(source, lambda: source.streamed or source.image))
        if isinstance(source, Image.Image):
            return self.open_image(source)
        return self.open_array(source)

    # Files

    def open_raster(self, source, name, driver=None, start=None) -> _Opened:
        return _of_source(RasterImage(source, name=name, driver=driver, start=start, **self.options))

    def open_file(self, file: BinaryIO, name, path="") -> _Opened:
        """From a file that is open, and its path where it lies on this machine."""
        start = file.read(16)
        if is_raster(start):
            by_gdal = _has_rasterio()
        else:
            by_gdal = path and _is_envi(path) or self.of_rasters and (path or driver_of(start))
        if by_gdal:
            # What comes from elsewhere is opened as what it begins as: other formats may name files of this machine.
            return self.open_raster(path or _all_of(file), name, None if path else driver_of(start))
        if self.of_rasters and not is_raster(start):
            raise ValueError(
                f"{name}: `{self.of_rasters[0]}` is for rasters, JPEG and PNG, and this is another format."
            )
        file.seek(0)
        streamed = None
        # The registered readers are called directly, as `Image.open` does after it has asked for Pillow's own limit.
        try:
            image = open_picture(file, path)
        except Exception as error:
            raise OSError(f"{name}: the image cannot be opened ({reason(error)}).") from error
        if is_raster(start):
            _check_pillow_suffices(image, name, self.of_rasters)
        elif image is None:
            if path and _has_rasterio():
                try:
                    return self.open_raster(path, name)  # VRT, ENVI, IMG and whatever else GDAL knows
                except OSError:
                    pass
            raise UnidentifiedImageError(
                f"{name}: not an image in {PICTURE_NAMES}, and none at a path that GDAL (rasterio) can read; or one with a side of "
                f"0 pixels."
            )
        elif path and image.height * image.width >= HELD_PIXELS and is_streamable(image) and _has_rasterio():
            opened = self.open_raster(path, name)
            if not is_reducible(image):
                return opened
            streamed = opened.decode()
        return _Opened(name, (image.height, image.width), lambda: self.decode_file(image, file, name, streamed))

    def decode_file(self, image, file, name, streamed) -> Image.Image | JPEGImage:
        if not self.reduces((image.height, image.width)) or not is_reducible(image):
            return decode_picture(image, name) if streamed is None else streamed
        orientation = jpeg_orientation(image, name)
        size = image.size if upright_by(orientation)[0] else (image.height, image.width)
        return self.jpeg_or(JPEGImage(_all_of(file), size, name, orientation, streamed), None)

    def reduces(self, size) -> bool:
        """Whether some view of a JPEG of `size` (height, width) is made from a smaller picture."""
        return bool(self.scales) and self.options["overviews"] != "off" and jpeg_reduction(size, min(self.scales)) > 1

    def jpeg_or(self, image: JPEGImage, whole) -> Image.Image | JPEGImage:
        """The JPEG, decoded as large as its finest view asks for; what `whole()` returns where no view is made from less, and
        a large one as a raster where one view needs the whole."""
        if not self.reduces((image.height, image.width)):
            return whole()
        if image.streamed is not None and jpeg_reduction((image.height, image.width), max(self.scales)) == 1:
            return image.streamed
        image.smaller(max(self.scales))  # a damaged file is told here
        return image

    def open_url(self, url, name) -> _Opened:
        # A server that sends parts of a file does so when it is asked for the first one.
        status, start = _fetch(url, name, {"Range": f"bytes=0-{URL_START - 1}"})
        if status == 206 and is_raster(start) and _has_rasterio():
            return self.open_raster(f"/vsicurl/{url}", name, driver_of(start), start)
        if status == 206 and len(start) == URL_START:
            _, start = _fetch(url, name)
        return self.open_file(io.BytesIO(start), name)

    def open_text(self, source, files) -> _Opened:
        """From a path, a URL, a name of GDAL's or base64."""
        name = source if len(source) <= 200 else f"{source[:100]}..."
        if source.startswith(("http://", "https://")):
            return self.open_url(source, name)
        if source.startswith("data:"):
            header, _, payload = source.partition(",")
            try:
                return self.open_file(_decode_base64(payload), header)
            except binascii.Error as error:
                raise ValueError(f"{header}: the image is not base64 ({error}).") from error
        path = url2pathname(urlparse(source).path) if source.startswith("file://") else source
        if os.path.isdir(path):
            return self.open_folder(path, name)
        if os.path.exists(path):
            return self.open_file(files.enter_context(open(path, "rb")), name, path)
        if not source.startswith("file://") and GDAL_NAME.match(source):
            return self.open_raster(source, name)
        try:
            return self.open_file(_decode_base64(source), name)
        except (binascii.Error, UnidentifiedImageError) as error:
            raise FileNotFoundError(f"{name}: there is no such file, and it is no URL or base64 image.") from error

    def open_folder(self, path, name) -> _Opened:
        """From a folder that GDAL knows as one raster (Zarr, SAFE), or as the mosaic of the rasters in it."""
        try:
            return self.open_raster(path, name)
        except (OSError, ImportError) as error:
            files = [
                entry.path for entry in sorted(os.scandir(path), key=lambda one: one.name) if _is_raster_file(entry)
            ]
            if not files:
                raise IsADirectoryError(
                    f"{name}: it is a folder, and none that is a raster or has rasters in it."
                ) from error
        return self.open_mosaic(files, name)

    def open_mosaic(self, paths, name) -> _Opened:
        return self.open_raster(mosaic_vrt([os.fspath(path) for path in paths]), name, "VRT")

    # Images in memory

    def open_image(self, image: Image.Image) -> _Opened:
        name = getattr(image, "filename", "") or "image"  # only images that Pillow opened know their file
        if image.format == "TIFF" and pillow_misreads(image.tag_v2) in PILLOW_ERRORS:
            raise ValueError(
                f"{name}: Pillow does not read {pillow_misreads(image.tag_v2)} of a TIFF right. Pass the path instead of "
                f"the image."
            )

        def decode():
            if not self.do_convert_rgb and image.mode != "RGB":
                raise ValueError(f"{name}: mode {image.mode} is not RGB, and `do_convert_rgb` is False.")
            content = unread_jpeg(image) if self.reduces((image.height, image.width)) else None
            if content is None:
                return to_rgb(image, name)
            return self.jpeg_or(JPEGImage(content, (image.height, image.width), name), None)

        return _Opened(name, (image.height, image.width), decode)

    def open_array(self, array) -> _Opened:
        if is_torch_tensor(array):
            array = array.detach().cpu()
            array = (array.float() if array.is_floating_point() else array).numpy()
        array = channels_last(array, self.input_data_format)
        return _Opened("image", array.shape[:2], lambda: self.open_image(array_to_image(array)).decode())


def _fetch(url, name, headers=None) -> tuple[int, bytes]:
    """Status and content of an answer. Raises `OSError` for one that says no."""
    import httpx

    try:
        response = httpx.get(url, headers=headers, follow_redirects=True, timeout=TIMEOUT)
    except httpx.HTTPError as error:
        raise OSError(f"{name}: the image cannot be fetched ({reason(error)}).") from error
    if response.status_code >= 400:
        raise OSError(
            f"{name}: the image cannot be fetched, the server answers {response.status_code} {response.reason_phrase}."
        )
    return response.status_code, response.content


def _is_raster_file(entry) -> bool:
    """Of a folder: none of the overviews and masks, TIFFs too, that GDAL keeps beside a file."""
    if not entry.is_file() or entry.name.startswith(".") or entry.name.lower().endswith((".ovr", ".msk")):
        return False
    with open(entry.path, "rb") as file:
        return is_raster(file.read(16))


def _has_rasterio() -> bool:
    try:
        import_rasterio()
    except ImportError:
        return False
    return True


def _all_of(file) -> bytes:
    file.seek(0)
    return file.read()


def _is_envi(path) -> bool:
    """Whether it is raw pixels with ENVI's header beside it: any first bytes are possible, those of a picture too."""
    for header in (f"{path}.hdr", f"{os.path.splitext(path)[0]}.hdr"):
        if header != path and os.path.isfile(header):
            with open(header, "rb") as file:
                return file.read(4) == b"ENVI"
    return False


def _check_pillow_suffices(image, name, options):
    """Raises `ImportError` where a raster needs rasterio, which is not installed."""
    if image is None:
        misread = "its format"
    elif options:
        misread = f"`{options[0]}`"
    else:
        misread = image.format == "TIFF" and pillow_misreads(image.tag_v2, image.n_frames)
    if misread:
        try:
            import_rasterio()
        except ImportError as error:
            raise ImportError(f"{name}: Pillow would not read {misread} right. {error}") from error


def _decode_base64(text):
    """A file in memory; line breaks are allowed. Whatever else is no base64 raises `binascii.Error`."""
    return io.BytesIO(base64.b64decode("".join(text.split()).encode(errors="replace"), validate=True))


def kind_of(image: Any) -> str | None:
    """What an image is, by the name that it has in any copy of this package (`IMAGES`, `ENCODED`); "source" of somebody's own
    that has what a source has; None of everything else."""
    kind = getattr(image, "kind", None)
    if isinstance(kind, str) and kind in (*IMAGES, *ENCODED):
        return kind
    is_source = callable(getattr(image, "parts", None)) and hasattr(image, "height") and hasattr(image, "width")
    return "source" if is_source else None


def is_image(source: Any) -> bool:
    """Whether it is an image already, not where one is: PIL, NumPy or torch, what `open_image` returns, or any other
    [`ImageSource`]."""
    return kind_of(source) in IMAGES or is_valid_image(source)


def read_image(
    source: Any,
    max_image_pixels: int,
    *,
    bands: Any = None,
    value_range: Any = None,
    window: Any = None,
    nodata: Any = None,
    area: Any = None,
    page: int | None = None,
    overviews: str | None = None,
    do_convert_rgb: bool = True,
    input_data_format: str | ChannelDimension | None = None,
    scales: Sequence[int] | None = None,
) -> Image.Image | ImageSource:
    """An image of any kind as 8-bit RGB, its size checked before its pixels are decoded.

    Args:
        source: one of
            - a path, a `file://` or `http(s)://` URL, any name that GDAL knows ("s3://...", "/vsicurl/..."), or base64
              with or without a `data:` header; what is read here stands upright by its EXIF orientation, and of several
              frames of a picture the first is taken. Of a raster at a URL only the parts that are needed are fetched,
              where the server sends parts;
            - the bytes of a file, or a file that is open for reading bytes, which is read from its start;
            - an open dataset of rasterio, or an array of xarray with rioxarray's transform;
            - a folder, or a list of paths: the rasters of one grid in it, as one mosaic;
            - a PIL image of any mode (`to_rgb`), which comes back itself where it is RGB;
            - a NumPy array or a torch tensor [h, w], [h, w, C] or [C, h, w] with 1, 3 or 4 channels, the fourth of
              which is dropped. Values: 8 bits; bool; 16 bits, scaled by their full range; other integers that are in
              0..255; floats in [0, 1];
            - what `open_image` returns, or any other [`ImageSource`].
        max_image_pixels: pixels of the largest image, or part of a raster, that is read; of a raster with overviews those
            of the one that a view of `VIEW_SIDE` pixels is made from, whatever its own size.
        bands, value_range, window, nodata, area, page, overviews: how a raster is read, see [`RasterImage`]. With any but the last a
            picture is read as a raster too.
        do_convert_rgb: False refuses PIL images and arrays that are not RGB.
        input_data_format: 'channels_first' or 'channels_last', for arrays whose shape can be read both ways.
        scales: sides in pixels of the views that the image is for, where they are known: a JPEG in a file, or one that
            Pillow opened and did not decode yet, is then decoded only as large as they need, unless `overviews` is "off".

    Returns:
        A PIL image; of a TIFF, a JPEG 2000 or what only GDAL knows a [`RasterImage`], which is never held whole. So is a
        JPEG or a PNG of `HELD_PIXELS` pixels or more where rasterio is installed. Of a JPEG whose `scales` need less than
        all of it a [`JPEGImage`].

    Raises:
        OSError: the image cannot be fetched, opened or decoded whole; names it.
        ImportError: it needs rasterio; names what to install.
        ValueError: an empty or too large image, or values, bands, a mode or a shape that are not those of an image;
            names the image.
        TypeError: `source` is of no such kind.
    """
    options = {
        "bands": bands, "value_range": value_range, "window": window, "nodata": nodata, "area": area, "page": page,
        "overviews": overviews,
    }  # fmt: skip
    check_overviews(overviews)
    with ExitStack() as files:
        opened = _Reader(do_convert_rgb, input_data_format, options, scales).open(source, files)
        check_image_size(opened.size, max_image_pixels, opened.name)
        return opened.decode()


def flatten_images(images: Any) -> list:
    """One flat list from an image of any kind, a batch array of 4 dimensions, or nested lists of these."""
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in flatten_images(nested)]
    if getattr(images, "ndim", 3) == 4:
        return list(images)
    return [images]
