"""The image processor as users load it: the batch, its settings, their checks, and its file.

How images are read and how views are made is tested in test_image_reading.py and test_image_views.py.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from images import every_kind, raises, random_image
from PIL import Image
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from uhr_bat.geometry_uhr_bat import shown_patches
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor
from uhr_bat.image_reading_uhr_bat import ImageSource, RasterImage
from uhr_bat.image_views_uhr_bat import image_to_tiles


ROOT = Path(__file__).resolve().parents[1]
PAD = (122, 116, 104)
TILE = 28
SCALES = [28, 56, 112]


@pytest.fixture
def processor():
    return UHRBatImageProcessor(crop_size=TILE, scales=SCALES)


@pytest.fixture
def image():
    return random_image(45, 70)


# The batch


def test_the_batch_has_every_tile_and_every_patch(processor, image):
    batch = processor([image, random_image(20, 20)], return_tensors="pt")
    assert list(batch) == processor.model_input_names
    assert batch.pixel_values.shape == (2, 1 + 4 + 16, 3, TILE, TILE) and batch.pixel_values.dtype == torch.float32
    assert batch.pixel_attention_mask.shape == (2, 4 + 16 + 64) and batch.pixel_attention_mask.dtype == torch.int64


def test_tiles_of_the_batch_are_bit_equal_to_what_clip_makes_of_each_tile(processor, image):
    clip = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    tiles = np.concatenate(list(image_to_tiles(image, SCALES, TILE).values()))
    expected = clip([Image.fromarray(tile.transpose(1, 2, 0)) for tile in tiles], return_tensors="np").pixel_values
    np.testing.assert_array_equal(processor(image, return_tensors="np").pixel_values[0], expected)


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


def test_nested_lists_batches_and_nothing_are_lists_of_images(processor, image):
    assert processor([[image], [], [image, image]]).pixel_values.shape[0] == 3
    assert processor(np.stack([np.asarray(image)] * 2)).pixel_values.shape[0] == 2
    assert processor([]).pixel_values.shape == (0, 21, 3, TILE, TILE)


# Kinds of images


def test_every_kind_of_image_gives_the_same_tiles(processor, image, tmp_path):
    expected = processor(image).pixel_values
    for kind in [*every_kind(image, tmp_path), np.asarray(image)[None]]:
        np.testing.assert_array_equal(processor(kind).pixel_values, expected)


def test_a_fourth_mean_goes_with_the_alpha_that_is_dropped(processor):
    rgba = np.asarray(random_image(20, 30, "RGBA"))
    four = processor(rgba, image_mean=[0.1, 0.2, 0.3, 0.4], image_std=[0.5, 0.6, 0.7, 0.8]).pixel_values
    three = processor(rgba[..., :3], image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).pixel_values
    np.testing.assert_array_equal(four, three)


def test_bfloat16_tensors_with_gradients_are_images(processor):
    tensor = torch.full((3, 20, 20), 0.5, dtype=torch.bfloat16, requires_grad=True)
    pixels = processor(tensor, do_rescale=False, do_normalize=False).pixel_values
    assert (pixels == 128).all()


def test_reading_is_told_of_the_settings_of_the_call(processor, image):
    with raises(ValueError, "image: mode L is not RGB, and `do_convert_rgb` is False."):
        processor(image.convert("L"), do_convert_rgb=False)
    text = "image: 45 x 70 = 3150 pixels are over the limit of 3149 pixels. Raise `max_image_pixels` to read it."
    with raises(ValueError, text):
        processor(image, max_image_pixels=3149)
    with raises(ValueError, text):
        UHRBatImageProcessor(crop_size=TILE, scales=SCALES, max_image_pixels=3149)(image)
    strip = random_image(1, 500)
    batch = processor(np.asarray(strip), input_data_format="channels_last")
    np.testing.assert_array_equal(batch.pixel_values, processor(strip).pixel_values)


# Fetching


def test_fetch_images_reads_what_is_text_and_keeps_the_nesting(processor, image, tmp_path):
    path = tmp_path / "image.png"
    image.save(path)
    (first,), (second, third) = processor.fetch_images([[str(path)], (image, np.asarray(image))])
    assert first.tobytes() == image.tobytes() and second is image and third.shape == (45, 70, 3)
    with raises(
        ValueError,
        f"{path}: 45 x 70 = 3150 pixels are over the limit of 3149 pixels. Raise `max_image_pixels` to read it.",
    ):
        processor.fetch_images([path], max_image_pixels=3149)
    with pytest.raises(TypeError, match="^An image is a PIL image, .* Got <class 'int'>."):
        processor.fetch_images([3])


def test_a_raster_that_was_opened_is_passed_like_any_other_image(processor, image, tmp_path):
    pytest.importorskip("rasterio")
    path = tmp_path / "image.tif"
    image.save(path)
    raster = processor.open_image(path)
    assert isinstance(raster, RasterImage)
    assert processor.fetch_images([[raster]])[0][0] is raster and processor.process_image(raster) is raster
    batch = processor([raster, path, image])
    np.testing.assert_array_equal(batch.pixel_values[0], batch.pixel_values[2])
    np.testing.assert_array_equal(batch.pixel_values[1], batch.pixel_values[2])
    np.testing.assert_array_equal(batch.pixel_attention_mask[0], batch.pixel_attention_mask[2])
    for refused in (processor.open_image, lambda path, **kwargs: processor(processor.open_image(path), **kwargs)):
        with raises(
            ValueError,
            f"{path}: 45 x 70 = 3150 pixels are over the limit of 3149 pixels. Raise `max_image_pixels` to read it.",
        ):
            refused(path, max_image_pixels=3149)


# Settings


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


# Pixels of one's own


class Made:
    """Pixels of somebody's own, as docs/coarse_to_fine.md says: nothing else, and no class of ours."""

    def __init__(self, array, valid=None):
        self.array, self.valid, (self.height, self.width) = array, valid, array.shape[:2]
        if valid is not None:
            self.masked = True

    @contextmanager
    def parts(self):
        def read(top, left, bottom, right):
            box = slice(top, bottom), slice(left, right)
            return self.array[box], None if self.valid is None else self.valid[box]

        yield read

    def for_scale(self, side):
        return self


class OfOurs(ImageSource):
    """A subclass, of the class of whichever copy of the package."""

    def __init__(self, array):
        self.array, (self.height, self.width) = array, array.shape[:2]

    @contextmanager
    def parts(self):
        yield lambda top, left, bottom, right: (self.array[top:bottom, left:right], None)


@pytest.fixture
def other_copy(model_folder):
    """The image processor of remote code, which has classes of its own."""
    processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True).image_processor
    assert type(processor) is not UHRBatImageProcessor
    return processor


def same_settings():
    return UHRBatImageProcessor(crop_size=32, scales=[64, 128, 256, 384], patch_size=8)


@pytest.mark.parametrize("kind", [Made, OfOurs])
def test_a_source_of_ones_own_is_the_image_that_it_makes_whatever_its_class(other_copy, kind):
    array = np.asarray(random_image(200, 145))
    for processor in (same_settings(), other_copy):
        expected, found = processor(array), processor(kind(array))
        np.testing.assert_array_equal(found.pixel_values, expected.pixel_values)
        np.testing.assert_array_equal(found.pixel_attention_mask, expected.pixel_attention_mask)
        (pyramid,) = processor([kind(array)], max_tiles=12, native=True)["image_pyramids"]
        (held,) = processor(array, max_tiles=12, native=True)["image_pyramids"]
        np.testing.assert_array_equal(pyramid.pixels(2, range(8)), held.pixels(2, range(8)))
        assert processor.open_image(kind(array)).height == 200


def test_what_a_source_says_is_no_part_of_the_image_is_letterbox(other_copy):
    array, valid = np.asarray(random_image(64, 64)), np.ones((64, 64), bool)
    valid[:32] = False
    mask = other_copy(Made(array, valid)).pixel_attention_mask[0, :64].reshape(8, 8)
    assert mask.tolist() == [[0] * 8] * 4 + [[1] * 8] * 4


def test_a_source_that_gives_something_else_is_told_what_it_must_give():
    processor = UHRBatImageProcessor(crop_size=28, scales=[28, 56], patch_size=14)
    with pytest.raises(ValueError, match="^Made: `parts..` gave pixels of float64 .* and must give uint8 "):
        processor(Made(np.zeros((30, 30, 3))))


def test_an_image_that_one_copy_of_the_package_opened_is_taken_by_another(other_copy, tmp_path):
    ours = same_settings()
    random_image(40, 50).save(tmp_path / "a.png")
    random_image(40, 50).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        expected = ours(tmp_path / name).pixel_values
        np.testing.assert_array_equal(other_copy(ours.open_image(tmp_path / name)).pixel_values, expected)
