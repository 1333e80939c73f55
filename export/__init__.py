"""Tools that build model folders: the files of the root as one importable package, and what every builder shares."""

import json
import os
import sys
import tempfile
import types
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent

# The files of the root are one package, as they are on the Hub: their imports of each other are relative.
if "uhr_bat" not in sys.modules:
    sys.modules["uhr_bat"] = types.ModuleType("uhr_bat")
    sys.modules["uhr_bat"].__path__ = [str(ROOT)]

AUTO_MAP = {
    "AutoConfig": "configuration_uhr_bat.UHRBatConfig",
    "AutoModel": "modeling_uhr_bat.UHRBatModel",
    "AutoModelForCausalLM": "modeling_uhr_bat.UHRBatForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_uhr_bat.UHRBatForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_uhr_bat.UHRBatForConditionalGeneration",
}


def distributed_name(name: str) -> str:
    """Releases before 5.23 nest the vision tower one level deeper; all of them read that form."""
    nested, flat = "model.vision_tower.vision_model.", "model.vision_tower."
    return name.replace(flat, nested, 1) if name.startswith(flat) and not name.startswith(nested) else name


@contextmanager
def whole_files(folder: Path):
    """A folder for a `with` block: the files that it leaves there replace those of `folder`, or none does if it fails.

    Weights come last: where they are, all else is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as built:
        yield Path(built)
        for path in sorted(Path(built).iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
            os.replace(path, folder / path.name)


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
