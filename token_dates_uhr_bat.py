# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT selection from two dates of one place: what differs from the other date counts more. Ours, not the paper's.

The question's importance is the mean of both dates at a place: a question about a pier looks at it in both. Each token is
then weighed by how far it is from what the other date shows there. Pure functions without a model.

Axes: N tokens of a scale of one date, M of the other, D width of a token.
"""

import math
from itertools import product

import torch

# What a token counts that equals the other date, where 1 is the mean of a scale's differences.
LEAST = 0.1
# The two dates may lie a token apart: steps in tokens along each axis, the nearest of which is taken.
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)
# Differences that are a smaller part of what tokens of a date differ by are those of rounding.
SAME = 1e-8
# Tokens by which the step is found, evenly spaced, and tokens that are compared at once.
LOOKED_AT, BLOCK = 2048, 4096


def places_of(positions, grid, other_grid, registration) -> torch.Tensor:
    """float[N, 2]: (row, column) on the other date's grid of the centres of tokens; whole numbers are centres.

    Args:
        positions: long[N], on `grid`.
        grid, other_grid: (height, width) in tokens, over the letterboxed squares.
        registration: float[2, 3], see `register`; from this date to the other.
    """
    here = torch.stack((positions // grid[1], positions % grid[1])).double().cpu() + 0.5
    a = torch.as_tensor(registration, dtype=torch.float64)
    there = a[:, :2] @ (here / torch.tensor(grid)[:, None]) + a[:, 2:]
    # Rounded: of equal squares tokens lie on tokens, to the last bit.
    return (there * torch.tensor(other_grid)[:, None] - 0.5).round(decimals=4).T.float().to(positions.device)


def inverse(registration) -> torch.Tensor:
    """float64[2, 3]: the map from the other date to this one."""
    a = torch.as_tensor(registration, dtype=torch.float64)
    turned = torch.linalg.inv(a[:, :2])
    return torch.cat((turned, -turned @ a[:, 2:]), dim=1)


def scale_beside(grid, other_grids, registration) -> int:
    """Index of the scale of the other date whose tokens are nearest to those of this one in size on the ground, the finer of equals."""
    a = torch.as_tensor(registration, dtype=torch.float64)
    wanted = math.log2(grid[0]) - math.log2(float(torch.linalg.det(a[:, :2]).abs())) / 2
    far = [round(abs(math.log2(height) - wanted), 6) for height, _ in other_grids]
    return max(range(len(far)), key=lambda idx: (-far[idx], idx))


def beside(images, registration):
    """Of two dates, where each scale of either lies in the other: (date, index of the scale, that of the other date's scale of that
    size, `places_of` its tokens there, (positions, grid) of the other's). `images`: the earlier one first, with positions and grids."""
    for date, way in enumerate((registration, inverse(registration))):
        image, other = images[date], images[1 - date]
        for idx, (grid, positions) in enumerate(zip(image.grids, image.positions)):
            at = scale_beside(grid, other.grids, way)
            others = other.positions[at], other.grids[at]
            yield date, idx, at, places_of(positions, grid, others[1], way), others


def read_at(places, values, positions, grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of tokens between their centres, bilinear among those that there are.

    Args:
        places: float[N, 2], as `places_of` has them.
        values: float[M, ...] of the tokens at `positions` long[M] on `grid`.

    Returns:
        (float32[N, ...], bool[N]: whether the tokens that there are make up half of it or more; elsewhere no value is known).
    """
    height, width = grid
    index = positions.new_full((height * width,), -1)
    index[positions] = torch.arange(len(positions), device=positions.device)
    low = places.floor()
    part, low = places - low, low.long()
    total = values.new_zeros((len(places), *values.shape[1:]), dtype=torch.float32)
    mass = torch.zeros(len(places), device=places.device)
    for down, across in product((0, 1), repeat=2):
        row, column = low[:, 0] + down, low[:, 1] + across
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        found = index[row.clamp(0, height - 1) * width + column.clamp(0, width - 1)]
        weight = (part[:, 0] if down else 1 - part[:, 0]) * (part[:, 1] if across else 1 - part[:, 1])
        weight = torch.where(inside & (found >= 0), weight, 0)
        total += weight.view(-1, *[1] * (values.dim() - 1)) * values[found.clamp_min(0)].float()
        mass += weight
    return total / mass.clamp_min(1e-6).view(-1, *[1] * (values.dim() - 1)), mass >= 0.5


@torch.no_grad()
def difference(tokens, places, other, other_positions, other_grid) -> torch.Tensor:
    """How far each token is from what the other date shows at its place.

    The mean of a date, over ground that both show, is taken out of its tokens: light and haze move all of them. The two dates may
    lie up to a token apart: of `STEPS` that one is taken by which they differ least, by the median over tokens, most of which
    show no change.

    Args:
        tokens: float[N, D] of this date, without their scale embedding, which says where they lie and not what they show.
        places: float[N, 2], where they lie on the other date's grid.
        other: float[M, D], tokens of the other date, likewise; `other_positions` long[M] on `other_grid`.

    Returns:
        float32[N]: squared distances, 1 on average; 1 where the other date shows nothing, and of equal dates.
    """
    if not len(tokens) or not len(other):
        return torch.ones(len(tokens), device=tokens.device)
    blocks = torch.arange(len(tokens), device=tokens.device).split(BLOCK)
    means, number = tokens.new_zeros((2, tokens.shape[1]), dtype=torch.float32), 0
    for rows in blocks:
        there, known = read_at(places[rows], other, other_positions, other_grid)
        means += torch.stack((tokens[rows][known].float().sum(0), there[known].sum(0)))
        number += int(known.sum())
    means /= max(number, 1)

    def apart(rows, step):
        there, known = read_at(places[rows] + places.new_tensor(step), other, other_positions, other_grid)
        return (tokens[rows].float() - means[0] - there + means[1]).square().sum(1), known

    some = torch.arange(0, len(tokens), -(-len(tokens) // LOOKED_AT), device=tokens.device)
    nearest, least = (0.0, 0.0), torch.inf
    for step in sorted(product(STEPS, repeat=2), key=lambda step: abs(step[0]) + abs(step[1])):
        far, known = apart(some, step)
        if known.any() and (middle := float(far[known].median())) < least:
            nearest, least = step, middle
    far, known = map(torch.cat, zip(*(apart(rows, nearest) for rows in blocks)))
    if not known.any():
        return torch.ones_like(far)
    mean, energy = far[known].mean(), (tokens[some].float() - means[0]).square().sum(1).mean()
    return torch.where(known & (mean > SAME * energy), far / mean.clamp_min(1e-30), 1)


@torch.no_grad()
def weigh_dates(importance, differences, places, other, other_positions, other_grid) -> torch.Tensor:
    """float[N]: the mean importance of both dates at a place, times what differs there.

    Args:
        importance: float[N] of this date, `other` float[M] of the other one, at `other_positions` long[M] on `other_grid`.
        differences: float32[N], of `difference`.
        places: float[N, 2], as there.
    """
    if len(other):
        there, known = read_at(places, other, other_positions, other_grid)
        importance = torch.where(known, (importance + there.to(importance)) / 2, importance)
    return importance * (LEAST + differences).to(importance)
