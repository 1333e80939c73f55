"""Objects of overlapping windows: each once, whole where a window shows it whole."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uhr_bat.common.objects import ImageObject
from uhr_bat.geo.detect import looked_at
from uhr_bat.geo.joining import OVERLAP, join, windows_of
from uhr_bat.modeling_outputs_uhr_bat import TokenMaps

SIZE = (100, 260)  # height, width
A, B, C = (0, 0, 100, 100), (75, 0, 175, 100), (150, 0, 250, 100)


def box(*edges, label="ship", score=None):
    return ImageObject(label, edges, score=score)


@pytest.mark.parametrize(
    "size, side", [((100, 260), 100), ((1000, 700), 64), ((30, 500), 100), ((20, 20), 100), ((64, 65), 64)]
)
def test_windows_cover_the_image_and_overlap(size, side):
    seen = np.zeros(size, int)
    windows = windows_of(size, side)
    for left, top, right, bottom in windows.tolist():
        assert (right - left, bottom - top) == (min(side, size[1]), min(side, size[0]))
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1 and len({tuple(window) for window in windows.tolist()}) == len(windows)
    for axis in (0, 1):
        starts = np.unique(windows[:, axis])
        assert not len(np.diff(starts)) or np.diff(starts).max() <= side * (1 - OVERLAP) + 1


def test_an_object_of_two_windows_is_one():
    found = join([(A, box(78, 10, 95, 30)), (B, box(79, 10, 94, 31)), (B, box(120, 10, 140, 30))], SIZE)
    assert [one.box for one in found] == [(78, 10, 95, 30), (120, 10, 140, 30)]
    found = join([(A, box(78, 10, 95, 30, score=0.2)), (B, box(79, 10, 94, 31, score=0.9))], SIZE)
    assert [one.box for one in found] == [(79, 10, 94, 31)]


def test_a_part_that_a_border_cut_off_gives_way_to_the_whole():
    found = join([(A, box(90, 10, 100, 30)), (B, box(90, 10, 120, 30))], SIZE)
    assert [one.box for one in found] == [(90, 10, 120, 30)]


def test_an_object_longer_than_any_window_is_the_box_around_its_parts():
    found = join([(A, box(10, 40, 100, 60)), (B, box(75, 40, 175, 61)), (C, box(150, 39, 230, 60))], SIZE)
    assert [one.box for one in found] == [(10, 39, 230, 61)]


def test_two_objects_side_by_side_stay_two_and_a_repeated_one_is_one():
    one, other = box(78, 10, 96, 40), box(82, 14, 99, 44)  # intersection over union of 0.5
    found = join([(A, one), (A, other), (B, one), (B, other), (B, one)], SIZE)
    assert [item.box for item in found] == [one.box, other.box]


def test_objects_at_the_images_own_border_are_whole():
    found = join([(A, box(0, 0, 20, 100)), (A, box(0, 40, 20, 60))], SIZE)
    assert len(found) == 2


def test_points_of_two_windows_are_one_where_they_agree():
    one, near, far = (ImageObject("ship", point=point) for point in ((80, 50), (81, 50), (90, 50)))
    assert join([(A, one), (B, near), (B, far)], SIZE) == [one, far]
    assert join([], SIZE) == []


def test_a_question_looks_into_the_window_of_the_token_it_looks_at_most_at_the_finest_level_that_was_read():
    grids = [(2, 2), (16, 16)]  # of a square of 256 px: 128 and 16 px a token
    coarse, fine = torch.tensor([1.0, 1.0, 3.0, 1.0]), torch.full((64,), 0.2)
    lower_left = [row * 16 + column for row in range(8, 16) for column in range(8)]  # one tile was read
    fine[lower_left.index(9 * 16 + 5)] = 2.0  # at x 80 to 96, y 144 to 160
    maps = TokenMaps([coarse, fine], [torch.arange(4), torch.tensor(lower_left)], grids, 0)
    windows = windows_of((256, 256), 32)
    values = looked_at(SimpleNamespace(importance=[maps]), (256, 256), windows)
    best = {tuple(window) for window in windows[values == values.max()].tolist()}
    assert best == {
        window
        for window in map(tuple, windows.tolist())
        if window[0] < 96 and window[2] > 80 and window[1] < 160 and window[3] > 144
    }
    assert values[0] == values[-1] < values.max()  # elsewhere the coarse level is what is known
