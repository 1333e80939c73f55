"""The dynamic pyramid: the levels that LRS-VQA's system has, by arithmetic, and tiles as of the whole resized image."""

import numpy as np
import pytest
from PIL import Image
from uhr_bat.image_pyramids_uhr_bat import DynamicPyramid, dynamic_levels, level_ratios

AS_THEY_ARE = (None, None, None)


# Rows and columns of tiles by level, as that system's own code computes them.
@pytest.mark.parametrize(
    "size, tiles",
    [
        ((4000, 4000), [(3, 3), (6, 6), (12, 12)]),
        ((5304, 7920), [(3, 3), (4, 6), (8, 12), (16, 24)]),
        ((27328, 20000), [(3, 3), (6, 4), (11, 8), (21, 15), (41, 30), (82, 60)]),
        ((1008, 700), [(3, 3)]),
    ],
)
def test_levels_are_those_of_the_system(size, tiles):
    assert [level.tiles for level in dynamic_levels(size, 336, 14)] == tiles


def test_tokens_are_counted_as_the_system_counts_them():
    first, second, third = dynamic_levels((4000, 4000), 336, 14)
    # 12 x 12 tokens of a tile, a newline at the end of each row.
    assert [level.num_tokens for level in (first, second, third)] == [36 * 37, 72 * 73, 144 * 145]
    # 5304 x 7920: 675 x 1008 px of 1008 x 1008, so 24 of 36 rows are left without the padding.
    assert dynamic_levels((5304, 7920), 336, 14)[0].grid == (24, 36)


@pytest.mark.parametrize("side", [1, 335, 336])
def test_a_thumbnail_shows_all_of_a_small_image(side):
    assert dynamic_levels((side, 7), 336, 14) == []
    assert dynamic_levels((337, 7), 336, 14)[0].tiles == (2, 1)


def test_ratios_halve_down_to_three_tiles():
    assert level_ratios(1008, 336) == [1.0]
    assert level_ratios(2016, 336) == [0.5, 1.0]
    assert level_ratios(2017, 336) == [1008 / 2017, 0.5, 1.0]
    assert level_ratios(700, 336) == [1.0]


@pytest.mark.parametrize("size", [(700, 1100), (333, 90), (96, 96), (200, 31)])
def test_tiles_are_those_of_the_whole_resized_image_padded_below_and_right(size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8))
    pyramid = DynamicPyramid(image, tile_size=32, patch_size=8, pad_color=(9, 8, 7), arithmetic=AS_THEY_ARE)
    shown = [((32, 32), (1, 1))] + [(level.size, level.tiles) for level in pyramid.levels]
    for level_idx, ((height, width), (rows, columns)) in enumerate(shown):
        if level_idx == 0:
            height, width = (max(1, round(side * 32 / max(size))) for side in size)
        whole = np.full((32 * rows, 32 * columns, 3), (9, 8, 7), np.uint8)
        # Rows first, as everywhere here; Pillow begins with the columns of an image that is much higher than wide.
        narrow = image.resize((width, size[0]), Image.Resampling.BICUBIC)
        whole[:height, :width] = narrow.resize((width, height), Image.Resampling.BICUBIC)
        expected = whole.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
        order = rng.permutation(rows * columns)
        np.testing.assert_array_equal(pyramid.tiles(level_idx, order), expected[order])
