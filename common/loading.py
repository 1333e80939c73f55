"""One way to load a model folder, and one to save it."""

from pathlib import Path

from .images import is_file_name

ROOT = Path(__file__).resolve().parent.parent  # the package, which is UHR-BAT-Tiny's model folder too
# Of UHR-BAT-Tiny. The README says the same; change both when the weights change.
WEIGHTS_NOTE = (
    "These weights were trained on made-up scenes only: most answers about those are right, none about a real image is to "
    "be trusted."
)


def model_name(folder) -> str:
    """What a model folder is called in reports: a clone or an installed package may lie anywhere."""
    folder = Path(folder)
    return "UHR-BAT-Tiny" if folder.resolve() == ROOT else folder.resolve().name


def load_model(folder=ROOT, dtype="auto", device_map="auto", quantization_config=None, **changes):
    """Processor and model of a folder, of the classes of this package.

    Args:
        folder: model folder; UHR-BAT-Tiny where none is given.
        dtype: torch.dtype of the weights; "auto" takes that of the folder.
        device_map: as in transformers; "auto" is the GPU where there is one, None the CPU.
        quantization_config: as in transformers; None for weights as they are.
        changes: other values for fields of the configuration, as `selector`.
    """
    import torch

    from ..configuration_uhr_bat import UHRBatConfig
    from ..image_processing_uhr_bat import UHRBatImageProcessor
    from ..modeling_uhr_bat import UHRBatForConditionalGeneration
    from ..processing_uhr_bat import UHRBatProcessor

    # Registered classes bring all code along when they are saved: the new folder loads by itself.
    UHRBatImageProcessor.register_for_auto_class()
    UHRBatProcessor.register_for_auto_class()
    UHRBatForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

    if device_map == "auto" and not torch.cuda.is_available():
        device_map = None
    config = UHRBatConfig.from_pretrained(folder, **changes)
    processor = UHRBatProcessor.from_pretrained(folder)
    model = UHRBatForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=dtype, device_map=device_map, quantization_config=quantization_config
    )
    return processor, model


def save_model(model, processor, folder):
    """A model folder that loads by itself."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def check_files(image_path, folder):
    """Raises `FileNotFoundError` at the door: loading the model first would take its time. `image_path` may be None."""
    if image_path is not None and is_file_name(image_path) and not Path(image_path).exists():
        raise FileNotFoundError(f"{image_path}: there is no such image file.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: this is no model folder, there is no config.json in it.")
