"""An image of any kind in another size, for pictures of it."""

import math

from PIL import Image

from ..image_pictures_uhr_bat import MARGIN, jpeg_reduction
from ..image_reading_uhr_bat import kind_of
from ..image_sources_uhr_bat import ImageSource


def resize_image(
    image: Image.Image | ImageSource,
    size: tuple[int, int],
    box: tuple[int, int, int, int] | None = None,
    resample: int = Image.Resampling.BICUBIC,
    reducing_gap: float | None = None,
) -> Image.Image:
    """RGB of what `read_image` or `open_image` gives, or of a box (top, left, bottom, right) of it in pixels, in another
    size (height, width). Pillow resizes what is in memory, as the last two say; of a raster see `RasterImage.picture`. A JPEG
    is decoded so that it has as many pixels for each as `reducing_gap` says."""
    kind = kind_of(image)
    if kind == "raster":
        return image.picture(size, box)
    if kind == "source":
        edges = box or (0, 0, image.height, image.width)
        longest = max(image.height, image.width) / max(edges[2] - edges[0], edges[3] - edges[1], 1)
        smaller = image.for_scale(math.ceil(longest * max(size)))
        sizes = (smaller.height, smaller.width) * 2
        edges = [
            min(edge * there / whole, there)
            for edge, there, whole in zip(edges, sizes, (image.height, image.width) * 2)
        ]
        first = [math.floor(edge) for edge in edges[:2]] * 2
        with smaller.parts() as read:
            pixels, _ = read(*first[:2], *map(math.ceil, edges[2:]))
        top, left, bottom, right = (edge - start for edge, start in zip(edges, first))
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        return image.resize(size[::-1], resample, (left, top, right, bottom), reducing_gap).convert("RGB")
    if kind == "jpeg":
        longest = max(image.height, image.width)
        edges = box or (0, 0, image.height, image.width)
        shown = max(edges[2] - edges[0], edges[3] - edges[1], 1)
        side, gap = math.ceil(max(size) * longest / shown), reducing_gap or MARGIN
        if image.streamed is not None and jpeg_reduction((image.height, image.width), side, gap) == 1:
            return image.streamed.picture(size, box)
        reduced = image.smaller(side, gap)
        if reduced.factor > 1:
            return reduced.picture.resize(size[::-1], resample, reduced.box(edges), reducing_gap)
        image = reduced.picture
    image = image.image if kind == "picture" else image
    if box:
        top, left, bottom, right = box
        image = image.crop((left, top, right, bottom))
    if (image.height, image.width) != tuple(size):
        image = image.resize(size[::-1], resample, reducing_gap=reducing_gap)
    return image.convert("RGB")
