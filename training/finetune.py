"""Stages 2 and 3: the decoder learns where to look and to answer, from images that are encoded once.

    python -m training.finetune --model runs/vision --output runs/taught --fresh --taught
    python -m training.finetune --model runs/decoder --output runs/tiny --budget 0.02 1 --batch-size 4 --steps 800

The loss is the language model's on the answers of a conversation about one site, through the ordinary `forward` with
its own compression at a budget that is drawn anew for every step, and the KL divergence of the question's attention
(`estimate_importance`, eq. 2) from the cells of the anchor scale that the named sites cover.
"""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Trainer
from uhr_bat.modeling_uhr_bat import UHRBatCompressionOutput, UHRBatImageFeatures

from training import questions, scenes
from training.common import arguments, load, paint, save, tokens_at, train

IGNORED = -100
IMPORTANCE_WEIGHT = 1.0
SITE_SAMPLES = 24  # points a side, by which the share of a site in an anchor cell is measured


# ---- Scenes, encoded once --------------------------------------------------------------------------------------------


class Painted(Dataset):
    """Tiles of scenes, painted when they are asked for."""

    def __init__(self, image_processor, seeds):
        self.image_processor, self.seeds = image_processor, seeds

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, index):
        return dict(self.image_processor(paint(scenes.make_scene(self.seeds[index])), return_tensors="pt"))


def encode_scenes(model, image_processor, seeds, workers=1):
    """UHRBatImageFeatures of the scene of every seed, one after the other; tokens in bfloat16, to hold thousands."""
    tiles = DataLoader(Painted(image_processor, seeds), batch_size=None, num_workers=workers)
    for one in tqdm(tiles, desc="Encoding scenes", unit="scene"):
        features = model.encode_image(**one)[0]
        features.anchor_tokens = features.anchor_tokens.bfloat16()
        features.tokens = [tokens.bfloat16() for tokens in features.tokens]
        yield features


def cached_features(model, image_processor, seeds, path, workers=1):
    """List of the features of all seeds: read from a safetensors file, or encoded and written whole to it."""
    num_scales = len(model.config.scales)
    if path.exists():
        stored = load_file(path)
    else:
        stored = {}
        for seed, features in zip(seeds, encode_scenes(model, image_processor, seeds, workers)):
            stored[f"{seed}.anchor_tokens"], stored[f"{seed}.anchor_positions"] = (
                features.anchor_tokens, features.anchor_positions
            )  # fmt: skip
            for scale in range(num_scales):
                stored[f"{seed}.tokens.{scale}"] = features.tokens[scale]
                stored[f"{seed}.positions.{scale}"] = features.positions[scale]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    return [
        UHRBatImageFeatures(
            stored[f"{seed}.anchor_tokens"],
            stored[f"{seed}.anchor_positions"],
            [stored[f"{seed}.tokens.{scale}"] for scale in range(num_scales)],
            [stored[f"{seed}.positions.{scale}"] for scale in range(num_scales)],
        )
        for seed in seeds
    ]


# ---- Conversations ---------------------------------------------------------------------------------------------------


def site_cells(scene, sites, grid) -> np.ndarray:
    """float[N]: the share of the named sites' area that lies in each cell of a grid, row by row."""
    side = (np.arange(SITE_SAMPLES) + 0.5) / SITE_SAMPLES * 2 - 1
    x, y = (axis.ravel() * scenes.SITE_SIDE / 2 for axis in np.meshgrid(side, side))
    cells = np.zeros(grid[0] * grid[1])
    for site in (scene.sites[index] for index in sites):
        sine, cosine = np.sin(site.angle), np.cos(site.angle)
        points = np.stack((x * cosine - y * sine, x * sine + y * cosine), axis=-1) + site.centre
        cells += np.bincount(tokens_at(scene, points.tolist(), grid), minlength=len(cells))
    return cells / cells.sum()


def evidence_tokens(scene, question, grids) -> list[tuple[int, int]]:
    """(scale, token) of what has to be read: objects at the two finest scales, the site at all where none is asked for."""
    if question.kind == "quadrant":
        points, scales = [scene.sites[index].centre for index in question.sites], range(len(grids))
    else:
        points, scales = [thing.centre for thing in question.objects], range(len(grids))[-2:]
    return [(scale, token) for scale in scales for token in tokens_at(scene, points, grids[scale])]


class Conversations(Dataset):
    """A conversation about one site of every scene, another one each time that the scene comes round again."""

    def __init__(self, features, seeds, grids, repeats=1000):
        self.features, self.seeds, self.grids, self.repeats = features, seeds, grids, repeats

    def __len__(self):
        return len(self.seeds) * self.repeats

    def __getitem__(self, index):
        repeat, place = divmod(index, len(self.seeds))
        scene = scenes.make_scene(self.seeds[place])
        turns = questions.converse(scene, np.random.default_rng([self.seeds[place], repeat]))
        features = self.features[place]
        cells = site_cells(scene, turns[0].sites, self.grids[0])
        return {
            "index": index,
            "features": features,
            "turns": turns,
            "cells": torch.tensor(cells)[features.anchor_positions],
            "evidence": [evidence_tokens(scene, turn, self.grids) for turn in turns],
        }


def budgets_of(share, features, proportions) -> list[int]:
    """Tokens that each scale may spend where a share of all that show the image is wanted, int[S].

    Scales share as `proportions` do; what a scale does not hold goes to the next finer ones.
    """
    available = [len(places) for places in features.positions]
    total, budgets = max(round(share * sum(available)), len(available)), []
    weights = np.asarray(proportions, float)
    for scale, limit in enumerate(available):
        wanted = round((total - sum(budgets)) * weights[scale] / weights[scale:].sum())
        budgets.append(min(max(wanted, 1), limit))
    # Coarser scales take what the finest cannot hold.
    for scale in reversed(range(len(available))):
        budgets[scale] = min(available[scale], budgets[scale] + max(total - sum(budgets), 0))
    return budgets


class Collator:
    """Conversations -> inputs of `forward`: ids with as many placeholders as the budget, and labels on the answers."""

    def __init__(self, processor, share):
        """`share`: the least and the greatest part of all tokens that a step spends, drawn log-uniformly."""
        self.processor, self.share = processor, share

    def __call__(self, items):
        tokenizer = self.processor.tokenizer
        # Drawn from the items, so that a run that goes on from a checkpoint draws the same.
        share = np.exp(np.random.default_rng(items[0]["index"]).uniform(*np.log(self.share)))
        rows, budgets = [], []
        for item in items:
            messages = []
            for turn in item["turns"]:
                image = [] if messages else [{"type": "image"}]
                messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.text}]})
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            text = tokenizer.apply_chat_template(
                messages, chat_template=self.processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
            )
            budgets.append(budgets_of(share, item["features"], self.processor.default_budgets))
            ids, answered = torch.tensor(text["input_ids"]), torch.tensor(text["assistant_masks"]).bool()
            times = torch.where(ids == self.processor.image_token_id, sum(budgets[-1]), 1)
            ids, answered = ids.repeat_interleave(times), answered.repeat_interleave(times)
            rows.append({"input_ids": ids, "labels": ids.where(answered, IGNORED)})
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True, padding_value)
            for name, padding_value in (("input_ids", tokenizer.pad_token_id), ("labels", IGNORED))
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            **batch,
            "attention_mask": (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long(),
            "image_features": [item["features"] for item in items],
            "budgets": torch.tensor(budgets),
            "site_cells": [item["cells"] for item in items],
            "evidence": [item["evidence"] for item in items],
        }


# ---- Training --------------------------------------------------------------------------------------------------------


class GuidedTrainer(Trainer):
    """The language model's loss, and two that say where to look.

    One is the divergence of the importance (eq. 2) from where the named sites lie. The other, with `taught` only, asks
    the last layer to read an answer off the visual tokens that show its evidence (eager attention), and there the
    compression itself follows the sites: as long as the importance is not learnt, the evidence is not among the tokens,
    and a decoder learns to guess.
    """

    def __init__(self, *args, taught=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.taught = taught
        self.parts = defaultdict(list)  # of the loss, since the last line of the log

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= {name: round(sum(values) / len(values), 4) for name, values in self.parts.items()}
            self.parts.clear()
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        cells, evidence = inputs.pop("site_cells"), inputs.pop("evidence")
        inner = self.accelerator.unwrap_model(model)
        guides = [
            self.divergence(inner, *row)
            for row in zip(inputs["input_ids"], inputs["labels"], inputs["image_features"], cells)
        ]
        guide = torch.stack(guides).mean()
        self.parts["divergence"].append(float(guide.detach()))
        guide = IMPORTANCE_WEIGHT * guide
        if self.taught:
            compressed = self.compress(inner, inputs.pop("image_features"), inputs.pop("budgets"), cells)
            inputs |= {"mm_encoder_outputs": {"image": compressed}, "output_attentions": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.taught:
            attention = outputs.attentions[-1].float().mean(1)
            unread = self.unread(inner, inputs, attention, compressed, evidence)
            self.parts["unread"].append(float(unread.detach()))
            guide = guide + unread
        # Where the Trainer counts answers over all steps of an accumulation, it does not divide by their number.
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = loss + guide / steps
        return (loss, outputs) if return_outputs else loss

    def compress(self, model, image_features, budgets, cells):
        """What `model.compress` returns, by the cells of the sites in place of the importance."""
        rows = [model.model._compress_one(*row) for row in zip(image_features, cells, budgets.tolist())]
        tokens, importance, regions, slots = map(list, zip(*rows))
        return UHRBatCompressionOutput(
            [torch.cat(scales) for scales in tokens], tokens, importance, regions, slots, [1] * len(tokens)
        )

    def divergence(self, model, input_ids, labels, features, cells):
        """KL(cells || importance) of the first question of a conversation."""
        question = input_ids[: int((labels != IGNORED).nonzero()[0])]
        importance = model.estimate_importance(question, features.anchor_tokens)
        return F.kl_div((importance / importance.sum()).clamp_min(1e-9).log(), cells.to(importance), reduction="sum")

    def unread(self, model, inputs, attention, compressed, evidence):
        """-log of the attention, float[B, M, M], that the tokens before the answers pay to their evidence."""
        losses = []
        for row, turns in enumerate(evidence):
            start = int((inputs["input_ids"][row] == model.config.image_token_id).nonzero()[0])
            answered = F.pad(inputs["labels"][row] != IGNORED, (1, 0))
            asked = (answered[1:] & ~answered[:-1]).nonzero()[:, 0] - 1
            slots, offset = [], start
            for scale, tokens in zip(compressed.slots[row], compressed.tokens[row]):
                slots.append(torch.where(scale >= 0, scale + offset, -1))
                offset += len(tokens)
            for place, turn in zip(asked, turns):
                seen = torch.tensor([int(slots[scale][token]) for scale, token in turn], dtype=torch.long).unique()
                seen = seen[seen >= 0]
                if len(seen):
                    losses.append(-attention[row, place, seen].sum().clamp_min(1e-6).log())
        return torch.stack(losses).mean() if losses else attention.new_zeros(())


@torch.no_grad()
def match_scales(model, features):
    """Prepare a decoder for visual tokens: the same length as text embeddings, and layers that start out small.

    Visual tokens of 70 times the length of text embeddings were seen to drown what attention adds to them. The
    projector's last layer and the scale embedding are scaled, so that the tokens change by one factor.
    """
    inner = model.model
    tokens = torch.cat([torch.cat(image.tokens) for image in features]).float()
    factor = model.get_input_embeddings().weight.square().mean().sqrt() / tokens.square().mean().sqrt()
    last = inner.multi_modal_projector.linear_2
    for parameter in (last.weight, last.bias, *inner.scale_embedding.parameters()):
        parameter.mul_(factor)
    for image in features:
        image.anchor_tokens, image.tokens = image.anchor_tokens * factor, [rows * factor for rows in image.tokens]
    depth = (2 * model.config.text_config.num_hidden_layers) ** -0.5
    for layer in inner.language_model.layers:
        layer.self_attn.o_proj.weight.mul_(depth)
        layer.mlp.down_proj.weight.mul_(depth)


def main():
    parser = arguments(__doc__, steps=2500, batch_size=16, learning_rate=1e-3)
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes, encoded once before the first step")
    parser.add_argument("--features", type=Path, metavar="FILE", help="safetensors file that keeps the encoded scenes")
    parser.add_argument("--fresh", action="store_true", help="the decoder is untrained: match it to the visual tokens")
    parser.add_argument(
        "--budget", type=float, nargs=2, default=(0.01, 0.15), metavar=("LEAST", "MOST"), help="share of all tokens"
    )
    parser.add_argument("--taught", action="store_true", help="compress by the true sites, and say what to read")
    args = parser.parse_args()
    processor, model = load(args.model)
    if args.taught:
        model.set_attn_implementation({"text_config": "eager"})
    seeds = range(scenes.FINETUNING_SEED, scenes.FINETUNING_SEED + args.scenes)
    path = args.features or args.output / "features.safetensors"
    with PartialState().main_process_first():
        features = cached_features(model, processor.image_processor, seeds, path, args.workers)
    if args.fresh:
        match_scales(model, features)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    model.model.scale_embedding.requires_grad_(False)
    args.workers = 0  # what is encoded stays where it is
    dataset = Conversations(features, seeds, model.config.grids)
    collator = Collator(processor, args.budget)
    train(GuidedTrainer, model, dataset, args, data_collator=collator, taught=args.taught)
    save(model, processor, args.output)


if __name__ == "__main__":
    main()
