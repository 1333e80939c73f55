# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT picture reading: what Pillow decodes, and arrays, become 8-bit RGB.

Pictures are opened by a list of formats, not by whatever Pillow has registered: some of its readers start other programs
(EPS: Ghostscript) or open what a file names. In this order: formats, pixels to 8-bit RGB, files. Sizes are (height, width).
"""

import struct
from importlib import import_module

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension

from .image_raster_files_uhr_bat import reason

# Formats that are opened, and Pillow's module that knows each of them, common ones first.
PICTURE_FORMATS = {
    "JPEG": "JpegImagePlugin",
    "PNG": "PngImagePlugin",
    "WEBP": "WebPImagePlugin",
    "GIF": "GifImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "PPM": "PpmImagePlugin",
}
# The same in words, for errors.
PICTURE_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000 or PPM"
STREAMED_FORMATS, STREAMED_MODES = ("JPEG", "PNG"), ("L", "RGB", "RGBA")
# What Pillow decodes into other pixels of a TIFF; the rest of `pillow_misreads` it leaves out or takes on trust.
PILLOW_ERRORS = ("planar bands of 16 bits", "bands without colours", "signed pixels")
# 16 bits to 8 by the full range, 65535 -> 255, to the nearest: 65535 / 255 = 257, which is odd, so there are no ties.
SIXTEEN_TO_EIGHT = ((np.arange(65536) + 128) // 257).astype(np.uint8)


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
        raise OSError(f"{name}: the image cannot be decoded whole ({reason(error)}).") from error
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


def channels_last(array, input_data_format):
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


def array_to_image(array):
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


def open_picture(file, path):
    """The opened image, nothing decoded, or None for what has none of the `PICTURE_FORMATS`: `Image.open` without its
    limit."""
    prefix = file.read(16)
    for image_format, module in PICTURE_FORMATS.items():
        import_module(f"PIL.{module}")  # registers its reader
        reader, accept = Image.OPEN[image_format]
        try:
            accepted = accept is None or accept(prefix)
            if accepted and not isinstance(accepted, str):  # a string is a reason to say no
                file.seek(0)
                return reader(file, path)
        except (SyntaxError, IndexError, TypeError, struct.error):  # another format's file
            continue
    return None


def decode_picture(image, name):
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
        raise OSError(f"{name}: the image cannot be decoded whole ({reason(error)}).") from error
    return to_rgb(image, name)


def pillow_misreads(tags, num_pages=1) -> str | None:
    """What of a TIFF Pillow would read as something else, without an error, by the tags of its page."""
    samples, bits = tags.get(277, 1), max(tags.get(258, (1,)))
    several = samples > 1
    found = {
        "planar bands of 16 bits": several and tags.get(284) == 2 and bits > 8,
        "bands without colours": several and tags.get(262) in (0, 1),
        "signed pixels": bits < 32 and 2 in tags.get(339, ()),
        "planar bands": several and tags.get(284) == 2,
        "bands of 16 bits": several and bits > 8,
        "alpha, nodata or colours that GDAL wrote": any(tag in tags for tag in (338, 42112, 42113)),
        "several pages": num_pages > 1,
    }
    return next((what for what, there in found.items() if there), None)


def is_streamable(image: Image.Image) -> bool:
    """Whether rasterio reads an opened picture upright and in the same colours."""
    if image.format not in STREAMED_FORMATS:
        return False
    turned = "exif" in image.info if image.format == "PNG" else image.getexif().get(274, 1) != 1
    deep = any(";16" in str(tile.args) for tile in image.tile)  # Pillow takes the higher byte of such a PNG
    return image.mode in STREAMED_MODES and not turned and not deep
