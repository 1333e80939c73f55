"""One way to load a model folder or an adapter's, and one to save it."""

import json
import warnings
from functools import partial
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from ..budgets_uhr_bat import is_one_budget, split_budgets
from ..hosts.settings import SETTINGS_FILE, HostSettings, over, write_settings
from ..image_raster_files_uhr_bat import reason
from .extras import require
from .images import is_file_name
from .measured import measured_settings
from .models import ROOT, base_of, find_model, with_weights

# Of UHR-BAT-Tiny. The README says the same; change both when the weights change.
WEIGHTS_NOTE = (
    "These weights were trained on made-up scenes only: most answers about those are right, none about a real image is to "
    "be trusted."
)
PROCESSOR_FILE = "processor_config.json"
SHARED = {"budgets", "scales", "mask_padding"}  # settings that a processor of this package has, too


def load_config(folder=ROOT, **changes):
    """Configuration of a model of this package; of an adapter of one, with the settings that it was trained with. `changes`: other
    values of its fields. Raises `ValueError` for one that there is not."""
    from ..configuration_uhr_bat import UHRBatConfig

    folder = find_model(folder, weights=False)
    base = base_of(folder)
    # The library takes other names in silence.
    if unknown := sorted(changes.keys() - _own_fields()):
        place = (base or folder) / "config.json"
        raise ValueError(f"UHR-BAT has no setting {', '.join(unknown)}. Its settings are the fields of {place}.")
    trained = {} if base is None else trained_settings(folder)
    try:
        return UHRBatConfig.from_pretrained(base or folder, **over(trained, changes))
    except StrictDataclassError as error:  # which is none of Python's kinds
        why = f"With the settings that {folder} was trained with: " if trained else ""
        raise ValueError(f"{why}{error.__cause__ or error}") from error


def _own_fields() -> set[str]:
    """Settings of a model of this package. The towers are those of the weights."""
    from ..configuration_uhr_bat import UHRBatConfig

    return UHRBatConfig.__annotations__.keys() - UHRBatConfig.sub_configs.keys()


def selector_of(folder=ROOT, **changes) -> str:
    """The rule by which a model chooses its tokens, if it is not told another. `changes`: of `load_model`."""
    base = base_of(folder)
    if is_host(base or folder):
        from ..hosts.loading import RULES

        return (RULES | host_settings(folder, base) | changes)["selector"]
    return load_config(folder, **changes).selector


def load_processor(folder=ROOT, changes=None, **settings):
    """Processor of a model, or the one beside an adapter; an adapter that has none has its model's.

    Args:
        changes: of [`load_model`]; the processor has the same budgets, scales and padding.
        settings: of `UHRBatProcessor`.
    """
    from ..processing_uhr_bat import UHRBatProcessor

    folder = find_model(folder, weights=False)
    base = base_of(folder)
    if is_host(base or folder):
        from ..hosts.loading import host_processor

        budgets = {"budgets": settings["default_budgets"]} if "default_budgets" in settings else {}
        return host_processor(base or folder, host_settings(folder, base), **{**(changes or {}), **budgets})
    config = load_config(folder, **(changes or {}))  # which refuses what there is not
    budgets = settings.pop("default_budgets", None)
    if base is None:
        processor = UHRBatProcessor.from_pretrained(folder, **settings)
    else:
        # The configuration is the model's, and says which class the tokenizer is of.
        beside = (folder / "tokenizer_config.json").is_file() and (folder / PROCESSOR_FILE).is_file()
        processor = UHRBatProcessor.from_pretrained(folder if beside else base, config=config, **settings)
    shared = SHARED & {*(changes or {}), *(trained_settings(folder) if base else {})}
    for name in shared - {"budgets"}:
        setattr(processor.image_processor, name, getattr(config, name))
    if budgets is None and "budgets" in shared:
        budgets = config.budgets
    if budgets is not None:
        split_budgets(budgets, processor.image_processor.scales)
        processor.default_budgets = budgets if is_one_budget(budgets) else list(budgets)
    return processor


def attach_adapter(model, folder, name="default", **options):
    """A peft model: `model` with the adapter of a folder, live, nothing merged.

    Args:
        model: the adapter's base; a peft model gets one more.
        name: of the adapter in the model.
        options: of `PeftModel.from_pretrained`, as `is_trainable=True`.

    Raises:
        ImportError: peft is missing.
        ValueError: the adapter lacks a part, or does not fit the model.
    """
    require("train", "peft")
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict

    folder = with_weights(Path(folder))
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder}: an adapter without weights, there is no adapter_model.safetensors in it. Pickles are not opened."
        )
    try:
        with warnings.catch_warnings():
            # A part that the adapter lacks would be as if it were not trained.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, **options)
            else:
                model = PeftModel.from_pretrained(model, str(folder), name, **options)
            # What it has too much of, peft drops in silence.
            found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), name)
    except Exception as error:  # of a wrong adapter peft raises whatever it likes
        raise ValueError(f"{folder}: the adapter does not fit ({reason(error)}).") from error
    if found.unexpected_keys:
        raise ValueError(
            f"{folder}: the adapter is of another model: {len(found.unexpected_keys)} of its tensors have no place, as "
            f"{found.unexpected_keys[0]}."
        )
    return model


def load_model(folder=ROOT, dtype="auto", device_map="auto", quantization_config=None, check=True, **changes):
    """Processor and model of a folder: of the classes of this package, or a vision-language model of another family behind
    the same calls (`hosts/`).

    Args:
        folder: model folder, or its name on the Hub; UHR-BAT-Tiny where none is given; or either of a LoRA adapter: the model
            that it was trained on is loaded with it, and nothing is merged, so that weights of 4 or 8 bits take one too.
        dtype: torch.dtype of the weights; "auto" takes that of the folder.
        device_map: as in transformers; "auto" is the GPU where there is one, None the CPU.
        quantization_config: as in transformers; None for weights as they are.
        check: whether a model of another family is tried first (`common.self_test`).
        changes: other values for fields of the configuration, as `selector`, or of `hosts.settings.HostSettings`.

    Raises:
        FileNotFoundError, ValueError: no model is there, or not all of it; an adapter whose model is nowhere, or that does not
            fit it; a model of another family that cannot be asked, with what it lacks.
        ImportError: an adapter, but peft is missing.
    """
    folder = find_model(folder)
    base = base_of(folder)
    if is_host(base or folder):
        return _load_host(folder, base, dtype, device_map, quantization_config, check, changes)
    if base is None:
        return _load(folder, load_processor(folder, changes), dtype, device_map, quantization_config, changes)
    require("train", "peft")
    processor, changes = load_processor(folder, changes), over(trained_settings(folder), changes)
    changes = {"budgets": processor.default_budgets} | changes
    _, model = _load(base, processor, dtype, device_map, quantization_config, changes)
    adapted = keep_settings(attach_adapter(model, folder), changes)
    # The model itself, so that all that calls one finds its methods; what it saves is the adapter.
    model = adapted.get_base_model()
    model.save_pretrained, model.push_to_hub = adapted.save_pretrained, adapted.push_to_hub
    return processor, model


def is_host(folder) -> bool:
    """Whether a model folder is of another family than ours; of an adapter, ask for its base."""
    from transformers import PreTrainedConfig

    try:
        model_type = PreTrainedConfig.get_config_dict(str(folder))[0].get("model_type")
    except (OSError, ValueError):  # whoever loads the model says what is wrong with it
        return False
    # The authors' checkpoints have another name, and are converted.
    return model_type not in (None, "uhr_bat", "llava_qwen")


def _load_host(folder, base, dtype, device_map, quantization_config, check, changes):
    """Processor and model of another family, with an adapter of it where `folder` is one."""
    import torch

    from ..hosts.loading import explained, load_host
    from .self_test import self_test

    if device_map == "auto" and not torch.cuda.is_available():
        device_map = None
    calibrated, folder_of_host = host_settings(folder, base), with_weights(base or folder)
    processor, model = load_host(folder_of_host, dtype, device_map, quantization_config, calibrated, **changes)
    if check:
        with explained(folder_of_host):
            self_test(processor, model)
    if base is not None:
        require("train", "peft")
        adapted = attach_adapter(model.host, folder)
        model.host.save_pretrained, model.host.push_to_hub = adapted.save_pretrained, adapted.push_to_hub
    return processor, model


def trained_settings(folder, of_host: bool = False) -> dict:
    """Settings that an adapter, or a model of another family, was trained with, which stand beside it; {} where none do. Raises
    `ValueError` for such a file that is none."""
    path, trained = Path(folder, SETTINGS_FILE), {}
    try:
        if path.is_file():
            trained = json.loads(path.read_text(encoding="utf-8"))
            if of_host:
                from ..hosts.loading import CONFIG_FIELDS

                own = {name: value for name, value in trained.items() if name not in CONFIG_FIELDS}
                HostSettings(**own).changed(own)
                # One of an earlier release says nothing of what there was not.
                trained = {"anchor_share": 0.0} | trained
            elif unknown := sorted(trained.keys() - _own_fields()):
                raise ValueError(f"UHR-BAT has no setting {', '.join(unknown)}")
        if not of_host and (path := Path(folder, PROCESSOR_FILE)).is_file():
            stated = json.loads(path.read_text(encoding="utf-8"))
            # What an earlier release left has it there alone.
            stated = stated.get("image_processor", {}) | {"budgets": stated.get("default_budgets")}
            trained |= {name: stated[name] for name in SHARED if stated.get(name) is not None}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: these are no settings ({reason(error)}).") from error
    return trained


def keep_settings(adapted, settings: dict):
    """A peft model of a model of this package, which writes the settings that it is trained with beside the adapter that it
    saves, for [`trained_settings`]."""
    adapted.save_pretrained = partial(_save_adapter, adapted, settings)
    return adapted


def _save_adapter(adapted, settings, folder, *args, **kwargs):
    type(adapted).save_pretrained(adapted, folder, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        write_settings(folder, settings | {"budgets": adapted.get_base_model().config.budgets})


def host_settings(folder, base=None) -> dict:
    """Settings of a model of another family, or of an adapter of `base`: those that were measured on it, from the user's own
    `hosts.json`, over those that it was trained with, which stand beside it. Raises `ValueError` for such a file that is
    none."""
    trained = trained_settings(folder, of_host=True)
    return over(over({} if base is None else measured_settings(base), trained), measured_settings(folder))


def _load(folder, processor, dtype, device_map, quantization_config, changes):
    """Processor and model, whose code is carried along when they are saved."""
    import torch

    from ..hosts.weights import read_weights
    from ..image_processing_uhr_bat import UHRBatImageProcessor
    from ..modeling_uhr_bat import UHRBatForConditionalGeneration
    from ..processing_uhr_bat import UHRBatProcessor

    # Registered classes bring all code along when they are saved: the new folder loads by itself.
    UHRBatImageProcessor.register_for_auto_class()
    UHRBatProcessor.register_for_auto_class()
    UHRBatForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

    if device_map == "auto" and not torch.cuda.is_available():
        device_map = None
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    config = load_config(folder, **changes)
    # A module that is asked for is trained after that (`uhr-bat tiny focus`).
    new = ("model.region_focus.", "model.image_newline") if changes.get("region_focus") else ()
    return processor, read_weights(UHRBatForConditionalGeneration, with_weights(folder), new, config=config, **options)


def save_model(model, processor, folder):
    """A model folder that loads by itself."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def check_image(path: str):
    """Raises `FileNotFoundError` for an image file that is not there: loading a model first would take its time."""
    if is_file_name(path) and not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such image file.")
