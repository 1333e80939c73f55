"""A host from a folder, in parts: a whole processor needs torchvision in most families."""

from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from types import SimpleNamespace

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..image_raster_files_uhr_bat import reason
from ..token_rules_uhr_bat import CompressionRules
from .looks import full_layers
from .modeling import HostConfig, HostModel, TileReader
from .prompts import make_processor
from .settings import FAMILIES, OLDEST, HostSettings, family_of, over, rows_a_side, tile_side
from .weights import read_weights

SETTINGS = {one.name for one in fields(HostSettings)}
# What of UHR-BAT's configuration a host may have otherwise.
OTHERS = {"scales", "importance_layer", "question_tokens", "mask_padding"}
CONFIG_FIELDS = {one.name for one in fields(CompressionRules)} - SETTINGS | OTHERS
# The rules whose numbers were measured on made-up scenes, with the weights of UHR-BAT-Tiny.
RULES = {"selector": "distinct", "num_regions": 4, "coord_weight": 8.0, "anchor_share": 0.5}


def load_host(folder, dtype="auto", device_map=None, quantization_config=None, calibrated=None, make=None,
              **changes):  # fmt: skip
    """(processor, model) of a vision-language model of the library: see `common.loading.load_model`.

    `calibrated`: settings that were measured for this model, or that it was trained with, on which `changes` go. `make`: makes
    the model of its configuration, as one of shapes alone. Raises `ValueError` for a model that cannot be a host, a setting that cannot be;
    `ImportError` for a release of transformers before 5.18.
    """
    how = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    with explained(folder):
        parts = _read(str(folder), calibrated, changes)
        host = make(parts.config) if make else read_weights(AutoModelForImageTextToText, parts.folder, **how).eval()
        return _assemble(parts, host)


def check_settings(folder, calibrated=None, **changes) -> HostConfig:
    """UHR-BAT's configuration of a host, without its weights: of a family that is not in the table all but its rows. Raises as
    `load_host` for settings that cannot be."""
    with explained(folder):
        return _read(str(folder), calibrated, changes).checked


def host_processor(folder, calibrated=None, **changes):
    """The processor that [`load_host`] returns, without weights, but for those of a family that is not in the table, whose
    tower alone knows its rows. Raises as `load_host`."""
    with explained(folder):
        parts = _read(str(folder), calibrated, changes)
        if parts.config.model_type in FAMILIES:
            return make_processor(parts, parts.rows)
    return load_host(folder, calibrated=calibrated, **changes)[0]


@contextmanager
def explained(folder):
    """Says of a model of a family that is not known what it failed by. Raises `ValueError` for one that cannot be a host."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        needed = f"transformers {'.'.join(map(str, OLDEST))} or newer"
        raise ImportError(f"Models of other families need {needed}. Got {transformers.__version__}.")
    stated, _ = PreTrainedConfig.get_config_dict(str(folder))
    model_type = stated.get("model_type", "")
    family_of(model_type)
    if "auto_map" in stated and model_type not in CONFIG_MAPPING:
        mend = "Load the repository of this model whose name ends in -hf, as OpenGVLab/InternVL3-8B-hf."
        raise ValueError(f"{folder}: its code is its repository's own and takes no encoded images. {mend}")
    try:
        yield
    except Exception as error:  # of files that do not fit the library raises whatever it likes
        if model_type in FAMILIES:
            if isinstance(error, (ValueError, OSError, ImportError)):
                raise
            raise ValueError(f"{folder}: this model cannot be read ({reason(error)}).") from error
        blind = model_type in CONFIG_MAPPING and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        why = "it answers no questions about images" if blind else f"{type(error).__name__}: {error}"
        known = f"Known families: {', '.join(FAMILIES)}, and UHR-BAT's own."
        raise ValueError(f"{folder}: a model of the type {model_type!r} could not be taken ({why}). {known}") from error


def _read(folder, calibrated, changes) -> SimpleNamespace:
    """What is known of a host before its weights are read. `rules` are of UHR-BAT's configuration."""
    given = over(calibrated or {}, changes)
    if unknown := sorted(set(given) - SETTINGS - CONFIG_FIELDS):
        known = f"{', '.join(sorted(SETTINGS))}, and of UHR-BAT's configuration {', '.join(sorted(CONFIG_FIELDS))}"
        raise ValueError(f"A host has no setting {', '.join(unknown)}. It has {known}.")
    # Left out, the library asks on a terminal whether to run a class that the folder brings along.
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    own = {name: value for name, value in given.items() if name in SETTINGS}
    settings = family_of(config.model_type).settings.changed(own)
    half = config.get_text_config().max_position_embeddings // 2
    settings = settings if "budgets" in own else settings.changed({"budgets": min(settings.budgets, half)})
    side, options = tile_side(config, image_processor, settings.tile)
    rules = RULES | {name: value for name, value in given.items() if name not in SETTINGS}
    scales = rules.get("scales", [side * settings.anchor * 2**n for n in range(settings.levels)])
    reader = TileReader(image_processor, side, options)
    parts = SimpleNamespace(folder=folder, config=config, reader=reader, settings=settings, scales=scales, rules=rules)
    parts.default_share = "anchor_share" not in changes
    # Those of a family that is not in the table are its tower's to say.
    parts.rows = rows_a_side(config, side) if config.model_type in FAMILIES else 1
    parts.checked = _configure(parts, parts.rows)  # settings are refused before weights are read
    return parts


def _configure(parts, p: int) -> HostConfig:
    """UHR-BAT's configuration of a host whose tiles have p rows a side. Raises `ValueError` for a setting that cannot be."""
    text, settings, side, scales = parts.config.get_text_config(), parts.settings, parts.reader.side, parts.scales
    layers = full_layers(text)
    if not layers:
        raise ValueError(f"{parts.folder}: the decoder has no layer of full attention to look at.")
    if not isinstance(scales, list | tuple):
        raise ValueError(f"`scales` are sides of levels in pixels, as [448, 896]. Got {scales!r}.")
    wanted = settings.look * (text.num_hidden_layers - 1)
    importance_layer = min(layers, key=lambda layer: abs(layer - wanted))
    try:
        config = HostConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": side, "patch_size": side // p},
            text_config=copy(text),
            budgets=settings.budgets,
            image_token_index=parts.config.image_token_id,
            scale_embedding_additions=0,
            refinement=[settings.refinement] * (len(scales) - 1) if settings.refinement else [],
            **{"importance_layer": importance_layer, **parts.rules, "scales": scales},
        )
    except StrictDataclassError as error:
        why = str(error.__cause__ or error)
        raise ValueError(f"{parts.folder}: this model cannot be read with these settings ({why}).") from None
    config.name_or_path, config.anchor_share_by_default = parts.folder, parts.default_share
    return config


def _assemble(parts, host):
    """(processor, model)"""
    folder, reader, settings = parts.folder, parts.reader, parts.settings
    if getattr(host, "_tp_size", None):
        raise ValueError(f"{folder}: under tensor parallelism a process sees its own heads alone, so it cannot look.")
    if not host._supports_mm_encoder_outputs():
        raise ValueError(f"{folder}: {type(host).__name__} takes no images that are encoded already.")
    p = reader.measure(host)
    model, processor = HostModel(host, _configure(parts, p), reader, settings), make_processor(parts, p)
    model.vision_chunk_size, model.processor = family_of(host.config.model_type).chunk, processor
    return processor, model
