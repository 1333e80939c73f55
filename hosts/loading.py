"""A host from a folder, in parts: a whole processor needs torchvision in most families. And the self-test, which turns a change
of the library into an error instead of a wrong answer."""

from contextlib import contextmanager
from copy import copy
from dataclasses import fields
from types import SimpleNamespace

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..modeling_outputs_uhr_bat import Places
from ..token_rules_uhr_bat import CompressionRules
from .looks import attention_modules, look
from .modeling import HostConfig, HostModel, TileReader
from .prompts import make_processor
from .settings import FAMILIES, OLDEST, HostSettings, family_of, rows_a_side, tile_side

SETTINGS = {one.name for one in fields(HostSettings)}
# What of UHR-BAT's configuration a host may have otherwise.
OTHERS = {"scales", "importance_layer", "question_tokens", "mask_padding"}
CONFIG_FIELDS = {one.name for one in fields(CompressionRules)} - SETTINGS | OTHERS
# The rules whose numbers were measured on made-up scenes, with the weights of UHR-BAT-Tiny.
RULES = {"selector": "distinct", "num_regions": 4, "coord_weight": 8.0}


def load_host(folder, dtype="auto", device_map=None, quantization_config=None, check=True, calibrated=None, make=None,
              **changes):  # fmt: skip
    """(processor, model) of a vision-language model of the library: see `common.loading.load_model`.

    Args:
        calibrated: fields of [`HostSettings`] that were measured for this model, on which `changes` go.
        make: makes the model of its configuration, as one of shapes alone, in place of reading weights.

    Raises `ValueError` for a model that cannot be a host, a setting that cannot be or that there is not, and a self-test that
    failed; `ImportError` for a release of transformers before 5.18.
    """
    how = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    with _explained(folder):
        parts = _read(str(folder), calibrated, changes)
        host = make(parts.config) if make else AutoModelForImageTextToText.from_pretrained(parts.folder, **how).eval()
        made = _assemble(parts, host)
        if check:
            self_test(*made)
    return made


def host_processor(folder, calibrated=None, **changes):
    """The processor that [`load_host`] returns, without weights: images are opened and cut before these are read. In a family
    that is not in the table, the tower alone knows its rows, and weights are read. Raises as `load_host`."""
    with _explained(folder):
        parts = _read(str(folder), calibrated, changes)
        if parts.config.model_type in FAMILIES:
            return make_processor(parts, rows_a_side(parts.config, parts.reader.side))
    return load_host(folder, check=False, calibrated=calibrated, **changes)[0]


@contextmanager
def _explained(folder):
    """Says of a model of a family that is not known what it failed by. Raises `ValueError` for one that cannot be a host."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise ImportError(
            f"Models of other families need transformers {'.'.join(map(str, OLDEST))} or newer, which takes images that are "
            f"encoded already. Got {transformers.__version__}."
        )
    stated, _ = PreTrainedConfig.get_config_dict(str(folder))
    model_type = stated.get("model_type", "")
    family_of(model_type)
    if "auto_map" in stated and model_type not in CONFIG_MAPPING:
        mend = "Load the repository of this model whose name ends in -hf, as OpenGVLab/InternVL3-8B-hf."
        raise ValueError(f"{folder}: its code is its repository's own and takes no encoded images. {mend}")
    try:
        yield
    except Exception as error:
        if model_type in FAMILIES:
            raise
        blind = model_type in CONFIG_MAPPING and model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        why = "it answers no questions about images" if blind else f"{type(error).__name__}: {error}"
        known = f"Known families: {', '.join(FAMILIES)}, and UHR-BAT's own."
        raise ValueError(f"{folder}: a model of the type {model_type!r} could not be taken ({why}). {known}") from error


def _read(folder, calibrated, changes) -> SimpleNamespace:
    """What is known of a host before its weights are read. `changes` that are left are of UHR-BAT's configuration."""
    if unknown := sorted(set(changes) - SETTINGS - CONFIG_FIELDS):
        known = f"{', '.join(sorted(SETTINGS))}, and of UHR-BAT's configuration {', '.join(sorted(CONFIG_FIELDS))}"
        raise ValueError(f"A host has no setting {', '.join(unknown)}. It has {known}.")
    image_processor, config = AutoImageProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    own = {**(calibrated or {}), **{name: value for name, value in changes.items() if name in SETTINGS}}
    settings = family_of(config.model_type).settings.changed(own)
    half = config.get_text_config().max_position_embeddings // 2
    settings = settings if "budgets" in own else settings.changed({"budgets": min(settings.budgets, half)})
    side, options = tile_side(config, image_processor, settings.tile)
    rest = {name: value for name, value in changes.items() if name not in SETTINGS}
    scales = rest.pop("scales", None) or [side * settings.anchor * 2**level for level in range(settings.levels)]
    reader = TileReader(image_processor, side, options)
    return SimpleNamespace(folder=folder, config=config, reader=reader, settings=settings, scales=scales, changes=rest)


def _assemble(parts, host):
    """(processor, model)"""
    folder, reader, settings = parts.folder, parts.reader, parts.settings
    if getattr(host, "_tp_size", None):
        raise ValueError(f"{folder}: under tensor parallelism a process sees its own heads alone, so it cannot look.")
    if not host._supports_mm_encoder_outputs():
        raise ValueError(f"{folder}: {type(host).__name__} takes no images that are encoded already.")
    p = reader.measure(host)
    text, layers = host.config.get_text_config(), sorted(attention_modules(host.get_decoder()))
    if not layers:
        raise ValueError(f"{folder}: the decoder has no layer of full attention to look at.")
    wanted = settings.look * (text.num_hidden_layers - 1)
    config = HostConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": reader.side, "patch_size": reader.side // p},
        text_config=copy(text),
        scales=parts.scales,
        budgets=settings.budgets,
        image_token_index=host.config.image_token_id,
        scale_embedding_additions=0,
        refinement=[settings.refinement] * (len(parts.scales) - 1) if settings.refinement else [],
        **{"importance_layer": min(layers, key=lambda layer: abs(layer - wanted)), **RULES, **parts.changes},
    )
    config.name_or_path = folder
    model, processor = HostModel(host, config, reader, settings), make_processor(parts, p)
    model.vision_chunk_size, model.tokenizer = family_of(host.config.model_type).chunk, processor.tokenizer
    return processor, model


@torch.no_grad()
def self_test(processor, model):
    """Two tiles and one prompt: the order of rows, everything kept against the host's plain call, and a look against eager
    attention. Raises `ValueError` with what differs, and by how much."""
    p, side, prompts = model.patches_per_side, model.tile_size, processor.prompts
    tiles = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0)).float()
    rows = model.project_tiles(tiles)
    _compare(model, "a tile that is encoded with another", rows[1], model.project_tiles(tiles[1:])[0])
    if model.family_name not in FAMILIES:
        _check_order(model, tiles[0], rows[0])

    text = prompts.before + processor.image_token + prompts.after + "What is this?"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"][0].to(model.device)
    spots = model.find_placeholders(ids).nonzero()[:, 0].tolist()
    if len(spots) != 1:
        raise ValueError(f"The self-test found {len(spots)} image tokens in the prompt {text!r}, which has one.")
    _, start, _, inputs = model.prompt_with(ids, spots, rows[0], [Places(torch.arange(p * p), (p, p), 0)])
    kept, attention = model.host(**inputs).logits[0, -1], model.attention_of(model.config.importance_layer)

    # The plain call, with what stands behind a tile in some families out of sight.
    whole = model.reader.encode(model.host, tiles[:1].to(model.device))[1].shape[1]
    plain_ids = torch.cat((ids[:start], ids.new_full((whole,), model.image_token_id), ids[start + 1 :]))[None]
    mask = torch.ones_like(plain_ids)
    mask[:, start + p * p : start + whole] = 0
    plain = model.reader.inputs(tiles[:1], model.device)
    plain |= {name: model.find_placeholders(plain_ids).long() for name in model.type_names}
    plain |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if whole > p * p else {}
    plain = {name: value for name, value in plain.items() if name in model.taken}
    plain = model.host(input_ids=plain_ids, attention_mask=mask, **plain).logits[0, -1]
    _compare(model, "an image of one tile that is kept whole", kept, plain)

    base, decoder, begin = model.host.base_model, model.host.get_decoder(), start + p * p
    own, seen = decoder.config._attn_implementation, look(base, attention, begin, **inputs)
    decoder.set_attn_implementation("eager")
    try:
        _compare(model, "a look", seen, look(base, attention, begin, weights=True, **inputs))
    finally:
        decoder.set_attn_implementation(own)


def _check_order(model, tile, rows):
    """Raises `ValueError` where a tile's rows are not its cells, line by line: for a family of which nothing is known. The test
    asks for a tower whose rows show most of what lies in them, as a trained one's do."""
    p, side = model.patches_per_side, model.tile_size
    # Odd lines of cells, or those of one half, in negative: it is their rows that change most, in each layer's columns.
    cells = torch.arange(side) * p // side
    lines = torch.stack((cells % 2 == 1, cells % 2 == 0, 2 * cells >= p, 2 * cells < p))
    negative = torch.cat((lines[:, None].expand(4, side, side), lines[:, :, None].expand(4, side, side)))
    drawn = torch.where(negative[:, None], 255 - tile, tile)
    changed = model._project_in_chunks(drawn, torch.arange(8), desc="Self-test") - rows
    changed = changed.float().unflatten(2, (model.reader.num_layers, -1)).norm(dim=-1).cpu()
    fits = (changed[::2] > changed[1::2]) == negative[::2, :: side // p, :: side // p].reshape(4, p * p, 1)
    if fits.float().mean(1).min() < 0.75:
        raise ValueError(f"The self-test of {model.family_name} failed: a tile's rows are not its cells, line by line.")


def _compare(model, what, got, expected):
    allowed = expected.float().abs().max().item() * torch.finfo(model.dtype).eps ** 0.5
    difference = (got.float() - expected.float()).abs().max().item()
    if not difference <= allowed:
        raise ValueError(
            f"The self-test of {model.family_name} failed: {what} differs from the library's own by {difference:.1e}, where "
            f"{allowed:.1e} is rounding. This transformers is not fit for it; `check=False` loads it all the same."
        )
