"""What the tests of images share."""

import re

import numpy as np
import pytest
from PIL import Image


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def random_image(height, width, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values)
