"""Where pixels, tiles and tokens lie: against exact fractions, and against tiles that images were made into."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from uhr_bat.geometry_uhr_bat import (
    check_scales,
    grids,
    letterbox,
    patch_centres,
    pixel_tokens,
    shown_patches,
    tile_of,
    tokens_of_points,
    token_box,
    token_corners,
)
from uhr_bat.image_views_uhr_bat import image_to_tiles


# Squares, strips, even and odd margins, smaller and larger than the grids below.
SIZES = [(7, 7), (1, 50), (50, 1), (13, 29), (29, 13), (40, 41), (3, 2), (4, 8), (16, 8), (45, 70), (1, 1)]
GRIDS = [(2, 2), (8, 8), (9, 5), (14, 14)]


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def token_oracle(row, column, image_size, grid):
    """The token whose patch holds a point of the image, in exact fractions."""
    side, top, left = letterbox(image_size)
    return int((row + top) * grid[0] / side) * grid[1] + int((column + left) * grid[1] / side)


# Scales and letterbox


@pytest.mark.parametrize(
    "arguments, text",
    [
        (([28, 50], 28), "Scale 50 px is not a positive multiple of the tile of 28 px."),
        (([0, 28], 28), "Scale 0 px is not a positive multiple of the tile of 28 px."),
        (([56, 28], 28), "`scales` must be ascending, the anchor first. Got [56, 28]."),
        (([28, 28], 28), "`scales` must be ascending, the anchor first. Got [28, 28]."),
        (([], 28), "`scales` is empty: at least the anchor scale is needed."),
        (([30], 30, 14), "The tile of 30 px is not a positive multiple of the patch of 14 px."),
        (([30], 0), "The tile of 0 px is not a positive multiple of the patch of 1 px."),
    ],
)
def test_wrong_scales_fail_with_both_numbers(arguments, text):
    with raises(ValueError, text):
        check_scales(*arguments)


def test_the_grids_of_the_paper_have_131328_tokens():
    assert grids((672, 1344, 2688, 4032), 14) == [(48, 48), (96, 96), (192, 192), (288, 288)]
    assert sum(height * width for height, width in grids((672, 1344, 2688, 4032), 14)) == 131_328  # Table 4


def test_letterbox_centres_and_leaves_the_odd_pixel_below_and_right():
    assert letterbox((3, 6)) == (6, 1, 0)
    assert letterbox((8, 3)) == (8, 0, 2)
    assert letterbox((5, 5)) == (5, 0, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_patch_is_shown_where_it_overlaps_a_pixel_of_the_image(size, grid):
    side, top, left = letterbox(size)

    def overlaps(patch_idx, num_patches, start, length):
        low, high = Fraction(patch_idx * side, num_patches), Fraction((patch_idx + 1) * side, num_patches)
        return any(pixel < high and low < pixel + 1 for pixel in range(start, start + length))

    expected = [
        [overlaps(y, grid[0], top, size[0]) and overlaps(x, grid[1], left, size[1]) for x in range(grid[1])]
        for y in range(grid[0])
    ]
    mask = shown_patches(size, grid)
    assert mask.dtype == bool and mask.tolist() == expected


# Pixels and tokens


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_pixel_is_shown_by_the_token_whose_patch_holds_its_centre(size, grid):
    half = Fraction(1, 2)
    expected = [[token_oracle(y + half, x + half, size, grid) for x in range(size[1])] for y in range(size[0])]
    found = pixel_tokens(size, grid)
    assert found.dtype == np.int64 and found.tolist() == expected


def test_a_point_is_shown_by_the_token_of_the_letterboxed_square_around_it():
    # 40 x 100 pixels in a square of 100: 30 rows of letterbox above.
    points = np.array([[0.0, 0.0], [39.5, 99.5], [20.0, 50.0]])
    assert tokens_of_points(points, (40, 100), (10, 10)).tolist() == [30, 69, 55]
    centres = np.stack(np.mgrid[:701, :1000], axis=-1) + 0.5
    np.testing.assert_array_equal(tokens_of_points(centres, (701, 1000), (24, 24)), pixel_tokens((701, 1000), (24, 24)))


@pytest.mark.parametrize("size, grid", [((1000, 1301), (48, 48)), ((701, 1000), (24, 24)), ((999, 500), (96, 96))])
def test_odd_margins_put_every_pixel_on_the_token_of_the_letterbox(size, grid):
    side, top, left = letterbox(size)
    assert (side - min(size)) % 2 == 1
    # Every token's pixels as the square has them, where the image's corner is at (top, left).
    rows, columns = ((2 * np.arange(side) + 1) * num_tokens // (2 * side) for num_tokens in grid)
    square = rows[:, None] * grid[1] + columns
    np.testing.assert_array_equal(pixel_tokens(size, grid), square[top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize("size", [(45, 70), (70, 45), (33, 70), (70, 70), (69, 70)])
def test_the_pixels_of_a_token_are_those_that_its_patch_was_made_of(size):
    # Patches of 7 px in a view of the square's own size: every pixel of a patch is one pixel of the image or letterbox.
    rows, columns = np.indices(size)
    image = np.stack([rows, columns, np.full(size, 200)], axis=-1).astype(np.uint8)
    tiles = image_to_tiles(Image.fromarray(image), [70], 70, pad_color=(255, 255, 0))[70]
    patches = tiles[0].reshape(3, 10, 7, 10, 7).transpose(1, 3, 2, 4, 0).reshape(100, 49, 3)
    tokens, shown = pixel_tokens(size, (10, 10)), shown_patches(size, (10, 10)).ravel()
    for position, patch in enumerate(patches):
        seen = sorted((int(row), int(column)) for row, column, painted in patch if painted == 200)
        assert seen == [tuple(pixel) for pixel in np.argwhere(tokens == position).tolist()]
        assert bool(seen) == shown[position]
        top, left, bottom, right = token_box(position, size, (10, 10)).astype(int).tolist()
        assert seen == [(row, column) for row in range(top, bottom) for column in range(left, right)]


@pytest.mark.parametrize("size", [(45, 70), (1, 50), (40, 41), (64, 48)])
@pytest.mark.parametrize("picture_size", [(90, 140), (13, 20), (1, 1), (45, 70)])
def test_a_pixel_of_a_copy_is_shown_by_the_token_that_shows_that_place_of_the_image(size, picture_size):
    grid = (8, 6)
    expected = [
        [
            token_oracle(
                Fraction(2 * y + 1, 2 * picture_size[0]) * size[0],
                Fraction(2 * x + 1, 2 * picture_size[1]) * size[1],
                size,
                grid,
            )
            for x in range(picture_size[1])
        ]
        for y in range(picture_size[0])
    ]
    assert pixel_tokens(size, grid, picture_size).tolist() == expected


def test_pixels_of_the_largest_image_are_counted_without_overflow():
    assert pixel_tokens((1, 100_000), (4096, 4096), (1, 100_000))[0, -1] == 2047 * 4096 + 4095
    assert pixel_tokens((100_000, 1), (4096, 4096), (100_000, 1))[-1, 0] == 4095 * 4096 + 2047


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_pixel_is_the_tokens_where_its_centre_lies_in_the_tokens_box(size, grid):
    positions = np.arange(grid[0] * grid[1]).reshape(grid)
    boxes = token_box(positions, size, grid)
    assert boxes.shape == (*grid, 4) and boxes.dtype == np.float64
    rows, columns = np.arange(size[0])[:, None] + 0.5, np.arange(size[1]) + 0.5
    tokens = pixel_tokens(size, grid)
    for position, (top, left, bottom, right) in zip(positions.ravel(), boxes.reshape(-1, 4)):
        inside = (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
        np.testing.assert_array_equal(inside, tokens == position)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_boxes_cover_the_image_once_and_are_empty_where_only_the_letterbox_is_shown(size, grid):
    top, left, bottom, right = np.moveaxis(token_box(np.arange(grid[0] * grid[1]), size, grid), -1, 0)
    areas = ((bottom - top) * (right - left)).reshape(grid)
    np.testing.assert_array_equal(areas > 0, shown_patches(size, grid))
    assert areas.sum() == pytest.approx(size[0] * size[1])
    assert (0 <= top).all() and (bottom <= size[0]).all() and (0 <= left).all() and (right <= size[1]).all()
    # No overlap: boxes of one row, and of one column, begin where the box before them ends.
    for low, high, axis in ((top, bottom, 0), (left, right, 1)):
        low, high = np.moveaxis(low.reshape(grid), axis, 0), np.moveaxis(high.reshape(grid), axis, 0)
        np.testing.assert_array_equal(low[1:], high[:-1])


def test_a_box_has_the_hand_computed_edges():
    # 45 x 70 in a square of 70, 12 rows above: patches of 17.5 px, the first row of them from -12 to 5.5.
    assert token_box(0, (45, 70), (4, 4)).tolist() == [0, 0, 5.5, 17.5]
    assert token_box(torch.tensor([5, 15]), (45, 70), (4, 4)).tolist() == [[5.5, 17.5, 23, 35], [40.5, 52.5, 45, 70]]


@pytest.mark.parametrize("positions", [16, -1, [0, 99], 1.5, float("nan"), True])
def test_a_token_that_the_grid_does_not_have_is_refused_with_those_that_it_has(positions):
    for of in (token_box, token_corners):
        with pytest.raises(ValueError, match="grid of 4 x 4 are whole numbers from 0 to 15. Got"):
            of(positions, (45, 70), (4, 4))
    assert token_box([], (45, 70), (4, 4)).shape == (0, 4)


# Tiles and tokens


@pytest.mark.parametrize("transform", [(2, 0, 100, 0, -2, 50), (0.5, -1.5, 7, 1.5, 0.5, -3), (0, 3, 0, 4, 0, 0)])
def test_corners_are_those_of_the_box_through_the_transform(transform):
    a, b, c, d, e, f = transform
    for size, grid in [((45, 70), (6, 6)), ((29, 13), (9, 5))]:
        positions = np.arange(grid[0] * grid[1]).reshape(grid)
        corners = token_corners(positions, size, grid, transform)
        plain = token_corners(positions, size, grid)
        assert corners.shape == plain.shape == (*grid, 4, 2)
        for position in positions.ravel():
            top, left, bottom, right = token_box(position, size, grid)
            pixels = [(left, top), (right, top), (right, bottom), (left, bottom)]
            row, column = divmod(position, grid[1])
            assert plain[row, column].tolist() == [list(pixel) for pixel in pixels]
            expected = [[a * x + b * y + c, d * x + e * y + f] for x, y in pixels]
            np.testing.assert_allclose(corners[row, column], expected, rtol=1e-15, atol=1e-12)
        # Neighbours share their corners to the last bit, and a transform of nine numbers is the same one.
        assert (corners[:, :-1, 1] == corners[:, 1:, 0]).all() and (corners[:-1, :, 3] == corners[1:, :, 0]).all()
        assert (corners == token_corners(positions, size, grid, (*transform, 0, 0, 1))).all()


@pytest.mark.parametrize("kind", [torch.arange, np.arange])
def test_a_token_has_the_tile_and_the_place_in_it_that_unfolding_the_grid_gives(kind):
    tile_idx, patch_idx = tile_of(kind(36), width=6, patches_per_side=2)
    tiles = np.arange(36).reshape(3, 2, 3, 2).transpose(0, 2, 1, 3).reshape(9, 4)
    for position, (tile, patch) in enumerate(zip(tile_idx, patch_idx)):
        assert tiles[tile, patch] == position


@pytest.mark.parametrize("grid", [(6, 6), (4, 10)])
def test_centres_go_from_0_to_1_over_the_scale_or_over_each_tile(grid):
    positions = torch.arange(grid[0] * grid[1])
    rows, columns = positions // grid[1], positions % grid[1]
    whole = torch.stack([(rows + 0.5) / grid[0], (columns + 0.5) / grid[1]], dim=1)
    centres = patch_centres(positions, grid)
    assert centres.dtype == torch.float32 and torch.equal(centres, whole)
    in_tile = torch.stack([(rows % 2 + 0.5) / 2, (columns % 2 + 0.5) / 2], dim=1)
    assert torch.equal(patch_centres(positions, grid, extent=(2, 2)), in_tile)
    assert torch.equal(patch_centres(positions[[3, 7]], grid), whole[[3, 7]])
