"""The call of the released code, translated to this model's arguments.

The model card of the release loads these names from the module of the model class and calls `generate` with
`multiscale_*` arguments. Nothing here computes anything of its own: tiles come from the image processor, label maps
become `region_labels`, and the placeholder -200 becomes the image token.
"""

import torch
from transformers import StoppingCriteria
from transformers.utils import logging

from .configuration_uhr_bat import split_budgets
from .image_processing_uhr_bat import UHRBatImageProcessor, shown_patches


logger = logging.get_logger(__name__)

# Placeholder of the LLaVA family: no row of the vocabulary.
RELEASED_IMAGE_TOKEN = -200

# Arguments of the released `generate`. The last two say what is known anyway.
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


def split_image_to_multiscale_tiles(image, image_processor, target_sizes, tile_size=None):
    """Tiles of every scale: {scale: float[T, 3, tile, tile]}, row-major, from a PIL image of any shape.

    `image_processor` may be this repository's or CLIP's. The tile is the one that it was made for, whatever `tile_size`
    says: the released call passes 336, which is right for its own weights only.
    """
    processor = UHRBatImageProcessor.from_clip(image_processor, scales=list(target_sizes))
    tile = processor.crop_size["height"]
    if tile_size not in (None, tile):
        logger.warning_once(f"`tile_size={tile_size}` is not this image processor's: tiles of {tile} px are cut.")
    pixel_values = processor(image, return_tensors="pt")["pixel_values"][0]
    return dict(zip(target_sizes, pixel_values.split([(scale // tile) ** 2 for scale in target_sizes])))


def load_multiscale_tile_masks(path, target_sizes=None):
    """Token label maps of one image from the released mask cache: {scale: long[H, W]}, 0 = background.

    Read with weights only, so no code in the file is ever run.

    Raises:
        ValueError: a file that holds anything but such maps, or lacks a scale of `target_sizes`.
    """
    try:
        cache = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged or hostile file the unpickler raises whatever it likes
        raise ValueError(
            f"{path} is no mask cache: it is damaged or holds more than tensors ({type(error).__name__})."
        ) from error
    if not isinstance(cache, dict) or "scales" not in cache:
        raise ValueError(f"{path} is no mask cache: it has no entry 'scales'.")
    masks = _join_tile_masks(cache, path)
    missing = sorted(set(target_sizes or ()) - set(masks))
    if missing:
        raise ValueError(f"{path} has masks for the scales {sorted(masks)}, but not for {missing}.")
    return masks


def _join_tile_masks(cache, name):
    """{scale: long[H, W]} from the layout of the cache:
    {"scales": {scale: {"tile_masks": [int[P, P], ...], "tile_coords": [(row, column), ...]}}}."""
    masks = {}
    for scale, entry in cache["scales"].items():
        tiles = torch.stack([torch.as_tensor(tile) for tile in entry["tile_masks"]]).long()
        rows, columns = torch.tensor(entry["tile_coords"]).T
        side = round(len(tiles) ** 0.5)
        if side**2 != len(tiles) or len(rows) != len(tiles):
            raise ValueError(f"{name}: scale {scale} has {len(tiles)} masks and {len(rows)} places, not a square.")
        T, height, width = tiles.shape
        ordered = tiles[(rows * side + columns).argsort()].view(side, side, height, width)
        masks[int(scale)] = ordered.transpose(1, 2).reshape(side * height, side * width)
    return masks


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


def translate_released_call(config, inputs, kwargs) -> tuple:
    """`inputs` and keyword arguments of the released `generate` to this model's; any other call stays as it is.

    Args:
        config: the model's configuration.
        inputs: long[B, M], prompt ids with -200 or the image token, one per image; or None.
        kwargs: keyword arguments of `generate`.

    Raises:
        ValueError: scales, images or label maps that do not fit the configuration or each other.
    """
    if inputs is not None:
        inputs = inputs.masked_fill(inputs == RELEASED_IMAGE_TOKEN, config.image_token_id)
    if not any(name in kwargs for name in RELEASED_ARGUMENTS):
        return inputs, kwargs
    kwargs = dict(kwargs)
    released = {name: kwargs.pop(name, None) for name in RELEASED_ARGUMENTS}
    scales = config.scales if released["multiscale_target_sizes"] is None else list(released["multiscale_target_sizes"])
    if scales != config.scales:
        raise ValueError(f"This model was made for the scales {config.scales}. Got multiscale_target_sizes={scales}.")
    if released["multiscale_topk"] is not None:
        split_budgets(released["multiscale_topk"], scales)
        kwargs["budgets"] = list(released["multiscale_topk"])
    images = released["multiscale_pixels"]
    if not images:
        return inputs, kwargs
    kwargs["pixel_values"] = torch.stack([_stack_tiles(image, scales) for image in images])
    if config.mask_padding and released["image_sizes"] is not None:
        if len(released["image_sizes"]) != len(images):
            raise ValueError(
                f"`image_sizes` needs one size per image. Got {len(released['image_sizes'])} for {len(images)} images."
            )
        # PIL's order here, (width, height), as the release passes it.
        shown = [
            [torch.from_numpy(shown_patches((height, width), grid)).flatten() for grid in config.grids]
            for width, height in released["image_sizes"]
        ]
        kwargs["pixel_attention_mask"] = torch.stack([torch.cat(scales_shown) for scales_shown in shown])
    masks = released["multiscale_masks"]
    if masks is not None and (len(masks) != len(images) or any(masks)):
        if len(masks) != len(images) or not all(masks):
            raise ValueError(
                f"`multiscale_masks` needs label maps for every image or for none. Got {sum(map(bool, masks))} for "
                f"{len(images)} images."
            )
        kwargs["region_labels"] = torch.stack([_stack_labels(mask, config) for mask in masks])
    return inputs, kwargs


def _stack_tiles(image, scales):
    missing = [scale for scale in scales if scale not in image]
    if missing:
        raise ValueError(f"`multiscale_pixels` has the scales {sorted(image)}, but not {missing}.")
    return torch.cat([image[scale] for scale in scales])


def _stack_labels(masks, config):
    if "scales" in masks:  # a cache as it stands in its file
        masks = _join_tile_masks(masks, "`multiscale_masks`")
    for scale, (height, width) in zip(config.scales, config.grids):
        shape = list(masks[scale].shape) if scale in masks else None
        if shape != [height, width]:
            raise ValueError(f"The label map of scale {scale} px must be {[height, width]} tokens. Got {shape}.")
    return torch.cat([masks[scale].flatten() for scale in config.scales])
