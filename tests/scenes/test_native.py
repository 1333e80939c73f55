"""Scenes with objects of a few native pixels: their layout, and images that are painted part by part."""

import numpy as np
import pytest
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor
from uhr_bat.scenes import layout, native


@pytest.fixture(scope="module")
def scene():
    return layout.make_scene(3, 1.25, width=6000)


@pytest.fixture(scope="module")
def picture(scene):
    return native.picture_of(scene)


@pytest.mark.parametrize("seed", range(5))
def test_objects_are_two_to_eight_native_pixels_large_and_stand_on_pads(seed):
    scene = native.native_scene(seed)
    assert layout.NATIVE_WIDTHS[0] <= scene.width <= layout.NATIVE_WIDTHS[1]
    for thing in scene.objects:
        assert 2 <= thing.size * scene.width / layout.WIDTH <= 8
        distances = [np.abs(np.subtract(pad.centre, thing.centre)).max() for pad in scene.pads]
        assert min(distances) <= layout.PAD_SIDE / 2


def test_every_site_has_as_many_pads_whatever_stands_on_them(scene):
    for site in scene.sites:
        assert sum(site.contains(pad.centre) for pad in scene.pads) == layout.PADS_PER_SITE


def test_other_scenes_are_what_they_were():
    assert layout.make_scene(7).pads == () and layout.make_scene(7).width is None


def test_a_part_is_the_same_whatever_else_is_asked_for(picture):
    size = picture.width // 2, picture.height // 2
    whole, part = picture.paint((900, 800, 1000, 950), size), picture.paint((940, 870, 1000, 950), size)
    np.testing.assert_array_equal(whole[40:, 70:], part)


def test_objects_are_painted_in_their_colour_and_fade_in_smaller_copies(scene, picture):
    for thing in [thing for thing in scene.objects if thing.size * 0.6 > 5][:8]:
        row, column = (int(value) for value in np.array(thing.centre)[::-1] * picture.width / layout.WIDTH)
        box = row - 4, column - 4, row + 4, column + 4
        pixels = picture.paint(box, (picture.width, picture.height)).reshape(-1, 3).astype(int)
        paint = layout.PAINTS[thing.colour]
        assert (np.abs(pixels - paint).max(-1) < 60).mean() > 0.1
        far = picture.paint([edge // 16 for edge in box[:2]] + [edge // 16 + 2 for edge in box[:2]], (375, 300))
        assert (np.abs(far.reshape(-1, 3).astype(int) - paint).max(-1) < 60).mean() <= 0.5


def test_the_processor_takes_it_as_it_takes_any_image(picture):
    processor = UHRBatImageProcessor(crop_size={"height": 32, "width": 32}, scales=[64, 128], patch_size=8)
    assert processor(picture)["pixel_values"].shape == (1, 20, 3, 32, 32)
    (pyramid,) = processor(picture, max_tiles=40, native=True)["image_pyramids"]
    assert pyramid.scales == [64, 128, 256, 512, 1024, 2048, 4096, 6016] and sum(pyramid.num_chosen) == 40
