"""A host from a folder or the Hub, in parts: image processor, tokenizer and chat template, without a whole processor, which
needs torchvision in most families. And the self-test, which turns a change of the library into an error instead of a wrong
answer."""

from dataclasses import fields
from math import isqrt

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, PreTrainedConfig
from transformers.modeling_outputs import ModelOutput

from ..token_rules_uhr_bat import CompressionRules
from .looks import look
from .modeling import HostConfig, HostModel, TileReader
from .prompts import make_processor
from .settings import FAMILIES, OLDEST, family_of, largest_side, split_changes, tile_side

# What of UHR-BAT's configuration a host may have otherwise.
CONFIG_FIELDS = {one.name for one in fields(CompressionRules)} - {"refinement"} | {
    "scales", "importance_layer", "question_tokens", "mask_padding", "max_image_pixels",
}  # fmt: skip
# The rules whose numbers were measured on made-up scenes, with the weights of UHR-BAT-Tiny.
RULES = {"selector": "distinct", "num_regions": 4, "coord_weight": 8.0}


def load_host(folder, dtype="auto", device_map=None, quantization_config=None, check=True, calibrated=None, **changes):
    """(processor, model) of a vision-language model of the library.

    Args:
        folder: model folder or name on the Hub.
        dtype, device_map, quantization_config: as in transformers.
        check: whether two tiles and a prompt are tried (`self_test`).
        calibrated: fields of [`HostSettings`] that were measured for this model, on which `changes` go.
        changes: fields of [`HostSettings`] or of UHR-BAT's configuration.

    Raises:
        ValueError: a model that cannot be a host, a setting that cannot be, or a self-test that failed.
        TypeError: a setting that there is not.
        ImportError: a release of transformers before 5.18.
    """
    folder = str(folder)
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    if version < tuple(map(int, OLDEST.split("."))):
        raise ImportError(
            f"Vision-language models of other families need transformers {OLDEST} or newer, which takes images that are "
            f"encoded already. Got {transformers.__version__}."
        )
    own, rest = split_changes(changes, CONFIG_FIELDS)
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type", "")
    family = family_of(model_type)
    settings = family.settings.changed({**(calibrated or {}), **own})
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        side, options = tile_side(config, image_processor, settings.tile)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(_not_a_host(folder, model_type, f"{type(error).__name__}: {error}")) from error
    except (OSError, ValueError, HFValidationError) as error:
        if model_type in FAMILIES:
            raise
        raise ValueError(_not_a_host(folder, model_type, error)) from error
    host = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, device_map=device_map, quantization_config=quantization_config, trust_remote_code=False
    ).eval()
    if getattr(host, "tp_size", None) or getattr(host, "_tp_size", None):
        raise ValueError(f"{folder}: under tensor parallelism a process sees its own heads alone, so it cannot look.")
    missing = [name for name in ("get_image_features", "get_decoder") if not hasattr(host, name)]
    if missing or not host._supports_mm_encoder_outputs():
        raise ValueError(_not_a_host(folder, model_type, f"it has no {', '.join([*missing, 'mm_encoder_outputs'])}"))
    try:
        return _assemble(folder, host, image_processor, side, options, settings, rest, check)
    except Exception as error:
        if model_type in FAMILIES or isinstance(error, ValueError) and "self-test" in str(error):
            raise
        raise ValueError(_not_a_host(folder, model_type, f"{type(error).__name__}: {error}")) from error


def _not_a_host(folder, model_type, reason) -> str:
    return (
        f"{folder}: a model of the type {model_type!r} could not be taken as a host ({reason}). Known families: "
        f"{', '.join(FAMILIES)}, and UHR-BAT's own."
    )


def _assemble(folder, host, image_processor, side, options, settings, changes, check):
    """(processor, model) of a host that is loaded."""
    reader = TileReader(image_processor, side, options)
    with torch.no_grad():
        _, rows = reader.encode(host, torch.full((2, 3, side, side), 127.0))
    p = isqrt(rows.shape[1])
    if side % p:
        raise ValueError(f"A tile of {side} px has {rows.shape[1]} rows, which are no square grid of whole pixels.")
    scales = changes.pop("scales", None) or [side * settings.anchor * 2**level for level in range(settings.levels)]
    text = host.config.get_text_config()
    from .looks import attention_modules

    layers = sorted(attention_modules(host.get_decoder()))
    if not layers:
        raise ValueError("its decoder has no layer of full attention to look at")
    wanted = settings.look * (text.num_hidden_layers - 1)
    made = {
        "importance_layer": min(layers, key=lambda layer: abs(layer - wanted)),
        "refinement": [settings.refinement] * (len(scales) - 1) if settings.refinement else [],
        "budgets": settings.budgets,
        **RULES, **changes,
    }  # fmt: skip
    config = HostConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": side, "patch_size": side // p},
        text_config=text, full_layers=layers, scales=scales, image_token_index=host.config.image_token_id,
        scale_embedding_additions=0, **made,
    )  # fmt: skip
    config.name_or_path = folder
    model = HostModel(host, config, reader, settings, largest_side(image_processor))
    one = reader.inputs(torch.full((1, 3, side, side), 127.0))
    processor = make_processor(folder, host.config, image_processor, settings, side, p, scales, one)
    model.write = lambda words: processor.tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if check:
        self_test(processor, model)
    return processor, model


@torch.no_grad()
def self_test(processor, model):
    """Two tiles and one prompt: everything kept against the host's plain call, and a look against eager attention.

    Raises:
        ValueError: what differs, and by how much.
    """
