"""RGB images to the tiles of every scale: against plain Pillow code and CLIP's own processor.

The oracle of every resized view is `plain_view`: build the padded square, resize it.
"""

import threading

import numpy as np
import pytest
from images import random_image
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from uhr_bat.image_rasters_uhr_bat import RasterImage
from uhr_bat.image_views_uhr_bat import image_to_tiles, normalize_tiles, normalize_views

PAD = (122, 116, 104)
TILE = 28
SCALES = [28, 56, 112]


def plain_view(image, scale, resample=Image.Resampling.BICUBIC):
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((scale, scale), resample)


def view_of(image, scale, **kwargs):
    """The view that the tiles of a scale were cut from, as one tile: uint8[scale, scale, 3]."""
    return image_to_tiles(image, [scale], scale, **kwargs)[scale][0].transpose(1, 2, 0)


@pytest.fixture
def image():
    return random_image(45, 70)


# Resizing


@pytest.mark.parametrize(
    "size",
    [(1, 500), (500, 1), (10, 1000), (1000, 10), (37, 53), (53, 37), (64, 63), (63, 64), (112, 112), (5, 4), (1, 1)]
    + [(56, 112), (112, 56), (224, 448), (448, 224), (336, 337), (337, 336), (2, 1999), (1999, 2)],
)
@pytest.mark.parametrize("scale", [28, 56, 112, 336])
def test_a_view_is_bit_equal_to_the_resized_padded_square(size, scale):
    image = random_image(*size)
    np.testing.assert_array_equal(view_of(image, scale), plain_view(image, scale))


@pytest.mark.parametrize("seed", range(30))
def test_a_view_of_any_size_in_strips_of_any_height_is_bit_equal(seed):
    rng = np.random.default_rng(seed)
    height, width, scale = (int(value) for value in rng.integers(1, 260, 3))
    image = random_image(height, width, seed=seed)
    view = view_of(image, scale, strip_pixels=int(rng.integers(1, 4000)))
    np.testing.assert_array_equal(view, plain_view(image, scale))


@pytest.mark.parametrize("side, scale", [(1000, 112), (2500, 112), (1250, 336), (448, 112), (28, 336), (997, 112)])
@pytest.mark.parametrize("portrait", [False, True])
def test_a_view_in_bands_is_bit_equal(side, scale, portrait):
    image = random_image(side, side // 3) if portrait else random_image(side // 3, side)
    tiles = image_to_tiles(image, [scale], TILE, band_rows=10)[scale]
    tiles = tiles.reshape(scale // TILE, scale // TILE, 3, TILE, TILE)
    view = tiles.transpose(0, 3, 1, 4, 2).reshape(scale, scale, 3)
    np.testing.assert_array_equal(view, plain_view(image, scale))


@pytest.mark.parametrize("resample", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("size", [(90, 31), (31, 90), (60, 60)])
def test_every_other_filter_is_bit_equal_too(resample, size):
    image = random_image(*size)
    np.testing.assert_array_equal(view_of(image, 56, resample=resample), plain_view(image, 56, resample))


def test_a_large_image_passes_where_pillow_would_stop(monkeypatch):
    image = random_image(300, 200)
    expected = view_of(image, 112)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(view_of(image, 112), expected)


# Streams


class Rows:
    """An image that is handed out in strips, as streams are, and notes how often and by which threads it is read."""

    def __init__(self, image):
        self.image, self.height, self.width = image, image.height, image.width
        self.num_passes, self.readers = 0, []

    def masked_strips(self, num_rows):
        self.num_passes += 1
        readers = set()
        self.readers.append(readers)
        for top in range(0, self.height, num_rows):
            readers.add(threading.get_ident())
            yield self.image.crop((0, top, self.width, min(top + num_rows, self.height))), None


@pytest.mark.parametrize("size", [(45, 70), (70, 45), (130, 130), (1, 300), (300, 1)])
@pytest.mark.parametrize("suffix, options", [("tif", {}), ("tif", {"compression": "tiff_lzw"}), ("png", {})])
def test_a_file_that_is_read_in_strips_gives_the_tiles_of_its_image(tmp_path, suffix, options, size):
    pytest.importorskip("rasterio")
    path, image = tmp_path / f"image.{suffix}", random_image(*size)
    image.save(path, **options)
    in_strips = image_to_tiles(RasterImage(path), SCALES, TILE, strip_pixels=7 * max(size))
    for scale, tiles in image_to_tiles(image, SCALES, TILE).items():
        np.testing.assert_array_equal(in_strips[scale], tiles)


@pytest.mark.parametrize("window_bytes, num_passes", [(10**9, 1), (4 * 70 * (SCALES[0] + SCALES[1]), 2), (1, 3)])
def test_the_number_of_passes_over_an_image_changes_nothing(image, window_bytes, num_passes):
    rows = Rows(image)
    tiles = image_to_tiles(rows, SCALES, TILE, window_bytes=window_bytes)
    assert rows.num_passes == num_passes
    for scale, expected in image_to_tiles(image, SCALES, TILE).items():
        np.testing.assert_array_equal(tiles[scale], expected)


@pytest.mark.parametrize("side, num_passes", [(1000, 1), (997, 2)])
def test_little_memory_is_enough_for_one_pass_where_side_and_scales_share_factors(side, num_passes):
    rows = Rows(random_image(side, 300))
    image_to_tiles(rows, [100, 200], 100, band_rows=10, window_bytes=200_000)  # a whole view takes 400,000 and 800,000
    assert rows.num_passes == num_passes


def test_one_thread_reads_all_strips_of_a_pass(image):
    rows = Rows(image)
    image_to_tiles(rows, SCALES, TILE, strip_pixels=1, window_bytes=1)
    assert [len(readers) for readers in rows.readers] == [1, 1, 1]


def test_an_error_of_a_stream_reaches_the_caller(image):
    class Damaged(Rows):
        def masked_strips(self, num_rows):
            yield from list(super().masked_strips(num_rows))[:2]
            raise OSError("damaged.tif: the image cannot be decoded whole.")

    with pytest.raises(OSError, match="^damaged.tif"):
        image_to_tiles(Damaged(image), SCALES, TILE, strip_pixels=700)


# Tiles


def test_tiles_are_the_crops_of_the_view_row_by_row(image):
    tiles = image_to_tiles(image, SCALES, TILE)
    assert list(tiles) == SCALES
    for scale in SCALES:
        view = plain_view(image, scale)
        crops = [
            np.asarray(view.crop((left, top, left + TILE, top + TILE))).transpose(2, 0, 1)
            for top in range(0, scale, TILE)
            for left in range(0, scale, TILE)
        ]
        assert tiles[scale].dtype == np.uint8
        np.testing.assert_array_equal(tiles[scale], crops)


def test_normalised_tiles_are_bit_equal_to_what_clip_makes_of_each_tile(image):
    clip = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    tiles = np.concatenate(list(image_to_tiles(image, SCALES, TILE).values()))
    expected = clip([Image.fromarray(tile.transpose(1, 2, 0)) for tile in tiles], return_tensors="np").pixel_values
    np.testing.assert_array_equal(normalize_tiles(tiles), expected)


@pytest.mark.parametrize("rescale_factor", [1 / 255, 1 / 127.5, 1 / 256, 3.0])
def test_every_8_bit_value_is_rescaled_as_clip_does(rescale_factor):
    tiles = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3).transpose(0, 2, 1)[..., None]
    expected = (tiles.astype(np.float64) * rescale_factor).astype(np.float32)
    result = normalize_tiles(tiles, rescale_factor, mean=None)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


def test_all_scales_are_normalised_into_one_array_and_let_go(image):
    tiles = image_to_tiles(image, SCALES, TILE)
    expected = normalize_tiles(np.concatenate(list(tiles.values())), 1 / 256, 0.5, [0.25])
    out = np.empty_like(expected)
    normalize_views(tiles, (1 / 256, 0.5, [0.25]), out)
    np.testing.assert_array_equal(out, expected)
    assert not tiles
