"""Which parts of the model are trained: whole parts, a LoRA adapter of the decoder, on weights of four bits or not."""

import re
from pathlib import Path

from transformers import AutoConfig
from transformers.utils import logging

from ..common.extras import require
from ..common.loading import attach_adapter, is_host
from ..common.models import base_of, hub_name

logger = logging.get_logger(__name__)

# The decoder alone: what an adapter changes there, the importance pass (eq. 2) reads too.
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
# What stands before the decoder and is trained with it.
VISUAL_PARTS = ("vision_tower", "multi_modal_projector", "scale_embedding", "token_mlp")
# The same of models of other families.
HOST_PARTS = ("visual", "vision_model", "connector", "embed_vision")


def is_visual(name: str, parts=VISUAL_PARTS + HOST_PARTS) -> bool:
    """Whether a parameter of this name stands before the decoder, or in one of these parts of it."""
    return any(f"{part}." in name for part in parts)


def check_host(options):
    """Raises `ValueError` for [`ModelOptions`] by which no model of another family is trained. Its settings become those of
    batches, which hold whole images."""
    if not options.use_peft:
        raise ValueError("A model of another family is trained by an adapter alone: `use_peft: true`.")
    options.model_settings = {"max_tiles": None} | (options.model_settings or {})


def decoder_name(model) -> str:
    """Of the decoder among a model's modules."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def outside_decoder(model) -> list[str]:
    """Names of the modules of a model that are neither in its decoder nor around it."""
    own = decoder_name(model)
    around = ["", *(own[:idx] for idx, letter in enumerate(own) if letter == ".")]
    names = [name for name, _ in model.named_modules() if name and name.rpartition(".")[0] in around]
    return [name for name in names if name not in (*around, own)]


def freeze_parts(model, names: list[str]):
    """Train all but these parts of a [`UHRBatForConditionalGeneration`], and what no forward pass reads.

    Raises:
        ValueError: a name that no part has.
    """
    parts = {**dict(model.model.named_children()), "lm_head": model.lm_head}
    if unknown := sorted(set(names) - set(parts)):
        raise ValueError(f"`freeze`: there is no part {', '.join(unknown)}. There are: {', '.join(parts)}.")
    model.requires_grad_(True)
    for name in names:
        parts[name].requires_grad_(False)
    model.model.vision_tower.freeze_unread_layers()
    if model.model.pointer is not None:  # which answers do not train
        model.model.pointer.requires_grad_(False)


def unread_modules(model) -> list[str]:
    """Names of the modules behind the tower's feature layer, which no token comes through."""
    unread = {id(module) for layer in model.model.vision_tower.unread_layers for module in layer.modules()}
    return [name for name, module in model.named_modules() if id(module) in unread]


def add_adapter(model, options):
    """A peft model with the LoRA adapter of [`ModelOptions`]; nothing else of the model is trained.

    What the tower's unread layers hold never gets an adapter, whatever the expression says.

    Args:
        model: [`UHRBatForConditionalGeneration`], or a host, whose decoder has a name of its own.

    Raises:
        ImportError: peft is missing.
        ValueError: the expression finds no layer.
    """
    require("train", "peft")
    from peft import LoraConfig, get_peft_model

    ours, targets = model.config.model_type == "uhr_bat", options.lora_target_modules
    if not ours and targets == LORA_TARGETS:
        targets = LORA_TARGETS.replace(".*language_model", re.escape(decoder_name(model)))
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        target_modules=targets,
        exclude_modules="|".join(map(re.escape, unread_modules(model))) if ours else None,
        modules_to_save=options.lora_modules_to_save,
        task_type="CAUSAL_LM",
    )
    return _name_base(get_peft_model(model, config))


def continue_adapter(model, folder):
    """A peft model that goes on training the adapter of a folder, whose rank, layers and whole parts stay what they are.

    Raises:
        ImportError: peft is missing.
        ValueError: the adapter does not fit the model.
    """
    adapted = attach_adapter(model, folder, is_trainable=True)
    config = adapted.active_peft_config
    logger.warning(
        f"The run goes on from the adapter {folder}, with its rank {config.r} and alpha {config.lora_alpha}: options of a "
        "new one (`lora_r`, `lora_target_modules` and so on) are not read."
    )
    return _name_base(adapted)


def _name_base(adapted):
    """The adapter names the folder of its model in full, as it is read from other places; or its name and revision on the
    Hub."""
    base, config = Path(adapted.get_base_model().name_or_path), adapted.active_peft_config
    config.base_model_name_or_path, config.revision = hub_name(base) or (str(base.resolve()), None)
    return adapted


def quantization(options):
    """`quantization_config` of four bits for the decoder's linear layers, nothing before them; None without.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: no adapter is trained on them.
    """
    if not options.load_in_4bit:
        return None
    if not options.use_peft:
        raise ValueError("`load_in_4bit`: weights of four bits cannot be trained, only an adapter (`use_peft: true`).")
    import torch

    place = base_of(options.model_name_or_path) or options.model_name_or_path
    if not is_host(place):
        return quantize_decoder(4, torch.bfloat16)
    from ..planning.counting import shapes_of

    return quantize_decoder(4, torch.bfloat16, outside_decoder(shapes_of(AutoConfig.from_pretrained(place))))


def quantize_decoder(bits: int, compute_dtype, left=None):
    """`quantization_config` for `from_pretrained`: the decoder's linear layers in 8 or 4 bits (NF4), nothing before them and not
    the head. The importance pass reads the same layers, and calls them as the decoder does.

    Args:
        compute_dtype: of the products of four bits.
        left: names of the modules that stay as they are; ours if None.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    require("qlora", "bitsandbytes")
    from transformers import BitsAndBytesConfig

    left = {"llm_int8_skip_modules": left or [*(f"model.{part}" for part in VISUAL_PARTS), "lm_head"]}
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        **left,
    )
