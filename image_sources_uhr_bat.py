# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT image sources: an image that is read part by part and never held whole, ours or somebody's own.

Remote code has classes of its own, so that an image is known by what it has, and no class is asked for. Sizes are (height,
width), boxes (top, left, bottom, right) in pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from .geometry_uhr_bat import PAD_COLOR

WHOLE = (0.0, 0.0, 1.0, 1.0)


def check_overviews(overviews: str | None):
    """Raises `ValueError` for what says neither that nor whether smaller copies of an image are used."""
    if overviews not in (None, "auto", "off"):
        raise ValueError(f"`overviews` is 'auto' or 'off'. Got {overviews!r}.")


class ImageSource:
    """An image that is read part by part and never held whole: what the views and the pyramid ask of it. A raster, or a
    class of your own that makes pixels when they are asked for.

    Attributes:
        height, width: in pixels.
        filename: what errors call it.
        masked: whether some of its pixels may be no part of the image.
        kind: what it is, in a word.
        crs, transform: where it lies, as rasterio has it; None: nowhere.
        part: (top, left, bottom, right) of the window that it is, in parts of the height and width of the whole image.
    """

    kind = "source"
    filename = "image"
    masked = False
    crs = transform = None
    part = WHOLE

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

    def strips(self, num_rows: int) -> Iterator[Image.Image]:
        """As `masked_strips`, RGB alone: what is no part of the image has the letterbox's colour."""
        for strip, valid in self.masked_strips(num_rows):
            yield fill(strip, valid)


def fill(strip: Image.Image, valid: np.ndarray | None) -> Image.Image:
    """The strip with the letterbox's colour where it is not valid."""
    if valid is not None:
        strip.paste(PAD_COLOR, mask=Image.fromarray(~valid))
    return strip


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
