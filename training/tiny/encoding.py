"""Scenes that are encoded once, in memory or in a file: what the decoder is trained on."""

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...common.files import whole_files
from ...modeling_outputs_uhr_bat import UHRBatImageFeatures
from ...scenes.layout import make_scene
from ...scenes.painting import paint

VISION = ("vision_tower", "multi_modal_projector", "scale_embedding")  # what makes visual tokens


def freeze_vision(model):
    """Nothing that makes visual tokens is trained."""
    for name in VISION:
        getattr(model.model, name).requires_grad_(False)


class SceneImages(Dataset):
    """Tiles of the scenes of some seeds, painted when they are asked for."""

    def __init__(self, image_processor, seeds):
        self.image_processor, self.seeds = image_processor, seeds

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, index):
        return dict(self.image_processor(paint(make_scene(self.seeds[index])), return_tensors="pt"))


def encode_scenes(model, image_processor, seeds, workers=1):
    """UHRBatImageFeatures of the scene of every seed, one after the other; tokens in bfloat16, to hold thousands."""
    tiles = DataLoader(SceneImages(image_processor, seeds), batch_size=None, num_workers=workers)
    for of_scene in tqdm(tiles, desc="Encoding scenes", unit="scene"):
        features = model.encode_image(**of_scene)[0]
        features.anchor_tokens = features.anchor_tokens.bfloat16()
        features.tokens = [tokens.bfloat16() for tokens in features.tokens]
        yield features


def all_tokens(images) -> torch.Tensor:
    """float32[N, D]: the tokens of all scales of some images."""
    return torch.cat([torch.cat(image.tokens) for image in images]).float()


def cached_features(model, image_processor, seeds, path, workers=1):
    """List of the features of all seeds: read from a safetensors file, or encoded and written whole to it."""
    if path.exists():
        stored = load_file(path)
    else:
        stored = {}
        for seed, features in zip(seeds, encode_scenes(model, image_processor, seeds, workers)):
            stored |= packed(features, seed)
        with whole_files(path.parent) as built:
            save_file(stored, built / path.name)
    return [unpacked(stored.__getitem__, seed, model.config) for seed in seeds]


def packed(features, name) -> dict[str, torch.Tensor]:
    """The tensors of an encoded image as a file keeps them, tokens in bfloat16."""
    stored = {
        f"{name}.anchor_tokens": features.anchor_tokens.bfloat16(),
        f"{name}.anchor_positions": features.anchor_positions,
    }
    for scale, (tokens, positions) in enumerate(zip(features.tokens, features.positions)):
        stored |= {f"{name}.tokens.{scale}": tokens.bfloat16(), f"{name}.positions.{scale}": positions}
    return stored


def unpacked(read, name, config) -> UHRBatImageFeatures:
    """The encoded image that was `packed` under a name; `read`: its tensor of a file by its name there."""
    scales = range(len(config.scales))
    return UHRBatImageFeatures(
        read(f"{name}.anchor_tokens"),
        read(f"{name}.anchor_positions"),
        [read(f"{name}.tokens.{scale}") for scale in scales],
        [read(f"{name}.positions.{scale}") for scale in scales],
        config.scales,
        config.grids,
    )
