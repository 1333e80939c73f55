"""Windows that cover an image, and the objects of overlapping windows joined: no object twice.

Letters: W windows, K objects. Windows and boxes are (left, top, right, bottom) in pixels of the image, sizes (height, width).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..common.objects import ImageObject

# Part of a window's side that it shares with the next one, at least.
OVERLAP = 0.25
# Of two boxes, where two windows both look: from this intersection over union on they are one object.
SAME = 0.5
# Of two boxes of one window: a model that repeats itself. Less is two objects side by side.
REPEATED = 0.9
# A box that ends so near to a window's border, in parts of its side, is cut off there.
AT_BORDER = 0.01
# Half the side of the box that stands for a point, in parts of its window's side.
REACH = 1 / 32


def windows_of(image_size: tuple[int, int], side: int) -> np.ndarray:
    """int64[W, 4], row by row: square windows of `side` pixels that cover an image and overlap by `OVERLAP` or more; an image
    that is smaller has smaller ones."""
    starts, lengths = [], [min(side, length) for length in image_size]
    for length in image_size:
        step = side - int(side * OVERLAP)
        number = 1 + max(0, -(-(length - side) // step))
        starts.append(np.linspace(0, max(0, length - side), number).round().astype(np.int64))
    top, left = (part.ravel() for part in np.meshgrid(*starts, indexing="ij"))
    return np.stack((left, top, left + lengths[1], top + lengths[0]), axis=1)


def join(found: Sequence[tuple[tuple[int, int, int, int], ImageObject]], image_size) -> list[ImageObject]:
    """Non-maximum suppression over the borders of windows, in the order of what is kept.

    Two boxes of different windows are one object if they agree where both windows look: intersection over union `SAME` of the
    parts that lie there. Pairs are taken best first, and an object has one box of each window at most, so that two ships side
    by side stay two. Of an object that a window shows whole, the box with the best score is kept, else the first; of one that
    all its windows cut off, the box around all parts.

    Args:
        found: (window, object in pixels of the image).
        image_size: (height, width).

    Raises:
        ImportError: shapely is missing; says what to install.
    """
    import shapely

    if not found:
        return []
    windows = np.array([window for window, _ in found], float)
    side = (windows[:, 2:] - windows[:, :2]).max(1)
    edges = np.array([one.edges for _, one in found], float)
    is_point = np.array([one.box is None for _, one in found])[:, None]
    edges = edges + is_point * REACH * side[:, None] * (-1, -1, 1, 1)
    boxes, looked = shapely.box(*edges.T), shapely.box(*windows.T)
    cut = _cut(edges, windows, side, image_size)

    one, other = shapely.STRtree(boxes).query(boxes, predicate="intersects")
    one, other = one[one < other], other[one < other]
    same_window = (windows[one] == windows[other]).all(1)
    both = shapely.intersection(looked[one], looked[other])
    agree = _overlap(shapely.intersection(boxes[one], both), shapely.intersection(boxes[other], both))
    repeated = same_window & (agree >= REPEATED)
    gone = set(other[repeated].tolist())

    groups = {idx: [idx] for idx in range(len(found)) if idx not in gone}
    group_of = {idx: idx for idx in groups}
    pairs = np.flatnonzero(~same_window & (agree >= SAME))
    for pair in pairs[np.argsort(-agree[pairs], kind="stable")]:
        ends = one[pair].item(), other[pair].item()
        if gone & set(ends):
            continue
        first, second = sorted(group_of[end] for end in ends)
        members = groups[first] + groups[second]
        if first != second and len({found[idx][0] for idx in members}) == len(members):
            groups[first] = members
            group_of |= dict.fromkeys(groups.pop(second), first)
    return [_joined([found[idx][1] for idx in sorted(members)], cut[sorted(members)]) for members in groups.values()]


def _overlap(ones, others) -> np.ndarray:
    """Intersection over union of shapes, 0 where there is nothing."""
    import shapely

    shared, whole = shapely.area(shapely.intersection(ones, others)), shapely.area(shapely.union(ones, others))
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def _cut(edges, windows, side, image_size) -> np.ndarray:
    """bool[K]: boxes that end at a border of their window that is none of the image."""
    inner = windows != (0, 0, image_size[1], image_size[0])
    return (inner & (np.abs(edges - windows) <= AT_BORDER * side[:, None])).any(1)


def _joined(members, cut) -> ImageObject:
    if cut.all() and members[0].box is not None:
        edges = np.array([one.edges for one in members])
        scores = [one.score for one in members if one.score is not None]
        box = *edges[:, :2].min(0).tolist(), *edges[:, 2:].max(0).tolist()
        return replace(members[0], box=box, score=max(scores, default=None))
    whole = [one for one, is_cut in zip(members, cut) if not is_cut] or members
    return max(whole, key=lambda one: -1 if one.score is None else one.score)
