# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""The helpers and the calls of the released code, translated to this model's arguments.

Scripts that were written for the release load these names from the module of the model class and call the model with
`multiscale_*` arguments. Nothing here computes anything of its own: tiles come from the image processor, masks become
`regions`, and the placeholder -200 becomes the image token.

Letters: I images, T tiles of a scale, p patches a side of a tile, H and W tokens of a scale, N tokens of all scales,
M ids. The coords of a tile are its (row, column) among the tiles of its scale.
"""

import math
import os

import torch
from transformers import StoppingCriteria
from transformers.utils import logging

from .budgets_uhr_bat import split_budgets
from .geometry_uhr_bat import shown_patches
from .image_processing_uhr_bat import UHRBatImageProcessor
from .image_raster_files_uhr_bat import reason

logger = logging.get_logger(__name__)

# Placeholder of the LLaVA family: no row of the vocabulary.
RELEASED_IMAGE_TOKEN = -200

# What tells a released call from a modern one. `modalities` says what is known anyway.
RELEASED_ARGUMENTS = (
    "multiscale_pixels",
    "multiscale_masks",
    "multiscale_topk",
    "multiscale_target_sizes",
    "image_sizes",
    "modalities",
)


def tokenizer_image_token(prompt, tokenizer, image_token_index=RELEASED_IMAGE_TOKEN, return_tensors=None):
    """Ids of a prompt with `image_token_index` for each "<image>": list[int], or long[M] with `return_tensors="pt"`."""
    first, *rest = prompt.split("<image>")
    ids = list(tokenizer(first).input_ids)
    for chunk in rest:
        ids += [image_token_index, *tokenizer(chunk, add_special_tokens=False).input_ids]
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ValueError(f"`return_tensors` must be None or 'pt'. Got {return_tensors!r}.")
    return torch.tensor(ids, dtype=torch.long)


def split_image_to_multiscale_tiles(image, image_processor, target_sizes, tile_size=None) -> dict:
    """Tiles of a PIL image of any shape at the scales `target_sizes`, in their order.

    `image_processor` may be this repository's or CLIP's. The tile is the one that it was made for, whatever `tile_size`
    says: the released call passes 336, which is right for its own weights only.

    Returns:
        {scale: {"tiles": float[T, 3, tile, tile], "coords": [(row, column), ...]}}, row by row.

    Raises:
        ValueError: a scale that is no multiple of the tile, or that stands there twice.
    """
    processor = UHRBatImageProcessor.from_clip(image_processor, scales=sorted(target_sizes))
    tile = processor.crop_size["height"]
    if tile_size not in (None, tile):
        logger.warning_once(f"`tile_size={tile_size}` is not this image processor's: tiles of {tile} px are cut.")
    pixel_values = processor(image, return_tensors="pt")["pixel_values"][0]
    sides = {scale: scale // tile for scale in processor.scales}
    tiles = dict(zip(sides, pixel_values.split([side**2 for side in sides.values()])))
    return {scale: {"tiles": tiles[scale], "coords": _row_by_row(sides[scale])} for scale in target_sizes}


def load_multiscale_tile_masks(mask_entry, scales=None, tile_size=None, patch_size=None) -> dict:
    """Token masks of one image at the given scales, in their order; scales that the entry lacks are left out.

    Args:
        mask_entry: what a mask file holds, {"scales": {scale: {"tile_masks": [int[p, p], ...],
            "tile_coords": [(row, column), ...]}}}; or its path, read with weights only, so that no code in the file is
            ever run; or None.
        scales: sides of the views in pixels. None: all of the entry.
        tile_size, patch_size: pixels a side. The masks are taken as they are, with a warning where p is another: the
            released call passes 336 and 14, which are right for its own weights only.

    Returns:
        {scale: {"masks": int[T, p, p], "coords": [(row, column), ...]}}, 0 = background; {} where there is none.

    Raises:
        OSError: the file cannot be opened.
        ValueError: anything but such masks, or masks that do not make up a square.
    """
    name = "`mask_entry`"
    if isinstance(mask_entry, (str, os.PathLike)):
        name, mask_entry = os.fspath(mask_entry), _read_mask_file(mask_entry)
    if mask_entry is None or mask_entry == {}:
        return {}
    if not isinstance(mask_entry, dict) or not isinstance(mask_entry.get("scales"), dict):
        raise ValueError(f"{name} is no mask cache: it has no entry 'scales' that is a dict.")
    entries = mask_entry["scales"]
    try:
        entries = {int(scale): entry for scale, entry in entries.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is no mask cache: its scales are {list(entries)}, which are no pixels.") from error
    wanted = entries if scales is None else [scale for scale in scales if scale in entries]
    masks = {scale: _read_tile_masks(entries[scale], f"{name}, scale {scale} px") for scale in wanted}
    if None not in (tile_size, patch_size):
        expected = tile_size // patch_size
        for side in sorted({entry["masks"].shape[-1] for entry in masks.values()} - {expected}):
            logger.warning_once(
                f"`tile_size={tile_size}` and `patch_size={patch_size}` make masks of {expected} x {expected} patches, "
                f"but those of the mask cache have {side} x {side}: they are taken as they are."
            )
    return masks


def join_tile_masks(masks, coords) -> torch.Tensor:
    """long[H, W], the label map of a scale, from int[T, p, p] and the coords of every tile, in any order.

    Raises:
        ValueError: masks of another shape, or coords that are not those of a square, each once.
    """
    if masks.ndim != 3:
        raise ValueError(f"The masks of a scale must have the shape [tiles, p, p]. Got {list(masks.shape)}.")
    T, height, width = masks.shape
    side = math.isqrt(T)
    tiles = torch.zeros_like(masks, dtype=torch.long)
    tiles[_places(coords, T, "The masks of a scale")] = masks.long()
    return tiles.view(side, side, height, width).transpose(1, 2).reshape(side * height, side * width)


def _read_mask_file(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged or hostile file the unpickler raises whatever it likes
        raise ValueError(
            f"{path} is no mask cache: it is damaged or holds more than tensors ({type(error).__name__})."
        ) from error


def _read_tile_masks(entry, name) -> dict:
    """{"masks": int[T, p, p], "coords": [(row, column), ...]} from one scale of a mask cache."""
    try:
        tiles = [torch.as_tensor(tile) for tile in entry["tile_masks"]]
        coords = [(int(row), int(column)) for row, column in entry["tile_coords"]]
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: 'tile_masks' must be arrays of labels, and 'tile_coords' pairs (row, column). Reading them gave "
            f"{reason(error)}."
        ) from error
    shapes = sorted({tuple(tile.shape) for tile in tiles})
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1]:
        raise ValueError(f"{name}: the masks of all tiles must have one shape (p, p). Got {shapes}.")
    masks = torch.stack(tiles)
    if masks.is_floating_point() or masks.is_complex():
        raise ValueError(f"{name}: labels must be integers. Got {masks.dtype}.")
    _places(coords, len(masks), name)
    return {"masks": masks, "coords": coords}


def _row_by_row(side) -> list[tuple[int, int]]:
    return [(row, column) for row in range(side) for column in range(side)]


def _places(coords, num_tiles, name) -> torch.Tensor:
    """long[T]: row-by-row index of each tile of a square. Raises `ValueError` unless each one is there once."""
    side = math.isqrt(num_tiles)
    coords = [(int(row), int(column)) for row, column in coords]
    if len(coords) != num_tiles or sorted(coords) != _row_by_row(side):
        raise ValueError(
            f"{name}: the tiles must make up a square, each (row, column) once. Got {num_tiles} tiles and "
            f"{len(coords)} coords, {len(set(coords))} of them different, from {min(coords, default=None)} to "
            f"{max(coords, default=None)}."
        )
    return torch.tensor([row * side + column for row, column in coords])


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops a sequence once one of the keywords stands in its answer (LLaVA's helper, for batches too).

    `input_ids` is not used: the prompt grows by its visual tokens, so the answer is known to begin where the first call
    finds its first token. One instance serves one call of `generate`.
    """

    def __init__(self, keywords, tokenizer, input_ids=None):
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.start = None
        # A keyword spans at most so many tokens; two more for the text around it.
        self.reach = max(len(tokenizer(keyword, add_special_tokens=False).input_ids) for keyword in self.keywords) + 2

    def __call__(self, output_ids, scores, **kwargs) -> torch.BoolTensor:
        length = output_ids.shape[1]
        if self.start is None:
            self.start = length - 1
        recent = output_ids[:, max(self.start, length - self.reach) :]
        texts = self.tokenizer.batch_decode(recent, skip_special_tokens=False)
        found = [any(keyword in text for keyword in self.keywords) for text in texts]
        return torch.tensor(found, device=output_ids.device)


def _check_scales(scales, config, name):
    if len(set(scales)) < len(scales) or not set(scales) <= set(config.scales):
        raise ValueError(f"{name} must be scales that this model has, each once: {config.scales}. Got {scales}.")


def _order_budgets(topk, scales, used, config) -> list[int]:
    """int[S] in the order of the configuration, 0 for scales that are not in `used`, from one number per scale."""
    if len(topk) != len(scales):
        raise ValueError(
            f"`multiscale_topk` needs one number per scale. Got {len(topk)} budgets {list(topk)} and {len(scales)} "
            f"scales {scales}."
        )
    budgets = {scale: int(budget) for scale, budget in zip(scales, topk) if scale in used}
    split_budgets([budgets[scale] for scale in sorted(budgets)], sorted(budgets))
    return [budgets.get(scale, 0) for scale in config.scales]


def _unpack(entry, key, name) -> tuple:
    missing = [part for part in (key, "coords") if part not in entry]
    if missing:
        raise ValueError(f"{name} has the entries {sorted(entry)}, but not {missing}.")
    return entry[key], entry["coords"]


def _read_tiles(image, scales, config) -> dict:
    """{scale: (tiles float[T, 3, tile, tile], places long[T])} of one image, for those of `scales` that it has."""
    _check_scales(list(image), config, "`multiscale_pixels`")
    read = {}
    for scale in scales:
        if scale not in image:
            continue
        name, entry, side = f"`multiscale_pixels`, scale {scale} px", image[scale], scale // config.tile_size
        tiles, coords = _unpack(entry, "tiles", name) if isinstance(entry, dict) else (entry, _row_by_row(side))
        expected = [side**2, 3, config.tile_size, config.tile_size]
        if list(tiles.shape) != expected:
            raise ValueError(f"{name}: the tiles must have the shape {expected}. Got {list(tiles.shape)}.")
        read[scale] = tiles, _places(coords, side**2, name)
    if not read:
        raise ValueError(f"An image of `multiscale_pixels` has tiles of the scales {list(image)}, none of {scales}.")
    return read


def _stack_tiles(images, config) -> torch.Tensor:
    """float[I, T, 3, tile, tile], the tiles of all scales in their places; zeros for a scale that an image lacks."""
    tile, numbers = config.tile_size, [(scale // config.tile_size) ** 2 for scale in config.scales]
    first, _ = next(iter(images[0].values()))
    pixel_values = first.new_zeros(len(images), sum(numbers), 3, tile, tile)
    for scale, part in zip(config.scales, pixel_values.split(numbers, dim=1)):
        for image_idx, image in enumerate(images):
            if scale in image:
                tiles, places = image[scale]
                part[image_idx, places.to(part.device)] = tiles.to(part)
    return pixel_values


def _shown(image, image_size, config) -> torch.Tensor:
    """bool[N], whether a patch shows the image of (width, height) pixels, PIL's order; None: no letterbox."""
    shown = []
    for scale, grid in zip(config.scales, config.grids):
        patches = torch.ones(grid, dtype=torch.bool)
        if image_size is not None:
            width, height = image_size
            patches = torch.from_numpy(shown_patches((height, width), grid))
        shown.append(patches.flatten() & (scale in image))
    return torch.cat(shown)


def _read_label_maps(masks, config) -> dict:
    """{scale: long[H, W]} from the masks of one image in any of their forms."""
    if not masks:
        return {}
    if "scales" in masks:  # a cache as it stands in its file
        masks = load_multiscale_tile_masks(masks)
    _check_scales(list(masks), config, "`multiscale_masks`")
    label_maps = {}
    for scale, entry in masks.items():
        name, side = f"`multiscale_masks`, scale {scale} px", scale // config.patch_size
        labels = join_tile_masks(*_unpack(entry, "masks", name)) if isinstance(entry, dict) else entry
        if list(labels.shape) != [side, side]:
            raise ValueError(f"{name}: the label map must be {[side, side]} tokens. Got {list(labels.shape)}.")
        label_maps[scale] = labels
    return label_maps


def _stack_label_maps(label_maps, config) -> torch.Tensor:
    """long[I, N] of all scales; 0 for a scale without a label map."""
    sizes = [height * width for height, width in config.grids]
    regions = torch.zeros(len(label_maps), sum(sizes), dtype=torch.long)
    for scale, part in zip(config.scales, regions.split(sizes, dim=1)):
        for image_idx, maps in enumerate(label_maps):
            if scale in maps:
                part[image_idx] = maps[scale].flatten()
    return regions


def translate_released_call(config, inputs, kwargs) -> tuple:
    """Ids and keyword arguments of the released `generate` or `forward` to this model's; any other call stays as it is.

    Args:
        config: the model's configuration.
        inputs: long[B, M], ids with -200 or the image token, one per image; or None.
        kwargs: keyword arguments, of which these are translated:
            multiscale_pixels: per image {scale: {"tiles": float[T, 3, tile, tile], "coords": [(row, column), ...]}}, or
                {scale: float[T, 3, tile, tile]} row by row. Scales in any order; one that an image lacks shows nothing.
            multiscale_masks: per image {scale: {"masks": int[T, p, p], "coords": [(row, column), ...]}},
                {scale: long[H, W]}, a mask cache as it stands in its file, or {} or None for no masks. Where some image
                has masks, all is background (0) that has none: plain top-k, as in the release.
            multiscale_target_sizes: the scales to use, in any order. None: those of the configuration.
            multiscale_topk: one budget per scale of `multiscale_target_sizes`; ignored where no image has tiles.
            image_sizes: (width, height) per image, for the letterbox.
            images, modalities: ignored.

    Returns:
        inputs: long[B, M], with the image token.
        kwargs: with pixel_values float[I, T, 3, tile, tile] and, where needed, pixel_attention_mask bool[I, N],
            regions long[I, N] and budgets int[S], 0 for a scale without tiles, instead.

    Raises:
        ValueError: scales, images or masks that do not fit the configuration or each other.
    """
    if inputs is not None:
        inputs = inputs.masked_fill(inputs == RELEASED_IMAGE_TOKEN, config.image_token_id)
    if not any(name in kwargs for name in RELEASED_ARGUMENTS):
        return inputs, kwargs
    kwargs = {name: value for name, value in kwargs.items() if name != "images"}
    pixels, masks, topk, target_sizes, image_sizes, _ = (kwargs.pop(name, None) for name in RELEASED_ARGUMENTS)

    scales = list(config.scales if target_sizes is None else target_sizes)
    _check_scales(scales, config, "`multiscale_target_sizes`")
    images = [_read_tiles(image, scales, config) for image in pixels or []]
    if topk is not None:
        used = [scale for scale in scales if not images or any(scale in image for image in images)]
        kwargs["budgets"] = _order_budgets(topk, scales, used, config)
    if not images:
        return inputs, kwargs

    kwargs["pixel_values"] = _stack_tiles(images, config)
    if not config.mask_padding:
        image_sizes = None
    if image_sizes is not None and len(image_sizes) != len(images):
        raise ValueError(f"`image_sizes` needs one size per image. Got {len(image_sizes)} for {len(images)} images.")
    if image_sizes is not None or any(len(image) < len(config.scales) for image in images):
        sizes = [None] * len(images) if image_sizes is None else image_sizes
        kwargs["pixel_attention_mask"] = torch.stack([_shown(*pair, config) for pair in zip(images, sizes)])
    label_maps = [_read_label_maps(mask, config) for mask in masks or []]
    if any(label_maps):
        if len(label_maps) != len(images):
            raise ValueError(
                f"`multiscale_masks` needs one entry per image, {{}} for none. Got {len(label_maps)} for {len(images)} "
                "images."
            )
        kwargs["regions"] = _stack_label_maps(label_maps, config)
    return inputs, kwargs
