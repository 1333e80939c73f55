"""What the tests of images share."""

import base64
import re

import numpy as np
import pytest
import torch
from PIL import Image


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def random_image(height, width, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values)


def every_kind(image, folder) -> list:
    """An RGB image in every form that is taken for one; the file of some of them is written into the folder."""
    array, path = np.asarray(image), folder / "an image.png"
    image.save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    return [
        image,
        array,
        array.transpose(2, 0, 1),
        array.astype(np.int64),
        (array / 255).astype(np.float32),
        array / 255,
        array.astype(np.uint16) * 257,
        torch.from_numpy(array.copy()),
        torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
        path,
        str(path),
        path.as_uri(),
        f"data:image/png;base64,{encoded}",
        encoded,
        "\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76)),
    ]
