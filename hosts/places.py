"""Where the rows of an image stand in a prompt: their order, the positions that M-RoPE gives them, the words between them.

Axes: V rows of an image, L its levels, B prompts, M tokens of a prompt. Points are (row, column) on a level's grid.
"""

import torch


def order_of(places, tile_rows: int | None) -> torch.Tensor:
    """long[V]: rows of an image, given level after level, in the order of the prompt.

    Args:
        places: per level, with `points` float[V_l, 2].
        tile_rows: rows a side of a tile, for the order tile by tile, as a 1-D decoder was trained to read images; None for
            row by row over the whole level.
    """
    points = torch.cat([one.points for one in places])
    level = torch.cat([torch.full_like(one.points[:, 0], one.level) for one in places])
    keys = [level]
    if tile_rows is not None:
        keys += list((points // tile_rows).unbind(1))
    order = torch.arange(len(points), device=points.device)
    for key in reversed([*keys, *points.unbind(1)]):
        order = order[key[order].argsort(stable=True)]
    return order


def coordinates(places, rule: str, largest: int | None) -> tuple[torch.Tensor, int]:
    """M-RoPE's (t, h, w) of the rows of an image, from its first, and by how much the text after it goes on.

    Args:
        places: per level, with `points` float[V_l, 2] and `grid`.
        rule: see [`HostSettings`].
        largest: rows a side of the largest image that the model was made for; finer grids are laid onto that.

    Returns:
        (float64[V, 3], level after level; an integer).
    """
    limit = largest or max(max(one.grid) for one in places)
    if rule == "rectangle":
        number = sum(len(one.points) for one in places)
        columns = max(1, int(number**0.5))
        columns += columns**2 < number
        idx = torch.arange(number, device=places[0].points.device)
        made = torch.stack((torch.zeros_like(idx), idx // columns, idx % columns), dim=1)
        return made.double(), columns
    found, start = [], 0
    side = min(max(max(one.grid) for one in places), limit)
    for one in places:
        if rule == "levels":
            side = min(max(one.grid), limit)
        grid = one.points.new_tensor(one.grid)
        points = (one.points + 0.5) * side / grid - 0.5
        if side == max(one.grid):  # no rounding of what is a place of the grid
            points = one.points
        time = points.new_full((len(points), 1), start)
        found.append(torch.cat((time, points + start), dim=1))
        start += side if rule == "levels" else 0
    return torch.cat(found), start or side


def position_ids(image_mask, attention_mask, images) -> torch.Tensor:
    """[4, B, M] for M-RoPE: a token's number among those of its prompt, and its t, h and w. Whole numbers where all are.

    Args:
        image_mask, attention_mask: bool[B, M].
        images: per image in the order of the prompts, what `coordinates` returned, in the order of the prompt.
    """
    images, rows = iter(images), []
    for is_image, visible in zip(image_mask, attention_mask):
        is_image = is_image[visible]
        made = torch.zeros(len(is_image), 3, dtype=torch.float64, device=is_image.device)
        spots, cursor, done = is_image.nonzero()[:, 0].tolist(), 0, 0
        while spots:
            points, extent = next(images)
            first = spots[0]
            made[done:first] = (cursor + torch.arange(first - done, device=made.device))[:, None].double()
            cursor += first - done
            done = first + len(points)
            made[first:done] = points.to(made.device) + cursor
            cursor += extent
            spots = spots[len(points) :]
        made[done:] = (cursor + torch.arange(len(made) - done, device=made.device))[:, None].double()
        made = torch.cat((torch.arange(len(made), device=made.device)[:, None].double(), made), dim=1)
        rows.append(made.new_zeros(len(visible), 4).masked_scatter(visible[:, None], made))
    made = torch.stack(rows).permute(2, 0, 1)
    return made.long() if bool((made == made.round()).all()) else made.float()


def mark_places(places, order, tile_rows: int) -> list[tuple[int, str]]:
    """(place among the rows of an image, words that go before it) of each tile's first row, in the order of the prompt; none
    where all lie on one tile."""
    points = torch.cat([one.points for one in places])[order]
    level = torch.cat([torch.full((len(one.points), 1), one.level) for one in places]).to(points)[order]
    tiles = torch.cat((level, points // tile_rows), dim=1).long()
    runs, sizes = tiles.unique_consecutive(dim=0, return_counts=True)
    if len(runs) == 1:
        return []
    starts = (sizes.cumsum(0) - sizes).tolist()
    return [
        (start, f"level {one + 1}, row {row + 1}, column {column + 1}: ")
        for start, (one, row, column) in zip(starts, runs.tolist())
    ]
