"""Stages 2 to 4: the decoder learns where to look and to answer, from images that are encoded once.

    uhr-bat tiny finetune --model runs/vision --output runs/taught --fresh --taught
    uhr-bat tiny finetune --model runs/taught --output runs/alone --budget 0.02 0.4 --batch-size 12 --steps 180
    uhr-bat tiny finetune --model runs/alone --output runs/tiny --budget 0.02 0.08 --batch-size 2 --together 16

The loss is the sum of the language model's on the answers, through the ordinary `forward` with visual tokens at a budget
that is drawn anew for every step; of the KL divergence of the question's attention (`estimate_importance`, eq. 2) from
the cells of the anchor scale that the named sites cover; and of losses that say what to look at (`GuidedTrainer`). With
`--together`, questions about a scene are also asked about the same tokens, up to all of them, which the decoder reads
once.
"""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import Trainer

from ...common.asking import expand_placeholder
from ...common.budgets import counts_of_fraction
from ...common.commands import tells_errors
from ...common.loading import save_model
from ...modeling_outputs_uhr_bat import CACHE, UHRBatCompressionOutput
from ...scenes.evidence import evidence_tokens, site_cells, site_tokens
from ...scenes.layout import FINETUNING_SEED, make_scene
from ...scenes.questions import draw_question
from ...token_rules_uhr_bat import CompressionRules, compress_image
from ..collator import IGNORED
from .encoding import all_tokens, cached_features, freeze_vision
from .stages import LogsParts, load_with_attentions, make_parser, read_arguments, train

ANSWER_WEIGHT = 3.0  # of the language model's loss, beside those that say where to look
NOISE = 0.25  # on visual tokens of length 1 (root mean square): without it, scenes are learnt by heart
FRACTION_TOGETHER = (0.1, 1.0)  # of all tokens, which questions asked together see, drawn log-uniformly
NUM_ALONE = 4  # questions of a scene that are asked alone as well
TAUGHT = {"selector": "top_k", "refinement": []}  # by the true sites, with nothing to refine


# ---- Questions -------------------------------------------------------------------------------------------------------


class Questions(Dataset):
    """Questions about every scene, other ones each time that the scene comes round again."""

    def __init__(self, features, seeds, grids, num_questions, repeats=1000):
        self.features, self.seeds, self.grids, self.repeats = features, seeds, grids, repeats
        self.num_questions = num_questions
        self.scenes = [make_scene(seed) for seed in seeds]

    def __len__(self):
        return len(self.seeds) * self.repeats

    def __getitem__(self, index):
        repeat, scene_idx = divmod(index, len(self.seeds))
        scene, features = self.scenes[scene_idx], self.features[scene_idx]
        rng, generator = np.random.default_rng([scene.seed, repeat]), torch.Generator().manual_seed(index)
        noisy = [
            tokens + NOISE * torch.randn(tokens.shape, generator=generator)
            for tokens in (features.anchor_tokens, *features.tokens)
        ]
        drawn = [draw_question(scene, rng) for _ in range(self.num_questions)]
        return {
            "index": index,
            "features": replace(features, anchor_tokens=noisy[0], tokens=noisy[1:], partitions={}),
            "sites": site_tokens(scene, range(len(scene.sites)), self.grids),
            "questions": [
                # The portion of its sites in each anchor token, too.
                (question, targets_of(scene, question, self.grids) | {
                    "cells": torch.tensor(site_cells(scene, question.sites, self.grids[0]))[features.anchor_positions]
                })
                for question in drawn
            ],
        }  # fmt: skip


def targets_of(scene, question, grids) -> dict[str, list[tuple[int, int]]]:
    """Where a question should look: (scale, position) of all tokens of its sites and of its evidence."""
    return {
        "sites": site_tokens(scene, question.sites, grids),
        "evidence": evidence_tokens(scene, question, grids),
    }


def draw_tokens(features, sites, fraction, grids, generator, finish=lambda rows: rows) -> UHRBatCompressionOutput:
    """All tokens of the sites and others at random, a fraction of every scale: a choice that no question made.

    They stand scale after scale, row by row, as all tokens do (fraction 1) when nothing is compressed. `finish`: chosen
    rows of `features.tokens` -> visual tokens.
    """
    chosen, slots = [], []
    for scale, (tokens, positions, grid) in enumerate(zip(features.tokens, features.positions, grids)):
        needed = torch.isin(positions, torch.tensor([token for at, token in sites if at == scale]).long())
        order = torch.rand(len(positions), generator=generator).masked_fill(needed, -1).argsort()
        kept = order[: max(round(fraction * len(positions)), int(needed.sum()))].sort().values
        chosen.append(finish(tokens[kept.to(tokens.device)]))
        slots.append(torch.full((grid[0] * grid[1],), -1))
        slots[-1][positions[kept]] = torch.arange(len(kept))
    return UHRBatCompressionOutput([torch.cat(chosen)], [chosen], slots=[slots], images_per_prompt=[1])


class Collator:
    """Questions about scenes -> inputs of `GuidedTrainer.compute_loss`."""

    num_images = 1  # of a prompt

    def __init__(self, processor, grids, fractions, together):
        """`fractions`: the least and the greatest one of all tokens that a step spends, drawn log-uniformly."""
        self.processor, self.grids, self.fractions, self.together = processor, grids, fractions, together

    def __call__(self, items):
        # Drawn from the items, so that a run that goes on from a checkpoint draws the same.
        rng = np.random.default_rng(items[0]["index"])
        inputs = {
            "image_features": [item["features"] for item in items],
            # With budgets per scale and with one for all scales in turn: users have both.
            "alone": self.collate_alone(items, np.exp(rng.uniform(*np.log(self.fractions))), rng.random() < 0.5),
        }
        if self.together:
            inputs["together"] = [
                self.collate_together(item, np.exp(rng.uniform(*np.log(FRACTION_TOGETHER)))) for item in items
            ]
        return inputs

    def write(self, question):
        """Ids up to the last image's placeholder, ids after it, and the labels of these: long each."""
        messages = [
            {
                "role": "user",
                "content": [{"type": "image"}] * self.num_images + [{"type": "text", "text": question.text}],
            },
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
        image = int((ids == self.processor.image_token_id).nonzero()[-1])
        return ids[: image + 1], ids[image + 1 :], ids.where(answered, IGNORED)[image + 1 :]

    def sequence(self, question, num_tokens):
        """(ids, labels) of a question about so many visual tokens, and the index of the first of these."""
        before, after, labels = self.write(question)
        start = expand_placeholder(before, self.processor.image_token_id, num_tokens)
        return (torch.cat((start, after)), torch.cat((torch.full_like(start, IGNORED), labels))), len(before) - 1

    def write_together(self, questions):
        """Ids up to the image's placeholder, which all questions share, and what follows as inputs of `forward`."""
        written = [self.write(question) for question in questions]
        return written[0][0], self.pad([(after, labels) for _, after, labels in written])

    def pad(self, rows):
        """Rows of (ids, labels) -> inputs of `forward`, padded on the right."""
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence(column, True, padding_value)
            for column, padding_value in zip(zip(*rows), (self.processor.tokenizer.pad_token_id, IGNORED))
        )
        lengths = torch.tensor([len(row) for row, _ in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def with_words(self, question, targets):
        """The targets of a question, and the ids of the words that it asks about."""
        words = self.processor.tokenizer(f" {' '.join(question.words)}")["input_ids"]
        return targets | {"words": torch.tensor(words)}

    def collate_alone(self, items, fraction, one_budget):
        """The first questions of every scene, each in a sequence of its own with its own tokens, a fraction of all."""
        rows, token_counts, all_targets = [], [], []
        for item in items:
            available = item["features"].available
            counts = counts_of_fraction(fraction, available, None if one_budget else self.processor.default_budgets)
            for question, targets in item["questions"][:NUM_ALONE]:
                rows.append(self.sequence(question, sum(counts))[0])
                token_counts.append(counts)
                all_targets.append(self.with_words(question, targets))
        return {**self.pad(rows), "token_counts": torch.tensor(token_counts), "targets": all_targets}

    def collate_together(self, item, fraction):
        """All questions of a scene behind one sequence, which holds the same tokens for all of them."""
        generator = torch.Generator().manual_seed(item["index"])
        image = draw_tokens(item["features"], item["sites"], fraction, self.grids, generator)
        before, padded = self.write_together(question for question, _ in item["questions"])
        start = expand_placeholder(before, self.processor.image_token_id, len(image.pooler_output[0]))
        return {
            "start": start[None],
            "image": image,
            **padded,
            "targets": [self.with_words(*pair) for pair in item["questions"]],
        }


# ---- Training --------------------------------------------------------------------------------------------------------


@contextmanager
def attention_implementation(decoder, name):
    """Another attention of a decoder for a `with` block: the library reads it from the configuration alone."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def divergence(portion, importance) -> torch.Tensor:
    """KL(portion || importance): float[N] of sum 1 and float[N] of any positive sum."""
    found = (importance / importance.sum()).clamp_min(1e-9)
    return F.kl_div(found.log(), portion.to(found), reduction="sum")


class GuidedTrainer(LogsParts, Trainer):
    """The language model's loss, the divergence of the importance (eq. 2) from where the sites of the question lie, and
    four losses that say what to look at, -log of the attention each:

        name            layer           from                    to
        look_at_sites   importance      the question            visual tokens of the sites that it names
        look_at_words   last but two    before the answer       words that the question asks about
        then_at_sites   last but one    before the answer       visual tokens of the sites
        read_evidence   last            before the answer       visual tokens that show the evidence

    With `taught` the tokens are those that matter most by the true sites, none of them merged: as long as the
    importance is not learnt, the evidence is not among its choice, and a decoder learns to guess.
    """

    def __init__(self, *args, taught=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.taught = taught

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner = self.accelerator.unwrap_model(model)
        inner = getattr(inner, "get_base_model", lambda: inner)()
        loss = self.loss_alone(model, inner, inputs["image_features"], **inputs["alone"])
        if together := inputs.get("together"):
            loss = loss + sum(self.loss_together(inner, **scene) for scene in together) / len(together)
        return (loss, None) if return_outputs else loss

    def total(self, answers, parts, prefix=""):
        """The sum of the losses; the log gets each of them by its name."""
        for name, part in {"answers": answers, **parts}.items():
            self.parts[prefix + name].append(float(part.detach()))
        return ANSWER_WEIGHT * answers + sum(parts.values())

    def loss_alone(self, model, inner, image_features, token_counts, targets, **inputs):
        """Loss of questions that are each asked about their own choice of tokens."""
        rules = CompressionRules.of(inner.config, TAUGHT if self.taught else None)
        image_features = [image for image in image_features for _ in range(len(targets) // len(image_features))]
        looks, rows = defaultdict(list), []
        for ids, labels, features, wanted, counts in zip(
            inputs["input_ids"], inputs["labels"], image_features, targets, token_counts.tolist()
        ):
            question = ids[: int((labels != IGNORED).nonzero()[0])]
            importance = inner.estimate_importance(question, features.anchor_tokens)
            looks["divergence"].append(divergence(wanted["cells"], importance))
            known = wanted["cells"] if self.taught else importance
            maps = inner.model.refine_importance(question, features, known, rules)
            if rules.refinement:
                looks["refined"].append(self.divergence_of_scales(maps, features.positions, wanted))
            maps = [of_scale.detach() for of_scale in maps]
            rows.append(compress_image(features, maps, counts, inner, rules))
        tokens, importance, regions, slots = map(list, zip(*rows))
        compressed = UHRBatCompressionOutput(
            [torch.cat(scales) for scales in tokens], tokens, importance, regions, slots, [1] * len(tokens)
        )
        seen = inner.visual_inputs(inputs["input_ids"], inputs["attention_mask"], compressed)
        outputs = model(**inputs, **seen, output_attentions=True)
        starts = (inputs["input_ids"] == inner.config.image_token_id).int().argmax(1).tolist()
        parts = self.look(inner.config, outputs.attentions, inputs, slots, starts, targets)
        return self.total(outputs.loss, {name: torch.stack(ones).mean() for name, ones in looks.items()} | parts)

    def loss_together(self, model, start, image, targets, **inputs):
        """Loss of the questions that share the tokens of a scene, which go through the decoder once."""
        decoder = model.model.language_model
        with attention_implementation(decoder, "sdpa"):
            seen = model.visual_inputs(start, None, image)
            cache = model.model(input_ids=start, **seen, use_cache=True)[CACHE]
        cache.batch_repeat_interleave(len(targets))
        mask = inputs.pop("attention_mask")
        mask = torch.cat((mask.new_ones(len(mask), start.shape[1]), mask), dim=1)
        outputs = model(**inputs, attention_mask=mask, cache=cache, output_attentions=True)
        starts = (start == model.config.image_token_id).int().argmax(1).tolist() * len(targets)
        parts = self.look(model.config, outputs.attentions, inputs, image.slots * len(targets), starts, targets)
        return self.total(outputs.loss, parts, "whole_")

    def divergence_of_scales(self, maps, positions, wanted):
        """Mean over the finer scales of the divergence of the refined importance from the evidence; where a scale does
        not show it, from the sites."""
        divergences = []
        for scale in range(1, len(maps)):
            evidence, sites = ([token for at, token in wanted[name] if at == scale] for name in ("evidence", "sites"))
            shown = torch.isin(positions[scale], torch.tensor(evidence or sites)).to(maps[scale])
            divergences.append(divergence(shown / shown.sum(), maps[scale]))
        return torch.stack(divergences).mean()

    def look(self, config, attentions, inputs, slots, starts, targets):
        """-log of the attention that the right visual tokens and words get, mean over the questions that have them.

        Args:
            attentions: float[B, heads, Q, K] of every layer, what the last Q of K tokens of the sequence pay to all.
            inputs: `input_ids` and `labels` of those Q tokens, long[B, Q].
            slots: of every question, long[N] per scale: the slot of each token among those of the scale, -1 for none.
            starts: of every question, the index of its first visual token among the K.
            targets: of every question, from `targets_of`, and its words.
        """
        stops, in_sequence = [], []
        for row, wanted in enumerate(targets):
            places, stop = places_in_sequence(slots[row], starts[row])
            stops.append(stop)
            in_sequence.append({
                name: sorted({found for scale, token in wanted[name] if (found := int(places[scale][token])) >= 0})
                for name in ("sites", "evidence")
            } | {"words": wanted["words"]})  # fmt: skip
        return look(config, attentions, inputs, starts, stops, in_sequence)


def places_in_sequence(slots, start: int) -> tuple[list[torch.Tensor], int]:
    """(long[N] for every scale, the index in the sequence of each token, -1 of one that was not kept; the index after the last).

    Args:
        slots: long[N] per scale: the slot of each token among those of the scale, -1 for none.
        start: index of the first visual token.
    """
    places = []
    for slot in slots:
        places.append(torch.where(slot >= 0, slot + start, -1))
        start += int(slot.max()) + 1
    return places, start


def look(config, attentions, inputs, starts, stops, in_sequence) -> dict[str, torch.Tensor]:
    """The losses that say what to look at, by name (see `GuidedTrainer`).

    Args:
        attentions, inputs, starts: as in `GuidedTrainer.look`.
        stops: of every question, the index after its last visual token among the K.
        in_sequence: of every question, indices among the K of visual tokens of its `sites` and of its `evidence`, and ids
            of the `words` that it asks about.
    """
    layers = {
        "look_at_sites": config.importance_layer,
        "look_at_words": -3,
        "then_at_sites": -2,
        "read_evidence": -1,
    }
    maps = {name: attentions[layer].float().mean(1) for name, layer in layers.items()}
    losses = {name: [] for name in layers}
    for row, (ids, labels, wanted) in enumerate(zip(inputs["input_ids"], inputs["labels"], in_sequence)):
        start, stop = starts[row], stops[row]
        cached = attentions[0].shape[-1] - len(ids)
        end = int((labels != IGNORED).nonzero()[0])  # of the question
        words = torch.isin(ids[:end], wanted["words"].to(ids.device)).nonzero()[:, 0] + cached
        sites, evidence = wanted["sites"], wanted["evidence"]
        losses["look_at_words"].append(maps["look_at_words"][row, end - 1, words].sum())
        if sites:
            weights = maps["look_at_sites"][row, stop - cached : end].mean(0)
            losses["look_at_sites"].append(weights[sites].sum() / weights[start:stop].sum())
            losses["then_at_sites"].append(maps["then_at_sites"][row, end - 1, sites].sum())
        if evidence:
            losses["read_evidence"].append(maps["read_evidence"][row, end - 1, evidence].sum())
    return {name: -torch.stack(paid).clamp_min(1e-6).log().mean() for name, paid in losses.items() if paid}


@torch.no_grad()
def begin_by_matching(decoder):
    """What layers of an untrained decoder add starts out divided by the root of their number. The first head of every group of
    keys starts as a head that looks for what resembles it, and copies it ("mimetic" initialisation, Trockman and Kolter 2023).
    """
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.o_proj.weight.div_((2 * len(decoder.layers)) ** 0.5)
        layer.mlp.down_proj.weight.div_((2 * len(decoder.layers)) ** 0.5)
        for group in range(decoder.config.num_key_value_heads):
            head = group * attention.num_key_value_groups
            keys, queries = (
                slice(part * attention.head_dim, (part + 1) * attention.head_dim) for part in (group, head)
            )
            attention.q_proj.weight[queries] = attention.k_proj.weight[keys]
            if attention.q_proj.bias is not None:
                attention.q_proj.bias[queries] = attention.k_proj.bias[keys]
            attention.o_proj.weight[:, queries] = attention.v_proj.weight[keys].T


@torch.no_grad()
def prepare_decoder(model, features):
    """Prepare an untrained decoder for visual tokens.

    Text embeddings and visual tokens get entries of length 1 (root mean square), and the last norm what keeps the
    logits as they were: an embedding is then about as long as what a layer adds, and a step of the optimiser is small
    beside it.
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
    begin_by_matching(decoder)


@tells_errors
def main(arguments=None):
    parser = make_parser("tiny finetune", __doc__, steps=2000, batch_size=32, learning_rate=5e-4)
    parser.add_argument("--scenes", type=int, default=2000, help="training scenes, encoded once before the first step")
    parser.add_argument("--first-seed", type=int, default=FINETUNING_SEED, help="of the scenes")
    parser.add_argument("--features", type=Path, metavar="FILE", help="safetensors file that keeps the encoded scenes")
    parser.add_argument("--fresh", action="store_true", help="the decoder is untrained: prepare it")
    parser.add_argument(
        "--budget", type=float, nargs=2, default=(0.02, 0.02), metavar=("LEAST", "MOST"), help="fraction of all tokens"
    )
    parser.add_argument("--taught", action="store_true", help="choose tokens by the true sites")
    parser.add_argument("--together", type=int, default=0, metavar="N", help="and ask N questions about a whole scene")
    args = read_arguments(parser, arguments, "features")
    processor, model = load_with_attentions(args.model)
    seeds = range(args.first_seed, args.first_seed + args.scenes)
    path = args.features or args.output / "features.safetensors"
    with PartialState().main_process_first():
        features = cached_features(model, processor.image_processor, seeds, path, args.workers)
    if args.fresh:
        prepare_decoder(model, features)
    freeze_vision(model)
    args.workers = 0  # encoded scenes are in memory: worker processes would copy them
    dataset = Questions(features, seeds, model.config.grids, num_questions=max(args.together, 1))
    collator = Collator(processor, model.config.grids, args.budget, args.together > 0)
    train(GuidedTrainer, model, dataset, args, {"adam_beta2": 0.98}, data_collator=collator, taught=args.taught)
    save_model(model, processor, args.output)


if __name__ == "__main__":
    raise SystemExit(main())
