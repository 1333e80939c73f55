"""Files and folders that are written whole or not at all."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def whole_folder(folder: Path):
    """A folder for a `with` block, which becomes `folder`, new or empty so far, when the block ends well.

    Until then its name ends in ".incomplete". A run that is killed leaves that behind, and the next run removes it.
    """
    building = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        for path in building.iterdir():
            path.chmod(0o644)  # safetensors makes files for their owner alone
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def write_report(folder: Path, name: str, result, text: str, plot):
    """A measurement as name.json, name.md and name.png, which `plot(path)` draws; all whole or none is there."""
    with whole_files(folder) as built:
        write_json(built / f"{name}.json", result)
        (built / f"{name}.md").write_text(text, encoding="utf-8")
        plot(built / f"{name}.png")


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
