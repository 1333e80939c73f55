"""Images to tiles: against plain Pillow code, CLIP's own processor, and hand-made files.

The oracle of every resized view is `plain_view`: build the padded square, resize it.
"""

import base64
import json
import re
import struct
import sys
import threading
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from uhr_bat import image_processing_uhr_bat
from uhr_bat.image_processing_uhr_bat import (
    StreamedImage,
    UHRBatImageProcessor,
    array_to_image,
    check_scales,
    flatten_images,
    image_to_tiles,
    letterbox,
    normalize_tiles,
    shown_patches,
    to_rgb,
)


ROOT = Path(__file__).resolve().parents[1]
PAD = (122, 116, 104)
TILE = 28
SCALES = [28, 56, 112]


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def random_image(height, width, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values)


def plain_view(image, scale, resample=Image.Resampling.BICUBIC):
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((scale, scale), resample)


def view_of(image, scale, **kwargs):
    """The view that the tiles of a scale were cut from, as one tile: uint8[scale, scale, 3]."""
    return image_to_tiles(image, [scale], scale, **kwargs)[scale][0].transpose(1, 2, 0)


@pytest.fixture
def processor():
    return UHRBatImageProcessor(crop_size=TILE, scales=SCALES)


@pytest.fixture
def image():
    return random_image(45, 70)


# Sizes and letterbox


def test_letterbox_centres_and_leaves_the_odd_pixel_below_and_right():
    assert letterbox((3, 6)) == (6, 1, 0)
    assert letterbox((8, 3)) == (8, 0, 2)
    assert letterbox((5, 5)) == (5, 0, 0)


@pytest.mark.parametrize("size", [(7, 7), (1, 50), (50, 1), (13, 29), (29, 13), (40, 41), (3, 2), (4, 8), (16, 8)])
@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (9, 5)])
def test_padding_mask_is_where_a_patch_overlaps_a_pixel_of_the_image(size, grid):
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


# Resizing and cutting


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
def test_a_view_of_any_size_in_strips_of_any_height_is_bit_equal(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    height, width, scale = (int(value) for value in rng.integers(1, 260, 3))
    image = random_image(height, width, seed=seed)
    monkeypatch.setattr(image_processing_uhr_bat, "STRIP_PIXELS", int(rng.integers(1, 4000)))
    np.testing.assert_array_equal(view_of(image, scale), plain_view(image, scale))


@pytest.mark.parametrize("side, scale", [(1000, 112), (2500, 112), (1250, 336), (448, 112), (28, 336), (997, 112)])
@pytest.mark.parametrize("portrait", [False, True])
def test_a_view_in_bands_is_bit_equal(side, scale, portrait, monkeypatch):
    monkeypatch.setattr(image_processing_uhr_bat, "BAND_ROWS", 10)
    image = random_image(side, side // 3) if portrait else random_image(side // 3, side)
    tiles = image_to_tiles(image, [scale], TILE)[scale].reshape(scale // TILE, scale // TILE, 3, TILE, TILE)
    view = tiles.transpose(0, 3, 1, 4, 2).reshape(scale, scale, 3)
    np.testing.assert_array_equal(view, plain_view(image, scale))


@pytest.mark.parametrize(
    "side, scale, num_bands", [(20_000, 4032, 32), (8500, 4032, 4), (8500, 672, 4), (10_007, 4032, 1)]
)
def test_a_view_is_resized_in_bands_wherever_side_and_scale_share_a_factor(side, scale, num_bands):
    bands = image_processing_uhr_bat._bands(side, scale)
    assert len(bands) == num_bands
    assert [band.view[1] for band in bands[:-1]] == [band.view[0] for band in bands[1:]]
    assert (bands[0].view[0], bands[-1].view[1]) == (0, scale)
    for view, square, window in bands:
        assert view[0] * side == square[0] * scale and view[1] * side == square[1] * scale
        assert (
            window[0] <= max(0, square[0] - 2 * side / scale) and min(side, square[1] + 2 * side / scale) <= window[1]
        )


@pytest.mark.parametrize("resample", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("size", [(90, 31), (31, 90), (60, 60)])
def test_every_other_filter_is_bit_equal_too(resample, size):
    image = random_image(*size)
    np.testing.assert_array_equal(view_of(image, 56, resample=resample), plain_view(image, 56, resample))


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


def test_tiles_of_another_mode_or_scale_are_refused(image):
    with raises(ValueError, "Tiles are cut from an RGB image. Got mode L."):
        image_to_tiles(image.convert("L"), SCALES, TILE)
    with raises(ValueError, "Scale 50 px is not a positive multiple of the tile of 28 px."):
        image_to_tiles(image, [50], TILE)


def test_normalised_tiles_are_bit_equal_to_what_clip_makes_of_each_tile(processor, image):
    clip = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    tiles = np.concatenate(list(image_to_tiles(image, SCALES, TILE).values()))
    expected = clip([Image.fromarray(tile.transpose(1, 2, 0)) for tile in tiles], return_tensors="np").pixel_values
    np.testing.assert_array_equal(processor(image, return_tensors="np").pixel_values[0], expected)


@pytest.mark.parametrize("rescale_factor", [1 / 255, 1 / 127.5, 1 / 256, 3.0])
def test_every_8_bit_value_is_rescaled_as_clip_does(rescale_factor):
    tiles = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3).transpose(0, 2, 1)[..., None]
    expected = (tiles.astype(np.float64) * rescale_factor).astype(np.float32)
    result = normalize_tiles(tiles, rescale_factor, mean=None)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


# The batch


def test_the_batch_has_every_tile_and_every_patch(processor, image):
    batch = processor([image, random_image(20, 20)], return_tensors="pt")
    assert list(batch) == processor.model_input_names
    assert batch.pixel_values.shape == (2, 1 + 4 + 16, 3, TILE, TILE) and batch.pixel_values.dtype == torch.float32
    assert batch.pixel_attention_mask.shape == (2, 4 + 16 + 64) and batch.pixel_attention_mask.dtype == torch.int64


def test_the_mask_of_the_batch_is_the_mask_of_every_scale_in_raster_order(processor, image):
    expected = np.concatenate([shown_patches((45, 70), (scale // 14, scale // 14)).ravel() for scale in SCALES])
    np.testing.assert_array_equal(processor(image).pixel_attention_mask[0], expected)
    assert 0 < expected.sum() < expected.size


def test_without_mask_padding_every_patch_counts(processor, image):
    assert processor(image, mask_padding=False).pixel_attention_mask.all()


def test_patches_that_are_masked_show_the_pad_colour_alone(processor):
    image = Image.new("RGB", (224, 56), (255, 0, 0))  # 2 x, so that the filter reaches one patch at most
    batch = processor(image, scales=[112], do_rescale=False, do_normalize=False)
    view = batch.pixel_values[0].reshape(4, 4, 3, TILE, TILE).transpose(0, 3, 1, 4, 2).reshape(8, 14, 8, 14, 3)
    is_pad = (view == PAD).all(axis=(1, 3, 4))
    assert not is_pad[batch.pixel_attention_mask[0].reshape(8, 8) == 1].any()
    assert is_pad[[0, 1, 6, 7]].all()


def test_an_image_gives_the_same_alone_in_a_batch_and_again(processor, image):
    alone, batch = processor(image), processor([random_image(9, 8), image])
    np.testing.assert_array_equal(alone.pixel_values[0], batch.pixel_values[1])
    np.testing.assert_array_equal(alone.pixel_values, processor(image).pixel_values)


def test_the_image_handed_in_stays_as_it_is(processor):
    image = random_image(30, 40, "RGBA")
    before = image.tobytes()
    processor(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


def test_scales_and_tile_can_be_given_per_call(processor, image):
    assert processor(image, scales=[56]).pixel_values.shape == (1, 4, 3, TILE, TILE)
    assert processor(image, crop_size=14, scales=[14, 28]).pixel_values.shape == (1, 5, 3, 14, 14)
    assert processor(image, scales=None).pixel_values.shape == (1, 21, 3, TILE, TILE)


def test_rescale_and_normalise_can_be_turned_off_or_changed(processor, image):
    tiles = np.concatenate(list(image_to_tiles(image, SCALES, TILE).values()))[None]
    raw = processor(image, do_rescale=False, do_normalize=False).pixel_values
    np.testing.assert_array_equal(raw, tiles.astype(np.float32))
    np.testing.assert_array_equal(
        processor(image, do_normalize=False).pixel_values, tiles.astype(np.float32) / np.float32(255)
    )
    np.testing.assert_array_equal(
        processor(image, do_rescale=False, image_mean=127.5, image_std=[127.5]).pixel_values,
        (tiles - np.float32(127.5)) / np.float32(127.5),
    )


def test_nested_lists_batches_and_nothing_are_flat_lists_of_images(processor, image):
    array = np.asarray(image)
    kinds = [image, array, "a", [[image], [array, "a"]], [], [[], [image]], np.stack([array, array])]
    assert [len(flatten_images(images)) for images in kinds] == [1, 1, 1, 3, 0, 1, 2]
    assert processor([[image], [], [image, image]]).pixel_values.shape[0] == 3
    assert processor([]).pixel_values.shape == (0, 21, 3, TILE, TILE)


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"do_resize": False}, "`do_resize=False` cannot be: every scale is a resized view of the image."),
        ({"data_format": "channels_last"}, "`pixel_values` are channels first. Got `data_format=channels_last`."),
        ({"image_mean": [0.0] * 2}, "`image_mean` is one number or three, for RGB. Got 2."),
        ({"crop_size": [28, 14]}, "`crop_size` is the tile, a square. Got {'height': 28, 'width': 14}."),
        ({"crop_size": {"shortest_edge": 28}}, "`crop_size` is the tile, a square. Got {'shortest_edge': 28}."),
        ({"scales": [30]}, "Scale 30 px is not a positive multiple of the tile of 28 px."),
        ({"patch_size": 15}, "The tile of 28 px is not a positive multiple of the patch of 15 px."),
        ({"pad_color": [0, 0]}, "`pad_color` is three numbers in 0..255. Got [0, 0]."),
        ({"max_image_pixels": 0}, "`max_image_pixels` must be at least 1. Got 0."),
    ],
)
def test_wrong_settings_fail_when_they_are_made_and_when_they_are_passed(processor, image, kwargs, text):
    with raises(ValueError, text):
        processor(image, **kwargs)
    with raises(ValueError, text):
        UHRBatImageProcessor(**{"crop_size": TILE, "scales": SCALES, **kwargs})


# Arrays


def test_every_kind_of_image_gives_the_same_tiles(processor, image, tmp_path):
    array = np.asarray(image)
    image.save(tmp_path / "an image.png")
    encoded = base64.b64encode((tmp_path / "an image.png").read_bytes()).decode()
    expected = processor(image).pixel_values
    for kind in [
        array,
        array.transpose(2, 0, 1),
        array.astype(np.int64),
        (array / 255).astype(np.float32),
        array / 255,
        array.astype(np.uint16) * 257,
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
        array[None],
        tmp_path / "an image.png",
        str(tmp_path / "an image.png"),
        (tmp_path / "an image.png").as_uri(),
        f"data:image/png;base64,{encoded}",
        encoded,
        "\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76)),
    ]:
        np.testing.assert_array_equal(processor(kind).pixel_values, expected)


def test_grey_arrays_are_repeated_and_the_alpha_of_arrays_is_dropped(image):
    grey, rgba = np.asarray(image.convert("L")), np.asarray(random_image(6, 7, "RGBA"))
    for array in (grey, grey[..., None], grey[None]):
        assert to_rgb(array_to_image(array)).tobytes() == image.convert("L").convert("RGB").tobytes()
    assert to_rgb(array_to_image(rgba)).tobytes() == rgba[..., :3].tobytes()
    assert np.asarray(array_to_image(grey > 99)).tolist() == np.where(grey > 99, 255, 0).tolist()


def test_a_fourth_mean_goes_with_the_alpha_that_is_dropped(processor):
    rgba = np.asarray(random_image(20, 30, "RGBA"))
    four = processor(rgba, image_mean=[0.1, 0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7, 0.8]).pixel_values
    three = processor(rgba[..., :3], image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).pixel_values
    np.testing.assert_array_equal(four, three)


def test_bfloat16_tensors_with_gradients_are_images(processor):
    tensor = torch.full((3, 20, 20), 0.5, dtype=torch.bfloat16, requires_grad=True)
    pixels = processor(tensor, do_rescale=False, do_normalize=False).pixel_values
    assert (pixels == 128).all()


@pytest.mark.parametrize(
    "array, text",
    [
        (np.full((5, 6, 3), 2.0), "An image of float64 must have values in 0..1. Got 2.0..2.0."),
        (np.full((5, 6, 3), np.nan), "An image of float64 must have values in 0..1. Got nan..nan."),
        (np.full((5, 6, 3), 256), "An image of int64 must have values in 0..255. Got 256..256."),
        (np.full((5, 6, 3), -1), "An image of int64 must have values in 0..255. Got -1..-1."),
        (
            np.zeros((5, 6, 7), np.uint8),
            "Cannot tell where the 1, 3 or 4 channels of an image of shape (5, 6, 7) are. Pass `input_data_format`, "
            "'channels_first' or 'channels_last'.",
        ),
        (
            np.zeros((1, 500, 3), np.uint8),
            "Cannot tell where the 1, 3 or 4 channels of an image of shape (1, 500, 3) are. Pass `input_data_format`, "
            "'channels_first' or 'channels_last'.",
        ),
        (np.zeros((5,), np.uint8), "An image array has 2 or 3 dimensions. Got the shape (5,)."),
        (np.zeros((0, 6, 3), np.uint8), "image: 0 x 6 pixels (height x width) show nothing."),
    ],
)
def test_arrays_that_are_no_image_are_refused(processor, array, text):
    with raises(ValueError, text):
        processor(array)


def test_input_data_format_settles_what_a_shape_cannot(processor):
    image = random_image(1, 500)
    batch = processor(np.asarray(image), input_data_format="channels_last")
    np.testing.assert_array_equal(batch.pixel_values, processor(image).pixel_values)
    with raises(ValueError, "An image has 1, 3 or 4 channels. Got 500 in the shape (3, 1, 500)."):
        processor(np.asarray(image).transpose(2, 0, 1), input_data_format="channels_last")


def test_what_is_no_image_at_all_is_a_type_error(processor):
    text = "An image is a PIL image, an array, a tensor, a path, a URL or base64. Got <class 'int'>."
    with raises(TypeError, text):
        processor(3)
    with raises(TypeError, text):
        processor.fetch_images([3])


# Modes


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "L", "1", "RGBX"])
def test_every_8_bit_mode_is_what_pillow_converts_it_to(mode):
    image = random_image(20, 30, "RGBA").convert("RGB" if mode in ("HSV", "CMYK", "YCbCr", "PA") else "RGBA")
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency_keeps_its_colours(processor, tmp_path, transparency):
    image = random_image(20, 30).quantize(256)
    image.save(tmp_path / "palette.png", transparency=transparency)
    assert processor.fetch_images(tmp_path / "palette.png").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("dtype, mode", [(np.uint16, "I;16"), (np.int32, "I")])
def test_16_bit_grey_is_scaled_by_its_full_range(processor, tmp_path, dtype, mode):
    values = np.array([[0, 128, 129, 256, 257, 30000, 65406, 65407, 65535]], dtype)
    image = Image.fromarray(values)
    assert image.mode == mode
    image.save(tmp_path / "grey.tif")
    expected = [[round(value / 257) for value in row] for row in values.tolist()]
    for grey in (to_rgb(image), processor.fetch_images(tmp_path / "grey.tif")):
        assert np.asarray(grey).tolist() == [[[value] * 3 for value in row] for row in expected]


def test_a_16_bit_png_is_scaled_by_its_full_range(processor, tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert np.asarray(processor.fetch_images(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 128, 255]


def test_modes_without_a_right_conversion_are_refused_by_name(processor, tmp_path):
    path = tmp_path / "odd.tif"
    Image.new("F", (4, 4), 0.5).save(path)
    with raises(ValueError, f"{path}: pixels are floats (mode F) of unknown range. Scale them to 8 bits first."):
        processor.fetch_images(path)
    Image.new("I", (4, 4), 70000).save(path)
    with raises(ValueError, f"{path}: integer pixels must be in 0..65535 (16-bit grey). Got 70000..70000."):
        processor.fetch_images(path)
    with pytest.raises(ValueError, match="^image: mode La cannot be converted to RGB"):
        to_rgb(Image.new("La", (4, 4)))


def test_without_conversion_only_rgb_is_taken(processor, image):
    assert processor(image, do_convert_rgb=False).pixel_values.shape[0] == 1
    with raises(ValueError, "image: mode L is not RGB, and `do_convert_rgb` is False."):
        processor(image.convert("L"), do_convert_rgb=False)


# Files


def empty_png(height, width):
    """A PNG that states a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 1000, b"IDAT")


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(processor, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(empty_png(50_000, 30_000))
    with raises(
        ValueError,
        f"{path}: 50000 x 30000 = 1500000000 pixels are over the limit of 1000000000 pixels. "
        f"Raise `max_image_pixels` to read it.",
    ):
        processor.fetch_images(str(path))
    encoded = base64.b64encode(path.read_bytes()).decode()
    with pytest.raises(ValueError, match="^data:image/png;base64: 50000 x 30000 = 1500000000 pixels are over"):
        processor(f"data:image/png;base64,{encoded}")


def test_a_side_that_no_letterbox_can_hold_is_refused(processor, tmp_path):
    (tmp_path / "strip.png").write_bytes(empty_png(1_000_000, 1))
    with raises(
        ValueError,
        f"{tmp_path / 'strip.png'}: 1000000 x 1 pixels have a side over 100000 pixels, whose letterboxed square would "
        f"take too long. Cut the image into parts.",
    ):
        processor(tmp_path / "strip.png")


@pytest.mark.parametrize("kind", [Image.fromarray, np.asarray, torch.from_numpy])
def test_the_limit_holds_for_images_that_are_handed_in(processor, kind):
    text = "image: 30 x 40 = 1200 pixels are over the limit of 1199 pixels. Raise `max_image_pixels` to read it."
    image = kind(np.zeros((30, 40, 3), np.uint8))
    with raises(ValueError, text):
        processor(image, max_image_pixels=1199)
    assert processor(image, max_image_pixels=1200).pixel_values.shape[0] == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "suffix, options",
    [
        ("png", {}),
        ("bmp", {}),
        ("gif", {}),
        ("jpg", {}),
        ("jpg", {"orientation": 6}),
        ("tif", {}),
        ("tif", {"orientation": 6}),
        ("tif", {"compression": "tiff_lzw"}),
        ("tif", {"compression": "tiff_lzw", "orientation": 6}),
        ("ppm", {}),
    ],
)
def test_pillows_own_limit_is_neither_used_nor_changed(processor, tmp_path, monkeypatch, suffix, options):
    exif = Image.Exif()
    exif[274] = options.pop("orientation", 1)
    image = random_image(40, 60)
    image.save(tmp_path / f"image.{suffix}", **options, **({"exif": exif} if suffix in ("jpg", "tif") else {}))
    expected = processor.fetch_images(tmp_path / f"image.{suffix}").tobytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    batch = processor([str(tmp_path / f"image.{suffix}"), tmp_path / f"image.{suffix}"])
    assert batch.pixel_values.shape[0] == 2
    assert processor.fetch_images(tmp_path / f"image.{suffix}").tobytes() == expected
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_large_strip_passes_where_pillow_would_stop(processor, tmp_path, monkeypatch):
    image = random_image(300, 200)
    expected = processor(image).pixel_values
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(processor(image).pixel_values, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_files_stand_upright_by_their_exif_orientation(processor, tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    image = random_image(40, 60)
    image.save(tmp_path / f"turned.{suffix}", exif=exif)
    image.save(tmp_path / f"plain.{suffix}")
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
    expected = processor.fetch_images(tmp_path / f"plain.{suffix}")
    if orientation > 1:
        expected = expected.transpose(Image.Transpose[turns[orientation - 2]])
    upright = processor.fetch_images(tmp_path / f"turned.{suffix}")
    assert (upright.size, upright.tobytes()) == (expected.size, expected.tobytes())


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_half_a_file_is_an_error_that_names_it(processor, tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    random_image(100, 100).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: "):
        processor.fetch_images(path)


def test_half_a_file_that_was_opened_elsewhere_is_an_error_that_names_it(processor, tmp_path):
    path = tmp_path / "half.png"
    random_image(100, 100).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with Image.open(path) as opened:
        with pytest.raises(OSError, match=f"^{re.escape(str(path))}: the image cannot be decoded whole"):
            processor(opened)


def test_what_cannot_be_opened_is_an_error_that_names_it(processor, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    flat = tmp_path / "flat.png"
    flat.write_bytes(empty_png(0, 5))
    for path in (text, empty, flat):
        with raises(
            UnidentifiedImageError, f"{path}: not an image that Pillow can read, or one with a side of 0 pixels."
        ):
            processor.fetch_images(path)
    # The third is valid base64 of no image.
    for name in ("missing.png", "größe.png", "fourfour", "file:///missing.png"):
        with raises(FileNotFoundError, f"{name}: there is no such file, and it is no URL or base64 image."):
            processor.fetch_images(name)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        processor.fetch_images(tmp_path)
    with pytest.raises(ValueError, match="^data:image/png;base64: the image is not base64"):
        processor.fetch_images("data:image/png;base64,A")


def test_urls_go_through_the_librarys_loader_and_the_limit(processor, image, monkeypatch):
    monkeypatch.setattr(image_processing_uhr_bat, "load_image", lambda url: image)
    assert processor.fetch_images(["https://host/a.png"]) == [image]
    with pytest.raises(ValueError, match="^https://host/a.png: 45 x 70 = 3150 pixels are over the limit of 3149"):
        processor("https://host/a.png", max_image_pixels=3149)

    def refuse(url):
        raise UnidentifiedImageError("cannot identify image file")

    monkeypatch.setattr(image_processing_uhr_bat, "load_image", refuse)
    with raises(
        OSError,
        "https://host/a.png: the image cannot be fetched (UnidentifiedImageError: cannot identify image file).",
    ):
        processor.fetch_images("https://host/a.png")


def test_fetch_images_keeps_the_nesting(processor, image, tmp_path):
    image.save(tmp_path / "image.png")
    (first,), (second, third) = processor.fetch_images([[str(tmp_path / "image.png")], (image, np.asarray(image))])
    assert first.tobytes() == image.tobytes() and second is image and third.shape == (45, 70, 3)


# Streaming


@pytest.fixture
def stream(processor):
    pytest.importorskip("pyvips")
    return processor.open_image


@pytest.mark.parametrize("size", [(45, 70), (70, 45), (130, 130), (1, 300), (300, 1)])
@pytest.mark.parametrize(
    "suffix, options",
    [("tif", {}), ("tif", {"compression": "tiff_lzw"}), ("jpg", {"quality": 90}), ("png", {})]
    + [("jpg", {"quality": 70, "progressive": True}), ("jpg", {"subsampling": 0})],
)
def test_a_streamed_file_gives_the_tiles_of_the_file_that_is_read_whole(
    stream, processor, tmp_path, monkeypatch, suffix, options, size
):
    path = tmp_path / f"image.{suffix}"
    random_image(*size).resize(size[::-1], Image.Resampling.BOX).save(path, **options)
    monkeypatch.setattr(image_processing_uhr_bat, "STREAMED_STRIP_PIXELS", 7 * max(size))
    batch = processor([stream(path), path])
    np.testing.assert_array_equal(batch.pixel_values[0], batch.pixel_values[1])
    np.testing.assert_array_equal(batch.pixel_attention_mask[0], batch.pixel_attention_mask[1])


def test_a_strip_is_read_while_the_one_before_is_resized_and_by_one_thread():
    begun, readers = [threading.Event() for _ in range(4)], set()

    def strips():
        for place, event in enumerate(begun):
            readers.add(threading.get_ident())
            event.set()
            yield place

    for place in image_processing_uhr_bat._read_ahead(strips()):
        assert all(event.wait(10) for event in begun[: place + 2])
    assert place == 3 and len(readers) == 1 and threading.get_ident() not in readers


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("compression", ["none", "deflate", "jpeg"])
def test_a_tiled_tiff_is_streamed_as_it_was_written(stream, tmp_path, tiled, compression):
    pyvips = pytest.importorskip("pyvips")
    image = random_image(100, 150)
    path = str(tmp_path / "tiled.tif")
    written = pyvips.Image.new_from_memory(image.tobytes(), 150, 100, 3, "uchar").copy(interpretation="srgb")
    written.tiffsave(path, tile=tiled, tile_width=32, tile_height=32, compression=compression, Q=100)
    streamed = np.concatenate([np.asarray(strip) for strip in stream(path).strips(9)])
    assert streamed.shape == (100, 150, 3)
    if compression == "jpeg":
        assert np.abs(streamed.astype(int) - np.asarray(image)).mean() < 40
    else:
        np.testing.assert_array_equal(streamed, image)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_number_of_passes_over_a_file_changes_nothing(stream, processor, image, tmp_path, monkeypatch, passes):
    image.save(tmp_path / "image.png")
    expected = processor(image).pixel_values
    limit = {1: 10**9, 2: 4 * 70 * (SCALES[0] + SCALES[1]), 3: 1}[passes]
    monkeypatch.setattr(image_processing_uhr_bat, "WINDOW_BYTES", limit)
    assert len(image_processing_uhr_bat._passes(SCALES, 70)) == passes
    np.testing.assert_array_equal(processor(image).pixel_values, expected)
    np.testing.assert_array_equal(processor(stream(tmp_path / "image.png")).pixel_values, expected)


def test_the_bands_of_a_streamed_image_are_grey_or_begin_with_red_green_and_blue(stream, tmp_path):
    pyvips = pytest.importorskip("pyvips")
    values = np.random.default_rng(0).integers(0, 256, (6, 7, 4), dtype=np.uint8)
    for bands, scale, interpretation in [(4, 1, "srgb"), (4, 257, "rgb16"), (4, 1, "multiband"), (3, 257, "rgb16")]:
        pixels = (values[..., :bands].astype(np.uint16) * scale).astype(np.uint8 if scale == 1 else np.uint16)
        image = pyvips.Image.new_from_array(pixels).copy(interpretation=interpretation)
        image.tiffsave(str(tmp_path / "bands.tif"))
        (strip,) = stream(tmp_path / "bands.tif").strips(6)
        np.testing.assert_array_equal(strip, values[..., :3])
    for bands, scale in [(1, 1), (2, 1), (1, 257)]:
        pixels = values[..., :bands].astype(np.uint8 if scale == 1 else np.uint16) * scale
        image = pyvips.Image.new_from_array(pixels).copy(interpretation="b-w" if scale == 1 else "grey16")
        image.tiffsave(str(tmp_path / "bands.tif"))
        (strip,) = stream(tmp_path / "bands.tif").strips(6)
        np.testing.assert_array_equal(strip, values[..., :1].repeat(3, axis=2))


def test_streamed_files_that_are_no_rgb_are_refused_by_name(stream, tmp_path):
    pyvips = pytest.importorskip("pyvips")
    path = tmp_path / "odd.tif"
    pyvips.Image.black(4, 4, bands=8).tiffsave(str(path))
    with raises(
        ValueError,
        f"{path}: 8 bands (srgb) are neither grey nor RGB. Write red, green and blue into a file of three bands.",
    ):
        stream(path)
    random_image(4, 4).convert("CMYK").save(path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: 4 bands .cmyk. are neither grey nor RGB"):
        stream(path)
    Image.new("F", (4, 4), 0.5).save(path)
    with raises(ValueError, f"{path}: pixels are float, not unsigned integers of 8 or 16 bits. Scale them first."):
        stream(path)
    exif = Image.Exif()
    exif[274] = 6
    random_image(4, 4).save(tmp_path / "turned.jpg", exif=exif)
    with raises(
        ValueError,
        f"{tmp_path / 'turned.jpg'}: the EXIF orientation 6 turns the image, which needs all of it at once. Store it "
        f"upright.",
    ):
        stream(tmp_path / "turned.jpg")


def test_the_limit_holds_for_streamed_files(stream, processor, tmp_path):
    path = tmp_path / "image.png"
    random_image(30, 40).save(path)
    with raises(
        ValueError,
        f"{path}: 30 x 40 = 1200 pixels are over the limit of 1199 pixels. Raise `max_image_pixels` to read it.",
    ):
        stream(path, max_image_pixels=1199)
    with pytest.raises(ValueError, match="1200 pixels are over the limit of 1199"):
        processor(stream(path), max_image_pixels=1199)
    assert isinstance(stream(str(path), max_image_pixels=1200), StreamedImage)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_half_a_streamed_file_is_an_error_that_names_it(stream, processor, tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    random_image(300, 300).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: the image cannot be"):
        processor(stream(path))


def test_what_cannot_be_streamed_is_an_error_that_names_it(stream, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(OSError, match=f"^{re.escape(str(tmp_path / name))}: the image cannot be opened"):
            stream(tmp_path / name)


def test_streaming_without_pyvips_says_what_to_install(processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with raises(ImportError, "Streaming an image needs pyvips: pip install pyvips pyvips-binary"):
        processor.open_image("image.tif")


def test_fetching_leaves_a_streamed_image_as_it_is(stream, processor, tmp_path):
    random_image(30, 40).save(tmp_path / "image.png")
    image = stream(tmp_path / "image.png")
    assert processor.fetch_images([[image]])[0][0] is image and processor.process_image(image) is image
    assert flatten_images([[image], image]) == [image, image]


# Settings


def test_the_defaults_are_the_papers():
    processor = UHRBatImageProcessor()
    assert (processor.crop_size.height, processor.scales, processor.patch_size) == (336, [672, 1344, 2688, 4032], 14)
    assert sum((scale // 336) ** 2 for scale in processor.scales) == 228


def test_size_follows_the_tile():
    assert UHRBatImageProcessor(crop_size=TILE, scales=SCALES).size == {"shortest_edge": TILE}
    assert UHRBatImageProcessor(crop_size=TILE, size=99, scales=SCALES).size == {"shortest_edge": TILE}
    size = {"height": TILE, "width": TILE}
    assert UHRBatImageProcessor(crop_size=TILE, size=size, scales=SCALES).size == size


def test_a_processor_that_is_saved_and_loaded_is_the_same(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "CLIPImageProcessor"
    assert saved == json.loads(processor.to_json_string())
    loaded = UHRBatImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert UHRBatImageProcessor.from_pretrained(tmp_path, scales=[56]).scales == [56]


def test_the_file_of_this_repository_is_ours_and_clips_alike(image):
    written = json.loads((ROOT / "preprocessor_config.json").read_text())
    ours = UHRBatImageProcessor.from_pretrained(ROOT)
    assert json.loads(ours.to_json_string()) == written
    tile = ours.crop_size.height
    clip = CLIPImageProcessorPil.from_pretrained(ROOT)
    assert clip(image, return_tensors="np").pixel_values.shape == (1, 3, tile, tile)


def test_every_key_of_the_file_is_known():
    written = json.loads((ROOT / "preprocessor_config.json").read_text())
    known = {*UHRBatImageProcessor.valid_kwargs.__annotations__, "image_processor_type", "auto_map"}
    assert set(written) <= known


def test_a_clip_processor_is_turned_into_ours(image):
    clip = CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": TILE, "width": TILE}, image_mean=[0.1, 0.2, 0.3]
    )
    ours = UHRBatImageProcessor.from_clip(clip, scales=SCALES)
    assert (ours.crop_size, ours.image_mean, ours.scales) == ({"height": TILE, "width": TILE}, (0.1, 0.2, 0.3), SCALES)
    assert ours.size == {"shortest_edge": TILE}
    assert ours(image).pixel_values.shape == (1, 21, 3, TILE, TILE)


def test_a_clip_processor_that_was_read_from_our_file_keeps_our_settings():
    clip, ours = CLIPImageProcessorPil.from_pretrained(ROOT), UHRBatImageProcessor.from_pretrained(ROOT)
    assert UHRBatImageProcessor.from_clip(clip).to_dict() == ours.to_dict()
    assert UHRBatImageProcessor.from_clip(ours).to_dict() == ours.to_dict()


def test_a_misspelt_setting_is_refused_in_a_call(processor, image):
    with pytest.raises(TypeError, match="scalez"):
        processor(image, scalez=[28])
