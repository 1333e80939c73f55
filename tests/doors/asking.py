"""What the doors' tests share: a picture, a prompt, a model that is loaded without complaint, its answer."""

import base64
import io

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers.utils import is_torchvision_available


# From 5.4 to 5.17 the class `AutoImageProcessor` needs torchvision, whatever it is to load. Nothing else that is tested
# here differs between the supported releases.
HAS_AUTO_IMAGE_PROCESSOR = Version(transformers.__version__) >= Version("5.18") or is_torchvision_available()
needs_auto_image_processor = pytest.mark.skipif(
    not HAS_AUTO_IMAGE_PROCESSOR,
    reason="AutoImageProcessor of this release needs torchvision; AutoProcessor gives the image processor too",
)

PROMPT = "<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n"
# Without repeats, because a model that was not trained says one word for ever, whatever it sees.
GENERATION = {"do_sample": False, "max_new_tokens": 6, "no_repeat_ngram_size": 1}


def load(auto_class, folder, **settings):
    """A model whose loading report is empty."""
    model, report = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **settings)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= report.keys()
    assert not any(report.values()), report
    return model


def picture(seed=0, size=(160, 20)):
    """Noise of (width, height) pixels; a strip by default, so that few of its tiles are more than letterbox."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def data_uri(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat(*images, question="How many ships are there?"):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def tokenize(processor, messages):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def answer(model, inputs):
    """long[B, new tokens]"""
    return model.generate(**inputs, **GENERATION)[:, inputs["input_ids"].shape[1] :]


def first_scores(model, inputs):
    """float[B, V]: scores of the first new token."""
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def assert_all_differ(scores):
    for idx, row in enumerate(scores):
        for other in scores[:idx]:
            assert (row - other).abs().max() > 1e-3
