"""Which tokens of a scene a question needs: those of its sites, and those of the objects that answer it.

Grids are those over the letterboxed square that the model sees, (height, width) in tokens; a token is its position in
one, row by row, or (scale, position) where there are several. Points of a scene are (x, y), as in `layout`.
"""

import numpy as np

from .layout import SITE_SIDE, WIDTH

SITE_SAMPLES = 24  # points a side, by which the portion of a site in a cell is measured


def tokens_at(scene, points, grid) -> list[int]:
    """The tokens of a grid that show points of a scene."""
    if not points:
        return []
    rows, columns = (scene.to_square(points) * grid).astype(int).clip(0, np.subtract(grid, 1)).T
    return (rows * grid[1] + columns).tolist()


def centres_of_tokens(grid, positions=None) -> np.ndarray:
    """float[N, 2]: (row, column) of the centres of a grid's tokens, or of some, in [0, 1]."""
    positions = np.arange(grid[0] * grid[1]) if positions is None else positions
    return (np.stack(np.divmod(positions, grid[1]), axis=-1) + 0.5) / grid


def points_of_tokens(scene, grid, positions=None) -> np.ndarray:
    """float[N, 2]: the same centres as points of the scene; those of the letterbox lie outside it."""
    top = (WIDTH - scene.height) / 2
    return centres_of_tokens(grid, positions)[:, ::-1] * WIDTH - (0, top)


def site_cells(scene, sites, grid) -> np.ndarray:
    """float[N]: the portion of the area of some sites (indices) that lies in each cell of a grid."""
    side = ((np.arange(SITE_SAMPLES) + 0.5) / SITE_SAMPLES - 0.5) * SITE_SIDE
    inside = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    cells = np.zeros(grid[0] * grid[1])
    for site in sites:
        points = scene.sites[site].placed(inside).tolist()
        cells += np.bincount(tokens_at(scene, points, grid), minlength=len(cells))
    return cells / cells.sum()


def site_tokens(scene, sites, grids) -> list[tuple[int, int]]:
    """(scale, position) of all tokens whose centre lies in one of some sites (indices)."""
    found = []
    for scale, grid in enumerate(grids):
        points = points_of_tokens(scene, grid)
        inside = np.any([scene.sites[index].contains(points) for index in sites], axis=0)
        found += [(scale, int(token)) for token in inside.nonzero()[0]]
    return found


def object_tokens(scene, things, grids) -> list[tuple[int, int]]:
    """(scale, position) of the tokens that show objects, at the two finest scales, object by object."""
    points, finest = [thing.centre for thing in things], range(len(grids))[-2:]
    by_scale = [[(scale, token) for token in tokens_at(scene, points, grids[scale])] for scale in finest]
    return [token for of_object in zip(*by_scale) for token in of_object]


def evidence_tokens(scene, question, grids) -> list[tuple[int, int]]:
    """(scale, position) of what has to be read for the answer.

    That is every object that is asked about, at the two finest scales; or, where the question is about the place of a
    site, its centre at all scales.
    """
    if question.kind == "quadrant":
        points = [scene.sites[index].centre for index in question.sites]
        return [(scale, token) for scale, grid in enumerate(grids) for token in tokens_at(scene, points, grid)]
    return object_tokens(scene, question.objects, grids)
