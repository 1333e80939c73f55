"""The released code's own outputs, from its own checkpoint: tests/reference/README.md."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load_clean
from PIL import Image
from uhr_bat.export.convert_checkpoint import convert
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor
from uhr_bat.regions.cache import read_labels


REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "released_layout"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(model through an Auto class, its remote module, the folder) of the converted reference."""
    folder = convert(REFERENCE, tmp_path_factory.mktemp("reference") / "model", max_shard_size="1MB")
    model = load_clean(folder)
    return model, importlib.import_module(model.__class__.__module__), folder


@pytest.fixture(scope="module")
def reference_call(reference):
    """The prompt and the released call of the reference, without label maps."""
    _, module, folder = reference
    image = Image.open(REFERENCE / "image.png")
    processor = UHRBatImageProcessor.from_pretrained(folder)
    scales = [672, 1344]
    tiles = module.split_image_to_multiscale_tiles(image, processor, target_sizes=scales, tile_size=336)
    call = {
        "multiscale_pixels": [tiles],
        "multiscale_masks": [{}],
        "multiscale_topk": [40, 90],
        "multiscale_target_sizes": scales,
        "image_sizes": [image.size],
        "modalities": ["image"],
    }
    return torch.tensor([[5, 6, 7, -200, 8, 9, 10, 11, 12, 13]]), call, np.load(REFERENCE / "expected.npz")


def test_the_tiles_are_the_references(reference_call):
    _, call, expected = reference_call
    for scale, entry in call["multiscale_pixels"][0].items():
        tiles = entry["tiles"]
        sums = [tiles.double().sum().item(), tiles.double().abs().sum().item()]
        np.testing.assert_allclose(sums, expected[f"tiles_{scale}_checksum"], rtol=1e-6)


@pytest.mark.parametrize("masks", ["topk", "sam"])
def test_importance_tokens_and_scores_are_the_references(reference, reference_call, masks):
    model, module, _ = reference
    prompt_ids, call, expected = reference_call
    inputs = {
        "input_ids": prompt_ids.masked_fill(prompt_ids == -200, model.config.image_token_index),
        "pixel_values": torch.cat([entry["tiles"] for entry in call["multiscale_pixels"][0].values()])[None],
        "budgets": [40, 90],
    }
    if masks == "sam":
        entry = torch.load(REFERENCE / "mask.pt", weights_only=True)
        loaded = module.load_multiscale_tile_masks(entry, scales=[672, 1344], tile_size=336, patch_size=14)
        call = {**call, "multiscale_masks": [loaded]}
        labels = read_labels(REFERENCE / "mask.pt")
        inputs["regions"] = torch.cat([labels[scale].flatten() for scale in (672, 1344)])[None]
    out = model.compress(**inputs)
    for scale_idx, scale in enumerate((672, 1344)):
        side = scale // 336
        importance = out.importance[0][scale_idx].view(side, 24, side, 24).transpose(1, 2).reshape(-1, 24, 24)
        np.testing.assert_allclose(importance, expected[f"importance_{scale}"], atol=1e-6)
    np.testing.assert_allclose(out.pooler_output[0].detach(), expected[f"{masks}_tokens"], atol=1e-3)
    answer = model.generate(
        inputs=prompt_ids, **call, do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    np.testing.assert_allclose(torch.cat(answer.scores), expected[f"{masks}_scores"], atol=1e-3)
    assert answer.sequences[0, -6:].tolist() == expected[f"{masks}_answer"].tolist()
