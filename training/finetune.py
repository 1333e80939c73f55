"""Stages 2 to 4: the decoder learns where to look and to answer, from images that are encoded once.

    uhr-bat train-finetune --model runs/vision --output runs/taught --fresh --taught
    uhr-bat train-finetune --model runs/taught --output runs/alone --budget 0.02 0.4 --batch-size 12 --steps 180
    uhr-bat train-finetune --model runs/alone --output runs/tiny --budget 0.02 0.08 --batch-size 2 --together 16

The loss is the language model's on the answers, through the ordinary `forward` with visual tokens at a budget that is
drawn anew for every step, the KL divergence of the question's attention (`estimate_importance`, eq. 2) from the cells
of the anchor scale that the named sites cover, and losses that say what to read (`GuidedTrainer`). With `--together`,
questions about a scene are also asked about the same tokens, up to all of them, which the decoder then reads once.
"""

from collections import defaultdict
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

from ..common.files import whole_files
from ..common.loading import load_model, save_model
from ..common.prompts import expand_placeholder
from ..compression_uhr_bat import CompressionRules, compress_image
from ..outputs_uhr_bat import CACHE, UHRBatCompressionOutput, UHRBatImageFeatures
from . import questions, scenes
from .common import IGNORED, make_parser, paint, points_of_tokens, settings, tokens_at, train

ANSWER_WEIGHT = 3.0  # of the language model's loss, beside those that say where to look
NOISE = 0.25  # on visual tokens of length 1 (root mean square): without it, scenes are learnt by heart
WHOLE = (0.1, 1.0)  # share of all tokens that questions asked together see, drawn log-uniformly
ALONE = 4  # questions of a scene that are asked alone as well
VISION = ("vision_tower", "multi_modal_projector", "scale_embedding")  # what makes visual tokens
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


def all_tokens(images) -> torch.Tensor:
    """float32[N, D]: the tokens of all scales of some images."""
    return torch.cat([torch.cat(image.tokens) for image in images]).float()


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
        with whole_files(path.parent) as built:
            save_file(stored, built / path.name)
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
    """Questions about every scene, others each time that the scene comes round again."""

    def __init__(self, features, seeds, grids, asked, repeats=1000):
        self.features, self.seeds, self.grids, self.asked, self.repeats = features, seeds, grids, asked, repeats
        self.scenes = [scenes.make_scene(seed) for seed in seeds]

    def __len__(self):
        return len(self.seeds) * self.repeats

    def __getitem__(self, index):
        repeat, place = divmod(index, len(self.seeds))
        scene, features = self.scenes[place], self.features[place]
        rng, generator = np.random.default_rng([scene.seed, repeat]), torch.Generator().manual_seed(index)
        noisy = [
            tokens + NOISE * torch.randn(tokens.shape, generator=generator)
            for tokens in (features.anchor_tokens, *features.tokens)
        ]
        asked = [questions.ask_any(scene, rng) for _ in range(self.asked)]
        return {
            "index": index,
            "features": replace(features, anchor_tokens=noisy[0], tokens=noisy[1:], partitions={}),
            "sites": site_tokens(scene, range(len(scene.sites)), self.grids),
            "questions": [(question, self.guide(scene, question, features.anchor_positions)) for question in asked],
        }

    def guide(self, scene, question, anchor_positions):
        """Where a question should look: shares of the anchor's tokens, and (scale, token) of its sites and evidence."""
        return {
            "cells": torch.tensor(site_cells(scene, question.sites, self.grids[0]))[anchor_positions],
            "sites": site_tokens(scene, question.sites, self.grids),
            "evidence": evidence_tokens(scene, question, self.grids),
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


def choose_tokens(features, sites, share, grids, generator) -> UHRBatCompressionOutput:
    """All tokens of the sites and others at random, a share of every scale: what no question chose.

    They stand scale after scale, row by row, as all tokens do (share 1) when nothing is compressed.
    """
    chosen, slots = [], []
    for scale, (tokens, places, grid) in enumerate(zip(features.tokens, features.positions, grids)):
        needed = torch.isin(places, torch.tensor([token for at, token in sites if at == scale]))
        order = torch.rand(len(places), generator=generator).masked_fill(needed, -1).argsort()
        kept = order[: max(round(share * len(places)), int(needed.sum()))].sort().values
        chosen.append(tokens[kept])
        slots.append(torch.full((grid[0] * grid[1],), -1))
        slots[-1][places[kept]] = torch.arange(len(kept))
    return UHRBatCompressionOutput([torch.cat(chosen)], [chosen], slots=[slots], images_per_prompt=[1])


class Collator:
    """Questions about scenes -> inputs of `GuidedTrainer.compute_loss`."""

    def __init__(self, processor, grids, share, together):
        """`share`: the least and the greatest part of all tokens that a step spends, drawn log-uniformly."""
        self.processor, self.grids, self.share, self.together = processor, grids, share, together

    def __call__(self, items):
        # Drawn from the items, so that a run that goes on from a checkpoint draws the same.
        rng = np.random.default_rng(items[0]["index"])
        inputs = {
            "image_features": [item["features"] for item in items],
            "alone": self.alone(items, np.exp(rng.uniform(*np.log(self.share)))),
        }
        if self.together:
            inputs["together"] = [self.ask_together(item, np.exp(rng.uniform(*np.log(WHOLE)))) for item in items]
        return inputs

    def write(self, question):
        """Ids up to the image's placeholder, ids after it, and the labels of these: long each."""
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
            # After a space, most words are one token.
            {"role": "assistant", "content": [{"type": "text", "text": f" {question.answer}"}]},
        ]
        text = self.processor.tokenizer.apply_chat_template(
            messages,
            chat_template=self.processor.chat_template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, answered = torch.tensor(text["input_ids"]), torch.tensor(text["assistant_masks"]).bool()
        (image,) = (ids == self.processor.image_token_id).nonzero()[:, 0].tolist()
        return ids[: image + 1], ids[image + 1 :], ids.where(answered, IGNORED)[image + 1 :]

    def pad(self, rows):
        """Rows of (ids, labels) -> inputs of `forward`, padded on the right."""
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(column, True, padding_value)
            for column, padding_value in zip(zip(*rows), (self.processor.tokenizer.pad_token_id, IGNORED))
        )
        lengths = torch.tensor([len(row) for row, _ in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def guide(self, question, guide):
        """The guide of a question, and the ids of the words that it asks about."""
        words = self.processor.tokenizer(f" {' '.join(question.words)}")["input_ids"]
        return guide | {"words": torch.tensor(words)}

    def alone(self, items, share):
        """The first questions of every scene, each in a sequence of its own with its own tokens, a share of all."""
        rows, budgets, guides = [], [], []
        for item in items:
            budget = budgets_of(share, item["features"], self.processor.default_budgets)
            for question, guide in item["questions"][:ALONE]:
                before, after, labels = self.write(question)
                start = expand_placeholder(before, self.processor.image_token_id, sum(budget))
                rows.append((torch.cat((start, after)), torch.cat((torch.full_like(start, IGNORED), labels))))
                budgets.append(budget)
                guides.append(self.guide(question, guide))
        return {**self.pad(rows), "budgets": torch.tensor(budgets), "guides": guides}

    def ask_together(self, item, share):
        """All questions of a scene behind one sequence, which holds the same tokens for all of them."""
        generator = torch.Generator().manual_seed(item["index"])
        image = choose_tokens(item["features"], item["sites"], share, self.grids, generator)
        written = [self.write(question) for question, _ in item["questions"]]
        before, _, _ = written[0]  # the same for all
        start = expand_placeholder(before, self.processor.image_token_id, len(image.pooler_output[0]))
        return {
            "start": start[None],
            "image": image,
            **self.pad([(after, labels) for _, after, labels in written]),
            "guides": [self.guide(*pair) for pair in item["questions"]],
        }


# ---- Training --------------------------------------------------------------------------------------------------------


class GuidedTrainer(Trainer):
    """The language model's loss, and those that say where to look.

    "divergence": of the importance (eq. 2) from where the sites of the question lie. "unseen": at the importance layer,
    the question is to look at the visual tokens of the sites that it names. The place before the answer is to look at
    the words that the question asks about two layers before the last ("unasked"), then at the sites ("unplaced"), and
    in the last layer at the visual tokens that show the evidence ("unread").

    With `taught` the tokens are those that matter most by the true sites, none of them merged: as long as the
    importance is not learnt, the evidence is not among its choice, and a decoder learns to guess.
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
        inner = self.accelerator.unwrap_model(model)
        loss = self.alone(model, inner, inputs["image_features"], **inputs["alone"])
        if together := inputs.get("together"):
            loss = loss + sum(self.ask_together(inner, **scene) for scene in together) / len(together)
        return (loss, None) if return_outputs else loss

    def total(self, answers, parts, prefix=""):
        """The sum of the losses; the log gets each of them by its name."""
        for name, part in {"answers": answers, **parts}.items():
            self.parts[prefix + name].append(float(part.detach()))
        return ANSWER_WEIGHT * answers + sum(parts.values())

    def alone(self, model, inner, image_features, budgets, guides, **inputs):
        """Loss of questions that are each asked about their own choice of tokens."""
        image_features = [image for image in image_features for _ in range(len(guides) // len(image_features))]
        rows = zip(inputs["input_ids"], inputs["labels"], image_features, guides)
        divergences = [self.divergence(inner, *row) for row in rows]
        if self.taught:
            compressed = self.compress(inner.config, guides, image_features, budgets.tolist())
        else:
            compressed = inner.compress(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                answer_mask=inputs["labels"] != IGNORED,
                image_features=image_features,
                token_counts=budgets,
            )
        outputs = model(**inputs, mm_encoder_outputs={"image": compressed}, output_attentions=True)
        starts = (inputs["input_ids"] == inner.config.image_token_id).int().argmax(1).tolist()
        parts = self.look(inner.config, outputs.attentions, inputs, compressed.slots, starts, guides)
        return self.total(outputs.loss, {"divergence": torch.stack(divergences).mean(), **parts})

    def ask_together(self, model, start, image, guides, **inputs):
        """Loss of the questions that share the tokens of a scene, which go through the decoder once."""
        decoder = model.model.language_model
        with settings(decoder.config, {"_attn_implementation": "sdpa"}):
            cache = model.model(input_ids=start, mm_encoder_outputs={"image": image}, use_cache=True)[CACHE]
        cache.batch_repeat_interleave(len(guides))
        mask = inputs.pop("attention_mask")
        mask = torch.cat((mask.new_ones(len(mask), start.shape[1]), mask), dim=1)
        outputs = model(**inputs, attention_mask=mask, cache=cache, output_attentions=True)
        starts = [start.shape[1] - len(image.pooler_output[0])] * len(guides)
        parts = self.look(model.config, outputs.attentions, inputs, image.slots * len(guides), starts, guides)
        return self.total(outputs.loss, parts, "whole_")

    def divergence(self, model, input_ids, labels, features, guide):
        """KL(cells of the sites || importance) of a question."""
        question = input_ids[: int((labels != IGNORED).nonzero()[0])]
        importance = model.estimate_importance(question, features.anchor_tokens)
        share = (importance / importance.sum()).clamp_min(1e-9)
        return F.kl_div(share.log(), guide["cells"].to(importance), reduction="sum")

    def compress(self, config, guides, image_features, budgets):
        """What `model.compress` returns for plain top-k, by the cells of the sites in place of the importance."""
        rules = CompressionRules.of(config, {"region_method": "none"})
        rows = [
            compress_image(features, guide["cells"], budget, config, rules)
            for features, guide, budget in zip(image_features, guides, budgets)
        ]
        tokens, importance, regions, slots = map(list, zip(*rows))
        return UHRBatCompressionOutput(
            [torch.cat(scales) for scales in tokens], tokens, importance, regions, slots, [1] * len(tokens)
        )

    def look(self, config, attentions, inputs, slots, starts, guides):
        """-log of the attention that the right visual tokens and words get, mean over the questions that have them.

        Args:
            attentions: float[B, heads, Q, K] of every layer, what the last Q of K places pay to all.
            inputs: `input_ids` and `labels` of those Q places, long[B, Q].
            slots: of every question, long[N] per scale: the place of each token among those of the scale, -1 for none.
            starts: of every question, the first of the K places that is a visual token.
            guides: of every question, from `Questions.guide`.
        """
        layers = {"unseen": config.importance_layer, "unasked": -3, "unplaced": -2, "unread": -1}
        maps = {name: attentions[layer].float().mean(1) for name, layer in layers.items()}
        losses = {name: [] for name in layers}
        for row, (ids, labels, guide) in enumerate(zip(inputs["input_ids"], inputs["labels"], guides)):
            places, stop = [], starts[row]
            for slot in slots[row]:
                places.append(torch.where(slot >= 0, slot + stop, -1))
                stop += int(slot.max()) + 1
            cached = attentions[0].shape[-1] - len(ids)
            end = int((labels != IGNORED).nonzero()[0])  # of the question
            asked = torch.isin(ids[:end], guide["words"]).nonzero()[:, 0] + cached
            sites, evidence = (
                sorted({place for scale, token in guide[name] if (place := int(places[scale][token])) >= 0})
                for name in ("sites", "evidence")
            )
            losses["unasked"].append(maps["unasked"][row, end - 1, asked].sum())
            if sites:
                weights = maps["unseen"][row, stop - cached : end].mean(0)
                losses["unseen"].append(weights[sites].sum() / weights[starts[row] : stop].sum())
                losses["unplaced"].append(maps["unplaced"][row, end - 1, sites].sum())
            if evidence:
                losses["unread"].append(maps["unread"][row, end - 1, evidence].sum())
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
    factor = 1 / all_tokens(features[:100]).square().mean().sqrt()
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


def main(arguments=None):
    parser = make_parser("train-finetune", __doc__, steps=2000, batch_size=32, learning_rate=5e-4)
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes, encoded once before the first step")
    parser.add_argument("--first-seed", type=int, default=scenes.FINETUNING_SEED, help="of the scenes")
    parser.add_argument("--features", type=Path, metavar="FILE", help="safetensors file that keeps the encoded scenes")
    parser.add_argument("--fresh", action="store_true", help="the decoder is untrained: prepare it")
    parser.add_argument(
        "--budget", type=float, nargs=2, default=(0.02, 0.02), metavar=("LEAST", "MOST"), help="share of all tokens"
    )
    parser.add_argument("--taught", action="store_true", help="choose tokens by the true sites")
    parser.add_argument("--together", type=int, default=0, metavar="N", help="and ask N questions about a whole scene")
    args = parser.parse_args(arguments)
    processor, model = load_model(args.model, torch.float32, device_map=None)
    model.set_attn_implementation({"text_config": "eager"})  # the one that returns what it looked at
    seeds = range(args.first_seed, args.first_seed + args.scenes)
    path = args.features or args.output / "features.safetensors"
    with PartialState().main_process_first():
        features = cached_features(model, processor.image_processor, seeds, path, args.workers)
    if args.fresh:
        prepare_decoder(model, features)
    for name in VISION:
        getattr(model.model, name).requires_grad_(False)
    args.workers = 0  # what is encoded stays where it is
    dataset = Questions(features, seeds, model.config.grids, asked=max(args.together, 1))
    collator = Collator(processor, model.config.grids, args.budget, args.together > 0)
    train(GuidedTrainer, model, dataset, args, {"adam_beta2": 0.98}, data_collator=collator, taught=args.taught)
    save_model(model, processor, args.output)


if __name__ == "__main__":
    main()
