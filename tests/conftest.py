"""Tests see this folder as the package `uhr_bat`, installed or not; nothing reaches the network."""

import atexit
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before transformers is imported, and for the processes that tests start. Remote code is copied into the cache: one of
# our own, so that no earlier copy is run.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="uhr_bat_modules_")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
# The models here are tiny: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

found = find_spec("uhr_bat")
if found is None or Path(found.origin).resolve().parent != ROOT:
    # A link, as a clone may have any name; on PYTHONPATH too, for the processes that tests start.
    folder = tempfile.mkdtemp(prefix="uhr_bat_package_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "uhr_bat").symlink_to(ROOT, target_is_directory=True)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A copy of what is distributed: code, configuration, tokenizer, template and weights. Tests only read it."""
    folder = tmp_path_factory.mktemp("UHR-BAT-Tiny")
    for pattern in ("*_uhr_bat.py", "*.json", "*.jinja", "*.safetensors"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    return folder
