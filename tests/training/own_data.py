"""A user's own data, small: images of one colour, questions about them, and a model folder that trains in seconds."""

import json

import torch
from PIL import Image
from uhr_bat.common.loading import ROOT, save_model
from uhr_bat.configuration_uhr_bat import UHRBatConfig
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration
from uhr_bat.processing_uhr_bat import UHRBatProcessor

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30), "white": (240, 240, 240)}
SCALES, BUDGETS = [32, 64], [4, 8]


def make_model_folder(folder):
    """A random model with UHR-BAT-Tiny's tokenizer and template: two scales, 16 and 64 tokens."""
    settings = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    settings |= {"scales": SCALES, "budgets": BUDGETS, "num_regions": 3, "refinement": [], "refinement_layers": []}
    settings["text_config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    settings["vision_config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    }  # fmt: skip
    UHRBatForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    UHRBatProcessor.register_for_auto_class()
    torch.manual_seed(0)
    model = UHRBatForConditionalGeneration(UHRBatConfig.from_dict(settings))
    processor = UHRBatProcessor.from_pretrained(ROOT)
    processor.image_processor.scales, processor.default_budgets = SCALES, BUDGETS
    save_model(model, processor, folder)
    return folder


def paint_images(folder, number):
    """Paths, relative to the folder, of images of one colour each, and the colours' names."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [list(COLOURS)[idx % len(COLOURS)] for idx in range(number)]
    for idx, name in enumerate(names):
        Image.new("RGB", (40, 30), COLOURS[name]).save(folder / "images" / f"{idx}.png")
    return [(f"images/{idx}.png", name) for idx, name in enumerate(names)]


def make_rows(folder, number):
    """Conversations in LLaVA's form, one per image."""
    return [
        {"id": str(idx), "image": path, "conversations": ask("<image>\nWhat colour?", f" {name}")}
        for idx, (path, name) in enumerate(paint_images(folder, number))
    ]


def ask(*texts):
    """Turns in LLaVA's form; a person begins."""
    return [{"from": ("human", "gpt")[idx % 2], "value": text} for idx, text in enumerate(texts)]


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path
