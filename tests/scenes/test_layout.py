"""What is in a made-up scene."""

import math
from collections import Counter

import numpy as np
import pytest
from uhr_bat.scenes import layout


@pytest.fixture(scope="module", params=[40, pytest.param(400, marks=pytest.mark.slow)])
def layouts(request):
    return [layout.make_scene(seed) for seed in range(request.param)]


@pytest.fixture(scope="module")
def many_layouts():
    """Enough to compare frequencies."""
    return [layout.make_scene(seed) for seed in range(400)]


def corners(site):
    """(x, y) of the four corners of a site, by plain trigonometry."""
    half, reach = layout.SITE_SIDE / 2, math.sqrt(2)
    turns = [site.angle + math.pi / 4 + turn * math.pi / 2 for turn in range(4)]
    return [
        (site.centre[0] + half * reach * math.cos(turn), site.centre[1] + half * reach * math.sin(turn))
        for turn in turns
    ]


def test_the_same_seed_lays_out_the_same_scene(layouts):
    assert layout.make_scene(7) == layouts[7]
    assert len({(scene.aspect, scene.sites) for scene in layouts}) == len(layouts)


def test_seeds_of_training_validation_and_test_are_disjoint():
    first, second = layout.VALIDATION_SEEDS, layout.TEST_SEEDS
    assert not set(first) & set(second)
    assert 0 < layout.FINETUNING_SEED < first.start and first.stop <= second.start
    # Training counts its seeds up: 100,000 steps of 16 scenes stay below.
    assert layout.FINETUNING_SEED + 16 * 100_000 < first.start


def test_sites_lie_in_the_image_and_in_one_quadrant_each(layouts):
    for scene in layouts:
        for site in scene.sites:
            x, y = np.transpose(corners(site))
            assert 0 <= x.min() and x.max() <= layout.WIDTH and 0 <= y.min() and y.max() <= scene.height
            right, lower = x > layout.WIDTH / 2, y > scene.height / 2
            assert right.all() or not right.any()
            assert lower.all() or not lower.any()
            vertical, horizontal = scene.quadrant(site).split()
            assert (vertical, horizontal) == ("lower" if lower[0] else "upper", "right" if right[0] else "left")


def test_sites_of_a_scene_are_three_to_five_of_different_kinds_that_do_not_overlap(layouts):
    assert {len(scene.sites) for scene in layouts} == {3, 4, 5}
    for scene in layouts:
        assert len({site.kind for site in scene.sites}) == len(scene.sites)
        for index, site in enumerate(scene.sites):
            for other in scene.sites[:index]:
                # Two squares are apart if their corners are, along one of their edges.
                apart = False
                for angle in (site.angle, other.angle):
                    for axis in (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle)):
                        mine, theirs = (np.array(corners(one)) @ axis for one in (site, other))
                        apart |= mine.max() < theirs.min() or theirs.max() < mine.min()
                assert apart


@pytest.mark.slow
def test_scenes_of_three_four_and_five_sites_are_alike_often(many_layouts):
    counts = Counter(len(scene.sites) for scene in many_layouts)
    assert min(counts.values()) > 0.2 * len(many_layouts)


def test_objects_of_a_site_stand_inside_it_and_the_others_outside_all(layouts):
    for scene in layouts:
        for thing in scene.objects:
            inside = [bool(site.contains(thing.centre)) for site in scene.sites]
            assert [index for index, held in enumerate(inside) if held] == [thing.site] * (thing.site is not None)
            assert 0 <= thing.centre[0] <= layout.WIDTH and 0 <= thing.centre[1] <= scene.height
        assert sum(map(len, scene.objects_of)) == sum(thing.site is not None for thing in scene.objects)


def test_objects_keep_apart(layouts):
    for scene in layouts:
        places = np.array([thing.centre for thing in scene.objects])
        # A shape reaches about as far from its centre as it is large: a ship's bow 0.95 of it, a plane's wing 1.1.
        reach = 0.9 * np.array([thing.size for thing in scene.objects])
        distance = np.hypot(*(places[:, None] - places).transpose(2, 0, 1)) + np.diag(np.full(len(places), 1e9))
        assert (distance > reach[:, None] + reach).all()


@pytest.mark.slow
def test_a_site_holds_zero_to_four_objects_alike_often(many_layouts):
    counts = Counter(len(things) for scene in many_layouts for things in scene.objects_of)
    assert set(counts) == set(range(layout.MOST_OBJECTS + 1))
    assert all(abs(count / counts.total() - 1 / 5) < 0.04 for count in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "values"), [("kind", layout.OBJECTS), ("colour", tuple(layout.PAINTS))])
def test_what_an_object_is_does_not_depend_on_where_it_stands(many_layouts, name, values):
    for kind in (*layout.SITES, None):
        drawn = Counter(
            getattr(thing, name)
            for scene in many_layouts
            for thing in scene.objects
            if kind == (None if thing.site is None else scene.sites[thing.site].kind)
        )
        error = math.sqrt(1 / len(values) / drawn.total())
        assert all(abs(drawn[value] / drawn.total() - 1 / len(values)) < 4 * error for value in values)


@pytest.mark.slow
def test_sizes_are_in_pixels_of_the_finest_scale(many_layouts):
    pixels = np.array([thing.size * 384 / 10000 for scene in many_layouts for thing in scene.objects])
    edges = sorted({edge for edges in layout.OBJECT_SIZES for edge in edges})
    assert edges[0] <= pixels.min() and pixels.max() <= edges[-1]
    for (low, high), share in layout.OBJECT_SIZES.items():
        assert abs(((low <= pixels) & (pixels < high)).mean() - share) < 0.02


@pytest.mark.parametrize("aspect", [1.0, 1.25, 3.0])
def test_points_of_the_scene_are_placed_in_the_letterboxed_square(aspect):
    scene = layout.make_scene(0, aspect)
    assert np.allclose(scene.to_square([layout.WIDTH / 2, scene.height / 2]), 0.5)
    assert np.allclose(scene.to_square([[0, 0], [layout.WIDTH, scene.height]]),
                       [[0.5 - 0.5 / aspect, 0], [0.5 + 0.5 / aspect, 1]])  # fmt: skip


def test_a_strip_without_room_has_no_sites():
    scene = layout.make_scene(0, 100)
    assert scene.sites == () and all(thing.site is None for thing in scene.objects)
