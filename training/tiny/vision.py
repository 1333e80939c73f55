"""Stage 1: the vision tower, the projector and the scale embedding learn to read what a token shows, and where.

    uhr-bat tiny vision --model runs/start --output runs/vision

Linear heads read from every token of a crowded scene, at every scale, the colour and the type of the object whose centre
it holds, the site it lies in, and its row and column in the image. Colour and type have separate heads: joint targets
stall. Afterwards each word ("red", "plane", "pier") gets its head's weight vector as embedding; the heads are thrown
away.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from ...common.commands import tells_errors
from ...common.loading import load_model, save_model
from ...scenes.evidence import centres_of_tokens, points_of_tokens, tokens_at
from ...scenes.layout import OBJECTS, PAINTS, SITES, TEST_SEEDS, WIDTH, make_scene
from ...scenes.painting import paint
from ..collator import IGNORED
from .stages import make_parser, read_arguments, train

CROWDED = (100, 160)  # objects outside the sites: a token with an object in ten, instead of one in fifty
HEADS = {"colour": len(PAINTS) + 1, "kind": len(OBJECTS) + 1, "site": len(SITES) + 1,
         "row": 8, "column": 8}  # fmt: skip
LOSS_WEIGHTS = {"kind": 2.0, "row": 0.1, "column": 0.1}  # types are the hardest to read, row and column the easiest
NOTHING_WEIGHT = 0.1  # of the tokens without an object


def head_labels(scene, config) -> dict[str, np.ndarray]:
    """long[N] by head for the tokens of all scales, each row by row over its grid; IGNORED beside a centre.

    0 stands for nothing; objects and sites are counted from 1.
    """
    labels = {name: [] for name in HEADS}
    places = scene.to_square([thing.centre for thing in scene.objects])
    reach = np.array([thing.size / WIDTH for thing in scene.objects])
    for height, width in config.grids:
        centres = centres_of_tokens((height, width))
        points = points_of_tokens(scene, (height, width))
        colour = np.zeros(height * width, np.int64)
        # Colour and type of a token that an object reaches into from beside it do not count.
        near = (np.abs(centres[:, None] - places).max(-1) < reach + 0.5 / width).any(1)
        colour[near] = IGNORED
        kind = colour.copy()
        held = tokens_at(scene, [thing.centre for thing in scene.objects], (height, width))
        colour[held] = [list(PAINTS).index(thing.colour) + 1 for thing in scene.objects]
        kind[held] = [OBJECTS.index(thing.kind) + 1 for thing in scene.objects]
        site = np.zeros(height * width, np.int64)
        for place in scene.sites:
            site[place.contains(points)] = SITES.index(place.kind) + 1
        cells = (centres * 8).astype(int)
        for name, values in zip(HEADS, (colour, kind, site, cells[:, 0], cells[:, 1])):
            labels[name].append(values)
    return {name: np.concatenate(values) for name, values in labels.items()}


class LabelledTiles(Dataset):
    """Crowded scenes, painted when they are asked for: tiles, masks and labels of their tokens."""

    def __init__(self, image_processor, config, seeds):
        self.image_processor, self.config, self.seeds = image_processor, config, seeds

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, index):
        scene = make_scene(self.seeds[index], objects_outside=CROWDED)
        tiles = self.image_processor(paint(scene))
        labels = head_labels(scene, self.config)
        return {
            "pixel_values": torch.tensor(np.asarray(tiles["pixel_values"][0])),
            "pixel_attention_mask": torch.tensor(np.asarray(tiles["pixel_attention_mask"][0])),
            **{name: torch.from_numpy(labels[name]) for name in HEADS},
        }


class VisionPretraining(nn.Module):
    """UHRBatModel's way from tiles to tokens, and a linear head per question about a token."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in HEADS.items()})

    def forward(self, pixel_values, pixel_attention_mask, **labels):
        images = self.model.encode_image(pixel_values, pixel_attention_mask)
        sizes = [height * width for height, width in self.model.config.grids]
        starts = np.cumsum([0, *sizes[:-1]])
        tokens = self.norm(torch.cat([torch.cat(image.tokens) for image in images]))
        positions = [
            torch.cat([of_scale + int(start) for of_scale, start in zip(image.positions, starts)]) for image in images
        ]
        loss, logits = 0, {}
        for name, head in self.heads.items():
            target = torch.cat([row[chosen] for row, chosen in zip(labels[name], positions)])
            weight = torch.ones(HEADS[name])
            if name in ("colour", "kind"):
                weight[0] = NOTHING_WEIGHT
            logits[name] = head(tokens)
            loss = loss + LOSS_WEIGHTS.get(name, 1) * F.cross_entropy(
                logits[name].float(), target, weight.to(target.device), ignore_index=IGNORED
            )
        return {"loss": loss, "logits": logits, "positions": positions}


@torch.no_grad()
def accuracy(pretraining, dataset, config) -> dict[str, list[float]]:
    """Fraction of the tokens that each head names right, per scale; colour and kind where an object is, site in sites."""
    pretraining.eval()
    sizes = [height * width for height, width in config.grids]
    scale_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    right = {name: np.zeros(len(sizes)) for name in HEADS}
    counted = {name: np.zeros(len(sizes)) for name in HEADS}
    for item in dataset:
        output = pretraining(**{name: value[None] for name, value in item.items()})
        positions = output["positions"][0]
        for name in HEADS:
            target = item[name][positions]
            chosen = target >= (0 if name in ("row", "column") else 1)
            hit = (output["logits"][name].argmax(-1) == target)[chosen]
            for scale in range(len(sizes)):
                here = scale_of[positions][chosen] == scale
                right[name][scale] += int(hit[here].sum())
                counted[name][scale] += int(here.sum())
    return {name: (right[name] / counted[name]).round(3).tolist() for name in HEADS}


@torch.no_grad()
def name_words(pretraining, embedding, tokenizer):
    """Give the words for colours, types and sites the vectors by which the heads tell them apart.

    A visual token then resembles the words for what it shows, and a decoder need not learn which goes with which.
    """
    names = {"colour": tuple(PAINTS), "kind": OBJECTS, "site": SITES}
    length = embedding.weight.square().mean().sqrt()
    for head, words in names.items():
        vectors = pretraining.norm.weight * pretraining.heads[head].weight
        vectors = vectors - vectors.mean(0)
        vectors = vectors - vectors.mean(1, keepdim=True)
        for name, vector in zip(words, vectors[1:]):
            parts = [word for word in name.split() if head != "site" or word not in OBJECTS]  # "tank farm"
            for token in tokenizer("".join(f" {part}" for part in parts))["input_ids"]:
                embedding.weight[token] = vector / vector.square().mean().sqrt() * length


@tells_errors
def main(arguments=None):
    parser = make_parser("tiny vision", __doc__, steps=2000, batch_size=2, learning_rate=1e-3)
    parser.add_argument("--first-seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--test-scenes", type=int, default=20)
    args = read_arguments(parser, arguments)
    processor, model = load_model(args.model, torch.float32, device_map=None)
    model.vision_chunk_size = 128
    model.set_attn_implementation({"vision_config": "eager"})  # 17 tokens a tile: faster than the fused kernels
    model.model.language_model.requires_grad_(False)
    pretraining = VisionPretraining(model.model)
    seeds = range(args.first_seed, args.first_seed + args.steps * args.batch_size)
    dataset = LabelledTiles(processor.image_processor, model.config, seeds)
    trainer = train(Trainer, pretraining, dataset, args)
    test = LabelledTiles(processor.image_processor, model.config, TEST_SEEDS[: args.test_scenes])
    for name, fractions in accuracy(trainer.model, test, model.config).items():
        print(f"{name:>7} by scale: {fractions}")
    name_words(pretraining, model.get_input_embeddings(), processor.tokenizer)
    save_model(model, processor, args.output)


if __name__ == "__main__":
    raise SystemExit(main())
