"""Any kind of image to 8-bit RGB, or an error that names it: against Pillow and hand-made files."""

import base64
import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from images import every_kind, raises, random_image
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from served import serve

from uhr_bat.image_reading_uhr_bat import flatten_images, read_image, to_rgb


LIMIT = 1_000_000_000


def read(source, **kwargs):
    return read_image(source, LIMIT, **kwargs)


@pytest.fixture
def image():
    return random_image(45, 70)


# Kinds


def test_every_kind_of_image_is_the_same_rgb(image, tmp_path):
    for kind in every_kind(image, tmp_path):
        found = read(kind)
        assert (found.mode, found.size, found.tobytes()) == ("RGB", image.size, image.tobytes())


def test_an_rgb_image_is_read_as_itself_and_any_other_stays_as_it_is(image):
    assert read(image) is image
    rgba = random_image(30, 40, "RGBA")
    before = rgba.tobytes()
    assert read(rgba).mode == "RGB" and (rgba.mode, rgba.tobytes()) == ("RGBA", before)


def test_what_is_no_image_at_all_is_a_type_error():
    text = (
        "An image is a PIL image, an array, a tensor, a path, a URL, base64, bytes, a file or an open raster. Got "
        "<class 'int'>."
    )
    with raises(TypeError, text):
        read(3)


def test_nested_lists_and_batches_are_flat_lists_of_images(image):
    array = np.asarray(image)
    kinds = [image, array, "a", [[image], [array, "a"]], [], [[], [image]], np.stack([array, array])]
    assert [len(flatten_images(images)) for images in kinds] == [1, 1, 1, 3, 0, 1, 2]


# Arrays


def test_grey_arrays_are_repeated_and_the_alpha_of_arrays_is_dropped(image):
    grey, rgba = np.asarray(image.convert("L")), np.asarray(random_image(6, 7, "RGBA"))
    for array in (grey, grey[..., None], grey[None]):
        assert read(array).tobytes() == image.convert("L").convert("RGB").tobytes()
    assert read(rgba).tobytes() == rgba[..., :3].tobytes()
    np.testing.assert_array_equal(read(grey > 99), np.where(grey > 99, 255, 0)[..., None].repeat(3, axis=2))


def test_bfloat16_tensors_with_gradients_are_images():
    tensor = torch.full((3, 20, 20), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert (np.asarray(read(tensor)) == 128).all()


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
def test_arrays_that_are_no_image_are_refused(array, text):
    with raises(ValueError, text):
        read(array)


def test_input_data_format_settles_what_a_shape_cannot():
    image = random_image(1, 500)
    assert read(np.asarray(image), input_data_format="channels_last").tobytes() == image.tobytes()
    with raises(ValueError, "An image has 1, 3 or 4 channels. Got 500 in the shape (3, 1, 500)."):
        read(np.asarray(image).transpose(2, 0, 1), input_data_format="channels_last")


# Modes


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "CMYK", "YCbCr", "HSV", "L", "1", "RGBX"])
def test_every_8_bit_mode_is_what_pillow_converts_it_to(mode):
    image = random_image(20, 30, "RGBA").convert("RGB" if mode in ("HSV", "CMYK", "YCbCr", "PA") else "RGBA")
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency_keeps_its_colours(tmp_path, transparency):
    image = random_image(20, 30).quantize(256)
    image.save(tmp_path / "palette.png", transparency=transparency)
    assert read(tmp_path / "palette.png").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("dtype, mode", [(np.uint16, "I;16"), (np.int32, "I")])
def test_16_bit_grey_is_scaled_by_its_full_range(dtype, mode):
    values = np.array([[0, 128, 129, 256, 257, 30000, 65406, 65407, 65535]], dtype)
    image = Image.fromarray(values)
    assert image.mode == mode
    expected = [[round(value / 257) for value in row] for row in values.tolist()]
    assert np.asarray(to_rgb(image)).tolist() == [[[value] * 3 for value in row] for row in expected]


def test_a_16_bit_png_is_scaled_by_its_full_range(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert np.asarray(read(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 128, 255]


def test_modes_without_a_right_conversion_are_refused_by_name():
    with raises(ValueError, "image: pixels are floats (mode F) of unknown range. Scale them to 8 bits first."):
        read(Image.new("F", (4, 4), 0.5))
    with raises(ValueError, "image: integer pixels must be in 0..65535 (16-bit grey). Got 70000..70000."):
        read(Image.new("I", (4, 4), 70000))
    with pytest.raises(ValueError, match="^image: mode La cannot be converted to RGB"):
        to_rgb(Image.new("La", (4, 4)))


def test_without_conversion_only_rgb_is_taken(image):
    assert read(image, do_convert_rgb=False) is image
    for grey in (image.convert("L"), np.asarray(image.convert("L"))):
        with raises(ValueError, "image: mode L is not RGB, and `do_convert_rgb` is False."):
            read(grey, do_convert_rgb=False)


# Files


def empty_png(height, width):
    """A PNG that states a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 1000, b"IDAT")


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(empty_png(50_000, 30_000))
    with raises(
        ValueError,
        f"{path}: 50000 x 30000 = 1500000000 pixels are over the limit of 1000000000 pixels. "
        f"Raise `max_image_pixels` to read it.",
    ):
        read(str(path))
    encoded = base64.b64encode(path.read_bytes()).decode()
    with pytest.raises(ValueError, match="^data:image/png;base64: 50000 x 30000 = 1500000000 pixels are over"):
        read(f"data:image/png;base64,{encoded}")


def test_a_side_that_no_letterbox_can_hold_is_refused(tmp_path):
    (tmp_path / "strip.png").write_bytes(empty_png(1_000_000, 1))
    with raises(
        ValueError,
        f"{tmp_path / 'strip.png'}: 1000000 x 1 pixels have a side over 100000 pixels, whose letterboxed square would "
        f"take too long. Cut the image into parts.",
    ):
        read(tmp_path / "strip.png")


@pytest.mark.parametrize("kind", [Image.fromarray, np.asarray, torch.from_numpy])
def test_the_limit_holds_for_images_that_are_handed_in(kind):
    text = "image: 30 x 40 = 1200 pixels are over the limit of 1199 pixels. Raise `max_image_pixels` to read it."
    image = kind(np.zeros((30, 40, 3), np.uint8))
    with raises(ValueError, text):
        read_image(image, 1199)
    assert read_image(image, 1200).size == (40, 30)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "suffix, options",
    [
        ("png", {}),
        ("bmp", {}),
        ("gif", {}),
        ("jpg", {}),
        ("jpg", {"orientation": 6}),
        ("ppm", {}),
    ],
)
def test_pillows_own_limit_is_neither_used_nor_changed(tmp_path, monkeypatch, suffix, options):
    exif = Image.Exif()
    exif[274] = options.pop("orientation", 1)
    image = random_image(40, 60)
    image.save(tmp_path / f"image.{suffix}", **options, **({"exif": exif} if suffix == "jpg" else {}))
    expected = read(tmp_path / f"image.{suffix}").tobytes()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read(tmp_path / f"image.{suffix}").tobytes() == expected
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_files_stand_upright_by_their_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    image = random_image(40, 60)
    image.save(tmp_path / f"turned.{suffix}", exif=exif)
    image.save(tmp_path / f"plain.{suffix}")
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
    expected = read(tmp_path / f"plain.{suffix}")
    if orientation > 1:
        expected = expected.transpose(Image.Transpose[turns[orientation - 2]])
    upright = read(tmp_path / f"turned.{suffix}")
    assert (upright.size, upright.tobytes()) == (expected.size, expected.tobytes())


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_half_a_file_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    random_image(100, 100).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=f"^{re.escape(str(path))}: "):
        read(path)


def test_half_a_file_that_was_opened_elsewhere_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "half.png"
    random_image(100, 100).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with Image.open(path) as opened:
        with pytest.raises(OSError, match=f"^{re.escape(str(path))}: the image cannot be decoded whole"):
            read(opened)


def test_what_cannot_be_opened_is_an_error_that_names_it(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    flat = tmp_path / "flat.png"
    flat.write_bytes(empty_png(0, 5))
    for path in (text, empty, flat):
        with raises(
            UnidentifiedImageError,
            f"{path}: not an image in JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000 or PPM, and none at a path that GDAL (rasterio) "
            f"can read; or one with a side of 0 pixels.",
        ):
            read(path)
    # The third is valid base64 of no image.
    for name in ("missing.png", "größe.png", "fourfour", "file:///missing.png"):
        with raises(FileNotFoundError, f"{name}: there is no such file, and it is no URL or base64 image."):
            read(name)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        read(tmp_path)
    with pytest.raises(ValueError, match="^data:image/png;base64: the image is not base64"):
        read("data:image/png;base64,A")


@pytest.mark.parametrize("door", ["path", "bytes", "file", "base64"])
def test_postscript_and_other_formats_that_are_not_on_the_list_start_no_program(tmp_path, monkeypatch, door):
    started = tmp_path / "started"
    for name in ("gs", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {started}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.init()  # as any other library may have called it
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    binary = b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, len(postscript), 0, 0, 0, 0) + bytes(4) + postscript
    for content in (postscript, binary):
        path = tmp_path / "image.png"
        path.write_bytes(content)
        source = {
            "path": path, "bytes": content, "file": io.BytesIO(content),
            "base64": f"data:image/png;base64,{base64.b64encode(content).decode()}",
        }[door]  # fmt: skip
        with pytest.raises(UnidentifiedImageError, match="not an image in JPEG, PNG"):
            read(source)
    assert not started.exists()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
def test_every_format_of_the_list_is_read_whatever_it_is_called(tmp_path, image_format):
    image, path = random_image(12, 16), tmp_path / "image.bin"
    image.save(path, image_format)
    with Image.open(path) as expected:
        assert read(path.read_bytes()).tobytes() == expected.convert("RGB").tobytes()


def test_bytes_and_open_files_are_the_files_that_they_come_from(image, tmp_path):
    path = tmp_path / "image.png"
    image.save(path)
    assert read(path.read_bytes()).tobytes() == image.tobytes()
    with open(path, "rb") as file:
        file.read(5)
        assert read(file).tobytes() == image.tobytes()
    path.write_bytes(path.read_bytes()[:1000])
    with (
        open(path, "rb") as file,
        pytest.raises(OSError, match=f"^{re.escape(str(path))}: the image cannot be decoded"),
    ):
        read(file)


def test_a_picture_at_a_url_is_the_picture(image, tmp_path, monkeypatch):
    large = random_image(200, 200)  # more than is asked for first
    for name, picture in (("small.png", image), ("large.png", large)):
        picture.save(tmp_path / name)
        for ranges in (True, False):
            with serve(tmp_path, ranges) as server:
                monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
                assert read(f"{server.url}/{name}").tobytes() == picture.tobytes()
