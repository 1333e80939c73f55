"""Which parts of an image a question should be looked at in: windows of one size, by the places of what was kept for it.

Letters: h and w height and width of an image in pixels, V visual tokens. Sizes are (height, width), boxes (top, left, bottom,
right) in pixels.
"""

from typing import NamedTuple

import numpy as np

from ..geometry_uhr_bat import token_box, tokens_of_points

# Steps a window takes across its own side, and the most that an image has a side: finer ones move no window by a tenth.
WINDOW_STEPS, MOST_STEPS = 16, 2048


class Window(NamedTuple):
    """A part of an image, and of the weight of all that was kept the share that lies in it and in no window before."""

    box: tuple[int, int, int, int]
    share: float


def best_windows(compressed, image_size: tuple[int, int], side: int, number: int, image_idx: int = 0) -> list[Window]:
    """The windows that hold most of what was kept, the best first: each the one that holds the most of what no window before
    shows. Fewer where these show all of it.

    Args:
        compressed: what `model.compress` returned.
        image_size: (height, width) in pixels of the image that the model saw.
        side: of a window in pixels; of a smaller image all is one window.
        number: at most so many.
        image_idx: which image of the batch.

    Raises:
        ValueError: a result without places (`check_letterbox`).
    """
    compressed.check_letterbox()
    steps = max(1, min(WINDOW_STEPS, MOST_STEPS * side // max(image_size)))
    weights = _weights(*_kept(compressed, image_size, side, image_idx), image_size, side / steps)
    shape = tuple(min(steps, length) for length in weights.shape)
    total, found = weights.sum(), []
    while len(found) < number and (held := _held(weights, shape)).max() > total * 1e-9:
        row, column = _middle_of_best(held, steps)
        corner = (int(at * side / steps) for at in (row, column))
        top, left = (max(0, min(at, length - side)) for at, length in zip(corner, image_size))
        box = (top, left, min(top + side, image_size[0]), min(left + side, image_size[1]))
        found.append(Window(box, float(held[row, column] / total)))
        weights[row : row + shape[0], column : column + shape[1]] = 0
    return found


def _kept(compressed, image_size, side, image_idx):
    """Boxes float64[V, 4] of the tokens that were kept, and the root of their importance, float64[V]: a question about two
    places looks at one of them more. Of a token that is larger than a window nobody knows where in it the evidence lies: such
    count only where there are no others."""
    boxes, scores = [], []
    slots, importance = compressed.slots[image_idx], compressed.importance[image_idx]
    for level, grid in enumerate(slots.grids):
        kept = (slots.values[level] >= 0).cpu()
        boxes.append(token_box(slots.positions[level].cpu()[kept], image_size, grid))
        scores.append(importance.values[level].cpu()[kept].double().clamp_min(0).sqrt().numpy())
    boxes, scores = np.concatenate(boxes), np.concatenate(scores)
    small = (boxes[:, 2:] - boxes[:, :2]).max(1) <= side
    return (boxes[small], scores[small]) if small.any() else (boxes, scores)


def _weights(boxes, scores, image_size, step):
    """float64[ceil(h / step), ceil(w / step)]: scores, each token's spread evenly over its box."""
    shape = [int(-(-length // step)) for length in image_size]
    weights = np.zeros(shape)
    for box, score in zip(boxes / step, scores):
        (top, left), (bottom, right) = (np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int))
        rows, columns = (
            np.minimum(np.arange(low, high) + 1, end) - np.maximum(np.arange(low, high), start)
            for low, high, start, end in ((top, bottom, box[0], box[2]), (left, right, box[1], box[3]))
        )
        if rows.size and columns.size:
            weights[top:bottom, left:right] += score * np.outer(rows / rows.sum(), columns / columns.sum())
    return weights


def _held(weights, shape):
    """What a window of a shape in steps holds, at every place."""
    sums = np.pad(weights, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    height, width = shape
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]


def _middle_of_best(held, steps) -> tuple[int, int]:
    """Of equally good windows around the first one the middle: what lies at a window's edge may reach out of it."""
    first = np.array(np.unravel_index(held.argmax(), held.shape))
    equal = np.argwhere(held >= held.max() * (1 - 1e-9))
    equal = equal[(np.abs(equal - first) < steps).all(1)]
    return tuple(equal[((equal - equal.mean(0)) ** 2).sum(1).argmin()].tolist())


def window_importance(
    compressed, image_size: tuple[int, int], box, size: tuple[int, int], image_idx: int = 0
) -> np.ndarray:
    """float64[size]: how much the question looks at every cell of a box, by the finest level that was encoded there: of smaller
    tokens the greatest in a cell; NaN where none was.

    Args:
        compressed, image_size, image_idx: as in `best_windows`.
        box: (top, left, bottom, right) in pixels of the image.
        size: (height, width) in cells, which cover the box.
    """
    compressed.check_letterbox()
    start, extent = np.array(box[:2], float), np.subtract(box[2:], box[:2])
    points = np.stack(np.meshgrid(*((np.arange(number) + 0.5) / number for number in size), indexing="ij"), axis=-1)
    points, found, importance = start + points * extent, np.full(size, np.nan), compressed.importance[image_idx]
    for values, positions, grid in zip(importance.values, importance.positions, importance.grids):
        order = positions.argsort()
        known, values = positions[order].cpu().numpy(), values[order].double().cpu().numpy()
        edges = token_box(known, image_size, grid)
        if not len(known):
            continue
        if max(image_size) / max(grid) < (extent / size).max():
            cells = np.floor(((edges[:, :2] + edges[:, 2:]) / 2 - start) / extent * size).astype(int)
            inside = ((cells >= 0) & (cells < size)).all(1)
            level = np.full(size, -np.inf)
            np.maximum.at(level, tuple(cells[inside].T), values[inside])
            found = np.where(np.isfinite(level), level, found)
        else:
            asked = tokens_of_points(points, image_size, grid)
            at = np.searchsorted(known, asked).clip(max=len(known) - 1)
            found = np.where(known[at] == asked, values[at], found)
    return found
