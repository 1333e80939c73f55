"""Rasters of every layout through `read_image`: the pixels that were written, or an error that names the file."""

import io
import itertools
import os
import re
import threading
import warnings
import zipfile

import geopandas
import numpy as np
import pytest
import rasterio.control
import rasterio.rpc
import shapely
from images import raises, random_image
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rasterio.shutil import copy
from rasterio.warp import transform_bounds
from rasters import random_bands, rasterio, rgb_of, write_raster
from served import serve
from uhr_bat import image_reading_uhr_bat
from uhr_bat.geometry_uhr_bat import PAD_COLOR, shown_patches
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor
from uhr_bat.image_pictures_uhr_bat import PlainImage
from uhr_bat.image_reading_uhr_bat import RasterImage, read_image

pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")  # tests write plain images
LIMIT = 1_000_000_000


def read(source, **options):
    return np.asarray(read_image(source, LIMIT, **options))


@pytest.fixture
def bands():
    return random_bands()


@pytest.fixture
def processor():
    return UHRBatImageProcessor(crop_size=28, scales=[28, 56, 112], patch_size=14)


# Layouts and doors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def urls(folder):
    with serve(folder) as in_parts, serve(folder, ranges=False) as whole:
        yield in_parts.url, whole.url


def doors(path, urls):
    """What the same file is through every door that `read_image` has."""
    yield path
    yield open(path, "rb").read()
    with open(path, "rb") as file:
        yield file
    with rasterio.open(path) as dataset:
        yield dataset
    for url in urls:
        yield f"{url}/{path.rsplit('/')[-1]}"


LAYOUTS = [
    pytest.param(*layout, id="-".join(map(str, layout)))
    for layout in itertools.product(
        ("uint8", "uint16"), (3, 4), ("RGB", "MINISBLACK"), ("pixel", "band"), ("tiles", "strips"),
        ("none", "lzw", "deflate", "zstd"),
    )
]  # fmt: skip


@pytest.mark.parametrize("dtype, num_bands, photometric, interleave, blocks, compress", LAYOUTS)
def test_every_layout_is_the_same_image_through_every_door(
    folder, urls, dtype, num_bands, photometric, interleave, blocks, compress
):
    bands = random_bands(num_bands)
    written = bands if dtype == "uint8" else bands.astype(np.uint16) * 257
    layout = {"photometric": photometric, "interleave": interleave, "tiles": blocks == "tiles", "compress": compress}
    name = f"{dtype}-{num_bands}-{photometric}-{interleave}-{blocks}-{compress}.tif"  # GDAL remembers what a URL gave
    path = write_raster(folder / name, written, **layout)
    at_urls = urls if (blocks, compress) == ("tiles", "deflate") else ()  # a request takes .2 s
    for source in doors(path, at_urls):
        np.testing.assert_array_equal(read(source), rgb_of(bands))


@pytest.mark.parametrize("num_bands, photometric", [(1, "MINISBLACK"), (3, "RGB"), (3, "YCBCR"), (4, "RGB")])
@pytest.mark.parametrize("tiles", [True, False])
def test_jpeg_inside_a_tiff_is_what_gdal_decodes_through_every_door(folder, urls, num_bands, photometric, tiles):
    path = write_raster(
        folder / f"{num_bands}-{photometric}-{tiles}.tif", random_bands(num_bands), photometric=photometric, compress="jpeg", tiles=tiles,
        interleave="pixel",
    )  # fmt: skip
    with rasterio.open(path) as dataset:
        expected = np.moveaxis(dataset.read([1, 2, 3] if num_bands > 1 else [1, 1, 1]), 0, -1)
    for source in doors(path, urls):
        np.testing.assert_array_equal(read(source), expected)


@pytest.mark.parametrize("driver, suffix", [("JP2OpenJPEG", "jp2"), ("ENVI", "img"), ("HFA", "img"), ("PNG", "png")])
def test_other_formats_of_gdal_are_read_too(tmp_path, bands, driver, suffix):
    options = {"quality": 100, "reversible": True} if driver == "JP2OpenJPEG" else {}
    path = write_raster(tmp_path / f"image.{suffix}", bands, driver=driver, **options)
    np.testing.assert_array_equal(read(path), rgb_of(bands))


def test_a_vrt_is_read_with_what_it_says_of_its_bands(tmp_path, bands):
    write_raster(tmp_path / "image.tif", bands)
    vrt = "".join(
        f'<VRTRasterBand dataType="Byte" band="{number}"><ColorInterp>{colour}</ColorInterp><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">image.tif</SourceFilename><SourceBand>{number}</SourceBand>'
        f"</SimpleSource></VRTRasterBand>"
        for number, colour in enumerate(("Blue", "Green", "Red"), 1)
    )
    path = tmp_path / "image.vrt"
    path.write_text(f'<VRTDataset rasterXSize="70" rasterYSize="45">{vrt}</VRTDataset>')
    np.testing.assert_array_equal(read(path), rgb_of(bands)[..., ::-1])


def test_a_vrt_that_comes_from_elsewhere_names_no_file_of_this_machine(tmp_path, bands):
    path = write_raster(tmp_path / "secret.tif", bands)
    vrt = (
        f'<VRTDataset rasterXSize="70" rasterYSize="45"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{path}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(OSError, match="^image: not an image in JPEG, PNG"):
        read(vrt.encode())


# Damage


@pytest.mark.parametrize("compress", ["none", "lzw", "deflate", "zstd", "jpeg", "webp"])
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("part", [0.2, 0.6, 0.98])
def test_a_file_that_was_cut_off_is_an_error_that_names_it(tmp_path, compress, tiles, part):
    whole = write_raster(
        tmp_path / "whole.tif", random_bands(3, 200, 200), compress=compress, tiles=tiles, interleave="pixel"
    )
    path, content = tmp_path / "cut.tif", open(whole, "rb").read()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: the image cannot be"):
        read(path)


@pytest.mark.parametrize("compress", ["deflate", "jpeg"])
def test_bytes_that_were_lost_inside_a_file_are_an_error_that_names_it(tmp_path, compress):
    path = tmp_path / "hole.tif"
    write_raster(path, random_bands(3, 200, 200), compress=compress, tiles=True, interleave="pixel")
    content = bytearray(path.read_bytes())
    middle = len(content) * 6 // 10
    content[middle : middle + 40] = (
        b"\xff\xd9" * 20
    )  # the end of a JPEG; in 30 trials of random bytes 9 were undamaged code
    path.write_bytes(content)
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: the image cannot be decoded whole"):
        read(path)


def test_what_is_no_raster_is_an_error_that_names_it(tmp_path):
    for start in (b"II*\0", b"\0\0\0\x0cjP  \r\n\x87\n"):
        path = tmp_path / "text.tif"
        path.write_bytes(start + b"no image")
        with pytest.raises(OSError, match=f"^{re.escape(str(path))}: the image cannot be opened"):
            read(path)
    for name in ("/vsimem/missing.tif", "GTIFF_DIR:1:missing.tif"):
        with pytest.raises(OSError, match=f"^{name}: the image cannot be opened"):
            read(name)


def test_a_server_that_has_no_such_file_says_so_and_the_limit_holds_for_urls(folder, urls):
    write_raster(folder / "limited.tif", random_bands())
    random_image(45, 70).save(folder / "limited.png")
    for url in urls:
        with raises(OSError, f"{url}/missing.tif: the image cannot be fetched, the server answers 404 Not Found."):
            read(f"{url}/missing.tif")
        for name in ("limited.tif", "limited.png"):
            with raises(
                ValueError,
                f"{url}/{name}: 45 x 70 = 3150 pixels are over the limit of 3149 pixels. Raise `max_image_pixels` to "
                f"read it.",
            ):
                read_image(f"{url}/{name}", 3149)
    with pytest.raises(OSError, match="^http://127.0.0.1:1/a.tif: the image cannot be fetched .ConnectError"):
        read("http://127.0.0.1:1/a.tif")


# Pages, orientation, colours


def test_the_largest_page_is_the_image_wherever_a_thumbnail_stands(tmp_path):
    image, small = random_image(45, 70), random_image(15, 23)
    for name, pages in [("first.tif", (small, image)), ("last.tif", (image, small))]:
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        np.testing.assert_array_equal(read(tmp_path / name), image)
        np.testing.assert_array_equal(read((tmp_path / name).read_bytes()), image)


def test_pages_that_might_be_bands_are_not_guessed(tmp_path):
    pages = [random_image(45, 70, seed=seed).convert("L") for seed in range(3)]
    path = tmp_path / "pages.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with raises(
        ValueError,
        f"{path}: 3 pages have 45 x 70 pixels: are they bands, or images? Pass the one that is meant as "
        "`page`, as 1, or write red, green and blue into one page.",
    ):
        read(path)
    for source in (path, path.read_bytes()):
        np.testing.assert_array_equal(read(source, page=2), pages[1].convert("RGB"))
    np.testing.assert_array_equal(read(f"GTIFF_DIR:2:{path}"), pages[1].convert("RGB"))
    for page in (0, 4):
        with raises(ValueError, f"{path}: `page` is from 1 to 3, the pages of the file. Got {page}."):
            read(path, page=page)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_stands_upright_and_a_window_is_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image, path = random_image(40, 60), tmp_path / "turned.tif"
    image.save(path, exif=exif)
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
    expected = np.asarray(image.transpose(Image.Transpose[turns[orientation - 2]]) if orientation > 1 else image)
    np.testing.assert_array_equal(read(path), expected)
    np.testing.assert_array_equal(read(path, window=(5, 7, 30, 39)), expected[5:30, 7:39])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBX", "LA", "RGBA"])
def test_what_pillow_writes_is_what_pillow_reads(tmp_path, mode):
    image = random_image(20, 30, "RGBX" if mode in ("RGBX", "RGBA") else "RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(255)
    image.save(tmp_path / "mode.tif")
    difference = np.abs(read(tmp_path / "mode.tif").astype(int) - np.asarray(image.convert("RGB")))
    assert difference.max() <= (mode == "YCbCr")  # which the two libraries round in different ways


def test_white_is_zero_where_the_file_says_so(tmp_path, bands):
    path = write_raster(tmp_path / "white.tif", bands[:1], photometric="MINISWHITE")
    np.testing.assert_array_equal(read(path), 255 - bands[0][..., None].repeat(3, axis=2))


# Bands


def test_colours_that_the_file_states_are_found_wherever_they_stand(tmp_path, bands):
    four = random_bands(4)
    path = write_raster(tmp_path / "bgr.tif", four, photometric="MINISBLACK", colours=["gray", "blue", "green", "red"])
    np.testing.assert_array_equal(read(path), np.moveaxis(four[[3, 2, 1]], 0, -1))
    path = write_raster(tmp_path / "false.tif", bands, photometric="MINISBLACK", colours=["undefined", "red", "green"])
    with raises(
        ValueError,
        f"{path}: which of 3 bands are red, green and blue? Pass `bands`, three numbers or names, or one for grey. Its "
        f"bands are 1 undefined, 2 red, 3 green.",
    ):
        read(path)


def test_bands_are_chosen_by_number_by_description_and_by_colour(tmp_path):
    seven = random_bands(7)
    path = write_raster(tmp_path / "seven.tif", seven)
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("B1", "B2", "B3", "B4", "NIR", None, None)
    with pytest.raises(ValueError, match="which of 7 bands are red, green and blue.*1 B1, 2 B2, 3 B3, 4 B4, 5 NIR"):
        read(path)
    for chosen in ([5, 4, 3], ["nir", "b4", "B3"], ["5", 4, "b3"]):
        np.testing.assert_array_equal(read(path, bands=chosen), np.moveaxis(seven[[4, 3, 2]], 0, -1))
    for chosen in (6, [6], "6"):
        np.testing.assert_array_equal(read(path, bands=chosen), seven[5][..., None].repeat(3, axis=2))
    for chosen, text in [
        ([1, 2], "`bands` is one band or three, numbers from 1 to 7. Got [1, 2]."),
        ([1, 2, 8], "`bands` is one band or three, numbers from 1 to 7. Got [1, 2, 8]."),
        ("red", "no band is called 'red'."),
    ]:
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {text} Its bands are 1 B1')}"):
            read(path, bands=chosen)


def test_a_palette_gives_the_colours_unless_a_range_in_numbers_is_stated(tmp_path):
    path = tmp_path / "palette.tif"
    with rasterio.open(path, "w", driver="GTiff", width=3, height=1, count=1, dtype="uint8", photometric="palette") as file:
        file.write(np.array([[[0, 1, 2]]], np.uint8))
        file.write_colormap(1, {0: (0, 0, 255), 1: (0, 255, 0), 2: (255, 0, 0)})
    for value_range in (None, "dtype", "percentile"):
        assert read(path, value_range=value_range)[0].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 0]]
    assert read(path, value_range=(0, 2))[0, :, 0].tolist() == [0, 128, 255]


def test_one_band_is_grey_and_so_is_the_first_of_two(tmp_path, bands):
    for num_bands in (1, 2):
        path = write_raster(tmp_path / "grey.tif", bands[:num_bands])
        np.testing.assert_array_equal(read(path), bands[0][..., None].repeat(3, axis=2))


# Values


def test_a_range_that_is_stated_is_stretched_to_8_bits(tmp_path):
    values = random_bands(3, dtype=np.uint16) % 4096
    path = write_raster(tmp_path / "eleven.tif", values)
    for limits in ((0, 2047), [(0, 2047), (100, 4000), (5, 6)]):
        expected = [
            np.rint(((band.astype(float) - low) / (high - low)).clip(0, 1) * 255)
            for band, (low, high) in zip(values, np.broadcast_to(limits, (3, 2)))
        ]
        np.testing.assert_array_equal(read(path, value_range=limits), np.stack(expected, axis=-1))
    for wrong in ((5, 5), (1, 2, 3), "wide", [(0, 1), (0, 1)]):
        with pytest.raises(ValueError, match=f"^{path}: `value_range` is 'dtype', 'percentile', .low, high."):
            read(path, value_range=wrong)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint32, np.float32, np.float64])
def test_types_without_a_range_of_their_own_are_asked_for_one(tmp_path, dtype):
    values = (random_bands() % 100).astype(dtype)
    path = write_raster(tmp_path / "odd.tif", values)
    with raises(
        ValueError,
        f"{path}: pixels are {np.dtype(dtype)}, whose full range says nothing about black and white. Pass "
        f"value_range=(low, high), the values that become black and white, or value_range='percentile'.",
    ):
        read(path, bands=[1, 2, 3])
    expected = np.rint(values.astype(float).clip(0, 51) * 5)
    np.testing.assert_array_equal(read(path, value_range=(0, 51)), np.moveaxis(expected, 0, -1))


def test_complex_pixels_are_refused_by_name(tmp_path):
    path = write_raster(tmp_path / "complex.tif", np.ones((1, 4, 4), np.complex64))
    with raises(ValueError, f"{path}: pixels are complex64, which no range of values makes an image of."):
        read(path)


def test_percentiles_are_of_all_chosen_bands_together_without_nodata(tmp_path):
    values = random_bands(4, dtype=np.uint16)
    values[:, :10] = 7
    path = write_raster(tmp_path / "nodata.tif", values, nodata=7)
    chosen = values[[2, 1, 0]]
    low, high = np.percentile(chosen[:, (chosen != 7).any(axis=0)], (2, 98))
    expected = np.rint(((chosen - low) / (high - low)).clip(0, 1) * 255)
    read_values = read(path, bands=[3, 2, 1], value_range="percentile")
    np.testing.assert_array_equal(read_values[10:], np.moveaxis(expected, 0, -1)[10:])


def test_bits_that_a_file_says_it_uses_are_its_range(tmp_path):
    values = random_bands(3, dtype=np.uint16) % 4096
    path = write_raster(tmp_path / "twelve.tif", values, nbits=12)
    np.testing.assert_array_equal(read(path), np.rint(np.moveaxis(values, 0, -1) * (255 / 4095)))


def test_dark_16_bit_data_are_warned_of_once_and_only_where_no_range_is_stated(tmp_path):
    values = random_bands(3, dtype=np.uint16) % 2048
    path, bright = write_raster(tmp_path / "dark.tif", values), write_raster(tmp_path / "bright.tif", values * 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(path)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{path}: 16-bit values go up to {values.max()} of 65535")
    assert "value_range=(0, 2047)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for stated in ("dtype", "percentile", (0, 2047)):
            read(path, value_range=stated)
        read(bright)


# Nodata, masks, alpha


def mask_of(bands):
    mask = np.ones(bands.shape[1:], bool)
    mask[:30, :40] = False
    mask[44, 69] = False
    return mask


def masked_rasters(folder, bands, mask):
    """The same image with the same mask in every way that a file can say it."""
    without = np.where(mask, np.maximum(bands, 1), 0)
    yield write_raster(folder / "nodata.tif", without, nodata=0)
    yield write_raster(folder / "mask.tif", np.maximum(bands, 1), mask=mask)
    alpha = np.concatenate([np.maximum(bands, 1), np.where(mask, 200, 0)[None].astype(np.uint8)])
    for tiles, compress in [(False, "none"), (True, "deflate")]:
        yield write_raster(
            folder / f"alpha{tiles}.tif", alpha, photometric="RGB", alpha="yes", tiles=tiles, compress=compress
        )


def test_what_is_no_part_of_the_image_is_letterbox_however_a_file_says_so(tmp_path, bands, processor):
    mask = mask_of(bands)
    expected = np.where(mask[..., None], np.maximum(rgb_of(bands), 1), PAD_COLOR)
    tiles = processor(Image.fromarray(expected.astype(np.uint8))).pixel_values
    for path in masked_rasters(tmp_path, bands, mask):
        np.testing.assert_array_equal(read(path), expected)
        batch = processor(path)
        np.testing.assert_array_equal(batch.pixel_values, tiles)
        shown = np.concatenate([grid.ravel() for grid in shown_by_pixels(mask, (2, 4, 8))])
        np.testing.assert_array_equal(batch.pixel_attention_mask[0], shown)
        assert 0 < shown.sum() < sum(shown_patches(mask.shape, (side, side)).sum() for side in (2, 4, 8))
        assert processor(path, mask_padding=False).pixel_attention_mask.all()


def shown_by_pixels(mask, sides):
    """By a plain loop: a patch is shown where any part of a valid pixel lies in it."""
    side, corner = max(mask.shape), [(max(mask.shape) - length) // 2 for length in mask.shape]
    for num_patches in sides:
        grid = np.zeros((num_patches, num_patches), int)
        for patch in np.ndindex(grid.shape):
            inside = [
                [
                    (place + start + 1) * num_patches > idx * side and (place + start) * num_patches < (idx + 1) * side
                    for place in range(length)
                ]
                for idx, start, length in zip(patch, corner, mask.shape)
            ]
            grid[patch] = mask[np.ix_(*inside)].any()
        yield grid


def test_alpha_in_jpeg_tiles_is_the_mask_of_a_drone_mosaic(tmp_path, bands):
    mask = mask_of(bands)
    alpha = np.concatenate([bands, np.where(mask, 255, 0)[None].astype(np.uint8)])
    path = write_raster(
        tmp_path / "mosaic.tif", alpha, photometric="RGB", alpha="yes", compress="jpeg", tiles=True, interleave="pixel"
    )
    with rasterio.open(path) as dataset:
        expected, valid = np.moveaxis(dataset.read([1, 2, 3]), 0, -1), dataset.read(4) > 0
    np.testing.assert_array_equal(read(path), np.where(valid[..., None], expected, PAD_COLOR))


def test_numbers_that_are_none_are_no_part_of_the_image(tmp_path):
    values = (random_bands() / 255).astype(np.float32)
    values[:, 5, 6] = np.nan
    image = read(write_raster(tmp_path / "nan.tif", values), value_range=(0, 1))
    assert tuple(image[5, 6]) == PAD_COLOR and tuple(image[0, 0]) == tuple(np.rint(values[:, 0, 0] * 255))


@pytest.fixture
def mosaic():
    """(uint8[3, 320, 320] with a collar of 0 around an image that has dark water within, bool of the collar, of the
    water)."""
    bands = random_bands(height=320, width=320) // 2 + 100
    rows, columns = np.mgrid[:320, :320]
    collar, water = rows + columns < 330, np.zeros((320, 320), bool)
    water[220:260, 220:260] = True
    bands[:, water], bands[:, collar] = 5, 0
    return bands, collar, water


def shown_of(image):
    """bool[h, w]: the pixels of a raster that are part of the image."""
    strips = [mask for _, mask in image.masked_strips(64)]
    return np.concatenate([np.ones((64, 320), bool) if mask is None else mask for mask in strips])


def quiet(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_image(path, LIMIT, **options)


@pytest.mark.parametrize("nodata", [0, (0, 0), (0, 8), (0, 15)])
def test_a_collar_that_is_stated_is_no_part_of_the_image_and_dark_water_within_is(tmp_path, mosaic, nodata):
    bands, collar, water = mosaic
    image = quiet(write_raster(tmp_path / "a.tif", bands), nodata=nodata)
    np.testing.assert_array_equal(shown_of(image), ~collar)
    # A part of it says the same of each pixel.
    part = quiet(write_raster(tmp_path / "a.tif", bands), nodata=nodata, window=(100, 0, 164, 320))
    np.testing.assert_array_equal(shown_of(part), ~collar[100:164])


@pytest.mark.parametrize("tag", [None, 0])
def test_a_tolerance_takes_what_jpeg_made_of_a_collar(tmp_path, mosaic, tag):
    bands, collar, water = mosaic
    path = write_raster(
        tmp_path / "a.tif", bands, compress="jpeg", photometric="ycbcr", interleave="pixel", nodata=tag, tiles=True
    )
    with pytest.warns(UserWarning, match=r"of the image is one colour at its edge, 0 in all bands, .* pass nodata=.0, 1\d"):
        without = read_image(path, LIMIT)
    image = quiet(path, nodata=(0, 15))
    shown = shown_of(image)
    rows, columns = np.mgrid[:320, :320]
    deep = rows + columns < 300
    assert not shown[deep].any() and shown[rows + columns > 345].mean() > (0.999 if tag is None else 0.99)
    assert shown[water].mean() == 1 if tag is None else shown[water].mean() > 0.9  # what is 0 by chance the tag rules out
    assert shown_of(without)[collar].any()


def test_a_border_of_one_colour_is_warned_of_once_and_only_where_nothing_says_that_it_is_no_data(tmp_path, mosaic):
    bands, collar, _ = mosaic
    path = write_raster(tmp_path / "black.tif", bands)
    with pytest.warns(UserWarning) as caught:
        read_image(path, LIMIT)
    (one,) = caught
    assert re.fullmatch(
        f"{re.escape(path)}: 5.% of the image is one colour at its edge, 0 in all bands, and visual tokens will be spent on "
        f"it. If it is no part of the image, pass nodata=0.",
        str(one.message),
    )
    white = np.where(collar, 255, bands).astype(np.uint8)
    with pytest.warns(UserWarning, match="255 in all bands.*pass nodata=255"):
        read_image(write_raster(tmp_path / "white.tif", white), LIMIT)
    quiet(write_raster(tmp_path / "tagged.tif", bands, nodata=0))
    quiet(write_raster(tmp_path / "masked.tif", bands, mask=np.where(collar, 0, 255).astype(np.uint8)))
    quiet(write_raster(tmp_path / "small.tif", np.where(collar & (np.mgrid[:320, :320][0] < 90), 0, 150).astype(np.uint8)[None].repeat(3, 0) + random_bands(height=320, width=320) // 16 * ~collar))  # fmt: skip
    sea = np.where(collar, random_bands(height=320, width=320) // 8, bands).astype(np.uint8)  # dark, and no one colour
    quiet(write_raster(tmp_path / "sea.tif", sea))


@pytest.mark.parametrize("nodata", ["black", (0, -1), (0, 1, 2), float("nan"), [None, 1]])
def test_what_is_no_value_of_nodata_is_refused_with_the_file(placed, nodata):
    with pytest.raises(ValueError, match=f"^{re.escape(placed)}: `nodata` is a number, or .value, tolerance."):
        read(placed, nodata=nodata)


def test_stated_ranges_are_in_the_units_of_scale_and_offset(tmp_path):
    stored = random_bands(1, dtype=np.uint16) % 10_000
    path = write_raster(tmp_path / "reflectance.tif", stored)
    expected = read(path, value_range=(1000, 4000))
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (0.0001,), (-0.1,)
    np.testing.assert_array_equal(quiet(path, value_range=(0, 0.3)), expected)
    # Stored values are told from those.
    with pytest.warns(UserWarning, match=r"100% of the values lie outside value_range=.*, whose scale and offset make"):
        read(path, value_range=(1000, 4000))


def test_a_range_that_leaves_nearly_everything_outside_is_warned_of(tmp_path, bands):
    path = write_raster(tmp_path / "a.tif", bands)
    for low, high in ((300, 4000), (-10, -1)):
        with pytest.warns(UserWarning, match=f"{re.escape(path)}: 100% of the values lie outside value_range=.* go from 0"):
            read(path, value_range=(low, high))
    quiet(path, value_range=(100, 150))


def test_a_folder_or_a_list_of_rasters_is_their_mosaic_and_what_none_covers_is_no_part_of_it(tmp_path, bands):
    whole = np.concatenate([bands] * 2, axis=2)
    paths = [
        write_raster(tmp_path / f"{number}.tif", part, crs="EPSG:32654", transform=rasterio.Affine(10, 0, left, 0, -10, 4_000_450))
        for number, (part, left) in enumerate(((bands, 500_000), (bands[:, :20], 500_700)))
    ]  # fmt: skip
    for source in (tmp_path, paths, tuple(paths)):
        image = read_image(source, LIMIT)
        ((strip, mask),) = image.masked_strips(100)
        expected = np.ones((45, 140), bool)
        expected[20:, 70:] = False
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(np.asarray(strip)[expected], rgb_of(whole)[expected])
        assert image.crs.to_epsg() == 32654 and image.transform * (0, 0) == (500_000, 4_000_450)
    coarse = write_raster(tmp_path / "c.tif", bands, crs="EPSG:32654", transform=rasterio.Affine(20, 0, 0, 0, -20, 0))
    with pytest.raises(ValueError, match="0.tif and .*c.tif are no mosaic: their pixel's size are .10.0, 10.0. and .20.0"):
        read(tmp_path)


NORTH_UP = {"crs": "EPSG:32654", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_450)}
BESIDE = {"crs": "EPSG:32654", "transform": rasterio.Affine(10, 0, 500_700, 0, -10, 4_000_450)}


def test_a_pixel_that_is_nodata_in_one_band_alone_is_part_of_a_mosaic_too(tmp_path, bands):
    bands = np.maximum(bands, 1)
    bands[:, 5:10], bands[0, 20:30], bands[2, 30:40] = 9, 9, 9
    paths = [write_raster(tmp_path / "0.tif", bands, nodata=9, **NORTH_UP), write_raster(tmp_path / "1.tif", bands, **BESIDE)]
    ((strip, mask),) = read_image(paths, LIMIT).masked_strips(100)
    expected = np.ones((45, 140), bool)
    expected[:, :70] = ~(bands == 9).all(axis=0)
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(np.asarray(strip)[expected], np.concatenate([rgb_of(bands)] * 2, axis=1)[expected])


def test_files_of_two_grids_or_of_two_values_without_data_are_no_mosaic(tmp_path, bands):
    path = write_raster(tmp_path / "0.tif", bands, nodata=0, **NORTH_UP)
    half = {**BESIDE, "transform": rasterio.Affine(10, 0, 500_705, 0, -10, 4_000_450)}
    with pytest.raises(ValueError, match="0.tif and .*half.tif are no mosaic: their upper left corners .* no whole number"):
        read([path, write_raster(tmp_path / "half.tif", bands, **half)])
    with pytest.raises(ValueError, match="0.tif and .*white.tif are no mosaic: their nodata are 0.0 and 255.0"):
        read([path, write_raster(tmp_path / "white.tif", bands, nodata=255, **BESIDE)])
    with pytest.raises(ValueError, match="https://none/a.tif: what a server sends .* pass '/vsicurl/https://none/a.tif'"):
        read([path, "https://none/a.tif"])


def test_a_mosaic_is_named_as_its_files_are_and_what_gdal_keeps_beside_them_is_no_part_of_it(tmp_path, bands):
    path = write_raster(tmp_path / "0.tif", bands, **NORTH_UP)
    with rasterio.Env(TIFF_USE_OVR=True, GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as file:
        file.build_overviews([2])
        file.write_mask(np.full((45, 70), 255, np.uint8))
    with zipfile.ZipFile(tmp_path / "a b.zip", "w") as file:
        file.write(path, "c d/0.tif")
    assert {"0.tif.ovr", "0.tif.msk"} <= set(os.listdir(tmp_path))
    for source in (tmp_path, [f"file://{path}"], [f"/vsizip/{tmp_path}/a b.zip/c d/0.tif"]):
        np.testing.assert_array_equal(read(source), rgb_of(bands))


def test_an_array_of_xarray_has_the_place_that_rioxarray_knows(bands):
    class Rio:
        x_dim, y_dim, nodata, crs = "x", "y", None, rasterio.crs.CRS.from_epsg(32654)

        def transform(self):
            return rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_450)

    class DataArray:
        rio = Rio()

        def __init__(self, values, dims):
            self.values, self.dims = values, dims

    for array in (DataArray(bands, ("band", "y", "x")), DataArray(rgb_of(bands), ("y", "x", "band"))):
        image = read_image(array, LIMIT, window=(500_200, 4_000_150, 500_600, 4_000_350, "EPSG:32654"))
        np.testing.assert_array_equal(image, rgb_of(bands)[10:30, 20:60])
    assert read(DataArray(bands[0], ("y", "x")))[..., 0].tolist() == bands[0].tolist()


def test_control_points_are_the_place_of_an_image(tmp_path, bands):
    path = write_raster(tmp_path / "gcps.tif", bands)
    transform = rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_450)
    corners = [(row, column) for row in (0, 45) for column in (0, 70)]
    points = [rasterio.control.GroundControlPoint(row, column, *(transform @ (column, row))) for row, column in corners]
    with rasterio.open(path, "r+") as file:
        file.gcps = points, rasterio.crs.CRS.from_epsg(32654)
    image = read_image(path, LIMIT, window=(500_200, 4_000_150, 500_600, 4_000_350, "EPSG:32654"))
    np.testing.assert_array_equal(image, rgb_of(bands)[10:30, 20:60])
    assert image.transform.almost_equals(rasterio.Affine(10, 0, 500_200, 0, -10, 4_000_350)) and image.crs.to_epsg() == 32654


def test_coordinates_of_a_camera_are_refused_with_what_makes_others_of_them(tmp_path, bands):
    path = write_raster(tmp_path / "rpcs.tif", bands)
    with rasterio.open(path, "r+") as file:
        file.rpcs = rasterio.rpc.RPC(
            height_off=0, height_scale=500, lat_off=36, lat_scale=0.1, line_den_coeff=[1] + [0] * 19, line_num_coeff=[0, 0, -1] + [0] * 17,
            line_off=22, line_scale=22, long_off=140, long_scale=0.1, samp_den_coeff=[1] + [0] * 19, samp_num_coeff=[0, 1] + [0] * 18,
            samp_off=35, samp_scale=35,
        )  # fmt: skip
    np.testing.assert_array_equal(read(path), rgb_of(bands))
    for options in ({"window": (139.9, 35.9, 140.1, 36.1, "EPSG:4326")}, {"area": shapely.box(139.9, 35.9, 140.1, 36.1)}):
        with pytest.raises(ValueError, match=f"^{re.escape(path)}: its coordinates are RPCs, .*WarpedVRT"):
            read(path, **options)


def test_what_lies_outside_an_area_is_no_part_of_the_image(placed, bands, tmp_path, processor):
    triangle = shapely.Polygon([(500_100, 4_000_400), (500_500, 4_000_400), (500_100, 4_000_000)])
    frame = geopandas.GeoDataFrame(geometry=[triangle], crs="EPSG:32654")
    frame.to_file(tmp_path / "area.gpkg")
    frame.to_crs("EPSG:4326").to_file(tmp_path / "area.geojson")
    rows, columns = np.mgrid[:40, :40]
    inside = rows + columns < 39
    for area in (tmp_path / "area.gpkg", tmp_path / "area.geojson", shapely.geometry.mapping(frame.to_crs(4326).geometry[0])):
        image = read_image(placed, LIMIT, area=area)
        found, mask = zip(*image.masked_strips(1000))
        close = np.abs(rows + columns - 39) <= 1  # the edge itself, to the pixel that degrees leave open
        assert (image.height, image.width) in ((40, 40), (41, 41), (40, 41), (41, 40)) and image.crs.to_epsg() == 32654
        np.testing.assert_array_equal(mask[0][:40, :40][~close], inside[~close])
        assert image.transform.almost_equals(rasterio.Affine(10, 0, 500_100, 0, -10, 4_000_400), 0.01)
    assert not processor(placed, area=tmp_path / "area.gpkg").pixel_attention_mask.all()
    with raises(ValueError, f"{placed}: the area {shapely.box(0, 0, 1, 1)} lies outside the image, or the window."):
        read(placed, area=shapely.box(0, 0, 1, 1))
    with pytest.raises(FileNotFoundError, match="none.geojson: there is no such file of an area"):
        read(placed, area="none.geojson")
    with pytest.raises(ValueError, match="no coordinate system that an area could be given in"):
        read(write_raster(tmp_path / "plain.tif", bands), area=tmp_path / "area.gpkg")


@pytest.mark.parametrize("west", [178, -182, 538])
@pytest.mark.parametrize(
    "area",
    [
        shapely.box(179.5, 0, 180.5, 0.1),
        shapely.box(-180.5, 0, -179.5, 0.1),
        shapely.MultiPolygon([shapely.box(179.5, 0, 180, 0.1), shapely.box(-180, 0, -179.5, 0.1)]),
    ],
)
def test_an_area_across_the_antimeridian_is_the_same_however_its_longitudes_and_those_of_the_image_are_told(
    tmp_path, bands, west, area
):
    place = rasterio.Affine(0.1, 0, west, 0, -0.1, 1)
    image = read_image(write_raster(tmp_path / "a.tif", bands, crs="EPSG:4326", transform=place), LIMIT, area=area)
    np.testing.assert_array_equal(image, rgb_of(bands)[9:10, 15:25])


def test_an_area_is_in_the_system_that_its_geojson_states_and_lines_and_nothing_in_it_do_no_harm(placed, bands):
    square = shapely.geometry.mapping(shapely.box(500_100, 4_000_000, 500_500, 4_000_400))
    features = [{"type": "Feature", "properties": {}, "geometry": one} for one in (None, square)]
    name = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32654"}}
    area = {"type": "FeatureCollection", "crs": name, "features": features}
    np.testing.assert_array_equal(read(placed, area=area), rgb_of(bands)[5:45, 10:50])
    with pytest.raises(ValueError, match="has no place in the image's coordinate system"):
        read(placed, area=square)  # metres for degrees


def test_an_image_without_any_valid_pixel_is_refused(tmp_path, processor):
    path = write_raster(tmp_path / "empty.tif", np.zeros((3, 20, 20), np.uint8), nodata=0)
    with raises(ValueError, f"{path}: none of its pixels is valid, so there is nothing to show."):
        processor(path)


# Windows and places


@pytest.fixture
def placed(tmp_path, bands):
    """A raster of 45 x 70 pixels of 10 m, from (500000, 4000450) down."""
    transform = rasterio.transform.from_origin(500_000, 4_000_450, 10, 10)
    return write_raster(tmp_path / "placed.tif", bands, crs="EPSG:32654", transform=transform)


def test_a_window_is_a_part_of_the_image_in_pixels_or_in_any_coordinates(placed, bands):
    expected = rgb_of(bands)[10:30, 20:60]
    corners = (500_200, 4_000_150, 500_600, 4_000_350)
    degrees = transform_bounds("EPSG:32654", "EPSG:4326", 500_205, 4_000_155, 500_595, 4_000_345)
    for window in (
        (10, 20, 30, 60), ((10, 30), (20, 60)), rasterio.windows.Window(20, 10, 40, 20), (*corners, "EPSG:32654")
    ):  # fmt: skip
        image = read_image(placed, 800, window=window)
        np.testing.assert_array_equal(image, expected)
        assert image.transform * (0, 0) == (500_200, 4_000_350) and image.crs.to_epsg() == 32654
    assert read(placed, window=(*degrees, "EPSG:4326")).shape[:2] == (20, 40)
    assert read(placed, window=(0, 0, 500_100, 9_000_000, "EPSG:32654")).shape == (45, 10, 3)


def test_a_window_that_is_not_inside_the_image_is_refused(placed, tmp_path, bands):
    with raises(
        ValueError,
        f"{placed}: the window (top 10, left 0, bottom 46, right 70) is not inside the image of 45 x 70 pixels "
        f"(height x width).",
    ):
        read(placed, window=(10, 0, 46, 70))
    with pytest.raises(
        ValueError, match="lie outside the image, whose own are .500000.0, 4000000.0, 500700.0, 4000450.0."
    ):
        read(placed, window=(0, 0, 1, 1, "EPSG:32654"))
    for bounds in ((0, 0, 1e30, 1e30, "EPSG:3857"), (-1e30, 0, 1, 1, "EPSG:4326")):  # PROJ would never be done with them
        with pytest.raises(ValueError, match="reach beyond 1e.10, where no coordinate system has a place"):
            read(placed, window=bounds)
    path = write_raster(tmp_path / "plain.tif", bands)
    with raises(ValueError, f"{path}: it has no coordinate system that bounds could be given in. Pass pixels."):
        read(path, window=(0, 0, 1, 1, "EPSG:4326"))


def overviews_named(name, key="OVERVIEW_FILE"):
    """Bytes of a TIFF whose metadata says in which file its overviews are."""
    tags = ImageFileDirectory_v2()
    tags.tagtype[42112] = 2
    tags[42112] = f'<GDALMetadata><Item name="{key}" domain="OVERVIEWS">{name}</Item></GDALMetadata>'
    file = io.BytesIO()
    Image.new("L", (60, 40)).save(file, "TIFF", tiffinfo=tags)
    return file.getvalue()


@pytest.mark.parametrize("key", ["OVERVIEW_FILE", "overview_file", "OVERVIEW&#95;FILE"])
def test_a_file_that_a_raster_names_as_that_of_its_overviews_is_not_opened(tmp_path, key):
    other = write_raster(tmp_path / "secret.tif", np.zeros((1, 20, 30), np.uint8))
    names = [str(other), f"/vsicurl/http://127.0.0.1:9/{key}.tif", ":::BASE:::../secret.tif", "&lt;VRTDataset/&gt;"]
    for name in names:
        path = tmp_path / "named.tif"
        path.write_bytes(overviews_named(name, key))
        for source in (path.read_bytes(), path if name != str(other) else path.read_bytes()):
            with pytest.raises(OSError, match="as the file of its overviews, which is not opened"):
                read(source)


WKT_GRIDS = (
    'GEOGCS["x",DATUM["d",SPHEROID["s",6378137,298.257],EXTENSION["PROJ4_GRIDS","{}"]],PRIMEM["Greenwich",0],'
    'UNIT["degree",0.0174532925199433]]'
)
WKT_PROJ4 = (
    'PROJCS["x",GEOGCS["x",DATUM["d",SPHEROID["s",6378137,298.257]],PRIMEM["Greenwich",0],UNIT["degree",'
    '0.0174532925199433]],PROJECTION["Mercator_1SP"],UNIT["metre",1],EXTENSION["PROJ4","+proj=merc +a=6378137 '
    '+b=6378137 +nadgrids=@{} +wktext +no_defs"]]'
)
WKT_METHOD = (
    'PROJCRS["x",BASEGEOGCRS["x",DATUM["d",ELLIPSOID["s",6378137,298.257]]],CONVERSION["c",METHOD["PROJ hgridshift '
    'grids={}"]],CS[Cartesian,2],AXIS["e",east],AXIS["n",north],LENGTHUNIT["metre",1]]'
)
WKT_BOUND = (
    'BOUNDCRS[SOURCECRS[GEOGCRS["x",DATUM["d",ELLIPSOID["s",6378137,298.257]],CS[ellipsoidal,2],AXIS["lon",east],'
    'AXIS["lat",north],ANGLEUNIT["degree",0.0174532925199433]]],TARGETCRS[GEOGCRS["WGS 84",DATUM["WGS",ELLIPSOID["s",'
    '6378137,298.257]],CS[ellipsoidal,2],AXIS["lon",east],AXIS["lat",north],ANGLEUNIT["degree",0.0174532925199433]]],'
    'ABRIDGEDTRANSFORMATION["t",METHOD["NTv2"],PARAMETERFILE["Latitude and longitude difference file","{}"]]]'
)


@pytest.mark.parametrize(
    "crs",
    ["{}", "{}.prj", "/vsicurl/{}", "+init={}:1", "+proj=longlat +nadgrids=@{}", "+proj=pipeline +step +proj=hgridshift +grids={}",
     "EPSG:{}", "ESRI::{}", "DICT:{},1", "urn:{}", WKT_GRIDS, WKT_PROJ4, WKT_METHOD, WKT_BOUND],
    ids=["bare", "ending", "vsi", "init", "nadgrids", "pipeline", "epsg", "esri", "dict", "urn", "grids", "proj4", "method", "bound"],
)  # fmt: skip
def test_bounds_are_in_a_code_or_a_wkt_that_names_no_address_and_no_file(placed, folder, urls, crs, monkeypatch):
    (folder / "crs").write_text(rasterio.crs.CRS.from_epsg(4326).to_wkt())
    with serve(folder) as server:
        for named in (f"{server.url}/crs", str(folder / "crs"), (folder / "crs").as_uri()):
            with pytest.raises(ValueError, match=f"^{re.escape(placed)}: .* Pass an authority's code, as EPSG:4326, or"):
                read(placed, window=(140, 36, 141, 37, crs.replace("{}", named)))
        assert server.sent == 0


def test_bounds_are_read_in_every_form_of_a_coordinate_system_that_names_none(placed):
    crs = rasterio.crs.CRS.from_epsg(32654)
    for form in ("epsg:32654", 32654, crs, *(crs.to_wkt(version=one) for one in ("WKT1_GDAL", "WKT2_2019", "WKT1_ESRI"))):
        image = read_image(placed, LIMIT, window=(500_200, 4_000_150, 500_600, 4_000_350, form))
        assert (image.height, image.width) == (20, 40)
    mercator = rasterio.crs.CRS.from_epsg(3857).to_wkt()
    assert "nadgrids=@null" in mercator
    bounds = transform_bounds("EPSG:32654", "EPSG:3857", 500_205, 4_000_155, 500_595, 4_000_345)
    assert read(placed, window=(*bounds, mercator)).shape[:2] == (20, 40)


def of_place(path, bands, crs, *transform):
    return write_raster(path, bands, crs=crs, transform=rasterio.Affine(*transform))


def test_bounds_in_degrees_go_across_the_antimeridian_and_meet_longitudes_that_differ_by_360(tmp_path, bands):
    path = of_place(tmp_path / "fiji.tif", bands, "EPSG:4326", 0.01, 0, 179.65, 0, -0.01, -16)  # to 180.35
    for west, east in ((179.95, -179.95), (179.95, 180.05), (-180.05, -179.95), (539.95, 540.05)):
        image = read_image(path, LIMIT, window=(west, -16.4, east, -16.1, "EPSG:4326"))
        np.testing.assert_array_equal(image, rgb_of(bands)[10:40, 30:40])
    mercator = of_place(tmp_path / "mercator.tif", bands, "EPSG:3857", 1000, 0, 20_037_508.34 - 35_000, 0, -1000, 0)
    degrees = transform_bounds("EPSG:3857", "EPSG:4326", -4900, -19_900, 4900, -10_100)
    image = read_image(mercator, LIMIT, window=(180 + degrees[0], degrees[1], degrees[2] - 180, degrees[3], "EPSG:4326"))
    assert (image.height, image.width) == (10, 10)
    zone = of_place(tmp_path / "zone.tif", bands, "EPSG:32660", 1000, 0, 800_000, 0, -1000, 45_000)
    expected = transform_bounds("EPSG:4326", "EPSG:32660", 179.9, 0.2, 180.1, 0.3)
    image = read_image(zone, LIMIT, window=(179.9, 0.2, -179.9, 0.3, "EPSG:4326"))
    assert image.width == np.ceil((expected[2] - 800_000) / 1000) - np.floor((expected[0] - 800_000) / 1000)
    # Its two ends are one place, but no window.
    world = of_place(tmp_path / "world.tif", bands, "EPSG:4326", 360 / 70, 0, -180, 0, -4, 90)
    with pytest.raises(ValueError, match="lie at both ends of the image, in 2 parts: .* Pass one of them."):
        read(world, window=(170, -10, -170, 10, "EPSG:4326"))
    assert read(world, window=(340, -10, 380, 10, "EPSG:4326")).shape[:2] == (5, 8)


def test_bounds_around_a_pole_hold_the_pole(tmp_path, bands):
    antarctica = of_place(tmp_path / "south.tif", bands, "EPSG:3031", 100_000, 0, -3_500_000, 0, -100_000, 2_250_000)
    radius = transform_bounds("EPSG:4326", "EPSG:3031", 0, -85, 0, -85)[3]
    image = read_image(antarctica, LIMIT, window=(-180, -90, 180, -85, "EPSG:4326"))
    reach = int(np.ceil(radius / 100_000))
    assert image.width == 2 * reach and image.transform.c == -reach * 100_000
    world = of_place(tmp_path / "world.tif", bands, "EPSG:4326", 360 / 70, 0, -180, 0, -4, 90)
    image = read_image(world, LIMIT, window=(-1e6, -1e6, 1e6, 1e6, "EPSG:3413"))
    assert image.width == 70 and image.transform.f == 90 and image.height == 4  # the corners lie at 77 degrees


def test_windows_of_rasterio_are_the_pixels_that_their_bounds_say(placed, bands):
    rng = np.random.default_rng(0)
    with rasterio.open(placed) as dataset:
        transform = dataset.transform
    for _ in range(50):
        top, left = rng.integers(20), rng.integers(30)
        bottom, right = top + rng.integers(1, 25), left + rng.integers(1, 40)
        bounds = rasterio.windows.bounds(((top, bottom), (left, right)), transform)
        window = rasterio.windows.from_bounds(*bounds, transform)
        np.testing.assert_array_equal(read(placed, window=window), rgb_of(bands)[top:bottom, left:right])
    assert read(placed, window=rasterio.windows.Window(0.5, 1.25, 2, 3)).shape[:2] == (4, 3)


@pytest.mark.parametrize(
    "window, words",
    [
        ((float("nan"), 0, 1, 1, "EPSG:4326"), "the edges of a window are finite numbers. Got (nan"),
        ((0, 0, float("inf"), 10), "the edges of a window are finite numbers"),
        ((0, None, 5, 10), "the edges of a window are finite numbers"),
        ((0, 0, 10), "'(0, 0, 10)' is no window. A window is (top, left, bottom, right) in pixels"),
        (((0, 1), 2), "is no window"),
        ("all", "'all' is no window"),
        ((35.6, 139.7, 35.7, 139.8, "EPSG:4326"), "139.7 to 139.8 are no latitudes from south to north"),
        ((139, 36, 140, 35, "EPSG:4326"), "36 to 35 are no latitudes from south to north"),
        ((2, 0, 1, 1, "EPSG:32654"), "west below east and south below north. Got (2, 0, 1, 1, EPSG:32654)"),
        ((0, 0, 1, 1, "EPSG:99999"), "the coordinate system 'EPSG:99999' of the window is not known"),
        ((0, 0, 1, 1, 'LOCAL_CS["site",UNIT["metre",1]]'), "have no place in the image's coordinate system"),
    ],
)
def test_what_is_no_window_is_told_with_the_file_and_what_is_one(placed, window, words):
    with pytest.raises(ValueError, match=f"^{re.escape(placed)}: .*{re.escape(words)}"):
        read(placed, window=window)


@pytest.mark.parametrize("wanted", [[None, 1, 2], [float("nan"), 1, 2], [1.5, 2, 3], [[1], [2], [3]], True, 0, 4])
def test_what_is_no_band_is_told_with_the_file_and_its_bands(placed, wanted):
    with pytest.raises(ValueError, match=f"^{re.escape(placed)}: `bands` is one band or three, .* Its bands are 1 red, 2"):
        read(placed, bands=wanted)


def test_an_image_tells_where_it_lies_and_one_without_a_place_that_it_has_none(placed, tmp_path, processor):
    image = processor.open_image(placed)
    assert (image.height, image.width, image.filename) == (45, 70, placed)
    assert image.crs.to_epsg() == 32654 and image.transform * (70, 45) == (500_700, 4_000_000)
    random_image(4, 5).save(tmp_path / "plain.png")
    plain = processor.open_image(tmp_path / "plain.png")
    assert (plain.height, plain.width, plain.crs, plain.transform) == (4, 5, None, None)
    assert processor.open_image(write_raster(tmp_path / "plain.tif", random_bands())).transform is None


# Options


def test_options_of_a_raster_reach_it_through_the_processor(placed, processor):
    options = {"bands": [3, 2, 1], "value_range": (0, 100), "window": (0, 0, 40, 40)}
    expected = processor(Image.fromarray(read(placed, **options))).pixel_values
    np.testing.assert_array_equal(processor(placed, **options).pixel_values, expected)
    np.testing.assert_array_equal(processor(processor.open_image(placed, **options)).pixel_values, expected)
    of_its_own = UHRBatImageProcessor(crop_size=28, scales=[28, 56, 112], patch_size=14, **options)
    np.testing.assert_array_equal(of_its_own(placed).pixel_values, expected)


def test_options_that_there_are_not_are_refused_at_every_door(placed, processor):
    for door in (processor, processor.open_image, processor.process_image, processor.fetch_images):
        with pytest.raises(TypeError, match="unexpected keyword argument 'band'"):
            door(placed, band=[3, 2, 1])


def test_a_folder_that_is_a_raster_is_read_and_so_are_subdatasets_by_every_name(tmp_path, bands):
    path = write_raster(tmp_path / "a.tif", bands)
    copy(path, str(tmp_path / "a.zarr"), driver="Zarr")
    np.testing.assert_array_equal(read(tmp_path / "a.zarr"), rgb_of(bands))
    copy(path, str(tmp_path / "a.nc"), driver="netCDF")
    with rasterio.open(tmp_path / "a.nc") as dataset:
        names = dataset.subdatasets
    for name in (names[1], names[1].replace("netcdf", "NETCDF")):
        np.testing.assert_array_equal(read(name)[..., 0], bands[1])
    with raises(
        ValueError,
        f"{tmp_path}/a.nc: it has no bands of its own, but subdatasets. Pass one of them: {', '.join(names)}.",
    ):
        read(tmp_path / "a.nc")


def test_options_are_for_what_is_opened_here(placed, processor):
    for image in (random_image(20, 20), np.zeros((20, 20, 3), np.uint8), processor.open_image(placed)):
        with pytest.raises(ValueError, match="^`bands` is for files and open datasets, and this image is in memory"):
            processor(image, bands=[1, 2, 3])
    with raises(ValueError, "`overviews` is 'auto' or 'off'. Got 'on'."):
        processor(placed, overviews="on")


def test_a_picture_with_options_is_read_as_a_raster(tmp_path, processor):
    image = random_image(40, 50)
    image.save(tmp_path / "image.png")
    expected = np.asarray(image)[3:20, 5:30, ::-1]
    for source in (tmp_path / "image.png", (tmp_path / "image.png").read_bytes()):
        np.testing.assert_array_equal(read(source, bands=[3, 2, 1], window=(3, 5, 20, 30)), expected)


# Overviews


@pytest.fixture
def pyramid(tmp_path):
    """A cloud-optimised file of 1024 x 1500 pixels, smooth as photographs are."""
    image = random_image(16, 24).resize((1500, 1024), Image.Resampling.BICUBIC)
    return write_raster(
        tmp_path / "cog.tif", np.moveaxis(np.asarray(image), -1, 0), driver="COG", blocksize=128, compress="deflate",
        overviews="auto", resampling="average",
    ), image  # fmt: skip


def test_views_come_from_overviews_unless_that_is_turned_off(pyramid, processor):
    path, image = pyramid
    exact = processor(image, do_rescale=False, do_normalize=False)
    off = processor(path, overviews="off", do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(off.pixel_values, exact.pixel_values)
    auto = processor(path, do_rescale=False, do_normalize=False)
    difference = np.abs(auto.pixel_values - exact.pixel_values)
    assert 0 < difference.mean() < 5
    np.testing.assert_array_equal(auto.pixel_attention_mask, exact.pixel_attention_mask)


def test_of_a_file_with_overviews_at_a_url_a_part_is_fetched(pyramid, processor):
    path, _ = pyramid
    folder, name = path.rsplit("/", 1)
    size = len(open(path, "rb").read())
    with serve(folder) as server:
        batch = processor(f"{server.url}/{name}")
        assert 0 < server.sent < size / 4
    np.testing.assert_array_equal(batch.pixel_values, processor(path).pixel_values)


def test_a_raster_with_overviews_has_no_limit_of_size_and_one_without_has(tmp_path, bands, processor):
    write_raster(tmp_path / "small.tif", bands)
    size = 'xSize="110162" ySize="51992"'
    sources = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename relativeToVRT="1">small.tif'
        f'</SourceFilename><SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" xSize="70" ySize="45"/>'
        f'<DstRect xOff="0" yOff="0" {size}/></SimpleSource></VRTRasterBand>'
        for band in (1, 2, 3)
    )
    path = tmp_path / "large.vrt"
    overviews = f"<OverviewList>{' '.join(str(2**level) for level in range(1, 11))}</OverviewList>"
    path.write_text(f'<VRTDataset rasterXSize="110162" rasterYSize="51992">{sources}{overviews}</VRTDataset>')
    image = processor.open_image(path)
    assert (image.height, image.width) == (51_992, 110_162) and processor(path).pixel_values.shape[1] == 21
    (pyramid,) = processor(path, max_tiles=40, native=True)["image_pyramids"]
    assert pyramid.scales[-1] >= 110_162 and pyramid.tiles(len(pyramid.scales) - 1, [3_000_000]).shape == (1, 3, 28, 28)
    # A view, and nothing else, is read whole.
    with pytest.raises(ValueError, match="are over the limit of 1000000 pixels"):
        processor.open_image(path, max_image_pixels=1_000_000)
    with pytest.raises(ValueError, match="51992 x 110162 = 5727542704 pixels are over the limit of 1000000000 pixels"):
        processor.open_image(path, overviews="off")
    path.write_text(path.read_text().replace(overviews, ""))
    with pytest.raises(ValueError, match="5727542704 pixels are over the limit"):
        processor(path)


def test_percentiles_are_the_same_with_and_without_overviews(tmp_path, processor, monkeypatch):
    from uhr_bat import image_rasters_uhr_bat

    monkeypatch.setattr(image_rasters_uhr_bat, "SAMPLE_PIXELS", 2**14)
    values = np.asarray(random_image(16, 24).resize((600, 400), Image.Resampling.BICUBIC)).astype(np.uint16) * 8
    for options in ({"driver": "COG", "blocksize": 128}, {}):  # with overviews and without
        path = write_raster(tmp_path / "deep.tif", np.moveaxis(values, -1, 0), **options)
        images = [processor.open_image(path, value_range="percentile", overviews=mode) for mode in ("auto", "off")]
        pictures = [np.asarray(image.picture((16, 16))) for image in images]
        np.testing.assert_array_equal(*pictures)
        low, high = np.percentile(values, (2, 98))
        expected = ((values - low) / (high - low)).clip(0, 1) * 255
        assert np.abs(np.asarray(images[1]).astype(float) - expected).mean() < 6


# Reading in parts


@pytest.mark.parametrize("num_rows", [1, 7, 16, 45, 100])
@pytest.mark.parametrize("tiles", [True, False])
def test_strips_of_any_height_are_the_image(tmp_path, bands, num_rows, tiles, monkeypatch):
    from uhr_bat import image_rasters_uhr_bat

    monkeypatch.setattr(image_rasters_uhr_bat, "CHUNK_BYTES", 2000)
    path = write_raster(tmp_path / "image.tif", bands, tiles=tiles, compress="lzw")
    for window in (None, (9, 3, 44, 60)):
        strips = [np.asarray(strip) for strip in RasterImage(path, window=window).strips(num_rows)]
        expected = rgb_of(bands) if window is None else rgb_of(bands)[9:44, 3:60]
        assert {len(strip) for strip in strips[:-1]} <= {num_rows}
        np.testing.assert_array_equal(np.concatenate(strips), expected)


def test_threads_read_the_same_image_at_once(tmp_path, bands):
    path, found = write_raster(tmp_path / "image.tif", bands, tiles=True), []
    with rasterio.open(path) as dataset:
        for image in (RasterImage(path), RasterImage(dataset)):
            threads = [threading.Thread(target=lambda: found.append(np.asarray(image))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(found) == 8
    for pixels in found:
        np.testing.assert_array_equal(pixels, rgb_of(bands))


@pytest.mark.parametrize("suffix, options", [("png", {}), ("jpg", {"subsampling": 0, "quality": 95})])
def test_a_large_picture_is_streamed_where_rasterio_is_installed(tmp_path, suffix, options, monkeypatch):
    image, path = random_image(40, 60).resize((120, 80), Image.Resampling.BICUBIC), tmp_path / f"large.{suffix}"
    image.save(path, **options)
    held = read_image(path, LIMIT)
    monkeypatch.setattr(image_reading_uhr_bat, "HELD_PIXELS", 80 * 120)
    streamed = read_image(path, LIMIT)
    assert isinstance(held, Image.Image) and isinstance(streamed, RasterImage)
    assert np.abs(np.asarray(streamed).astype(int) - np.asarray(held)).max() <= (0 if suffix == "png" else 1)


def test_pictures_that_gdal_would_read_otherwise_are_held_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr(image_reading_uhr_bat, "HELD_PIXELS", 1)
    exif = Image.Exif()
    exif[274] = 6
    image = random_image(40, 60)
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "turned.png", exif=exif)
    image.quantize(16).save(tmp_path / "palette.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for name in ("turned.jpg", "turned.png", "palette.png", "cmyk.jpg"):
        assert isinstance(read_image(tmp_path / name, LIMIT), Image.Image)


def test_a_picture_that_was_opened_is_the_picture(tmp_path, processor):
    image = random_image(40, 60)
    image.save(tmp_path / "image.png")
    plain = processor.open_image(tmp_path / "image.png")
    assert isinstance(plain, PlainImage) and processor.fetch_images([plain]) == [plain]
    np.testing.assert_array_equal(np.concatenate([np.asarray(strip) for strip in plain.strips(7)]), image)
    np.testing.assert_array_equal(np.asarray(plain), image)
    np.testing.assert_array_equal(processor(plain).pixel_values, processor(image).pixel_values)


def test_a_picture_of_another_size_shows_the_mean(tmp_path, bands):
    image = RasterImage(write_raster(tmp_path / "image.tif", bands))
    expected = rgb_of(bands)[4:44, 10:70].reshape(20, 2, 30, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(image.picture((20, 30), (4, 10, 44, 70))) - expected).max() <= 0.51


# Without rasterio


@pytest.fixture
def without_rasterio(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rasterio", None)


INSTALL = r'needs rasterio: pip install "uhr-bat\[geo\]"'


def test_without_rasterio_a_tiff_that_pillow_would_misread_is_refused_with_what_to_install(tmp_path, bands, request):
    deep = bands.astype(np.uint16) * 257
    four = random_bands(4)
    by_pixel = {"photometric": "RGB", "interleave": "pixel"}
    paths = [
        ("planar bands", write_raster(tmp_path / "planar.tif", bands, interleave="band")),
        ("its format", write_raster(tmp_path / "grey.tif", bands, photometric="MINISBLACK", interleave="pixel")),
        ("bands of 16 bits", write_raster(tmp_path / "deep.tif", deep, **by_pixel)),
        ("signed pixels", write_raster(tmp_path / "signed.tif", bands[:1].astype(np.int8))),
        ("alpha, nodata", write_raster(tmp_path / "alpha.tif", four, alpha="yes", **by_pixel)),
        ("its format", write_raster(tmp_path / "zstd.tif", deep, compress="zstd")),
        ("several pages", str(tmp_path / "pages.tif")),
    ]
    image, small = random_image(45, 70), random_image(5, 7)
    small.save(tmp_path / "pages.tif", save_all=True, append_images=[image])
    image.save(tmp_path / "sound.tif", compression="tiff_lzw")
    image.convert("L").save(tmp_path / "grey_sound.tif")
    request.getfixturevalue("without_rasterio")
    for what, path in paths:
        with pytest.raises(ImportError, match=f"^{re.escape(path)}: Pillow would not read {what}.* {INSTALL}"):
            read(path)
    np.testing.assert_array_equal(read(tmp_path / "sound.tif"), image)
    np.testing.assert_array_equal(read(tmp_path / "grey_sound.tif"), image.convert("L").convert("RGB"))
    with pytest.raises(ImportError, match=INSTALL):
        read(tmp_path / "sound.tif", window=(0, 0, 5, 5))
    with pytest.raises(ImportError, match=INSTALL):
        RasterImage(str(tmp_path / "sound.tif"))


def test_a_tiff_that_pillow_opened_and_misreads_is_refused(tmp_path, bands):
    deep = write_raster(tmp_path / "deep.tif", bands.astype(np.uint16) * 257, photometric="RGB", interleave="band")
    signed = write_raster(tmp_path / "signed.tif", bands[:1].astype(np.int8))
    for path, what in ((deep, "planar bands of 16 bits"), (signed, "signed pixels")):
        with (
            Image.open(path) as image,
            raises(
                ValueError, f"{path}: Pillow does not read {what} of a TIFF right. Pass the path instead of the image."
            ),
        ):
            read(image)
    random_image(45, 70).save(tmp_path / "sound.tif")
    with Image.open(tmp_path / "sound.tif") as image:
        np.testing.assert_array_equal(read(image), read(tmp_path / "sound.tif"))


# A real file


@pytest.mark.slow
def test_a_real_scene_is_read_with_its_alpha_and_its_place(real_scene, processor):
    image = processor.open_image(real_scene)
    assert (image.height, image.width, image.crs.to_epsg()) == (877, 1164, 32654)
    with rasterio.open(real_scene) as dataset:
        pixels, valid = np.moveaxis(dataset.read([1, 2, 3]), 0, -1), dataset.dataset_mask() > 0
        assert image.transform == dataset.transform
    np.testing.assert_array_equal(image, np.where(valid[..., None], pixels, PAD_COLOR))
