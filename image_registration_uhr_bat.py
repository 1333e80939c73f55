# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT registration of two images of one place: where in one letterboxed square a place of the other lies.

By their geotransforms where both have one, else by their pixels: the same part of the height and of the width, of the whole images
where they are windows.
"""

import numpy as np
from transformers.utils import logging

from .geometry_uhr_bat import box_corners, letterbox
from .image_raster_files_uhr_bat import import_rasterio
from .image_raster_windows_uhr_bat import period_of
from .image_sources_uhr_bat import WHOLE

logger = logging.get_logger(__name__)

# Points a side of each image by which two geotransforms are compared, and how far one of them may lie from the affine map between
# the images, as a part of the other's square: half a token of a grid of 250.
POINTS, BENT = 33, 1 / 500
# The area, in squares of the other image, from which on the square of an image is one.
TINY = 1e-12


def place_of(image) -> tuple:
    """(crs, transform) of an opened image; (None, None) of one that lies nowhere."""
    crs, transform = getattr(image, "crs", None), getattr(image, "transform", None)
    return (None, None) if crs is None or transform is None else (crs, transform)


def _part_of_whole(image) -> tuple:
    """A transform to parts of the height and of the width of the whole image, of which this one may be a window."""
    top, left, bottom, right = getattr(image, "part", WHOLE)
    return (right - left) / image.width, 0, left, 0, (bottom - top) / image.height, top


def open_dates(open_image, image, before=None) -> tuple[list, list | None]:
    """An image and, where there is one, an earlier one of the same place, opened and registered before anything of them is cut.

    Args:
        open_image: opens one of them, as `open_image` of the image processor does.
        image, before: what it takes; `before` None for an image that is compared with nothing.

    Returns:
        ([image], None); ([before, image], [what `register` returned]): `dates` of the processor for this prompt.

    Raises:
        What `open_image` and `register` raise.
    """
    if before is None:
        return [open_image(image)], None
    images = [open_image(before), open_image(image)]
    return images, [register(*images)]


def register(earlier, later) -> list[list[float]]:
    """The affine map from points of one image to those of another that show the same ground.

    Args:
        earlier, later: opened images, with `height`, `width` and, where they lie somewhere, `crs` and `transform`; where they are
            windows, `part`.

    Returns:
        [[a, b, c], [d, e, f]]: y' = a y + b x + c and x' = d y + e x + f, from points (y, x) in [0, 1] of the letterboxed square of
        the earlier image to those of the later.

    Raises:
        ValueError: the two lie apart, or no affine map leads from one to the other.
        ImportError: rasterio is missing; says what to install.
    """
    sizes = [(image.height, image.width) for image in (earlier, later)]
    places = [place_of(image) for image in (earlier, later)]
    if len(lacking := [crs for crs, _ in places if crs is None]) == 1:
        logger.warning(
            "One of the two dates has a place on the ground, the other has none: they are compared by their pixels, as if both "
            "showed the same ground."
        )
    if lacking:
        places = [(None, _part_of_whole(image)) for image in (earlier, later)]
    steps = np.linspace(0, 1, POINTS)
    parts = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    here, there = _common_ground(parts, places, sizes)
    here, there = ((points + letterbox(size)[1:]) / letterbox(size)[0] for points, size in zip((here, there), sizes))
    known = np.concatenate((here, np.ones((len(here), 1))), axis=1)
    found, _, rank, _ = np.linalg.lstsq(known, there, rcond=1e-9)
    if rank < 3:
        names = [getattr(image, "filename", None) or "image" for image in (earlier, later)]
        if names == ["image"] * 2:
            names = ["the earlier", "the later"]
        raise ValueError(
            f"The two dates show no common ground: {names[0]} and {names[1]} lie apart, but for a narrow strip at most. "
            "Give images of one place."
        )
    if (bent := np.abs(known @ found - there).max()) > BENT:
        raise ValueError(
            f"The grids of the two dates are bent against each other by {bent:.1%} of their width, where {BENT:.1%} is allowed: warp "
            "one onto the grid of the other first."
        )
    return found.T.tolist()


def _common_ground(parts, places, sizes) -> tuple[np.ndarray, np.ndarray]:
    """float[K, 2], (row, column) in pixels of either image, of ground that both show: of the points `parts` float[P, 2] of each
    image those that the other has, which may lie turns of the globe apart. Beyond, a system may be bent, or know no place."""
    pairs = []
    for one, other in ((0, 1), (1, 0)):
        (crs, transform), (other_crs, other_transform) = places[one], places[other]
        points = parts * sizes[one]
        x, y = box_corners(np.concatenate((points, points), axis=-1), transform)[:, 0].T
        if crs != other_crs:
            warp = import_rasterio("warp")
            try:
                x, y = warp.transform(crs, other_crs, x, y)
            except Exception:  # PROJ's own, of places that the other system lacks: the other image may lie inside
                continue
        period, x = other_crs and period_of(other_crs), np.asarray(x)
        if period and crs != other_crs and np.isfinite(middle := x[len(x) // 2]):
            with np.errstate(invalid="ignore"):  # infinite where there is no place
                x = x - period * np.round((x - middle) / period)
        a, b, c, d, e, f = tuple(other_transform)[:6]
        ways = []
        for turn in (0, 1, -1, 2, -2) if period else (0,):
            moved = np.stack((x + turn * (period or 0) - c, np.subtract(y, f)))
            there = np.linalg.solve([[a, b], [d, e]], moved)[::-1].T
            ways.append((there, ((there >= 0) & (there <= sizes[other])).all(1)))
        there, inside = max(ways, key=lambda way: way[1].sum())
        pair = points[inside], there[inside]
        pairs.append(pair if one == 0 else pair[::-1])
    none = np.empty((0, 2))
    return tuple(map(np.concatenate, zip((none, none), *pairs)))


def check_dates(images_per_prompt, allowed=(0, 2)):
    """Raises `ValueError` where a prompt has another number of images than two, or none."""
    if odd := [number for number in images_per_prompt if number not in allowed]:
        raise ValueError(
            f"`dates` compares 2 images of one place in a prompt. Got {odd[0]}: ask about them apart, or without `dates`."
        )


def check_registration(registration, images_per_prompt):
    """Raises `ValueError` where `registration` is not of two images in every prompt that has any, but for those where it is False,
    whose images have nothing to do with each other."""
    if len(registration) != len(images_per_prompt):
        raise ValueError(
            f"`registration` has {len(registration)} entries, but there are {len(images_per_prompt)} prompts: one for each."
        )
    check_dates(number for found, number in zip(registration, images_per_prompt) if found is not False)
    for found, number in zip(registration, images_per_prompt):
        if number and found is not False and not _is_registration(found):
            raise ValueError(
                f"A registration is [[a, b, c], [d, e, f]], as `register` returns it. Got {str(found)[:80]}."
            )


def _is_registration(found) -> bool:
    """Whether it is an affine map that can be turned round."""
    try:
        numbers = np.asarray(found, float)
    except (TypeError, ValueError):
        return False
    shaped = numbers.shape == (2, 3) and bool(np.isfinite(numbers).all())
    return shaped and bool(abs(np.linalg.det(numbers[:, :2])) > TINY)


__all__ = ["open_dates", "register"]
