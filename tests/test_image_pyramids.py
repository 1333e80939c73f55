"""The pyramid of an image: tiles that are read by themselves, against the tiles of whole views."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from images import random_image
from uhr_bat.geometry_uhr_bat import pyramid_scales, shown_patches
from uhr_bat.image_pyramids_uhr_bat import ImagePyramid
from uhr_bat.image_rasters_uhr_bat import RasterImage
from uhr_bat.image_reading_uhr_bat import read_image
from uhr_bat.image_views_uhr_bat import image_to_tiles

TILE, PATCH = 16, 4


def pyramid_of(image, scales=None, **kwargs):
    return ImagePyramid(image, scales, anchor=32, tile_size=TILE, patch_size=PATCH, **kwargs)


@pytest.mark.parametrize(
    "side, scales", [(1, [64]), (64, [64]), (65, [64, 96]), (128, [64, 128]), (1000, [64, 128, 256, 512, 1024])]
)
def test_levels_double_from_the_anchor_to_the_images_own_resolution(side, scales):
    assert pyramid_scales(side, 64, 32) == scales


def test_the_levels_of_a_large_image_follow_from_its_size_alone():
    assert pyramid_scales(30_000, 672, 336) == [672, 1344, 2688, 5376, 10752, 21504, 30240]


@pytest.mark.parametrize("size", [(70, 45), (45, 70), (128, 128), (300, 211), (1, 90), (97, 400), (513, 512), (5, 4)])
@pytest.mark.parametrize("resample", [3, 2])
def test_tiles_read_alone_are_bit_equal_to_those_of_the_whole_view(size, resample):
    image = random_image(*size)
    pyramid = pyramid_of(image, resample=resample)
    rng = np.random.default_rng(0)
    for level_idx, scale in enumerate(pyramid.scales):
        whole = image_to_tiles(image, [scale], TILE, resample=resample)[scale]
        chosen = rng.choice(len(whole), min(len(whole), 7), replace=False)
        np.testing.assert_array_equal(pyramid.pixels(level_idx, chosen), whole[chosen])


def test_a_window_that_is_read_in_strips_gives_the_same_tiles(monkeypatch):
    image = random_image(211, 190)
    monkeypatch.setattr("uhr_bat.image_views_uhr_bat.STREAMED_STRIP_PIXELS", 700)
    np.testing.assert_array_equal(pyramid_of(image, [32]).pixels(0, range(4)), image_to_tiles(image, [32], TILE)[32])


@pytest.mark.parametrize("size", [(70, 45), (45, 70), (300, 211), (97, 400)])
def test_masks_of_tiles_are_those_of_the_whole_level(size):
    pyramid = pyramid_of(random_image(*size))
    for level_idx, grid in enumerate(pyramid.grids):
        side, p = grid[0] // 4, 4
        whole = shown_patches(size, grid).reshape(side, p, side, p).transpose(0, 2, 1, 3).reshape(-1, p, p)
        chosen = np.arange(len(whole))[::3]
        np.testing.assert_array_equal(pyramid.shown(level_idx, chosen), whole[chosen])
        np.testing.assert_array_equal(pyramid.num_shown(level_idx), whole.sum((1, 2)))


def test_without_masks_every_patch_counts():
    pyramid = pyramid_of(random_image(20, 90), mask_padding=False)
    assert pyramid.shown(1, [0, 3]).all() and (pyramid.num_shown(1) == 16).all()


@pytest.fixture
def cog(tmp_path):
    """A raster with overviews and nodata in its upper left quarter; its path."""
    rasters = pytest.importorskip("rasters")
    bands = np.asarray(random_image(523, 640)).transpose(2, 0, 1)
    valid = np.full((523, 640), 255, np.uint8)
    valid[:260, :300] = 0
    path = rasters.write_raster(tmp_path / "a.tif", bands, mask=valid, tiles=True)
    with rasters.rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4, 8])
    return path


def test_tiles_of_a_raster_are_those_of_the_overview_that_they_come_from(cog):
    image = read_image(cog, 10**9)
    pyramid = pyramid_of(image)
    for level_idx, scale in enumerate(pyramid.scales):
        shown = {scale: np.zeros(pyramid.grids[level_idx], bool)}
        whole = image_to_tiles(image.for_scale(scale), [scale], TILE, shown=shown)[scale]
        side = scale // TILE
        masks = shown[scale].reshape(side, 4, side, 4).transpose(0, 2, 1, 3).reshape(-1, 4, 4)
        chosen = np.random.default_rng(1).permutation(len(whole))[:40]
        np.testing.assert_array_equal(pyramid.pixels(level_idx, chosen), whole[chosen])
        if level_idx == len(pyramid.scales) - 1:
            np.testing.assert_array_equal(pyramid.shown(level_idx, chosen), masks[chosen])


def test_masks_of_deep_levels_are_learnt_from_the_tiles_that_are_read(cog, monkeypatch):
    known = pyramid_of(read_image(cog, 10**9)).shown(5, [0, 5, 900])
    monkeypatch.setattr("uhr_bat.image_pyramids_uhr_bat.MASK_SIDE", 64)
    pyramid = pyramid_of(read_image(cog, 10**9))
    assert pyramid.is_known(1) and not pyramid.is_known(5)
    np.testing.assert_array_equal(pyramid.shown(5, [0, 5, 900]), known)


def test_threads_share_a_pyramid(cog):
    pyramid = pyramid_of(read_image(cog, 10**9))
    expected = pyramid.pixels(3, range(40, 60))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: pyramid.pixels(3, range(40, 60)), range(8)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["memory", "path", "bytes", "dataset"])
@pytest.mark.parametrize("travel", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_pyramid_travels_and_opens_its_file_again_where_it_arrives(cog, kind, travel):
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(cog) as given:
        sources = {"path": cog, "bytes": Path(cog).read_bytes(), "dataset": given}
        image = random_image(523, 640) if kind == "memory" else RasterImage(sources[kind])
        pyramid = pyramid_of(image, max_tiles=40)
        expected = [pyramid.tiles(level_idx, [2, 0]) for level_idx in range(4)]
        arrived = travel(pyramid.with_max_tiles(30))
        pyramid.image = given = None
    assert arrived.num_chosen != pyramid.num_chosen and arrived.max_tiles == 30
    for level_idx, wanted in enumerate(expected):
        np.testing.assert_array_equal(arrived.tiles(level_idx, [2, 0]), wanted)
    with ThreadPoolExecutor(2) as pool:  # and has a lock again
        for found in pool.map(lambda _: arrived.tiles(3, [2, 0]), range(4)):
            np.testing.assert_array_equal(found, wanted)


def test_an_open_dataset_that_is_no_file_says_that_it_cannot_travel(cog):
    rasterio = pytest.importorskip("rasterio")
    with rasterio.MemoryFile(Path(cog).read_bytes()) as file, file.open() as given:
        with pytest.raises(TypeError, match="Give its path, or the bytes of its file"):
            pickle.dumps(pyramid_of(RasterImage(given)))


def test_an_image_without_a_valid_pixel_is_refused(tmp_path):
    rasters = pytest.importorskip("rasters")
    bands = np.zeros((3, 40, 40), np.uint8)
    path = rasters.write_raster(tmp_path / "empty.tif", bands, mask=np.zeros((40, 40), np.uint8))
    with pytest.raises(ValueError, match="none of its pixels is valid"):
        pyramid_of(read_image(path, 10**9))
