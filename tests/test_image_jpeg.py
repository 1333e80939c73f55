"""A JPEG is its own pyramid: coarse views come from libjpeg's smaller pictures of it, close to those of the whole."""

import base64
import io
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from images import raises, random_image
from PIL import Image, ImageOps

from uhr_bat import image_reading_uhr_bat
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor
from uhr_bat.pictures.drawing import screen_image

SCALES = [32, 64]


@pytest.fixture(scope="module")
def processor():
    tile = {"height": 32, "width": 32}
    # Tiles are 0..255 here.
    return UHRBatImageProcessor(scales=SCALES, crop_size=tile, patch_size=8, do_rescale=False, do_normalize=False)


def tiles_of(processor, source, **options):
    return processor(source, return_tensors="np", **options)["pixel_values"][0]


def difference(one, other):
    return np.abs(one.astype(float) - other).mean()


def scene(height, width, mode="RGB"):
    """An image with details of all sizes, as photographs have them, and a bright border."""
    pixels = np.zeros((height, width, 3))
    for side in (4, 16, 64, 256):
        coarse = random_image(side, side, seed=side).resize((width, height), Image.Resampling.BICUBIC)
        pixels += np.asarray(coarse, float) / 4
    pixels[:9], pixels[-9:], pixels[:, :9], pixels[:, -9:] = 250, 250, 250, 250
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("jpeg") / "scene.jpg"
    scene(803, 1031).save(path, quality=90)
    return path


def photographs():
    matplotlib, sklearn = (pytest.importorskip(name) for name in ("matplotlib", "sklearn.datasets"))
    folder = Path(sklearn.__file__).parent / "images"
    return [
        folder / "china.jpg",
        folder / "flower.jpg",
        Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg"),
    ]


@pytest.mark.parametrize("scales", [[32, 64], [32], [64]])
def test_views_of_photographs_differ_by_less_than_0_3_of_255_from_those_of_the_whole(processor, scales):
    for photograph in photographs():
        whole = tiles_of(processor, photograph, scales=scales, overviews="off")
        reduced = tiles_of(processor, photograph, scales=scales)
        with Image.open(photograph) as opened:
            np.testing.assert_array_equal(whole, tiles_of(processor, opened.convert("RGB"), scales=scales))
        assert 0 < difference(reduced, whole) <= 0.3


def test_the_finest_view_comes_from_the_whole_where_it_needs_it_and_coarser_ones_do_not(processor, path):
    scales = [32, 64, 256]
    whole, mixed = (tiles_of(processor, path, scales=scales, overviews=mode) for mode in ("off", "auto"))
    coarse = 1 + 4
    np.testing.assert_array_equal(mixed[coarse:], whole[coarse:])
    assert 0 < difference(mixed[:coarse], whole[:coarse]) <= 0.3


def test_every_door_gives_the_same_tiles(processor, path):
    expected, content = tiles_of(processor, path), path.read_bytes()
    opened = processor.open_image(path)
    encoded = base64.b64encode(content).decode()
    sources = [str(path), path.as_uri(), content, io.BytesIO(content), f"data:image/jpeg;base64,{encoded}", opened]
    sources += [Image.open(path), Image.open(io.BytesIO(content)), processor.open_image(content)]
    sources += [processor.fetch_images(str(path)), pickle.loads(pickle.dumps(opened))]
    for source in sources:
        np.testing.assert_array_equal(tiles_of(processor, source), expected)
    (pyramid,) = processor(path, max_tiles=9)["image_pyramids"]
    levels = [pyramid.tiles(level, range(pyramid.num_tiles(level))) for level in range(2)]
    np.testing.assert_array_equal(np.concatenate(levels), expected)


def test_an_opened_jpeg_has_the_size_and_the_pixels_of_the_whole(processor, path):
    opened, whole = processor.open_image(path), np.asarray(Image.open(path))
    tiles_of(processor, opened)
    assert (opened.height, opened.width, opened.filename) == (803, 1031, str(path))
    np.testing.assert_array_equal(np.asarray(opened), whole)
    np.testing.assert_array_equal(
        tiles_of(processor, opened, overviews="off"), tiles_of(processor, path, overviews="off")
    )


def test_levels_down_to_the_images_own_pixels_are_read_from_the_whole(processor, path):
    (pyramid,) = processor(path, max_tiles=99, native=True)["image_pyramids"]
    (exact,) = processor(path, max_tiles=99, native=True, overviews="off")["image_pyramids"]
    for level_idx, scale in enumerate(exact.scales):
        some = range(0, exact.num_tiles(level_idx), 3)
        found, expected = pyramid.tiles(level_idx, some), exact.tiles(level_idx, some)
        assert difference(found, expected) <= (0.3 if scale < 256 else 0)


def test_the_pyramid_of_lrs_vqa_is_read_so_too(processor):
    photograph = photographs()[0]
    (pyramid,) = processor(photograph, dynamic_pyramid=True)["image_pyramids"]
    (exact,) = processor(photograph, dynamic_pyramid=True, overviews="off")["image_pyramids"]
    for level_idx in range(1 + len(exact.levels)):
        rows, columns = exact.levels[level_idx - 1].tiles if level_idx else (1, 1)
        every = range(rows * columns)
        assert difference(pyramid.tiles(level_idx, every), exact.tiles(level_idx, every)) <= 0.3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_of_odd_sides_is_close_to_the_whole_one_at_its_edges_too(processor, tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    scene(771, 1029).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "turned.jpg") as opened:
        upright = ImageOps.exif_transpose(opened)
        whole, found = tiles_of(processor, upright), tiles_of(processor, tmp_path / "turned.jpg")
        stored = tiles_of(processor, Image.open(tmp_path / "turned.jpg"))
        assert 0 < difference(stored, tiles_of(processor, opened.convert("RGB"))) <= 0.3  # as Pillow opens it
    assert 0 < difference(found, whole) <= 0.3
    assert np.abs(found - whole).max() <= 12
    assert processor.open_image(tmp_path / "turned.jpg").image.tobytes() == upright.tobytes()


@pytest.mark.parametrize("size", [(771, 1029), (513, 300), (1025, 1023)])
def test_a_line_along_every_edge_is_as_bright_as_in_the_whole(processor, tmp_path, size):
    pixels = np.full((*size, 3), 60, np.uint8)
    pixels[[0, -1]], pixels[:, [0, -1]] = 250, 250
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    whole, found = (tiles_of(processor, tmp_path / "a.jpg", overviews=mode) for mode in ("off", "auto"))
    assert 0 < np.abs(found - whole).max() <= 8


@pytest.mark.parametrize("mode, image_format, options", [
    ("L", "JPEG", {}), ("RGB", "JPEG", {"progressive": True}), ("RGB", "JPEG", {"subsampling": 0}),
    ("RGB", "MPO", {"save_all": True}),
])  # fmt: skip
def test_grey_progressive_and_several_pictures_are_read_reduced(processor, tmp_path, mode, image_format, options):
    path = tmp_path / "scene.jpg"
    image = scene(600, 800, mode)
    more = {"append_images": [image.rotate(180)]} if image_format == "MPO" else {}
    image.save(path, image_format, quality=90, **options, **more)
    assert 0 < difference(tiles_of(processor, path), tiles_of(processor, path, overviews="off")) <= 0.3


def lossless(height, width, color):
    """A lossless JPEG of one colour: how far its first pixel is from grey, and every other one from the one beside it."""

    def segment(marker, content):
        return bytes((255, marker)) + (len(content) + 2).to_bytes(2, "big") + content

    frame = bytes((8, *height.to_bytes(2, "big"), *width.to_bytes(2, "big"), 3))
    frame += b"".join(bytes((name, 0x11, 0)) for name in b"RGB")
    table = bytes((0, 0, 0, 0, 9, *[0] * 12, *range(9)))  # a number of i bits has the code i of four bits
    scan = bytes((3, *(byte for name in b"RGB" for byte in (name, 0)), 1, 0, 0))
    coded = [(value - 128, abs(value - 128).bit_length()) for value in color]
    bits = "".join(f"{size:04b}{far + ((1 << size) - 1) * (far < 0):0{size}b}" for far, size in coded)
    bits += "0" * (12 * (height * width - 1))
    content = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8), "big")
    return b"\xff\xd8" + segment(0xC3, frame) + segment(0xC4, table) + segment(0xDA, scan) + content + b"\xff\xd9"


def test_arithmetic_and_lossless_ones_are_read_as_their_whole(processor, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    profile = {"driver": "JPEG", "height": 600, "width": 800, "count": 3, "dtype": "uint8", "ARITHMETIC": "YES"}
    with rasterio.open(tmp_path / "arithmetic.jpg", "w", **profile) as raster:
        raster.write(np.moveaxis(np.asarray(scene(600, 800)), 2, 0))
    path = tmp_path / "arithmetic.jpg"
    assert (
        b"\xff\xc9" in path.read_bytes()[:1000] and path.stat().st_size > 2**16
    )  # of more than one of Pillow's pieces
    with open(path, "rb") as file:
        image = Image.open(file)
        assert (tiles_of(processor, image, overviews="off") == tiles_of(processor, path, overviews="off")).all()
    tiles_of(processor, image, overviews="off")  # whose file is closed by now
    assert 0 < difference(tiles_of(processor, path), tiles_of(processor, path, overviews="off")) <= 0.3
    (tmp_path / "lossless.jpg").write_bytes(lossless(300, 300, (200, 90, 30)))
    found = tiles_of(processor, tmp_path / "lossless.jpg")
    assert (found == np.array([200, 90, 30]).reshape(3, 1, 1)).all()


def test_other_pictures_and_small_ones_are_bit_equal_to_the_whole(processor, tmp_path):
    scene(600, 800, "CMYK").save(tmp_path / "cmyk.jpg")
    scene(600, 800).save(tmp_path / "scene.png", compress_level=1)
    scene(180, 250).save(tmp_path / "small.jpg")
    scene(1, 1000).save(tmp_path / "strip.jpg")
    for path in tmp_path.iterdir():
        with Image.open(path) as opened:
            expected = tiles_of(processor, opened.convert("RGB"))
        np.testing.assert_array_equal(tiles_of(processor, path), expected)


def test_somebodys_open_image_stays_as_it_is(processor, path):
    with Image.open(path) as opened:
        opened.fp.seek(5000)
        tiles_of(processor, opened)
        assert (opened.fp.tell(), opened.size, len(opened.tile)) == (5000, (1031, 803), 1)
        opened.draft(None, (300, 300))
        drafted = opened.size
        found = tiles_of(processor, opened)
        assert opened.size == drafted != (1031, 803)
        np.testing.assert_array_equal(found, tiles_of(processor, opened.convert("RGB")))


def test_an_image_that_was_changed_is_read_as_it_was_changed(processor, path):
    with Image.open(path) as opened:
        opened.paste((255, 0, 0), (0, 0, *opened.size))
        reds = tiles_of(processor, opened)[0][:, 16]
    assert (reds == np.array([[255], [0], [0]])).all()


@pytest.mark.parametrize("number", [0.5, 0.95])
def test_a_cut_off_file_is_the_same_error_at_every_door(processor, path, tmp_path, number):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(path.read_bytes()[: int(number * path.stat().st_size)])
    with pytest.raises(OSError) as whole:
        processor(cut, overviews="off")
    assert str(whole.value).startswith(f"{cut}: the image cannot be decoded whole")
    for read in (processor, processor.open_image, processor.fetch_images):
        with pytest.raises(OSError, match=f"^{re.escape(str(whole.value))}$"):
            read(str(cut))
    with Image.open(cut) as opened, pytest.raises(OSError, match=f"^{re.escape(str(whole.value))}$"):
        processor(opened)


def test_the_limit_of_pixels_is_that_of_the_whole(processor, path):
    text = (
        f"{path}: 803 x 1031 = 827893 pixels are over the limit of 800000 pixels. Raise `max_image_pixels` to read it."
    )
    with raises(ValueError, text):
        processor(path, max_image_pixels=800_000)
    with raises(ValueError, text):
        processor(processor.open_image(path), max_image_pixels=800_000)


def test_a_misspelt_overviews_is_refused_of_a_picture_too(processor, path):
    with raises(ValueError, "`overviews` is 'auto' or 'off'. Got 'of'."):
        processor(path, overviews="of")


def test_threads_share_an_open_jpeg(processor, path):
    opened = processor.open_image(path)
    sets = [[32], [64], [32, 256], [128]] * 4
    expected = [tiles_of(processor, path, scales=scales) for scales in sets]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda scales: tiles_of(processor, opened, scales=scales), sets))
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)


def test_a_large_jpeg_is_read_reduced_and_its_own_pixels_are_streamed(processor, path, monkeypatch):
    pytest.importorskip("rasterio")
    reduced = tiles_of(processor, path)
    monkeypatch.setattr(image_reading_uhr_bat, "HELD_PIXELS", 1)
    opened = processor.open_image(path)
    for source in (path, opened):
        np.testing.assert_array_equal(tiles_of(processor, source), reduced)
    for box in (None, (0, 0, 40, 50)):
        drawn, expected = (screen_image(one, 150, box) for one in (opened, processor.open_image(path, overviews="off")))
        assert difference(np.asarray(drawn), np.asarray(expected)) < 4
    for options in ({"overviews": "off"}, {"scales": [32, 512]}, {"max_tiles": 99, "native": True}):
        if "native" in options:
            levels = [processor(one, **options)["image_pyramids"][0] for one in (path, opened)]
            np.testing.assert_array_equal(*(one.tiles(5, [3, 40]) for one in levels))
        else:
            np.testing.assert_array_equal(*(tiles_of(processor, one, **options) for one in (path, opened)))


@pytest.mark.parametrize("box", [None, (100, 200, 700, 903), (40, 50, 60, 70)])
def test_what_is_drawn_shows_the_same_part(processor, path, box):
    drawn = screen_image(processor.open_image(path), 150, box)
    expected = screen_image(Image.open(path).convert("RGB"), 150, box)
    assert drawn.size == expected.size and difference(np.asarray(drawn), np.asarray(expected)) < 2


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("box", [None, (101, 203, 701, 761)])
def test_what_is_drawn_lies_where_it_lies_in_the_whole_however_a_jpeg_is_turned(processor, tmp_path, orientation, box):
    rows, columns = np.mgrid[:1025, :777]
    waves = (127 + 100 * np.sin(rows / 20) * np.cos(columns / 20)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(waves if orientation != 6 else waves.T).convert("RGB").save(
        tmp_path / "a.jpg", exif=exif, quality=95
    )
    whole = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    drawn, expected = (
        np.asarray(screen_image(one, 40, box)) for one in (processor.open_image(tmp_path / "a.jpg"), whole)
    )
    assert drawn.shape == expected.shape and difference(drawn, expected) < 1.5
