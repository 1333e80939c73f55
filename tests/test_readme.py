"""The README's code runs as it stands."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from uhr_bat.common.loading import ROOT


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(model_folder, tmp_path, monkeypatch):
    """The model folder as the working directory, with an image in it."""
    shutil.copytree(model_folder, tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "model" / "my_image.tif")
    monkeypatch.chdir(tmp_path / "model")
    return tmp_path / "model"


def test_the_blocks_run_one_after_the_other(folder, capsys):
    assert len(BLOCKS) == 5
    names = {
        "image": Image.open(folder / "my_image.tif"),
        "prompt": "<image>\nHow many ships?",
        "questions": ["How many ships?", "What colour are they?"],
    }
    torch.manual_seed(0)
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()  # the answer
    assert names["inputs"]["input_ids"].shape[0] == 1
    out = names["out"]
    height, width = out.importance[0][1].shape
    assert len(out.regions[0][1]) == len(out.slots[0][1]) == height * width
    assert len(out.tokens[0][1]) == names["model"].config.budgets[1]
