"""UHR-BAT images: from a file, a PIL image or an array to the tiles of every scale (the resized views of section 3.3).

An image of any shape is letterboxed to a square (centred, the mean colour), the square is resized to every scale with
Pillow's bicubic, and each of these views is cut into tiles, row by row. The square itself is never built, and an image
that is streamed from its file is never held whole either. In this order: sizes and letterbox, reading, streaming,
resizing and cutting, the class that users load.

Letters: I images, T tiles of all scales, N patches of all scales. Sizes are (height, width).
"""

import base64
import binascii
import io
import math
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    SizeDict,
    is_torch_tensor,
    is_valid_image,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging


# CLIP's mean colour in 8 bits, the letterbox of the released code.
PAD_COLOR = (122, 116, 104)
# Longest side in pixels. The horizontal pass over a portrait image costs as much as its square, about a minute per
# scale at this side; a file of a few bytes that states 1,000,000 x 1 pixels would take hours.
MAX_SIDE = 100_000
# Pixels of one strip of rows on its way to the scales. Pillow prepares every strip anew, so larger ones are faster; of a
# streamed image, strips are a good part of the memory.
STRIP_PIXELS, STREAMED_STRIP_PIXELS = 2**21, 2**19
# Rows that libvips is asked for at once: its memory goes with them. A JPEG's blocks have 16.
FETCHED_ROWS = 16
# Rows of a view that are resized together, at least. Each time, some rows around them are read once more.
BAND_ROWS = 96
# Bytes of the rows that wait for their vertical pass. Beyond it the image is gone through once more; only large sides
# that share no factor with the scales come there.
WINDOW_BYTES = 2**29
# Pixels on each side that the widest of Pillow's filters, Lanczos, reads.
WIDEST_FILTER = 3
# Pillow resizes outside of Python's lock. More threads hold more strips and wait for the one that reads.
NUM_THREADS = min(4, os.cpu_count() or 1)
# 16 bits to 8 by the full range, 65535 -> 255, to the nearest: 65535 / 255 = 257, which is odd, so there are no ties.
SIXTEEN_TO_EIGHT = ((np.arange(65536) + 128) // 257).astype(np.uint8)


# Sizes and letterbox


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


def check_scales(scales: Sequence[int], tile_size: int, patch_size: int = 1):
    """Raises `ValueError` unless scales are ascending multiples of the tile, and the tile a multiple of the patch."""
    if tile_size < 1 or patch_size < 1 or tile_size % patch_size:
        raise ValueError(f"The tile of {tile_size} px is not a positive multiple of the patch of {patch_size} px.")
    if not scales:
        raise ValueError("`scales` is empty: at least the anchor scale is needed.")
    for scale in scales:
        if scale < 1 or scale % tile_size:
            raise ValueError(f"Scale {scale} px is not a positive multiple of the tile of {tile_size} px.")
    if any(low >= high for low, high in zip(scales, scales[1:])):
        raise ValueError(f"`scales` must be ascending, the anchor first. Got {list(scales)}.")


def letterbox(image_size: tuple[int, int]) -> tuple[int, int, int]:
    """(side, top, left) of the square around a (height, width) image: centred, an odd pixel goes below and right."""
    height, width = image_size
    side = max(height, width)
    return side, (side - height) // 2, (side - width) // 2


def shown_patches(image_size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """bool[H, W] for a (height, width) image and a grid over its letterboxed square, in exact integers: True where a
    patch shows any pixel of the image, False where it shows the letterbox alone (as in an attention mask)."""
    side, top, left = letterbox(image_size)
    shown = []
    for start, length, num_patches in zip((top, left), image_size, grid):
        patch_idx = np.arange(num_patches, dtype=np.int64)
        # Patch i covers [i * side / num_patches, (i + 1) * side / num_patches) of the square.
        shown.append(
            ((patch_idx + 1) * side > start * num_patches) & (patch_idx * side < (start + length) * num_patches)
        )
    return shown[0][:, None] & shown[1]


# Reading: everything becomes an 8-bit RGB image, or an error that names the file


def _reason(error):
    """The error's type and text: the type says what an empty text, as that of a MemoryError, does not."""
    return f"{type(error).__name__}: {error}"


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """8-bit RGB from a PIL image of any mode; an RGB image comes back itself.

    Alpha is dropped, not blended. 16-bit grey (modes "I;16*", and "I" with values in 0..65535, which is how older
    Pillow reads it) is scaled by its full range; Pillow's own conversion would clip it at 255.
    Raises `OSError` if the image cannot be decoded whole, `ValueError` if its mode has no right conversion.
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


def read_image(file: BinaryIO, max_image_pixels: int, name: str = "image", path: str = "") -> Image.Image:
    """8-bit RGB from an open image file, upright by its EXIF orientation, first frame.

    The limit is checked between the header and the pixels. It replaces Pillow's own (`Image.MAX_IMAGE_PIXELS`), which
    is neither used nor changed: the registered readers are called directly, as `Image.open` does before its check.
    """
    try:
        image = _open_lazily(file, path)
    except Exception as error:
        raise OSError(f"{name}: the image cannot be opened ({_reason(error)}).") from error
    if image is None:
        raise UnidentifiedImageError(f"{name}: not an image that Pillow can read, or one with a side of 0 pixels.")
    check_image_size((image.height, image.width), max_image_pixels, name)
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


def _decode_base64(text):
    """A file in memory; line breaks are allowed. Whatever else is no base64 raises `binascii.Error`."""
    return io.BytesIO(base64.b64decode("".join(text.split()).encode(errors="replace"), validate=True))


def load_rgb(source: str | os.PathLike, max_image_pixels: int) -> Image.Image:
    """8-bit RGB from a path, a `file://` or `http(s)://` URL, or base64 with or without a `data:` header.

    Files and base64 are read by `read_image`. URLs are fetched by transformers' own loader, so that Pillow's limit
    holds for them too. Raises `OSError` or `ValueError` with the source's name.
    """
    source = os.fspath(source)
    name = source if len(source) <= 200 else f"{source[:100]}..."
    if source.startswith(("http://", "https://")):
        try:
            image = load_image(source)
        except Exception as error:
            raise OSError(f"{name}: the image cannot be fetched ({_reason(error)}).") from error
        check_image_size((image.height, image.width), max_image_pixels, name)
        return image
    if source.startswith("data:"):
        header, _, payload = source.partition(",")
        try:
            return read_image(_decode_base64(payload), max_image_pixels, header)
        except binascii.Error as error:
            raise ValueError(f"{header}: the image is not base64 ({error}).") from error
    path = url2pathname(urlparse(source).path) if source.startswith("file://") else source
    if os.path.exists(path):
        with open(path, "rb") as file:
            return read_image(file, max_image_pixels, name, path)
    try:
        return read_image(_decode_base64(source), max_image_pixels, name)
    except (binascii.Error, UnidentifiedImageError) as error:
        raise FileNotFoundError(f"{name}: there is no such file, and it is no URL or base64 image.") from error


def array_to_image(array: np.ndarray, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """L, RGB or RGBA image from [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels.

    Values: 8 bits; bool; 16 bits, scaled by their full range; other integers that are in 0..255; floats in [0, 1].
    Raises `ValueError` for other values, other shapes, and for a shape that can be read both ways.
    """
    array = _channels_last(array, input_data_format)
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


def _channels_last(array, input_data_format):
    """A [H, W, C] view of an image array."""
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


def flatten_images(images) -> list:
    """One flat list from an image (PIL, array, path or URL), a batch array of 4 dimensions, or nested lists."""
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in flatten_images(nested)]
    if getattr(images, "ndim", 3) == 4:
        return list(images)
    return [images]


# Streaming: an image that is never held whole


def _pyvips():
    """The optional library, told to keep no image that was read: an earlier pass would stay in memory."""
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError: pyvips is there, libvips is not
        raise ImportError("Streaming an image needs pyvips: pip install pyvips pyvips-binary") from error
    pyvips.cache_set_max(0)
    return pyvips


class StreamedImage:
    """An image file that libvips reads from top to bottom, some rows at a time: gigapixels in tens of megabytes.

    8-bit RGB as everything here: of two bands the first is grey, of three or four the first three are red, green and
    blue (a fourth is alpha or near infrared, and dropped); 16 bits are scaled by their full range. JPEG, PNG and TIFF
    come out as Pillow decodes them. The file is read again for every pass, so it must stay as it is.

    Args:
        path: an image file. Tiles or strips keep a TIFF's reading small; an interlaced PNG or a progressive JPEG is
            held whole by its decoder.
        max_image_pixels: the largest image that is read.

    Raises:
        ImportError: pyvips is not installed.
        OSError: the file cannot be opened.
        ValueError: an image that is too large, is turned by its EXIF orientation, or is neither grey nor RGB in 8 or
            16 bits.
    """

    def __init__(self, path: str | os.PathLike, max_image_pixels: int):
        self.filename = os.fspath(path)
        image = self._open()
        self.height, self.width = image.height, image.width
        check_image_size((self.height, self.width), max_image_pixels, self.filename)
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
            # Revalidated: libvips would return the image that an earlier pass has read to its end.
            return pyvips.Image.new_from_file(self.filename, access="sequential", fail_on="error", revalidate=True)
        except pyvips.Error as error:
            raise OSError(f"{self.filename}: the image cannot be opened ({_reason(error)}).") from error

    def strips(self, num_rows: int) -> Iterator[Image.Image]:
        """The image as RGB strips of `num_rows` rows, the last one of what is left. `OSError` for a damaged file."""
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
                strip.paste(to_rgb(array_to_image(pixels, ChannelDimension.LAST)), (0, top))
            yield strip


# Resizing and cutting


def _strips(image, pad_color):
    """Strips of rows as wide as the letterboxed square, from top to bottom, of an image in memory or in a file."""
    side, _, left = letterbox((image.height, image.width))
    streamed = isinstance(image, StreamedImage)
    num_rows = max(1, (STREAMED_STRIP_PIXELS if streamed else STRIP_PIXELS) // side)
    if streamed:
        parts = ((part, (left, 0)) for part in image.strips(num_rows))
    else:
        # Pasting clips, and does not ask for Pillow's limit as cropping does.
        parts = ((image, (left, -start)) for start in range(0, image.height, num_rows))
    for start, (part, place) in zip(range(0, image.height, num_rows), parts):
        strip = Image.new("RGB", (side, min(num_rows, image.height - start)), pad_color)
        strip.paste(part, place)
        yield strip


def _run(pool, calls):
    """Call functions in threads, `calls` being (function, *arguments), and wait for them."""
    for call in [pool.submit(*call) for call in calls]:
        call.result()  # raises what a thread raised


def _read_ahead(strips):
    """The strips of a generator, each read while the one before it is resized."""
    with ThreadPoolExecutor(1) as reader:  # one thread from first to last, as libvips asks of those who read a region
        coming = reader.submit(next, strips, None)
        while (strip := coming.result()) is not None:
            coming = reader.submit(next, strips, None)
            yield strip


class _Band(NamedTuple):
    """Rows (first, last + 1) that are resized together: of the view, of the square that they show, and of the square
    with what the filter reaches on both sides."""

    view: tuple[int, int]
    square: tuple[int, int]
    window: tuple[int, int]


def _bands(side: int, scale: int) -> list[_Band]:
    """Bands of `BAND_ROWS` or more, from top to bottom. Each begins with a whole row of the view and of the square: from
    part of a row on, Pillow rounds to other bits. Where the side is prime, there is one, the whole view."""
    num_parts = math.gcd(side, scale)
    parts_per_band = math.ceil(BAND_ROWS * num_parts / scale)
    reach = math.ceil(WIDEST_FILTER * max(1, side / scale)) + 1
    bands = []
    for start in range(0, num_parts, parts_per_band):
        stop = min(start + parts_per_band, num_parts)
        view, square = ((start * rows // num_parts, stop * rows // num_parts) for rows in (scale, side))
        bands.append(_Band(view, square, (max(0, square[0] - reach), min(side, square[1] + reach))))
    return bands


class _View:
    """The square view of one scale and its tiles, resized while the rows of the image come in.

    Pillow resizes rows first, rounds to 8 bits, then columns. Here every strip is made narrow when it comes, and the
    columns of a band follow as soon as its rows are there: only these are held.
    """

    def __init__(self, side, scale, tile_size, pad_color, resample):
        self.scale, self.tile_size, self.pad_color, self.resample = scale, tile_size, pad_color, resample
        self.bands = _bands(side, scale)  # that are not finished
        self.windows = {}  # of those that have begun: their narrow rows
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


def _passes(scales, side):
    """The scales in groups whose bands take no more than `WINDOW_BYTES`."""
    groups, taken = [[]], 0
    for scale in scales:
        bands = [band.window for band in _bands(side, scale)]
        needed = 4 * scale * max(last - first for first, last in bands)
        if groups[-1] and taken + needed > WINDOW_BYTES:
            groups.append([])
            taken = 0
        groups[-1].append(scale)
        taken += needed
    return groups


def image_to_tiles(
    image: Image.Image | StreamedImage,
    scales: Sequence[int],
    tile_size: int,
    pad_color: Sequence[int] = PAD_COLOR,
    resample: int = Image.Resampling.BICUBIC,
) -> dict[int, np.ndarray]:
    """{scale: uint8[(scale / tile)^2, 3, tile, tile]} of an RGB image: every view cut into tiles, row by row.

    Bit-equal to pasting the image into its letterboxed square and resizing that. The image is gone through in strips,
    once for all scales that fit `WINDOW_BYTES` together.
    """
    check_scales(scales, tile_size)
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise ValueError(f"Tiles are cut from an RGB image. Got mode {image.mode}.")
    pad_color, (side, top, _) = tuple(pad_color), letterbox((image.height, image.width))
    passes, tiles = _passes(scales, side), {}
    total = len(passes) * image.height
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        logging.tqdm(total=total, desc="Resizing", unit="row", delay=2, leave=False) as progress,
    ):
        for group in passes:
            # The longest work first.
            views = [_View(side, scale, tile_size, pad_color, resample) for scale in reversed(group)]
            row = top
            for strip in _read_ahead(_strips(image, pad_color)):
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
    """float32[..., 3, h, w] from uint8 of that shape: `(tiles * rescale_factor - mean) / std`, bit-equal to CLIP's
    processor, whose product is rounded once, from float64. `rescale_factor=None` and `mean=None` leave that step out.
    The result is written to `out` where given."""
    out = np.empty(tiles.shape, np.float32) if out is None else out
    if rescale_factor is None:
        out[...] = tiles
    else:
        np.multiply(tiles, rescale_factor, out=out, dtype=np.float64, casting="same_kind")
    if mean is not None:
        np.subtract(out, np.asarray(mean, np.float32).reshape(-1, 1, 1), out=out)
        np.divide(out, np.asarray(std, np.float32).reshape(-1, 1, 1), out=out)
    return out


# What users load


class UHRBatImageProcessorKwargs(ImagesKwargs, total=False):
    """
    scales (`list[int]`):
        Sides of the square views in pixels, ascending, the anchor first. Multiples of the tile.
    patch_size (`int`):
        Side of the square of pixels that one token shows.
    pad_color (`list[int]`):
        RGB colour of the letterbox.
    max_image_pixels (`int`):
        Pixels of the largest image that is read.
    mask_padding (`bool`):
        Whether `pixel_attention_mask` is 0 where a patch shows the letterbox alone; otherwise it is 1 everywhere.
    """

    scales: list[int] | tuple[int, ...] | None
    patch_size: int | None
    pad_color: list[int] | tuple[int, ...] | None
    max_image_pixels: int | None
    mask_padding: bool | None


class UHRBatImageProcessor(BaseImageProcessor):
    """Turns images into the tiles of every scale.

    Returns a `BatchFeature` with
    - `pixel_values` float32[I, T, 3, tile, tile]: scales ascending, the tiles of a scale row by row;
    - `pixel_attention_mask` int64[I, N]: scales ascending, each in raster order over its whole grid; 1 where the patch
      shows any pixel of the image, 0 where it shows the letterbox alone. int64 as `attention_mask` is, which every
      collator and gather handles; it is 300 times smaller than the pixels.

    Images: PIL, NumPy or torch (see `array_to_image`), paths, URLs, base64, what `open_image` returns, alone, in lists
    or in nested lists, which are flattened. EXIF orientation is applied to what is read here, not to PIL images handed
    in. Every image becomes 8-bit RGB first: floats in [0, 1] too, so that `do_rescale=False` gives 0..255 whatever the
    input.

    The tile is `crop_size`. The file that this class writes can be read as CLIP's, so that it gives a right image
    processor without `trust_remote_code` too: it names CLIP's class, and `size` (CLIP's key, not used here, like
    `do_center_crop`) always follows `crop_size`.
    """

    valid_kwargs = UHRBatImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_attention_mask"]

    # CLIP's keys. The tile is that of ViT-L/14-336.
    do_resize = True
    size = {"shortest_edge": 336}
    default_to_square = False
    resample = Image.Resampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 336, "width": 336}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    # Ours, with the paper's scales.
    scales = [672, 1344, 2688, 4032]
    patch_size = 14
    pad_color = list(PAD_COLOR)
    max_image_pixels = 1_000_000_000
    mask_padding = True

    def __init__(self, **kwargs: Unpack[UHRBatImageProcessorKwargs]):
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # None is the class's default
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @classmethod
    def from_clip(cls, image_processor: BaseImageProcessor, **kwargs) -> "UHRBatImageProcessor":
        """Our processor with the tile, mean, std and other settings of a CLIP one; `kwargs` (as `scales`) go first.

        One that was read from our own file without `trust_remote_code` still carries our settings: they are kept.
        """
        settings = image_processor.to_dict()
        known = (*cls.valid_kwargs.__annotations__, "auto_map")
        settings = {name: settings[name] for name in known if name in settings}
        size = settings.pop("size", None)
        settings.setdefault("crop_size", size)  # processors without a crop state the tile as their size
        return cls(**{**settings, **kwargs})

    def fetch_images(self, image_url_or_urls, max_image_pixels: int | None = None):
        """RGB images in place of paths, URLs and base64 strings, in the same nesting; other images as they are."""
        if max_image_pixels is None:
            max_image_pixels = self.max_image_pixels
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image, max_image_pixels) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return load_rgb(image_url_or_urls, max_image_pixels)
        if isinstance(image_url_or_urls, StreamedImage) or is_valid_image(image_url_or_urls):
            return image_url_or_urls
        raise TypeError(
            f"An image is a PIL image, an array, a tensor, a path, a URL or base64. Got {type(image_url_or_urls)}."
        )

    def open_image(self, path: str | os.PathLike, max_image_pixels: int | None = None) -> StreamedImage:
        """An image file that is read while it is resized and never held whole: pass it like any other image.

        For images of hundreds of megapixels; needs `pip install pyvips pyvips-binary`. See `StreamedImage` for what is
        read and what is raised.
        """
        return StreamedImage(path, self.max_image_pixels if max_image_pixels is None else max_image_pixels)

    def process_image(
        self,
        image: ImageInput | str | os.PathLike,
        max_image_pixels: int | None = None,
        do_convert_rgb: bool | None = True,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> Image.Image | StreamedImage:
        """One image of any kind as 8-bit RGB; a streamed one as it is."""
        if max_image_pixels is None:
            max_image_pixels = self.max_image_pixels
        image = self.fetch_images(image, max_image_pixels)
        if isinstance(image, StreamedImage):
            check_image_size((image.height, image.width), max_image_pixels, image.filename)
            return image
        if not isinstance(image, Image.Image):
            if is_torch_tensor(image):
                image = image.detach().cpu()
                image = (image.float() if image.is_floating_point() else image).numpy()
            check_image_size(_channels_last(image, input_data_format).shape[:2], max_image_pixels)
            image = array_to_image(image, input_data_format)
        name = getattr(image, "filename", "") or "image"  # only images that Pillow opened know their file
        check_image_size((image.height, image.width), max_image_pixels, name)
        if not do_convert_rgb and image.mode != "RGB":
            raise ValueError(f"{name}: mode {image.mode} is not RGB, and `do_convert_rgb` is False.")
        return to_rgb(image, name)

    def _standardize_kwargs(self, **kwargs) -> dict:
        # None in a call is what the processor itself says.
        kwargs = {name: getattr(self, name, None) if value is None else value for name, value in kwargs.items()}
        kwargs = super()._standardize_kwargs(**kwargs)
        tile_size = kwargs["crop_size"].height
        if set(dict(kwargs["size"]).values()) != {tile_size}:
            kwargs["size"] = SizeDict(shortest_edge=tile_size)
        for name in ("image_mean", "image_std"):
            if np.size(kwargs[name]) == 4:  # the fourth is that of the alpha channel, which is dropped
                kwargs[name] = kwargs[name][:3]
        # JSON has no tuples: lists here keep a processor equal to its own copy that was saved and loaded.
        kwargs["scales"] = list(kwargs["scales"])
        kwargs["pad_color"] = list(kwargs["pad_color"])
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs):
        super()._validate_preprocess_kwargs(**kwargs)
        crop_size = kwargs["crop_size"]
        if crop_size.height is None or crop_size.height != crop_size.width:
            raise ValueError(f"`crop_size` is the tile, a square. Got {dict(crop_size)}.")
        check_scales(kwargs["scales"], crop_size.height, kwargs["patch_size"])
        if kwargs["max_image_pixels"] < 1:
            raise ValueError(f"`max_image_pixels` must be at least 1. Got {kwargs['max_image_pixels']}.")
        if len(kwargs["pad_color"]) != 3 or not all(0 <= value <= 255 for value in kwargs["pad_color"]):
            raise ValueError(f"`pad_color` is three numbers in 0..255. Got {kwargs['pad_color']}.")
        for name in ("image_mean", "image_std"):
            if np.size(kwargs[name]) not in (1, 3):
                raise ValueError(f"`{name}` is one number or three, for RGB. Got {np.size(kwargs[name])}.")
        if not kwargs["do_resize"]:
            raise ValueError("`do_resize=False` cannot be: every scale is a resized view of the image.")
        if kwargs["data_format"] not in (None, ChannelDimension.FIRST, ChannelDimension.FIRST.value):
            raise ValueError(f"`pixel_values` are channels first. Got `data_format={kwargs['data_format']}`.")

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        *args,
        scales: list[int],
        crop_size,
        patch_size: int,
        pad_color: list[int],
        resample: int,
        mask_padding: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        sources = flatten_images(images)
        tile_size = crop_size.height
        num_tiles = [(scale // tile_size) ** 2 for scale in scales]
        num_patches = [(scale // patch_size) ** 2 for scale in scales]
        pixel_values = np.empty((len(sources), sum(num_tiles), 3, tile_size, tile_size), np.float32)
        pixel_attention_mask = np.ones((len(sources), sum(num_patches)), np.int64)

        arithmetic = (
            rescale_factor if do_rescale else None,
            image_mean if do_normalize else None,
            image_std if do_normalize else None,
        )
        for image_idx, source in enumerate(sources):  # one decoded image at a time
            image = self.process_image(source, **kwargs)
            tiles = image_to_tiles(image, scales, tile_size, pad_color, resample)
            by_scale = dict(zip(scales, np.split(pixel_values[image_idx], np.cumsum(num_tiles)[:-1])))
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                for scale in reversed(scales):  # the largest 8-bit tiles are dropped first
                    pairs = zip(tiles.pop(scale), by_scale[scale])
                    _run(pool, [(normalize_tiles, tile, *arithmetic, out) for tile, out in pairs])
            if mask_padding:
                grids = [(scale // patch_size, scale // patch_size) for scale in scales]
                masks = [shown_patches((image.height, image.width), grid).ravel() for grid in grids]
                pixel_attention_mask[image_idx] = np.concatenate(masks)

        data = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_processor_type": "CLIPImageProcessor"}


__all__ = ["UHRBatImageProcessor"]
