"""UHR-BAT zooming: which tiles of the next level a question looks at. Decisions alone, which know no model and no image.

The anchor is encoded whole. What the question looks at there says which tiles of the next level are read and encoded,
what it looks at in these says which of the level after, and so on down to the image's own resolution:

    level 0, whole      level 1: two tiles      level 2: five of those that lie on these
    +---+---+           +-+-+-+-+               . . . . . . . .
    | * |   |           |#| | | |               . # . . . . . .
    +---+---+    ->     +-+-+-+-+        ->     . # # . . . . .
    |   | * |           | | |#| |               . . . . # . . .
    +---+---+           +-+-+-+-+               . . . . # . . .

How many tiles each level gets follows from their numbers alone (`split_tiles`), so the number of visual tokens is known
before the model runs (`least_tokens`).

Letters: L levels, T tiles of a level, V tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch


def split_tiles(num_tiles: Sequence[int], max_tiles: int) -> list[int]:
    """int[L], tiles of every level that go through the vision tower: all of the anchor, and of what is left an equal share
    for every finer level; what a level cannot use goes to the finer ones.

    Args:
        num_tiles: int[L], tiles of every level that show the image.
        max_tiles: of all levels together, the anchor's included.

    Raises:
        ValueError: the anchor alone has more tiles.
    """
    if max_tiles < num_tiles[0]:
        raise ValueError(
            f"`max_tiles` is {max_tiles}, but the {num_tiles[0]} tiles of the anchor are always encoded, and count."
        )
    chosen, left = [num_tiles[0]], max_tiles - num_tiles[0]
    for level_idx, number in enumerate(num_tiles[1:], 1):
        chosen.append(min(number, left // (len(num_tiles) - level_idx)))
        left -= chosen[-1]
    return chosen


def least_tokens(num_shown: np.ndarray, num_tiles: int, counts: np.ndarray | None = None) -> int:
    """Tokens that some tiles of a level have at least, whichever are chosen of those that show the image.

    Args:
        num_shown: long[T], tokens of every tile that show the image.
        num_tiles: how many tiles are chosen.
        counts: long[T], how many tiles each of these stands for; by default one.
    """
    counts = np.ones_like(num_shown) if counts is None else counts
    order = np.argsort(num_shown)[np.count_nonzero(num_shown <= 0) :]
    fewest, counts = num_shown[order], counts[order]
    taken = (num_tiles - (counts.cumsum() - counts)).clip(0, counts)
    return int((fewest * taken).sum())


def overlapping_tiles(tile_idx: torch.Tensor, width: int, finer_width: int) -> torch.Tensor:
    """long[T'], ascending: the tiles of a finer level that lie on some tiles of this one, at least with a part.

    Args:
        tile_idx: long[T], of a level that is `width` tiles wide.
        finer_width: width of the finer level in tiles.
    """
    reach = -(-finer_width // width) + 1  # a tile overlaps no more of them in a row
    steps = torch.arange(reach, device=tile_idx.device)
    found = []
    for idx in (tile_idx // width, tile_idx % width):
        first, last = idx * finer_width // width, ((idx + 1) * finer_width - 1) // width
        found.append((first[:, None] + steps).minimum(last[:, None]))
    rows, columns = found
    return (rows[:, :, None] * finer_width + columns[:, None]).flatten().unique()


def best_tiles(scores: torch.Tensor, tile_idx: torch.Tensor, num_tiles: int, num_shown: np.ndarray | None) -> torch.Tensor:
    """long[num_tiles], ascending: the tiles of greatest score, of equals the first.

    Where there are fewer candidates, further tiles of the level that show the image are taken, the first of them: the
    number of tiles, and with it that of the visual tokens, is a promise.

    Args:
        scores: float[T] of the candidates.
        tile_idx: long[T], ascending, which they are; all show the image.
        num_tiles: how many to choose, no more than the level has.
        num_shown: long[tiles of the level], tokens of every tile that show the image; looked at only where there are fewer
            candidates.
    """
    chosen = tile_idx[scores.argsort(descending=True, stable=True)[:num_tiles]]
    if len(chosen) < num_tiles:
        others = torch.from_numpy(np.setdiff1d(np.flatnonzero(num_shown), chosen.cpu().numpy()))
        chosen = torch.cat((chosen, others[: num_tiles - len(chosen)].to(chosen)))
    return chosen.sort().values


__all__ = ["best_tiles", "least_tokens", "overlapping_tiles", "split_tiles"]
