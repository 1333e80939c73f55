"""UHR-BAT image reading: a file, a URL, base64, a PIL image, an array or a stream becomes 8-bit RGB, or a clear error.

`read_image` is the one door: what comes out of it has been checked, and nothing behind it checks again. In this order:
pixels to 8-bit RGB, files, streams (images that are never held whole), the door. Sizes are (height, width).
"""

import base64
import binascii
import io
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, is_torch_tensor, is_valid_image, load_image

# Longest side in pixels. The horizontal pass over a portrait image costs as much as its square, about a minute per
# scale at this side; a file of a few bytes that states 1,000,000 x 1 pixels would take hours.
MAX_SIDE = 100_000
# Rows that libvips is asked for at once: its memory goes with them. A JPEG's blocks have 16.
FETCHED_ROWS = 16
# 16 bits to 8 by the full range, 65535 -> 255, to the nearest: 65535 / 255 = 257, which is odd, so there are no ties.
SIXTEEN_TO_EIGHT = ((np.arange(65536) + 128) // 257).astype(np.uint8)


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


def _reason(error):
    """The error's type and text: the type says what an empty text, as that of a MemoryError, does not."""
    return f"{type(error).__name__}: {error}"


# Pixels to 8-bit RGB


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """8-bit RGB from a PIL image of any mode; an RGB image comes back itself.

    Alpha is dropped, not blended. 16-bit grey (modes "I;16*", and "I" with values in 0..65535, which is how older
    Pillow reads it) is scaled by its full range; Pillow's own conversion would clip it at 255.

    Args:
        image: of any mode, its pixels perhaps still in its file.
        name: of the image in errors.

    Raises:
        OSError: the image cannot be decoded whole.
        ValueError: its mode has no right conversion.
    """
    try:
        image.load()
    except Exception as error:  # decoders raise whatever they like
        raise OSError(f"{name}: the image cannot be decoded whole ({_reason(error)}).") from error
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if low < 0 or high > 65535:
            raise ValueError(f"{name}: integer pixels must be in 0..65535 (16-bit grey). Got {low}..{high}.")
        return Image.fromarray(SIXTEEN_TO_EIGHT[values]).convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{name}: pixels are floats (mode F) of unknown range. Scale them to 8 bits first.")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name}: mode {image.mode} cannot be converted to RGB ({error}).") from error


def _channels_last(array, input_data_format):
    """A [h, w, C] view of an image array [h, w], [h, w, C] or [C, h, w] with 1, 3 or 4 channels."""
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise ValueError(f"An image array has 2 or 3 dimensions. Got the shape {tuple(array.shape)}.")
    if input_data_format is None:
        first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
        if first == last:
            raise ValueError(
                f"Cannot tell where the 1, 3 or 4 channels of an image of shape {tuple(array.shape)} are. Pass "
                f"`input_data_format`, 'channels_first' or 'channels_last'."
            )
        input_data_format = ChannelDimension.LAST if last else ChannelDimension.FIRST
    if ChannelDimension(input_data_format) == ChannelDimension.FIRST:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3, 4):
        raise ValueError(f"An image has 1, 3 or 4 channels. Got {array.shape[2]} in the shape {tuple(array.shape)}.")
    return array


def _array_to_image(array):
    """L, RGB or RGBA image from [h, w, C]; the values are those that `read_image` names."""
    if array.dtype == np.uint16:
        array = SIXTEEN_TO_EIGHT[array]
    elif array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        low, high = array.min(), array.max()
        limit = 1 if np.issubdtype(array.dtype, np.floating) else 255
        if not (low >= 0 and high <= limit):  # in this form NaN is refused too
            raise ValueError(f"An image of {array.dtype} must have values in 0..{limit}. Got {low}..{high}.")
        array = np.rint(array * 255.0).astype(np.uint8) if limit == 1 else array.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))


# Files


def _open_lazily(file, path):
    """The opened image, nothing decoded, or None: `Image.open` without its limit. Common formats come first."""
    prefix = file.read(16)
    for register_readers in (Image.preinit, Image.init):
        register_readers()
        for image_format in tuple(Image.ID):
            reader, accept = Image.OPEN[image_format]
            try:
                accepted = accept is None or accept(prefix)
                if accepted and not isinstance(accepted, str):  # a string is a reason to say no
                    file.seek(0)
                    return reader(file, path)
            except (SyntaxError, IndexError, TypeError, struct.error):  # another format's file
                continue
    return None


def _decode(image, name):
    """8-bit RGB from an opened file, upright by its EXIF orientation, first frame.

    Pillow's own limit (`Image.MAX_IMAGE_PIXELS`) is neither used nor changed.
    """
    if image.format == "TIFF":
        # Pillow's TIFF reader turns the image upright itself, and asks for Pillow's limit once more when it allocates
        # the pixels: they are allocated here. The tags hold the stored size; `image.size` may be the upright one.
        stored_width, stored_height = image.tag_v2[256], image.tag_v2[257]
        image.im = Image.new(image.mode, (stored_width, stored_height), None).im
        return to_rgb(image, name)
    try:
        ImageOps.exif_transpose(image, in_place=True)  # in place: a copy of a gigapixel is 4 GB
    except Exception as error:
        raise OSError(f"{name}: the image cannot be decoded whole ({_reason(error)}).") from error
    return to_rgb(image, name)


# Streams


def _pyvips():
    """The optional library, told to keep no image that was read: an earlier pass would stay in memory."""
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError: pyvips is there, libvips is not
        raise ImportError('Streaming an image needs pyvips: pip install "uhr-bat[stream]"') from error
    pyvips.cache_set_max(0)
    return pyvips


class StreamedImage:
    """An image file that is read from top to bottom, some rows at a time: gigapixels in tens of megabytes.

    What the views ask of it is `height`, `width` and `strips`; errors name `filename`.

    8-bit RGB as everything here: of two bands the first is grey, of three or four the first three are red, green and
    blue (a fourth is alpha or near infrared, and dropped); 16 bits are scaled by their full range. JPEG, PNG and TIFF
    come out as Pillow decodes them. The file is read again for every pass, so it must stay as it is.

    Args:
        path: an image file. Tiles or strips keep a TIFF's reading small; an interlaced PNG or a progressive JPEG is
            held whole by its decoder.

    Raises:
        ImportError: pyvips is not installed.
        OSError: the file cannot be opened.
        ValueError: an image that is turned by its EXIF orientation, or is neither grey nor RGB in 8 or 16 bits.
    """

    def __init__(self, path: str | os.PathLike):
        self.filename = os.fspath(path)
        image = self._open()
        self.height, self.width = image.height, image.width
        if image.bands > 4 or image.interpretation not in ("srgb", "rgb", "rgb16", "b-w", "grey16", "multiband"):
            raise ValueError(
                f"{self.filename}: {image.bands} bands ({image.interpretation}) are neither grey nor RGB. Write red, "
                f"green and blue into a file of three bands."
            )
        if image.format not in ("uchar", "ushort"):
            raise ValueError(
                f"{self.filename}: pixels are {image.format}, not unsigned integers of 8 or 16 bits. Scale them first."
            )
        if image.get_typeof("orientation") and image.get("orientation") != 1:
            raise ValueError(
                f"{self.filename}: the EXIF orientation {image.get('orientation')} turns the image, which needs all of "
                f"it at once. Store it upright."
            )

    def _open(self):
        """pyvips' image of the file, to be read from top to bottom, and nothing of it read yet."""
        pyvips = _pyvips()
        try:
            # `revalidate`: otherwise libvips returns its cached image, which an earlier pass has read to the end.
            return pyvips.Image.new_from_file(self.filename, access="sequential", fail_on="error", revalidate=True)
        except pyvips.Error as error:
            raise OSError(f"{self.filename}: the image cannot be opened ({_reason(error)}).") from error

    def strips(self, num_rows: int) -> Iterator[Image.Image]:
        """The image from top to bottom as RGB strips of `num_rows` rows, the last one of what is left.

        One thread must ask for all strips of a pass. Raises `OSError` for a damaged file.
        """
        image = self._open()
        bands = 3 if image.bands >= 3 else 1
        dtype = np.uint16 if image.format == "ushort" else np.uint8
        # A region keeps its place in the file; `write_to_memory` of one crop after the other starts anew.
        region = _pyvips().Region.new(image.extract_band(0, n=bands))
        for start in range(0, self.height, num_rows):
            strip = Image.new("RGB", (self.width, min(num_rows, self.height - start)))
            for top in range(0, strip.height, FETCHED_ROWS):
                rows = min(FETCHED_ROWS, strip.height - top)
                try:
                    pixels = region.fetch(0, start + top, self.width, rows)
                except Exception as error:
                    raise OSError(f"{self.filename}: the image cannot be decoded whole ({_reason(error)}).") from error
                pixels = np.frombuffer(pixels, dtype).reshape(rows, self.width, bands)
                strip.paste(to_rgb(_array_to_image(pixels)), (0, top))
            yield strip


# The door


class _Opened(NamedTuple):
    """An image of any kind before it is checked; the pixels of a file are still in it."""

    name: str
    size: tuple[int, int]
    decode: Callable[[], Image.Image | StreamedImage]


def _open_file(file: BinaryIO, name, path="") -> _Opened:
    # The registered readers are called directly, as `Image.open` does after it has asked for Pillow's own limit.
    try:
        image = _open_lazily(file, path)
    except Exception as error:
        raise OSError(f"{name}: the image cannot be opened ({_reason(error)}).") from error
    if image is None:
        raise UnidentifiedImageError(f"{name}: not an image that Pillow can read, or one with a side of 0 pixels.")
    return _Opened(name, (image.height, image.width), lambda: _decode(image, name))


def _decode_base64(text):
    """A file in memory; line breaks are allowed. Whatever else is no base64 raises `binascii.Error`."""
    return io.BytesIO(base64.b64decode("".join(text.split()).encode(errors="replace"), validate=True))


def _open_text(source, files) -> _Opened:
    """From a path, a URL or base64; a file is closed by `files`."""
    name = source if len(source) <= 200 else f"{source[:100]}..."
    if source.startswith(("http://", "https://")):
        try:
            image = load_image(source)
        except Exception as error:
            raise OSError(f"{name}: the image cannot be fetched ({_reason(error)}).") from error
        return _Opened(name, (image.height, image.width), lambda: image)
    if source.startswith("data:"):
        header, _, payload = source.partition(",")
        try:
            return _open_file(_decode_base64(payload), header)
        except binascii.Error as error:
            raise ValueError(f"{header}: the image is not base64 ({error}).") from error
    path = url2pathname(urlparse(source).path) if source.startswith("file://") else source
    if os.path.exists(path):
        return _open_file(files.enter_context(open(path, "rb")), name, path)
    try:
        return _open_file(_decode_base64(source), name)
    except (binascii.Error, UnidentifiedImageError) as error:
        raise FileNotFoundError(f"{name}: there is no such file, and it is no URL or base64 image.") from error


def _open_image(image, do_convert_rgb) -> _Opened:
    name = getattr(image, "filename", "") or "image"  # only images that Pillow opened know their file

    def decode():
        if not do_convert_rgb and image.mode != "RGB":
            raise ValueError(f"{name}: mode {image.mode} is not RGB, and `do_convert_rgb` is False.")
        return to_rgb(image, name)

    return _Opened(name, (image.height, image.width), decode)


def _open_array(array, input_data_format, do_convert_rgb) -> _Opened:
    if is_torch_tensor(array):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    array = _channels_last(array, input_data_format)
    return _Opened("image", array.shape[:2], lambda: _open_image(_array_to_image(array), do_convert_rgb).decode())


def is_image(source: Any) -> bool:
    """Whether `read_image` takes it as an image already: PIL, NumPy or torch, or a [`StreamedImage`]."""
    return isinstance(source, StreamedImage) or is_valid_image(source)


def read_image(
    source: Any,
    max_image_pixels: int,
    *,
    do_convert_rgb: bool = True,
    input_data_format: str | ChannelDimension | None = None,
) -> Image.Image | StreamedImage:
    """An image of any kind as 8-bit RGB, its size checked before its pixels are decoded.

    Args:
        source: one of
            - a path, a `file://` or `http(s)://` URL, or base64 with or without a `data:` header; what is read here
              stands upright by its EXIF orientation, and of several frames the first is taken. URLs are fetched by
              transformers' own loader, so that Pillow's limit holds for them too;
            - a PIL image of any mode (`to_rgb`), which comes back itself where it is RGB;
            - a NumPy array or a torch tensor [h, w], [h, w, C] or [C, h, w] with 1, 3 or 4 channels, the fourth of
              which is dropped. Values: 8 bits; bool; 16 bits, scaled by their full range; other integers that are in
              0..255; floats in [0, 1];
            - a [`StreamedImage`], which comes back itself: its strips are 8-bit RGB.
        max_image_pixels: pixels of the largest image that is read.
        do_convert_rgb: False refuses PIL images and arrays that are not RGB.
        input_data_format: 'channels_first' or 'channels_last', for arrays whose shape can be read both ways.

    Raises:
        OSError: the image cannot be fetched, opened or decoded whole; names it.
        ValueError: an empty or too large image, or values, a mode or a shape that are not those of an image; names the
            image.
        TypeError: `source` is of no such kind.
    """
    with ExitStack() as files:
        if isinstance(source, (str, os.PathLike)):
            opened = _open_text(os.fspath(source), files)
        elif isinstance(source, StreamedImage):
            opened = _Opened(source.filename, (source.height, source.width), lambda: source)
        elif isinstance(source, Image.Image):
            opened = _open_image(source, do_convert_rgb)
        elif is_image(source):
            opened = _open_array(source, input_data_format, do_convert_rgb)
        else:
            raise TypeError(
                f"An image is a PIL image, an array, a tensor, a path, a URL or base64. Got {type(source)}."
            )
        check_image_size(opened.size, max_image_pixels, opened.name)
        return opened.decode()


def flatten_images(images: Any) -> list:
    """One flat list from an image of any kind, a batch array of 4 dimensions, or nested lists of these."""
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in flatten_images(nested)]
    if getattr(images, "ndim", 3) == 4:
        return list(images)
    return [images]


__all__ = ["StreamedImage", "flatten_images", "is_image", "read_image", "to_rgb"]
