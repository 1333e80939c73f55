"""Looks until evidence is in sight: the searches that `where` is compared with."""

import numpy as np
import pytest
from uhr_bat.evaluation.looks import OVERLAP, fewest, looks, quadtree, raster, report, shuffled, site_box
from uhr_bat.scenes.native import native_scene

SIZE, SIDE = (1000, 1700), 256


def test_a_scan_shows_every_small_box_whole_in_some_window():
    windows = raster(SIZE, SIDE)
    assert windows[0] == (0, 0, SIDE, SIDE) and windows[-1] == (1000 - SIDE, 1700 - SIDE, 1000, 1700)
    half = OVERLAP // 2
    for y, x in np.random.default_rng(0).uniform((0, 0), np.subtract(SIZE, half), (300, 2)):
        assert 1 <= looks(windows, [(y, x, y + half, x + half)], SIDE) <= len(windows)
    assert raster((100, 100), SIDE) == [(0, 0, 100, 100)]


def test_random_windows_are_those_of_a_scan_in_another_order():
    windows = shuffled(SIZE, SIDE, np.random.default_rng(0))
    assert sorted(windows) == sorted(raster(SIZE, SIDE)) and windows != raster(SIZE, SIDE)


def test_a_quadtree_goes_down_where_the_site_is_and_coarse_looks_count():
    box, site = (700, 1200, 708, 1208), (650, 1150, 760, 1260)
    windows = list(quadtree(SIZE, SIDE, [site]))
    assert windows[0] == (0, 0, *SIZE)
    number = looks(windows, [box], SIDE)
    assert 4 <= number < looks(raster(SIZE, SIDE), [box], SIDE)
    assert all(
        top < site[2] and left < site[3] and bottom > site[0] and right > site[1]
        for top, left, bottom, right in windows
    )


def test_all_boxes_are_needed_and_only_full_resolution_counts():
    boxes = [(10, 10, 18, 18), (500, 500, 508, 508)]
    assert looks([(0, 0, *SIZE), (0, 0, 256, 256), (400, 400, 656, 656)], boxes, SIDE) == 3
    with pytest.raises(ValueError, match="1 of 2 boxes lie in no window of 256 px"):
        looks([(0, 0, *SIZE), (0, 0, 256, 256)], boxes, SIDE)


def test_the_fewest_windows_are_one_for_what_is_near():
    near = [(10, 10, 18, 18), (200, 230, 208, 238), (90, 4, 98, 12)]
    assert fewest(near, SIDE) == 1
    assert fewest([*near, (600, 600, 608, 608), (10, 600, 18, 608)], SIDE) == 3


def test_a_site_holds_its_objects():
    scene = native_scene(20_000_003)
    scale = scene.width / 10_000
    for index, things in enumerate(scene.objects_of):
        top, left, bottom, right = site_box(scene, index)
        assert all(left < scale * x < right and top < scale * y < bottom for x, y in (thing.centre for thing in things))


def test_a_report_has_a_row_for_every_search():
    found = {name: [(1, "count", 1), (1, "type", 4), (2, "type", 2)] for name in ("where", "raster")}
    lines = report(found).splitlines()
    assert lines[2].startswith("| where | 33.3 [") and "| 66.7 [" in lines[2] and lines[2].endswith("| 2 | 2.3 |")
    assert lines[-1] == "`where`, 3 or fewer, by kind of question: count 100.0, type 50.0."
