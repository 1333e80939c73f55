# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT image processor, what users load: images to the tiles of every scale (the resized views of section 3.3).

Images are read (`image_reading_uhr_bat.py`), then brought to the tiles of every scale (`image_views_uhr_bat.py`). Here
are the settings, their checks and the batch.

Letters: I images, T tiles of all scales, N patches of all scales. Sizes are (height, width).
"""

import os
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ChannelDimension, ImageInput, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .geometry_uhr_bat import PAD_COLOR, check_scales, grids, shown_patches
from .image_pictures_uhr_bat import PlainImage
from .image_pyramids_uhr_bat import DynamicPyramid, ImagePyramid
from .image_reading_uhr_bat import MAX_SIDE, RasterImage, flatten_images, is_image, read_image
from .image_sources_uhr_bat import ImageSource
from .image_views_uhr_bat import image_to_tiles, normalize_views

# What of a call says how an image is read: the arguments of `process_image`.
READING = (
    "max_image_pixels", "do_convert_rgb", "input_data_format", "bands", "value_range", "window", "nodata", "area",
    "page", "overviews",
)  # fmt: skip


def part_reading(options: dict) -> tuple[dict, dict]:
    """(reading, cutting): of the options of a call those by which an image is opened, and those by which an opened one is cut. The
    limit of pixels is in both: an image may come opened."""
    reading = {name: value for name, value in options.items() if name in READING}
    return reading, {
        name: value for name, value in options.items() if name not in reading or name == "max_image_pixels"
    }


class UHRBatImageProcessorKwargs(ImagesKwargs, total=False):
    """
    scales (`list[int]`):
        Sides of the square views in pixels, ascending, the anchor first. Multiples of the tile.
    patch_size (`int`):
        Side of the square of pixels that one token shows.
    pad_color (`list[int]`):
        RGB colour of the letterbox.
    max_image_pixels (`int`):
        Pixels of the largest image that is read.
    mask_padding (`bool`):
        Whether `pixel_attention_mask` is 0 where a patch shows the letterbox alone, or pixels that a raster has no data
        for; otherwise it is 1 everywhere.
    bands (`list`):
        Bands of a raster by number, description or colour: three, or one for grey. By default what the file says.
    value_range (`str` or `list`):
        What becomes black and white of a raster: "dtype", "percentile", (low, high), or a pair for each band.
    window (`list`):
        Part of a raster: (top, left, bottom, right) in pixels or (west, south, east, north, crs).
    nodata (`float` or `list`):
        What is no part of a raster: a value, or a value and a tolerance for what JPEG made of a collar.
    area (`str`):
        File of polygons, GeoJSON or GeoPackage: what lies outside is no part of a raster.
    page (`int`):
        Of a TIFF that has several, from 1. By default the largest.
    overviews (`str`):
        "auto", or "off" where views must be bit-equal to those of the full resolution, of a JPEG too.
    max_tiles (`int`):
        Tiles that go through the vision tower for a question, the anchor's included: the rest are read and encoded where
        the question looks. By default every tile of every scale is.
    native (`bool`):
        With `max_tiles`: levels from the anchor down to the image's own resolution, each twice as large as the one
        before, instead of `scales`.
    dynamic_pyramid (`bool`):
        The pyramid of LRS-VQA's system instead, for a model with a `region_focus`.
    """

    scales: list[int] | tuple[int, ...] | None
    patch_size: int | None
    pad_color: list[int] | tuple[int, ...] | None
    max_image_pixels: int | None
    mask_padding: bool | None
    bands: Any
    value_range: Any
    window: Any
    nodata: Any
    area: Any
    page: int | None
    overviews: str | None
    max_tiles: int | None
    native: bool | None
    dynamic_pyramid: bool | None


class UHRBatImageProcessor(BaseImageProcessor):
    """Turns images into the tiles of every scale.

    Returns a `BatchFeature` with
    - `pixel_values` float32[I, T, 3, tile, tile]: scales ascending, the tiles of a scale row by row;
    - `pixel_attention_mask` int64[I, N]: scales ascending, each in raster order over its whole grid; 1 where the patch
      shows any pixel of the image, 0 where it shows the letterbox alone. int64 as `attention_mask` is, which every
      collator and gather handles; it is 300 times smaller than the pixels.

    With `max_tiles` it returns `image_pyramids` instead, a list of I [`ImagePyramid`], with
    `dynamic_pyramid` of I [`DynamicPyramid`]: nothing is resized yet.

    Images: PIL, NumPy or torch, paths, URLs, base64, bytes, files, datasets of rasterio (see `read_image`), what
    `open_image` returns, alone, in lists or in nested lists, which are flattened. EXIF orientation is applied to what is
    read here, not to PIL images handed in. Every image becomes 8-bit RGB first: floats in [0, 1] too, so that
    `do_rescale=False` gives 0..255 whatever the input.

    The tile is `crop_size`. The file that this class writes can be read as CLIP's, so that it gives a right image
    processor without `trust_remote_code` too: it names CLIP's class, and `size` (CLIP's key, not used here, like
    `do_center_crop`) always follows `crop_size`.
    """

    valid_kwargs = UHRBatImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_attention_mask"]

    # CLIP's keys. The tile is that of ViT-L/14-336.
    do_resize = True
    size = {"shortest_edge": 336}
    default_to_square = False
    resample = Image.Resampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 336, "width": 336}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_convert_rgb = True
    # Ours, with the paper's scales.
    scales = [672, 1344, 2688, 4032]
    patch_size = 14
    pad_color = list(PAD_COLOR)
    max_image_pixels = 1_000_000_000
    mask_padding = True
    bands = None
    value_range = None
    window = None
    nodata = None
    area = None
    page = None
    overviews = None
    max_tiles = None
    native = None
    dynamic_pyramid = None

    def __init__(self, **kwargs: Unpack[UHRBatImageProcessorKwargs]):
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # None is the class's default
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @classmethod
    def from_clip(cls, image_processor: BaseImageProcessor, **kwargs) -> "UHRBatImageProcessor":
        """Our processor with the tile, mean, std and other settings of a CLIP one; `kwargs` (as `scales`) go first.

        One that was read from our own file without `trust_remote_code` still carries our settings: they are kept.
        """
        settings = image_processor.to_dict()
        known = (*cls.valid_kwargs.__annotations__, "auto_map")
        settings = {name: settings[name] for name in known if name in settings}
        size = settings.pop("size", None)
        settings.setdefault("crop_size", size)  # processors without a crop state the tile as their size
        return cls(**{**settings, **kwargs})

    def fetch_images(self, image_url_or_urls, max_image_pixels: int | None = None, **options):
        """Images in place of paths, URLs and other sources (`read_image`), in the same nesting; PIL images and arrays as
        they are. `options` are those of a raster.

        Raises what `read_image` raises.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image, max_image_pixels, **options) for image in image_url_or_urls]
        if is_image(image_url_or_urls):
            return image_url_or_urls
        return self.process_image(image_url_or_urls, max_image_pixels, **options)

    def open_image(
        self, path: str | os.PathLike, max_image_pixels: int | None = None, **options
    ) -> RasterImage | PlainImage:
        """An image file with its `height`, `width`, `filename`, `crs` and `transform`: pass it like any other image.

        `options` are `bands`, `value_range`, `window`, `nodata`, `area`, `page` and `overviews` ([`RasterImage`]). A raster is
        read while it is resized and never held whole; its pixels are the same through every other door.
        """
        image = self.process_image(path, max_image_pixels, **options)
        if not isinstance(image, Image.Image):
            return image
        return PlainImage(image, os.fspath(path) if isinstance(path, (str, os.PathLike)) else "image")

    def process_image(
        self,
        image: ImageInput | RasterImage | str | os.PathLike,
        max_image_pixels: int | None = None,
        do_convert_rgb: bool | None = True,
        input_data_format: str | ChannelDimension | None = None,
        bands=None,
        value_range=None,
        window=None,
        nodata=None,
        area=None,
        page: int | None = None,
        overviews: str | None = None,
        scales: list[int] | None = None,
    ) -> Image.Image | ImageSource:
        """One image of any kind as 8-bit RGB, at most `max_image_pixels` large (`read_image`)."""
        options = {
            "scales": scales,
            "max_image_pixels": max_image_pixels, "bands": bands, "value_range": value_range, "window": window,
            "nodata": nodata, "area": area, "page": page, "overviews": overviews,
        }  # fmt: skip
        options = {name: getattr(self, name) if value is None else value for name, value in options.items()}
        return read_image(image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **options)

    def _standardize_kwargs(self, **kwargs) -> dict:
        # None in a call is what the processor itself says.
        kwargs = {name: getattr(self, name, None) if value is None else value for name, value in kwargs.items()}
        kwargs = super()._standardize_kwargs(**kwargs)
        tile_size = kwargs["crop_size"].height
        if set(dict(kwargs["size"]).values()) != {tile_size}:
            kwargs["size"] = SizeDict(shortest_edge=tile_size)
        for name in ("image_mean", "image_std"):
            if np.size(kwargs[name]) == 4:  # the fourth is that of the alpha channel, which is dropped
                kwargs[name] = kwargs[name][:3]
        # JSON has no tuples: lists here keep a processor equal to its own copy that was saved and loaded.
        kwargs["scales"] = list(kwargs["scales"])
        kwargs["pad_color"] = list(kwargs["pad_color"])
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs):
        super()._validate_preprocess_kwargs(**kwargs)
        crop_size = kwargs["crop_size"]
        if crop_size.height is None or crop_size.height != crop_size.width:
            raise ValueError(f"`crop_size` is the tile, a square. Got {dict(crop_size)}.")
        check_scales(kwargs["scales"], crop_size.height, kwargs["patch_size"])
        if kwargs["max_image_pixels"] < 1:
            raise ValueError(f"`max_image_pixels` must be at least 1. Got {kwargs['max_image_pixels']}.")
        if len(kwargs["pad_color"]) != 3 or not all(0 <= value <= 255 for value in kwargs["pad_color"]):
            raise ValueError(f"`pad_color` is three numbers in 0..255. Got {kwargs['pad_color']}.")
        for name in ("image_mean", "image_std"):
            if np.size(kwargs[name]) not in (1, 3):
                raise ValueError(f"`{name}` is one number or three, for RGB. Got {np.size(kwargs[name])}.")
        if kwargs["native"] and kwargs["max_tiles"] is None:
            raise ValueError(
                "`native` levels are encoded where the question looks, so many tiles: pass `max_tiles` with it."
            )
        if kwargs["dynamic_pyramid"] and (kwargs["native"] or kwargs["max_tiles"] is not None):
            raise ValueError(
                "`dynamic_pyramid` is another way of looking closer than `max_tiles` and `native`, with limits of the "
                "configuration (`region_focus`): pass one or the other."
            )
        if not kwargs["do_resize"]:
            raise ValueError("`do_resize=False` cannot be: every scale is a resized view of the image.")
        if kwargs["data_format"] not in (None, ChannelDimension.FIRST, ChannelDimension.FIRST.value):
            raise ValueError(f"`pixel_values` are channels first. Got `data_format={kwargs['data_format']}`.")

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        *args,
        scales: list[int],
        crop_size,
        patch_size: int,
        pad_color: list[int],
        resample: int,
        mask_padding: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        max_tiles: int | None = None,
        native: bool | None = None,
        dynamic_pyramid: bool | None = None,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        sources = flatten_images(images)
        kwargs, _ = part_reading(kwargs)
        tile_size = crop_size.height
        arithmetic = (
            rescale_factor if do_rescale else None,
            image_mean if do_normalize else None,
            image_std if do_normalize else None,
        )
        if dynamic_pyramid or max_tiles is not None:
            tiles = {
                "tile_size": tile_size, "patch_size": patch_size, "pad_color": pad_color, "resample": resample,
                "arithmetic": arithmetic,
            }  # fmt: skip
            if not dynamic_pyramid:
                levels = {"scales": None if native else scales, "anchor": scales[0]}
                tiles |= levels | {"mask_padding": mask_padding, "max_tiles": max_tiles}
            kind = DynamicPyramid if dynamic_pyramid else ImagePyramid
            anchor = tile_size if dynamic_pyramid else scales[0]
            views = [anchor, MAX_SIDE] if native or dynamic_pyramid else scales
            pyramids = [kind(self.process_image(source, scales=views, **kwargs), **tiles) for source in sources]
            return BatchFeature(data={"image_pyramids": pyramids})
        num_tiles = sum((scale // tile_size) ** 2 for scale in scales)
        num_patches = sum(height * width for height, width in grids(scales, patch_size))
        pixel_values = np.empty((len(sources), num_tiles, 3, tile_size, tile_size), np.float32)
        pixel_attention_mask = np.ones((len(sources), num_patches), np.int64)
        for image_idx, source in enumerate(sources):  # one decoded image at a time
            image = self.process_image(source, scales=scales, **kwargs)
            size, masked = (image.height, image.width), getattr(image, "masked", False)
            if not isinstance(image, Image.Image):
                image = image.for_scale(max(scales))
            shown = {scale: np.zeros(grid, bool) for scale, grid in zip(scales, grids(scales, patch_size))}
            tiles = image_to_tiles(image, scales, tile_size, pad_color, resample, shown=shown if masked else None)
            normalize_views(tiles, arithmetic, out=pixel_values[image_idx])
            if mask_padding:
                masks = shown.values() if masked else [shown_patches(size, patches.shape) for patches in shown.values()]
                pixel_attention_mask[image_idx] = np.concatenate([patches.ravel() for patches in masks])
                if not pixel_attention_mask[image_idx].any():
                    raise ValueError(f"{image.filename}: none of its pixels is valid, so there is nothing to show.")

        data = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_processor_type": "CLIPImageProcessor"}


__all__ = ["UHRBatImageProcessor"]
