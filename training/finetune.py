"""Stages 2 and 3: the decoder learns where to look and to answer, from images that are encoded once.

    python -m training.finetune --model runs/vision --output runs/taught --fresh --taught
    python -m training.finetune --model runs/taught --output runs/tiny --budget 0.02 0.4 --batch-size 12 --steps 180

The loss is the language model's on the answers, through the ordinary `forward` with visual tokens at a budget that is
drawn anew for every step, the KL divergence of the question's attention (`estimate_importance`, eq. 2) from the cells of
the anchor scale that the named sites cover, and losses that say what to read (`GuidedTrainer`).
"""

import os
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Trainer
from uhr_bat.modeling_uhr_bat import UHRBatCompressionOutput, UHRBatImageFeatures, question_attention

from training import questions, scenes
from training.common import IGNORED, arguments, load, paint, points_of_tokens, save, settings, tokens_at, train

ANSWER_WEIGHT = 3.0  # of the language model's loss, beside those that say where to look
NOISE = 0.25  # on visual tokens of length 1 (root mean square): without it, scenes are learnt by heart
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


# ---- Questions -------------------------------------------------------------------------------------------------------


def site_cells(scene, sites, grid) -> np.ndarray:
    """float[N]: the share of the named sites' area that lies in each cell of a grid, row by row."""
    side = ((np.arange(SITE_SAMPLES) + 0.5) / SITE_SAMPLES - 0.5) * scenes.SITE_SIDE
    inside = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    cells = np.zeros(grid[0] * grid[1])
    for site in sites:
        points = scene.sites[site].placed(inside).tolist()
        cells += np.bincount(tokens_at(scene, points, grid), minlength=len(cells))
    return cells / cells.sum()


def evidence_of(scene, question, grids) -> list[list[tuple[int, int]]]:
    """(scale, token) of every object that a question needs, at the two finest scales."""
    points, finest = [thing.centre for thing in question.objects], range(len(grids))[-2:]
    by_scale = [[(scale, token) for token in tokens_at(scene, points, grids[scale])] for scale in finest]
    return [list(one) for one in zip(*by_scale)]


def evidence_tokens(scene, question, grids) -> list[tuple[int, int]]:
    """(scale, token) of what has to be read: objects at the two finest scales, or a site at all where none is asked."""
    if question.kind == "quadrant":
        points = [scene.sites[index].centre for index in question.sites]
        return [(scale, token) for scale, grid in enumerate(grids) for token in tokens_at(scene, points, grid)]
    return [token for tokens in evidence_of(scene, question, grids) for token in tokens]


def site_tokens(scene, sites, grids) -> list[tuple[int, int]]:
    """(scale, token) of all that lies in the named sites."""
    found = []
    for scale, grid in enumerate(grids):
        points = points_of_tokens(scene, grid)
        inside = np.any([scene.sites[index].contains(points) for index in sites], axis=0)
        found += [(scale, int(token)) for token in inside.nonzero()[0]]
    return found


class Questions(Dataset):
    """A question about every scene, another one each time that the scene comes round again."""

    def __init__(self, features, seeds, grids, repeats=1000):
        self.features, self.seeds, self.grids, self.repeats = features, seeds, grids, repeats
        self.scenes = [scenes.make_scene(seed) for seed in seeds]

    def __len__(self):
        return len(self.seeds) * self.repeats

    def __getitem__(self, index):
        repeat, place = divmod(index, len(self.seeds))
        scene, features = self.scenes[place], self.features[place]
        question = questions.ask_any(scene, np.random.default_rng([scene.seed, repeat]))
        generator = torch.Generator().manual_seed(index)
        noisy = [
            tokens + NOISE * torch.randn(tokens.shape, generator=generator)
            for tokens in (features.anchor_tokens, *features.tokens)
        ]
        return {
            "index": index,
            "features": replace(features, anchor_tokens=noisy[0], tokens=noisy[1:], regions={}),
            "question": question,
            "guide": {
                "cells": torch.tensor(site_cells(scene, question.sites, self.grids[0]))[features.anchor_positions],
                "sites": site_tokens(scene, question.sites, self.grids),
                "evidence": evidence_tokens(scene, question, self.grids),
            },
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
    """Questions -> inputs of `forward`: ids with as many placeholders as the budget, and labels on the answers."""

    def __init__(self, processor, share):
        """`share`: the least and the greatest part of all tokens that a step spends, drawn log-uniformly."""
        self.processor, self.share = processor, share

    def __call__(self, items):
        tokenizer = self.processor.tokenizer
        # Drawn from the items, so that a run that goes on from a checkpoint draws the same.
        share = np.exp(np.random.default_rng(items[0]["index"]).uniform(*np.log(self.share)))
        rows, budgets, guides = [], [], []
        for item in items:
            question = item["question"]
            messages = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
                # After a space, most words are one token.
                {"role": "assistant", "content": [{"type": "text", "text": f" {question.answer}"}]},
            ]
            text = tokenizer.apply_chat_template(
                messages,
                chat_template=self.processor.chat_template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            budgets.append(budgets_of(share, item["features"], self.processor.default_budgets))
            ids, answered = torch.tensor(text["input_ids"]), torch.tensor(text["assistant_masks"]).bool()
            times = torch.where(ids == self.processor.image_token_id, sum(budgets[-1]), 1)
            ids, answered = ids.repeat_interleave(times), answered.repeat_interleave(times)
            rows.append({"input_ids": ids, "labels": ids.where(answered, IGNORED)})
            words = tokenizer(f" {' '.join(question.words)}")["input_ids"]
            guides.append(item["guide"] | {"words": torch.tensor(words)})
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
            "guides": guides,
        }


# ---- Training --------------------------------------------------------------------------------------------------------


class GuidedTrainer(Trainer):
    """The language model's loss, and those that say where to look.

    "divergence": of the importance (eq. 2) from where the sites of the question lie. "unseen": at the importance layer,
    the question is to look at the visual tokens of the sites that it names. The place before the answer is to look at
    the words that the question asks about two layers before the last ("unasked"), and in the last one at the visual
    tokens that show the evidence ("unread").

    With `taught` the tokens are those that matter most by the true sites, none of them merged: as long as the importance
    is not learnt, the evidence is not among its choice, and a decoder learns to guess.
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
        guides = inputs.pop("guides")
        inner = self.accelerator.unwrap_model(model)
        divergences = [
            self.divergence(inner, *row)
            for row in zip(inputs["input_ids"], inputs["labels"], inputs["image_features"], guides)
        ]
        images = {name: inputs.pop(name) for name in ("image_features", "budgets")}
        compressed = self.compress(inner, guides, **images) if self.taught else inner.compress(**inputs, **images)
        inputs["mm_encoder_outputs"] = {"image": compressed}
        with self.attention_inputs(inner) as seen:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        parts = {"divergence": torch.stack(divergences).mean(), **self.look(inner, inputs, seen, compressed, guides)}
        for name, part in parts.items():
            self.parts[name].append(float(part.detach()))
        # Where the Trainer counts answers over all steps of an accumulation, it does not divide by their number.
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        loss = ANSWER_WEIGHT * loss + sum(parts.values()) / steps
        return (loss, outputs) if return_outputs else loss

    def divergence(self, model, input_ids, labels, features, guide):
        """KL(cells of the sites || importance) of a question."""
        question = input_ids[: int((labels != IGNORED).nonzero()[0])]
        importance = model.estimate_importance(question, features.anchor_tokens)
        share = (importance / importance.sum()).clamp_min(1e-9)
        return F.kl_div(share.log(), guide["cells"].to(importance), reduction="sum")

    def compress(self, model, guides, image_features, budgets):
        """What `model.compress` returns for plain top-k, by the cells of the sites in place of the importance."""
        with settings(model.config, {"region_method": "none"}):
            rows = [
                model.model._compress_one(features, guide["cells"], budget)
                for features, guide, budget in zip(image_features, guides, budgets.tolist())
            ]
        tokens, importance, regions, slots = map(list, zip(*rows))
        return UHRBatCompressionOutput(
            [torch.cat(scales) for scales in tokens], tokens, importance, regions, slots, [1] * len(tokens)
        )

    @contextmanager
    def attention_inputs(self, model):
        """What the attention of the importance layer and of the last layer is called with, in a `with` block."""
        layers = model.model.language_model.layers
        chosen = {"unseen": layers[model.config.importance_layer], "unasked": layers[-3], "unread": layers[-1]}
        seen = {}

        def keep(name):
            def hook(attention, args, kwargs):
                seen[name] = attention, kwargs["hidden_states"], kwargs["position_embeddings"]

            return hook

        hooks = [
            layer.self_attn.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in chosen.items()
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def look(self, model, inputs, seen, compressed, guides):
        """-log of the attention that the right visual tokens and words get, mean over the questions that have them."""
        losses = {"unseen": [], "unasked": [], "unread": []}
        for row, (ids, labels, guide) in enumerate(zip(inputs["input_ids"], inputs["labels"], guides)):
            visual = (ids == model.config.image_token_id).nonzero()[:, 0]
            places, offset = [], int(visual[0])
            for slots, tokens in zip(compressed.slots[row], compressed.tokens[row]):
                places.append(torch.where(slots >= 0, slots + offset, -1))
                offset += len(tokens)
            first, end = int(visual[-1]) + 1, int((labels != IGNORED).nonzero()[0])  # of the question
            asked = torch.isin(ids[first:end], guide["words"]).nonzero()[:, 0] + first

            def attend(name, start, row=row, end=end):
                """The attention of the places from `start` on, up to the answer, to all before it."""
                attention, hidden_states, position_embeddings = seen[name]
                # The embeddings of positions are the same for all sequences, or one for each.
                turned = tuple(part[row % len(part), :end][None] for part in position_embeddings)
                return question_attention(attention, hidden_states[row, :end][None], turned, start)

            def held(tokens, places=places):
                return sorted({place for scale, token in tokens if (place := int(places[scale][token])) >= 0})

            losses["unasked"].append(attend("unasked", end - 1)[asked].sum())
            if sites := held(guide["sites"]):
                weights = attend("unseen", first)
                losses["unseen"].append(weights[sites].sum() / weights[visual].sum())
            if evidence := held(guide["evidence"]):
                losses["unread"].append(attend("unread", end - 1)[evidence].sum())
        return {name: -torch.stack(shares).clamp_min(1e-6).log().mean() for name, shares in losses.items() if shares}


@torch.no_grad()
def prepare_decoder(model, features):
    """Prepare an untrained decoder for visual tokens.

    Text embeddings and visual tokens get entries of length 1 (root mean square), and the last norm what keeps the
    logits as they were: an embedding is then about as long as what a layer adds, and a step of the optimiser is small
    beside it. What layers add starts out divided by the root of their number. The first head of every group of keys
    starts as a head that looks for what resembles it, and copies it ("mimetic" initialisation, Trockman and Kolter 2023).
    """
    inner = model.model
    embeddings, decoder = model.get_input_embeddings().weight, inner.language_model
    length = embeddings.square().mean().sqrt()
    embeddings.div_(length)
    decoder.norm.weight.mul_(length)
    # The projector's last layer and the scale embedding are scaled, so that all visual tokens change by one factor.
    tokens = torch.cat([torch.cat(image.tokens) for image in features[:100]]).float()
    factor = 1 / tokens.square().mean().sqrt()
    last = inner.multi_modal_projector.linear_2
    for parameter in (last.weight, last.bias, *inner.scale_embedding.parameters()):
        parameter.mul_(factor)
    for image in features:
        image.anchor_tokens, image.tokens = image.anchor_tokens * factor, [rows * factor for rows in image.tokens]
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.o_proj.weight.div_((2 * len(decoder.layers)) ** 0.5)
        layer.mlp.down_proj.weight.div_((2 * len(decoder.layers)) ** 0.5)
        for group in range(model.config.text_config.num_key_value_heads):
            head = group * attention.num_key_value_groups
            keys, queries = (
                slice(part * attention.head_dim, (part + 1) * attention.head_dim) for part in (group, head)
            )
            attention.q_proj.weight[queries] = attention.k_proj.weight[keys]
            attention.q_proj.bias[queries] = attention.k_proj.bias[keys]
            attention.o_proj.weight[:, queries] = attention.v_proj.weight[keys].T


def main():
    parser = arguments(__doc__, steps=2000, batch_size=32, learning_rate=5e-4)
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes, encoded once before the first step")
    parser.add_argument("--first-seed", type=int, default=scenes.FINETUNING_SEED, help="of the scenes")
    parser.add_argument("--features", type=Path, metavar="FILE", help="safetensors file that keeps the encoded scenes")
    parser.add_argument("--fresh", action="store_true", help="the decoder is untrained: prepare it")
    parser.add_argument(
        "--budget", type=float, nargs=2, default=(0.02, 0.02), metavar=("LEAST", "MOST"), help="share of all tokens"
    )
    parser.add_argument("--taught", action="store_true", help="choose tokens by the true sites")
    args = parser.parse_args()
    processor, model = load(args.model)
    if args.budget[1] < 0.1:
        model.set_attn_implementation({"text_config": "eager"})  # faster than the fused kernel on short sequences
    seeds = range(args.first_seed, args.first_seed + args.scenes)
    path = args.features or args.output / "features.safetensors"
    with PartialState().main_process_first():
        features = cached_features(model, processor.image_processor, seeds, path, args.workers)
    if args.fresh:
        prepare_decoder(model, features)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    model.model.scale_embedding.requires_grad_(False)
    args.workers = 0  # what is encoded stays where it is
    dataset = Questions(features, seeds, model.config.grids)
    collator = Collator(processor, args.budget)
    train(GuidedTrainer, model, dataset, args, {"adam_beta2": 0.98}, data_collator=collator, taught=args.taught)
    save(model, processor, args.output)


if __name__ == "__main__":
    main()
