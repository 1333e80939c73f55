# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT picture reading: what Pillow decodes, and arrays, become 8-bit RGB.

Pictures are opened by a list of formats, not by whatever Pillow has registered: some of its readers start other programs
(EPS: Ghostscript) or open what a file names. In this order: formats, pixels to 8-bit RGB, files, reduced pictures of a
JPEG, pictures as sources. Sizes are (height, width).
"""

import io
import math
import os
import struct
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension

from .image_raster_files_uhr_bat import reason, upright_by
from .image_sources_uhr_bat import ImageSource

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
# What libjpeg can reduce a picture by while it decodes it, the most first.
REDUCTIONS = (8, 4, 2)
# Pixels of such a picture for a pixel of a view, along a side: with fewer, views differ from those of the whole by more than
# 0.3 of 255 in the mean.
MARGIN = 4
# JPEGs that are read reduced: one of a phone or a drone that has several pictures is an "MPO"; CMYK becomes RGB by products,
# not by means.
REDUCED_FORMATS, REDUCED_MODES = ("JPEG", "MPO"), ("L", "RGB")
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
        _feed_at_once(image)
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
                image = reader(file, path)
                _feed_at_once(image)
                return image
        except (SyntaxError, IndexError, TypeError, struct.error):  # another format's file
            continue
    return None


def _feed_at_once(image):
    """Pillow hands libjpeg a file piece by piece, and of an arithmetic JPEG that cannot wait for the next one: all is one
    piece."""
    file = getattr(image, "fp", None)
    if image.format in REDUCED_FORMATS and file is not None and not file.closed:
        place = file.tell()
        image.decodermaxblock = max(image.decodermaxblock, file.seek(0, io.SEEK_END))
        file.seek(place)


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


# Reduced pictures of a JPEG, which is a pyramid of its own


def jpeg_reduction(size: tuple[int, int], side: int, margin: float = MARGIN) -> int:
    """By how much libjpeg may reduce a picture of `size` (height, width) for views of at most `side` pixels; 1: not at all."""
    return next((by for by in REDUCTIONS if max(size) >= margin * by * side and min(size) >= by), 1)


def is_reducible(image: Image.Image) -> bool:
    """Whether libjpeg's reduced pictures of an opened file are those of the whole picture."""
    return image.format in REDUCED_FORMATS and image.mode in REDUCED_MODES


def jpeg_orientation(image, name) -> int:
    """The EXIF orientation of an opened file, by which `decode_picture` turns it."""
    try:
        orientation = image.getexif().get(274, 1)
    except Exception as error:
        raise OSError(f"{name}: the image cannot be decoded whole ({reason(error)}).") from error
    return orientation if orientation in range(1, 9) else 1


def decode_jpeg(content: bytes, name: str, reduction: int, is_turned: bool) -> Image.Image:
    """RGB of the bytes of a JPEG, reduced by one of the `REDUCTIONS` or 1; upright where `is_turned`."""
    image = open_picture(io.BytesIO(content), "")
    if reduction > 1:
        image.draft(None, tuple(length // reduction for length in image.size))
        try:
            image.load()
        except Exception:  # libjpeg has no smaller pictures of a lossless one; what is damaged raises again
            image = to_rgb(open_picture(io.BytesIO(content), ""), name).reduce(reduction)
    return decode_picture(image, name) if is_turned else to_rgb(image, name)


def unread_jpeg(image: Image.Image) -> bytes | None:
    """The file of somebody's open JPEG, of which nothing is decoded yet; None where the image is another, was decoded or
    changed, or its file is neither in memory nor on this machine. Image and file stay as they are."""
    file = getattr(image, "fp", None)
    if not is_reducible(image) or type(file) not in (io.BytesIO, io.BufferedReader):
        return None
    try:
        if isinstance(file, io.BytesIO):
            content = file.getvalue()
        else:  # past the position of the file, which others may use
            size = os.fstat(file.fileno()).st_size
            content = os.pread(file.fileno(), size, 0)
        unchanged = open_picture(io.BytesIO(content), "")
    except (OSError, ValueError):  # it is closed
        return None
    states = [one and (one.format, one.mode, one.size, one.tile) for one in (image, unchanged)]
    return content if states[0] == states[1] else None


def _line(image, axis, place):
    """A row (axis 0) or column of an image."""
    line = Image.new("RGB", (image.width, 1) if axis == 0 else (1, image.height))
    line.paste(image, (0, -place) if axis == 0 else (-place, 0))
    return line


class ReducedPicture(NamedTuple):
    """A smaller copy of a picture, of which a pixel is the mean of `factor` x `factor`.

    Attributes:
        picture: RGB.
        factor: a whole number.
        size: (height, width) of the picture that it is a copy of, perhaps no multiple of the factor.
        orientation: by which the copy was turned after it was made: at which ends its pixels are means of fewer.
    """

    picture: Image.Image
    factor: int
    size: tuple[int, int]
    orientation: int = 1

    def box(self, edges: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in its own pixels, of a box (top, left, bottom, right) of the picture."""
        _, *is_reversed = upright_by(self.orientation)
        copied = self.picture.height, self.picture.width
        before = [
            (number * self.factor - length) * at_start
            for number, length, at_start in zip(copied, self.size, is_reversed)
        ]
        top, left, bottom, right = ((edge + before[idx % 2]) / self.factor for idx, edge in enumerate(edges))
        return left, top, right, bottom

    def view(
        self,
        canvas: tuple[int, int],
        corner: tuple[int, int],
        view: tuple[int, int],
        pad_color: Sequence[int],
        resample: int,
    ) -> np.ndarray:
        """uint8[h, w, 3]: a canvas with the whole picture in it, resized to a view as if nothing were reduced.

        Canvas and corner are seldom multiples of the factor, so that the box that is resized has fractions of pixels:

            canvas of 10 px, the picture's 7 from 1 on, factor 4:   |.|x|x|x|x|x|x|x|.|.|
            the same with 2 reduced pixels from pixel 1 on:       |...|xxxxxxx|xxxxx..|...|   box 0.75 to 3.25

        Args:
            canvas, view: (height, width).
            corner: (row, column) of the canvas where the picture begins.
            pad_color, resample: as in `image_to_tiles`.
        """
        _, *is_reversed = upright_by(self.orientation)
        copied = self.picture.height, self.picture.width
        starts, lows, ends, sizes, mixed = [], [], [], [], []
        for axis in range(2):
            length, number = self.size[axis], copied[axis]
            missing = number * self.factor - length
            edge = (corner[axis] - missing * is_reversed[axis]) / self.factor
            starts.append(math.ceil(edge))
            lows.append(starts[axis] - edge)
            ends.append(lows[axis] + canvas[axis] / self.factor)
            sizes.append(max(math.ceil(ends[axis]), starts[axis] + number))
            beyond = corner[axis] if is_reversed[axis] else canvas[axis] - corner[axis] - length
            if missing and beyond > 0:  # a mean of fewer pixels covers a part of its own place
                mixed.append((axis, 0 if is_reversed[axis] else number - 1, 1 - missing / self.factor))
        padded = Image.new("RGB", sizes[::-1], tuple(pad_color))
        padded.paste(self.picture, tuple(starts[::-1]))
        for axis, place, share in mixed:
            line_size, at = [copied[1], copied[0]], [starts[1], starts[0]]
            line_size[1 - axis] = 1
            at[1 - axis] += place
            line = Image.new("RGB", line_size)
            line.paste(padded, (-at[0], -at[1]))
            padded.paste(Image.blend(Image.new("RGB", line_size, tuple(pad_color)), line, share), tuple(at))
        for axis in range(2):
            # A pixel that an edge of the canvas cuts counts as a whole one: for the part of it beyond, its neighbour stands.
            last = sizes[axis] - 1
            for place, beside, beyond in ((0, 1, lows[axis]), (last, last - 1, last + 1 - ends[axis])):
                if last and 1e-6 < beyond < 1:
                    line = Image.blend(_line(padded, axis, place), _line(padded, axis, beside), beyond)
                    padded.paste(line, (0, place) if axis == 0 else (place, 0))
        box = lows[1], lows[0], min(ends[1], sizes[1]), min(ends[0], sizes[0])
        return np.asarray(padded.resize(view[::-1], resample, box))


# Pictures as sources


class PlainImage(ImageSource):
    """A picture that Pillow decoded, with what a [`RasterImage`] has: `read_image` takes it as the picture itself.

    Attributes:
        image: 8-bit RGB.
        height, width: in pixels.
        crs, transform: None: a picture lies nowhere.
    """

    kind = "picture"

    def __init__(self, image: Image.Image, filename: str = "image"):
        self.image, self.filename = image, filename
        self.height, self.width = image.height, image.width

    @contextmanager
    def parts(self):
        def read(top, left, bottom, right):
            part = Image.new("RGB", (right - left, bottom - top))
            part.paste(self.image, (-left, -top))  # pasting does not ask for Pillow's limit, as cropping does
            return part, None

        yield read

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.image, dtype)


class JPEGImage(PlainImage):
    """A JPEG that is decoded as large as somebody asks for: libjpeg gives a half, a quarter or an eighth of it for a part of
    the time. What is decoded is kept. Several threads may ask at once.

    Args:
        content: of the file.
        size: (height, width) of the whole picture, upright.
        filename: what errors call it.
        orientation: EXIF's, by which it is turned; 1 for none, whatever the file says.
        streamed: of a large one, what its own pixels are read from part by part.

    Attributes:
        image: 8-bit RGB of the whole picture.
        height, width, crs, transform: see [`PlainImage`].
    """

    kind = "jpeg"

    def __init__(self, content: bytes, size: tuple[int, int], filename="image", orientation=1, streamed=None):
        (self.height, self.width), self.filename = size, filename
        self._content, self._orientation, self.streamed = content, orientation, streamed
        self._pictures, self._lock = {}, threading.Lock()

    def __getstate__(self):
        """What a copy has, here or in another process: the file."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_pictures", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state, _pictures={}, _lock=threading.Lock())

    def _decoded(self, reduction, factor=1):
        """The picture, reduced by libjpeg and then by the means of `factor` x `factor` pixels."""
        if factor > 1:
            whole = self._decoded(reduction)
        with self._lock:
            if (reduction, factor) not in self._pictures:
                picture = (
                    whole.reduce(factor)
                    if factor > 1
                    else decode_jpeg(self._content, self.filename, reduction, self._orientation > 1)
                )
                self._pictures[reduction, factor] = picture
            return self._pictures[reduction, factor]

    @property
    def image(self) -> Image.Image:
        return self._decoded(1)

    @contextmanager
    def parts(self):
        with super().parts() if self.streamed is None else self.streamed.parts() as read:
            yield read

    @property
    def held_bytes(self) -> int:
        """Of the file, and of what is decoded so far."""
        return len(self._content) + sum(3 * one.height * one.width for one in list(self._pictures.values()))

    def reduced(self, scales: Sequence[int]) -> dict[int, ReducedPicture]:
        """What views of some sides in pixels are made from, of those for which the whole picture is not needed.

        One picture is decoded: where the finest view allows it a reduced one, for all of them; else the whole one, and
        coarser views are made from means of its pixels. Either has `MARGIN` pixels for one of the view, so that views
        depend on the finest one, but not on the order in which they are made.

        Raises:
            OSError: the file is damaged.
        """
        size = self.height, self.width
        reduction = jpeg_reduction(size, max(scales))
        if reduction > 1:
            return dict.fromkeys(scales, self.smaller(max(scales)))
        factors = {scale: min(max(size) // (MARGIN * scale), min(size)) for scale in scales}
        return {
            scale: ReducedPicture(self._decoded(1, factor), factor, size)
            for scale, factor in factors.items()
            if factor > 1
        }

    def smaller(self, side: int, margin: float = MARGIN) -> ReducedPicture:
        """The picture as small as libjpeg may make it for a copy of `side` pixels; decoded now. Raises `OSError`."""
        size = self.height, self.width
        reduction = jpeg_reduction(size, side, margin)
        return ReducedPicture(self._decoded(reduction), reduction, size, self._orientation)
