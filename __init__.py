"""UHR-BAT: questions about ultra-high-resolution remote-sensing images under a hard budget of visual tokens.

    from uhr_bat import load_model

    processor, model = load_model()  # UHR-BAT-Tiny, which is part of the package; or the folder of another model

Nothing is imported before it is asked for. The Hub's loader does not read this file.
"""

from importlib import import_module

_MODULES = {
    "UHRBatConfig": "configuration_uhr_bat",
    "UHRBatImageProcessor": "image_processing_uhr_bat",
    "UHRBatProcessor": "processing_uhr_bat",
    "UHRBatModel": "modeling_uhr_bat",
    "UHRBatForConditionalGeneration": "modeling_uhr_bat",
    "register": "image_registration_uhr_bat",
    "token_box": "geometry_uhr_bat",
    "token_corners": "geometry_uhr_bat",
    "evidence_frame": "geo",
    "objects_frame": "geo",
    "write_objects": "geo",
    "ask": "common.asking",
    "load_model": "common.loading",
    "save_model": "common.loading",
    "plan": "planning",
    "planner_of": "planning",
    "UHRBatDataCollator": "training.collator",
    "WithAnswerMask": "training.collator",
    "UHRBatTrainer": "training.trainer",
    "UHRBatTrainingArguments": "training.options",
    "load_samples": "training.data",
}

__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return sorted({*globals(), *_MODULES})
