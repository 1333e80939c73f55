"""Tests see the root's files as the package `uhr_bat`, as the Hub's loader does; nothing reaches the network."""

import atexit
import os
import shutil
import sys
import tempfile
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

sys.path.insert(0, str(ROOT))
import export  # noqa: E402, F401  registers the package


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A copy of what is distributed: code, configuration, tokenizer, template and weights. Tests only read it."""
    folder = tmp_path_factory.mktemp("UHR-BAT-Tiny")
    for pattern in ("*_uhr_bat.py", "*.json", "*.jinja", "*.safetensors"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    return folder
