"""A host from a folder or the Hub, in parts: image processor, tokenizer and chat template, without a whole processor, which
needs torchvision in most families. And the self-test, which turns a change of the library into an error instead of a wrong
answer."""

from copy import copy, deepcopy
from dataclasses import fields
from math import isqrt
from typing import NamedTuple

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, PreTrainedConfig

from ..modeling_outputs_uhr_bat import Places
from ..token_rules_uhr_bat import CompressionRules
from .looks import attention_modules, look
from .modeling import HostConfig, HostModel, TileReader
from .prompts import make_processor
from .settings import FAMILIES, OLDEST, HostSettings, family_of, largest_side, rows_a_side, split_changes, tile_side

# What of UHR-BAT's configuration a host may have otherwise.
CONFIG_FIELDS = {one.name for one in fields(CompressionRules)} - {"refinement"} | {
    "scales", "importance_layer", "question_tokens", "mask_padding",
}  # fmt: skip
# The rules whose numbers were measured on made-up scenes, with the weights of UHR-BAT-Tiny.
RULES = {"selector": "distinct", "num_regions": 4, "coord_weight": 8.0}


def load_host(
    folder, dtype="auto", device_map=None, quantization_config=None, check=True, calibrated=None, weights=True, **changes
):
    """(processor, model) of a vision-language model of the library.

    Args:
        folder: model folder or name on the Hub.
        dtype, device_map, quantization_config: as in transformers.
        check: whether two tiles and a prompt are tried (`self_test`).
        weights: whether weights are read; else the model is one of shapes, on the meta device, for plans.
        calibrated: fields of [`HostSettings`] that were measured for this model, on which `changes` go.
        changes: fields of [`HostSettings`] or of UHR-BAT's configuration.

    Raises:
        ValueError: a model that cannot be a host, a setting that cannot be or that there is not, or a self-test that failed.
        ImportError: a release of transformers before 5.18.
    """
    parts = _read(folder, calibrated, changes)
    model_type = parts.config.model_type
    if weights:
        options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
        host = AutoModelForImageTextToText.from_pretrained(parts.folder, **options, trust_remote_code=False).eval()
    else:
        host = shapes_of(parts.config, dtype)
    if getattr(host, "tp_size", None) or getattr(host, "_tp_size", None):
        raise ValueError(f"{folder}: under tensor parallelism a process sees its own heads alone, so it cannot look.")
    missing = [name for name in ("get_image_features", "get_decoder") if not hasattr(host, name)]
    if missing or not host._supports_mm_encoder_outputs():
        raise ValueError(_not_a_host(folder, model_type, f"it has no {', '.join([*missing, 'mm_encoder_outputs'])}"))
    try:
        return _assemble(host, parts, check)
    except Exception as error:
        if model_type in FAMILIES or isinstance(error, ValueError) and "self-test" in str(error):
            raise
        raise ValueError(_not_a_host(folder, model_type, f"{type(error).__name__}: {error}")) from error


def host_processor(folder, calibrated=None, **changes):
    """The processor that [`load_host`] returns, without weights: images are opened and cut before these are read. In a family
    that is not in the table, the tower alone knows its rows, and weights are read.

    Args and raises: see there.
    """
    parts = _read(folder, calibrated, changes)
    p = rows_a_side(parts.config, parts.side)
    return load_host(folder, check=False, calibrated=calibrated, **changes)[0] if p is None else _processor(parts, p)


class _Parts(NamedTuple):
    """What is known of a host before its weights are read. `changes`: of UHR-BAT's configuration."""

    folder: str
    config: PreTrainedConfig
    reader: TileReader
    settings: HostSettings
    scales: list[int]
    changes: dict

    @property
    def side(self) -> int:
        return self.reader.side


def _read(folder, calibrated, changes) -> _Parts:
    """Raises as [`load_host`]."""
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
    scales = rest.pop("scales", None) or [side * settings.anchor * 2**level for level in range(settings.levels)]
    return _Parts(folder, config, TileReader(image_processor, side, options), settings, scales, rest)


def _processor(parts, p):
    one = parts.reader.inputs(torch.full((1, 3, parts.side, parts.side), 127.0))
    reads = parts.folder, parts.config, parts.reader.image_processor
    return make_processor(*reads, parts.settings, parts.side, p, parts.scales, one)


def shapes_of(config, dtype="auto"):
    """A model of the library as its configuration has it, on the meta device; not quantised, whatever its weights are."""
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None  # as where no kernel was asked for
    dtype = config.dtype or torch.float32 if dtype == "auto" else dtype
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def _not_a_host(folder, model_type, reason) -> str:
    return (
        f"{folder}: a model of the type {model_type!r} could not be taken as a host ({reason}). Known families: "
        f"{', '.join(FAMILIES)}, and UHR-BAT's own."
    )


def _assemble(host, parts, check):
    """(processor, model) of a host that is loaded."""
    folder, _, reader, settings, scales, changes = parts
    side = parts.side
    with torch.no_grad():
        _, rows = reader.encode(host, torch.full((2, 3, side, side), 127.0))
    p = isqrt(rows.shape[1])
    if side % p:
        raise ValueError(f"A tile of {side} px has {rows.shape[1]} rows, which are no square grid of whole pixels.")
    text = host.config.get_text_config()
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
        text_config=copy(text), full_layers=layers, scales=scales, image_token_index=host.config.image_token_id,
        scale_embedding_additions=0, **made,
    )  # fmt: skip
    config.name_or_path = folder
    model = HostModel(host, config, reader, settings, largest_side(reader.image_processor))
    model.vision_chunk_size = family_of(host.config.model_type).chunk
    processor = _processor(parts, p)
    model.write = lambda words: processor.tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"][
        0
    ]
    if check:
        self_test(processor, model)
    return processor, model


@torch.no_grad()
def self_test(processor, model):
    """Two tiles and one prompt: everything kept against the host's plain call, and a look against eager attention.

    Raises:
        ValueError: what differs, and by how much.
    """
    device, p, side = model.device, model.patches_per_side, model.tile_size
    tiles = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0)).float()
    rows = model.project_tiles(tiles)
    _compare("a tile that is encoded with another", rows[1], model.project_tiles(tiles[1:])[0])

    prompts, token = processor.prompts, processor.image_token
    text = prompts.before + token + prompts.after + "What is this?"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"][0].to(device)
    spot = model.find_placeholders(ids).nonzero()[:, 0].tolist()
    if len(spot) != 1:
        raise ValueError(
            f"The self-test found {len(spot)} image tokens {token!r} in a prompt that was written with one."
        )
    places = [Places(torch.arange(p * p), (p, p), 0)]
    _, start, _, inputs = model.prompt_with(ids, spot, rows[0], places)

    # The plain call, with what stands behind a tile in some families out of sight.
    whole = model.reader.encode(model.host, tiles[:1])[1].shape[1]
    plain_ids = torch.cat((ids[:start], ids.new_full((whole,), model.image_token_id), ids[start + 1 :]))[None]
    mask = torch.ones_like(plain_ids)
    mask[:, start + p * p : start + whole] = 0
    plain = {"input_ids": plain_ids, "attention_mask": mask}
    plain |= {name: model.find_placeholders(plain_ids).long() for name in model.type_names}
    if whole > p * p:
        plain["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    plain |= {key: value for key, value in model.reader.inputs(tiles[:1]).items() if key in model.taken}
    plain = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in plain.items()}
    kept = model.host(**inputs).logits[0, -1]
    _compare("an image of one tile that is kept whole", kept, model.host(**plain).logits[0, -1])

    base, decoder = model.host.base_model, model.host.get_decoder()
    attention, own = model.attention[model.config.importance_layer], decoder.config._attn_implementation
    seen = look(base, attention, start + p * p, **inputs)
    decoder.set_attn_implementation("eager")
    try:
        _compare("a look", seen, look(base, attention, start + p * p, weights=True, **inputs))
    finally:
        decoder.set_attn_implementation(own)


def _compare(what, got, expected):
    allowed = expected.float().abs().max().item() * torch.finfo(expected.dtype).eps ** 0.5
    difference = (got.float() - expected.float()).abs().max().item()
    if not difference <= allowed:
        raise ValueError(
            f"The self-test of this model failed: {what} differs from the library's own by {difference:.1e}, and {allowed:.1e} "
            "would be rounding. This release of transformers is not fit for it; `check=False` loads it all the same."
        )
