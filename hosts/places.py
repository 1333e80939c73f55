"""Where the rows of an image stand in a prompt: their order, the positions that M-RoPE gives them, the words between them.

Axes: V rows of an image, L its levels, B prompts, M tokens of a prompt. `places` are [`KeptPlaces`] of each level in turn.
"""

from math import isqrt

import torch


def order_of(places, tile_rows: int | None) -> torch.Tensor:
    """long[V]: rows of an image, given level after level, in the order of the prompt: tile by tile of `tile_rows` rows a side,
    as a 1-D decoder was trained to read images, or with None row by row over each level."""
    points = torch.cat([one.points for one in places])
    level = torch.cat([torch.full_like(one.points[:, 0], one.level) for one in places])
    tiles = [] if tile_rows is None else list((points // tile_rows).unbind(1))
    order = torch.arange(len(points), device=points.device)
    for key in reversed([level, *tiles, *points.unbind(1)]):
        order = order[key[order].argsort(stable=True)]
    return order


def coordinates(places, order, rule: str, largest: int | None) -> tuple[torch.Tensor, int]:
    """M-RoPE's (t, h, w) of the rows of an image from its first, float64[V, 3] in their `order`, and by how much the text after
    it goes on.

    Args:
        rule: see [`HostSettings`].
        largest: rows a side of the largest image that the model was made for; finer grids are laid onto that.
    """
    if rule == "rectangle":
        columns = isqrt(max(0, len(order) - 1)) + 1
        idx = torch.arange(len(order), device=order.device)
        return torch.stack((idx * 0, idx // columns, idx % columns), dim=1).double(), columns
    sides = [min(max(one.grid), largest or max(one.grid)) for one in places]
    found, start = [], 0
    for one, side in zip(places, sides):
        side = side if rule == "levels" else max(sides)
        # No rounding of what is a place of the grid.
        points = one.points if side == max(one.grid) else (one.points + 0.5) * side / max(one.grid) - 0.5
        found.append(torch.cat((torch.zeros_like(points[:, :1]), points), dim=1) + start)
        start += side if rule == "levels" else 0
    return torch.cat(found)[order], start or max(sides)


def position_ids(image_mask, attention_mask, images) -> torch.Tensor:
    """[4, B, M] for M-RoPE: a token's number among those of its prompt, and its t, h and w; whole numbers where all are.

    Args:
        image_mask, attention_mask: bool[B, M].
        images: what `coordinates` returned of each image, in the order of the prompts.
    """
    images, rows = iter(images), []
    for is_image, visible in zip(image_mask, attention_mask):
        flags, done, at, pieces = is_image[visible].tolist(), 0, 0, []

        def text(length, at, device=visible.device):
            return (at + torch.arange(length, device=device, dtype=torch.float64))[:, None].expand(-1, 3)

        while True in flags[done:]:
            first, (points, extent) = flags.index(True, done), next(images)
            pieces += [text(first - done, at), points.to(visible.device) + at + first - done]
            at, done = at + first - done + extent, first + len(points)
        made = torch.cat((*pieces, text(len(flags) - done, at)))
        made = torch.cat((text(len(flags), 0)[:, :1], made), dim=1)
        rows.append(made.new_zeros(len(visible), 4).masked_scatter(visible[:, None], made))
    made = torch.stack(rows).permute(2, 0, 1)
    return made.long() if bool((made == made.round()).all()) else made.float()


def mark_places(places, order, tile_rows: int) -> list[tuple[int, str]]:
    """(number among the rows, words that go before it) of each tile's first row, in the order of the prompt; none where all
    lie on one tile."""
    points = torch.cat([one.points for one in places])[order]
    level = torch.cat([torch.full((len(one.points), 1), one.level) for one in places]).to(points)[order]
    tiles = torch.cat((level, points // tile_rows), dim=1).long()
    runs, sizes = tiles.unique_consecutive(dim=0, return_counts=True)
    found = zip((sizes.cumsum(0) - sizes).tolist(), (runs + 1).tolist())
    return [(start, "level {}, row {}, column {}: ".format(*run)) for start, run in found if len(runs) > 1]
