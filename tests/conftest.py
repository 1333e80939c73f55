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


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory):
    """A small random SAM in the library's layout: the real classes, with a view of 64 pixels. Tests only read it."""
    import torch
    from transformers import SamConfig, SamImageProcessorPil, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "image_size": 64,
            "patch_size": 8, "output_channels": 16, "num_pos_feats": 8, "global_attn_indexes": [1], "window_size": 4,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sam")
    model = SamModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # wide enough that points and pixels matter
    model.save_pretrained(folder)
    SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_scene(tmp_path_factory):
    """A harbour and a town, RGBA in EPSG:32654, 1164 x 877 pixels of 2.4 m: what nickyspatial 1.1.1 (MIT) ships."""
    import subprocess
    import tarfile

    folder = tmp_path_factory.mktemp("nickyspatial")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "nickyspatial"]
    fetched = subprocess.run([*command, "nickyspatial==1.1.1", "-d", folder], capture_output=True, text=True)
    if "No matching distribution found" in fetched.stderr:
        pytest.skip("the package registry cannot be reached")
    assert fetched.returncode == 0, fetched.stderr
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        (member,) = (name for name in archive.getnames() if name.endswith("data/sample.tif"))
        archive.extract(member, folder, filter="data")
    return str(folder / member)
