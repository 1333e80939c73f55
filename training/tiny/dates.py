"""A stage beside the others: an adapter of the decoder that answers questions about two dates of a place.

    uhr-bat tiny dates --model . --output runs/dates --encoded runs/pairs --pairs 2000 --minutes 60

The pairs are those of `scenes/dates.py`, encoded once; in every third one the second picture lies up to a token apart. The model
itself does not change: what is trained is a LoRA adapter of the decoder, which the selection reads, too. First, two heads of the
first layer learn to look from a token of the later date at what the earlier one shows at its place, without any question
(`match_first`). Then the losses are those of `finetune.py`, over the tokens of both dates, and two more that say what changed:
those heads go on (`look_across`), and linear heads, which are not kept, read from the later date's tokens what was there
(`tell_history`; a run that goes on from a checkpoint begins them anew).
"""

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from ...common.asking import encode, user_prompt
from ...common.budgets import counts_of_fraction
from ...common.commands import tells_errors
from ...common.files import whole_files
from ...modeling_outputs_uhr_bat import UHRBatCompressionOutput
from ...scenes import dates
from ...scenes.evidence import site_cells, site_tokens, tokens_at
from ...scenes.layout import OBJECTS, PAINTS, WIDTH
from ...token_rules_uhr_bat import CompressionRules, compress_image
from ..collator import IGNORED
from ..options import ModelOptions
from ..parts import add_adapter, continue_adapter
from .encoding import packed, unpacked
from .finetune import Collator, GuidedTrainer, divergence, draw_tokens, places_in_sequence
from .stages import ByTheClock, add_minutes, load_with_attentions, make_parser, read_arguments, train

SHIFTED = 3  # every so many pairs lie up to a token apart
SAME_PLACE = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]  # what `register` finds for two pictures of one size
FRACTION_TOGETHER = (0.05, 0.4)  # of all tokens, at least those of the sites, drawn log-uniformly
WHOLE = 1 / 24  # of the steps see all tokens
NUM_ALONE = 3  # questions of a pair that are asked alone
ACROSS = (0, 1)  # heads of the first layer that look at the other date
ACROSS_WEIGHT = 2.0
MATCHING_RATE = 6e-3
# What linear heads read from the tokens of the later date behind the second layer, and how many classes each has.
HISTORY = {"kind": len(OBJECTS) + 1, "colour": len(PAINTS) + 1, "change": 4}
HISTORY_WEIGHT, NOTHING = 1.0, 0.1  # of the loss, and in it of tokens at which nothing was
LONGEST = 2500  # tokens of a prompt of which `look_across` is taken
RANK = 32


# ---- Pairs -----------------------------------------------------------------------------------------------------------


def training_pair(seed: int, grid) -> dates.ScenePair:
    """The pair of a seed; every third one up to a token of `grid`, the finest, apart."""
    token = WIDTH / grid[1]
    shifted = seed % SHIFTED == SHIFTED - 1
    return dates.make_pair(
        seed, tuple(np.random.default_rng([seed, 10]).uniform(-token, token, 2)) if shifted else None
    )


def encode_pairs(model, image_processor, seeds, folder: Path):
    """A file for every pair: both dates, encoded, and how they differ. Files that are there stay as they are."""
    for seed in tqdm(seeds, desc="Encoding pairs", unit="pair"):
        if (path := folder / f"{seed}.safetensors").exists():
            continue
        pair, stored = training_pair(seed, model.config.grids[-1]), {}
        pictures = [dates.paint_date(pair, date) for date in (0, 1)]
        features = encode(model, image_processor(pictures, return_tensors="pt"))
        for date, differences in enumerate(model.model.differences_of(*features, SAME_PLACE)):
            stored |= packed(features[date], date)
            stored |= {f"{date}.differences.{scale}": one for scale, one in enumerate(differences)}
        with whole_files(folder) as built:
            save_file(stored, built / path.name)


def read_pair(folder: Path, seed: int, config) -> list:
    """The features of both dates of an encoded pair, compared already."""
    with safe_open(folder / f"{seed}.safetensors", "pt") as file:
        features = [unpacked(file.get_tensor, date, config) for date in (0, 1)]
        differences = tuple(
            [file.get_tensor(f"{date}.differences.{scale}") for scale in range(len(config.scales))] for date in (0, 1)
        )
    features = [
        replace(one, anchor_tokens=one.anchor_tokens.float(), tokens=[tokens.float() for tokens in one.tokens])
        for one in features
    ]
    features[1].partitions["dates"] = features[0].tokens, SAME_PLACE, differences
    return features


class PairQuestions(Dataset):
    """Questions about every pair, other ones each time that the pair comes round again."""

    def __init__(self, folder, seeds, config, num_questions, repeats=1000):
        self.folder, self.seeds, self.config, self.repeats = folder, seeds, config, repeats
        self.num_questions = num_questions

    def __len__(self):
        return len(self.seeds) * self.repeats

    def __getitem__(self, index):
        repeat, idx = divmod(index, len(self.seeds))
        grids, seed = self.config.grids, self.seeds[idx]
        pair, rng = training_pair(seed, grids[-1]), np.random.default_rng([seed, 11, repeat])
        item, drawn = self.tokens(index), []
        features = item["features"]
        while len(drawn) < self.num_questions:
            kind = dates.KINDS[rng.integers(len(dates.KINDS))]
            drawn += [question for question in [dates.make_question(pair, kind, rng=rng)] if question]
        questions = [(question, targets_of(pair, question, features, grids)) for question in drawn]
        return item | {"questions": questions}

    def tokens(self, index) -> dict:
        """An item without its questions."""
        seed = self.seeds[index % len(self.seeds)]
        pair = training_pair(seed, self.config.grids[-1])
        return {
            "index": index,
            "features": read_pair(self.folder, seed, self.config),
            "sites": [site_tokens(scene, range(len(scene.sites)), self.config.grids) for scene in pair.shown],
            "moved": [offset / WIDTH for offset in reversed(pair.shift)],
            "history": history_of(pair, self.config.grids),
        }


def history_of(pair, grids) -> list[torch.Tensor]:
    """long[len(HISTORY), N] for every scale: what was at each token of the later date, class 0 nothing or no change, and IGNORED where
    the tokens of the scale are too large to show it."""
    found = [torch.full((len(HISTORY), height * width), IGNORED) for height, width in grids]
    for labels, grid in list(zip(found, grids))[-2:]:
        labels.zero_()
        for thing in pair.before.objects:
            (token,) = tokens_at(pair.shown[1], [pair.moved(thing.centre)], grid)
            labels[:2, token] = torch.tensor([OBJECTS.index(thing.kind) + 1, list(PAINTS).index(thing.colour) + 1])
        for change in pair.changes:
            (token,) = tokens_at(pair.shown[1], [pair.moved(change.thing.centre)], grid)
            labels[2, token] = 1 if change.before is None else 2 if change.after is None else 3
    return found


def targets_of(pair, question, features, grids) -> dict[str, list]:
    """Where a question should look, for each date: (scale, position) of all tokens of its sites and of its evidence, and the portion
    of its sites in each anchor token."""
    evidence = [[], []]
    for date, tokens in dates.evidence_of_pair(pair, question, grids):
        evidence[date] += tokens
    return {
        "evidence": evidence,
        "sites": [site_tokens(scene, question.sites, grids) for scene in pair.shown],
        "cells": [
            torch.tensor(site_cells(scene, question.sites, grids[0]))[image.anchor_positions]
            for scene, image in zip(pair.shown, features)
        ],
    }


# ---- Training --------------------------------------------------------------------------------------------------------


def joined(slots, gap: int) -> list[torch.Tensor]:
    """The slots of two images as those of one with twice as many scales, whose tokens stand `gap` places apart."""
    earlier, later = ([one.clone() for one in of_image] for of_image in slots)
    first = next(one for one in later if (one >= 0).any())
    first[first >= 0] += gap
    return earlier + later


def as_one_image(targets, num_scales: int) -> dict:
    """Targets for each date as those of an image with twice as many scales."""
    both = {
        name: [(scale + date * num_scales, token) for date in (0, 1) for scale, token in targets[name][date]]
        for name in ("sites", "evidence")
    }
    return both | {"words": targets["words"]}


class PairCollator(Collator):
    """Questions about pairs -> inputs of `PairTrainer.compute_loss`."""

    num_images = 2

    @cached_property
    def gap(self) -> int:
        """Tokens of the template between two images."""
        text = user_prompt(self.processor, "", 2).split(self.processor.image_token)[1]
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def expand(self, ids, counts):
        """The ids with so many placeholders for each image."""
        repeats = torch.ones_like(ids)
        repeats[ids == self.processor.image_token_id] = torch.tensor(counts)
        return ids.repeat_interleave(repeats)

    def collate_alone(self, items, fraction, one_budget):
        rows, token_counts, all_targets = [], [], []
        for item in items:
            counts = [
                counts_of_fraction(fraction, image.available, None if one_budget else self.processor.default_budgets)
                for image in item["features"]
            ]
            told = {name: item[name] for name in ("moved", "history")}
            for question, targets in item["questions"][:NUM_ALONE]:
                before, after, labels = self.write(question)
                start = self.expand(before, list(map(sum, counts)))
                rows.append((torch.cat((start, after)), torch.cat((torch.full_like(start, IGNORED), labels))))
                token_counts.append(counts)
                all_targets.append(self.with_words(question, targets) | told)
        return {**self.pad(rows), "token_counts": torch.tensor(token_counts), "targets": all_targets}

    @cached_property
    def before(self):
        """Ids up to the last image's placeholder."""
        ids = self.processor.tokenizer(user_prompt(self.processor, "", 2), return_tensors="pt")["input_ids"][0]
        return ids[: int((ids == self.processor.image_token_id).nonzero()[-1]) + 1]

    def draw(self, item) -> UHRBatCompressionOutput:
        """The tokens of all sites of a pair, and others at random."""
        rng, generator = np.random.default_rng([item["index"], 1]), torch.Generator().manual_seed(item["index"])
        fraction = 1.0 if rng.random() < WHOLE else float(np.exp(rng.uniform(*np.log(FRACTION_TOGETHER))))
        images = [
            draw_tokens(features, sites, fraction, self.grids, generator)
            for features, sites in zip(item["features"], item["sites"])
        ]
        return UHRBatCompressionOutput(
            [one.pooler_output[0] for one in images],
            [one.tokens[0] for one in images],
            slots=[one.slots[0] for one in images],
            images_per_prompt=[2],
        )

    def collate_together(self, item, _):
        """All questions of a pair behind the tokens of all of its sites, and others at random."""
        image = self.draw(item)
        before, padded = self.write_together(question for question, _ in item["questions"])
        return {
            "start": self.expand(before, list(map(len, image.pooler_output)))[None],
            "image": image,
            **padded,
            "targets": [
                self.with_words(*pair) | {name: item[name] for name in ("moved", "history")}
                for pair in item["questions"]
            ],
        }


@contextmanager
def summed_weights(adapted, only=None):
    """A peft model whose layers have the sum of their weights and of their adapter's for a `with` block: of few tokens, two more
    products a layer would take longer than the sum once a step. Gradients go through it."""
    from peft.tuners.lora import LoraLayer

    layers = [module for part in only or [adapted] for module in part.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        base, (name,) = layer.get_base_layer(), layer.active_adapters
        both = layer.lora_B[name].weight @ layer.lora_A[name].weight
        weight = base.weight + layer.scaling[name] * both
        layer.forward = partial(F.linear, weight=weight, bias=base.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class PairTrainer(ByTheClock, GuidedTrainer):
    """As [`GuidedTrainer`], of prompts with two dates, with `look_across` and `tell_history`."""

    def tell_history(self, hidden, slots, start, wanted) -> torch.Tensor:
        """Cross-entropy of what the heads read, from what one sequence holds behind its second layer, float[M, D]."""
        places, _ = places_in_sequence(joined(slots, self.data_collator.gap), start)
        places, labels = places[len(slots[0]) :], wanted["history"]
        kept = [(place >= 0).nonzero()[:, 0] for place in places]
        at = torch.cat([place[one] for place, one in zip(places, kept)])
        labels = torch.cat([of_scale[:, one] for of_scale, one in zip(labels, kept)], dim=1)
        hidden = F.rms_norm(hidden[at].float(), hidden.shape[-1:])
        losses = []
        for head, label in zip(self.accelerator.unwrap_model(self.model).heads, labels):
            weight = torch.full((head.out_features,), 1.0)
            weight[0] = NOTHING
            losses.append(F.cross_entropy(head(hidden), label, weight, ignore_index=IGNORED))
        return torch.stack(losses).mean()

    def compute_loss(self, model, *args, **kwargs):
        with summed_weights(model):
            return super().compute_loss(model, *args, **kwargs)

    def loss_alone(self, model, inner, image_features, token_counts, targets, **inputs):
        rules, looks, rows = CompressionRules.of(inner.config), {"divergence": [], "refined": []}, []
        image_features = [pair for pair in image_features for _ in range(len(targets) // len(image_features))]
        for ids, labels, pair, wanted, counts in zip(
            inputs["input_ids"], inputs["labels"], image_features, targets, token_counts.tolist()
        ):
            question = ids[: int((labels != IGNORED).nonzero()[0])]
            order = (question == inner.config.image_token_id).cumsum(0) * (question == inner.config.image_token_id)
            looked = []
            for date, image in enumerate(pair):
                own = (order <= sum(counts[0])) if date == 0 else (order == 0) | (order > sum(counts[0]))
                importance = inner.estimate_importance(question[own], image.anchor_tokens)
                looks["divergence"].append(divergence(wanted["cells"][date], importance))
                maps = inner.model.refine_importance(question[own], image, importance, rules)
                of_date = {name: wanted[name][date] for name in ("sites", "evidence")}
                looks["refined"].append(self.divergence_of_scales(maps, image.positions, of_date))
                looked.append((image, [of_scale.detach() for of_scale in maps]))
            weighed, _ = inner.model.weigh_looked(looked, SAME_PLACE)
            rows += [compress_image(*one, share, inner, rules) for one, share in zip(weighed, counts)]
        tokens, importance, regions, slots = map(list, zip(*rows))
        compressed = UHRBatCompressionOutput(
            [torch.cat(scales) for scales in tokens], tokens, importance, regions, slots, [2] * len(targets)
        )
        seen = inner.visual_inputs(inputs["input_ids"], inputs["attention_mask"], compressed)
        outputs = model(**inputs, **seen, output_attentions=True, output_hidden_states=True)
        is_image = inputs["input_ids"] == inner.config.image_token_id
        parts = self.look(inner.config, outputs.attentions, inputs, slots, is_image.int().argmax(1).tolist(), targets)
        weights, gap = outputs.attentions[0][:, list(ACROSS)].float(), self.data_collator.gap
        parts["look_across"] = ACROSS_WEIGHT * torch.cat([
            look_across(of_row, pair, int(first.int().argmax()), gap, wanted["moved"], inner.config)
            for of_row, pair, first, wanted in zip(weights, zip(slots[::2], slots[1::2]), is_image, targets)
        ]).mean()  # fmt: skip
        parts["history"] = HISTORY_WEIGHT * torch.stack([
            self.tell_history(hidden, pair, int(first.int().argmax()), wanted)
            for hidden, pair, first, wanted in zip(outputs.hidden_states[2], zip(slots[::2], slots[1::2]), is_image, targets)
        ]).mean()  # fmt: skip
        parts |= {name: torch.stack(ones).mean() for name, ones in looks.items()}
        return self.total(outputs.loss, parts)

    def loss_together(self, model, start, image, targets, **inputs):
        seen = []
        hook = model.model.language_model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            loss = super().loss_together(model, start, image, targets, **inputs)
        finally:
            hook.remove()
        hidden = (
            seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        )  # of the tokens, which are read before the questions
        begin = int((start == model.config.image_token_id).int().argmax(1))
        parts = {"history": HISTORY_WEIGHT * self.tell_history(hidden[0], image.slots, begin, targets[0])}
        if start.shape[1] <= LONGEST:  # the square of it in memory
            weights, gap = first_weights(model, start, image), self.data_collator.gap
            across = look_across(weights, image.slots, begin, gap, targets[0]["moved"], model.config).mean()
            parts["look_across"] = ACROSS_WEIGHT * across
        for name, part in parts.items():
            self.parts[f"whole_{name}"].append(float(part.detach()))
        return loss + sum(parts.values())

    def look(self, config, attentions, inputs, slots, starts, targets):
        num_scales = len(config.scales)
        # In sequences behind shared tokens these are one pair's.
        slots = [joined(pair, self.data_collator.gap) for pair in zip(slots[::2], slots[1::2])]
        targets = [as_one_image(wanted, num_scales) for wanted in targets]
        return super().look(config, attentions, inputs, slots, starts, targets)


def look_across(weights, slots, start, gap, moved, config) -> torch.Tensor:
    """float[P]: -log of the attention that each token of the later date pays, with each head, to those that the earlier one has at
    its place, where it has any.

    Args:
        weights: float[heads, M, M].
        slots: of both images, long[N] per scale.
        start: index of the first visual token; `gap`: tokens between the images.
        moved: (down, across) that the later picture is moved, in parts of its width.
    """
    (places, _), losses = places_in_sequence(joined(slots, gap), start), []
    for earlier, later, (height, width) in zip(places[: len(config.grids)], places[len(config.grids) :], config.grids):
        here, there = ((one >= 0).nonzero()[:, 0] for one in (later, earlier))
        rows, columns = (here // width) - moved[0] * height, (here % width) - moved[1] * width
        near = ((rows[:, None] - there // width).abs() < 1) & ((columns[:, None] - there % width).abs() < 1)
        if near.any():
            paid = (weights[:, later[here]][:, :, earlier[there]] * near).sum(-1)[:, near.any(1)]
            losses.append(-paid.clamp_min(1e-6).log().flatten())
    return torch.cat(losses) if losses else weights.new_zeros(1)


def first_weights(model, start, image) -> torch.Tensor:
    """float[heads, M, M]: what the heads of ACROSS pay in the first layer, which reads what nothing was mixed with."""
    layer, embeds = model.model.language_model.layers[0], model.get_input_embeddings()(start)
    is_image = (start == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(is_image, torch.cat(image.pooler_output).to(embeds))
    places = model.model.language_model.rotary_emb(embeds, torch.arange(start.shape[1])[None])
    hidden, attention = layer.input_layernorm(embeds), layer.self_attn
    queries, keys = (
        project(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *places)
    keys = keys.repeat_interleave(attention.num_key_value_groups, dim=1)
    scores = (queries[0, list(ACROSS)] @ keys[0, list(ACROSS)].transpose(1, 2)) * attention.scaling
    return scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1)


def match_first(adapted, dataset, collator, steps):
    """`look_across` alone: the heads of ACROSS find the other date before anything is asked, which takes a step no pass through the
    decoder."""
    model = adapted.get_base_model()
    attention = model.model.language_model.layers[0].self_attn
    trained = [
        one for project in (attention.q_proj, attention.k_proj) for one in project.parameters() if one.requires_grad
    ]
    optimizer = torch.optim.Adam(trained, lr=MATCHING_RATE, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    paid = []
    for step in (bar := tqdm(range(steps), desc="Matching", unit="step")):
        item = dataset.tokens(step)
        image = collator.draw(item)
        start = collator.expand(collator.before, list(map(len, image.pooler_output)))[None]
        if start.shape[1] > LONGEST:
            continue
        begin = int((start == model.config.image_token_id).int().argmax(1))
        with summed_weights(adapted, [attention]):
            weights = first_weights(model, start, image)
        loss = look_across(weights, image.slots, begin, collator.gap, item["moved"], model.config).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        paid.append(float(loss.detach()))
        bar.set_postfix(look_across=np.mean(paid[-50:]))


@tells_errors
def main(arguments=None):
    parser = make_parser("tiny dates", __doc__, steps=1000, batch_size=2, learning_rate=2e-3)
    parser.add_argument("--pairs", type=int, default=2000, help="pairs for training")
    parser.add_argument("--first-seed", type=int, default=dates.PAIR_SEED, help="of the pairs")
    parser.add_argument("--encoded", type=Path, metavar="DIR", help="folder that keeps the encoded pairs")
    parser.add_argument(
        "--budget", type=float, nargs=2, default=(0.005, 0.06), metavar=("LEAST", "MOST"), help="fraction of all tokens"
    )
    parser.add_argument(
        "--together", type=int, default=16, metavar="N", help="ask N questions about the sites of a pair"
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter to go on from, with --matching 0")
    parser.add_argument("--matching", type=int, default=600, metavar="STEPS", help="before, of looking across alone")
    add_minutes(parser)
    args = read_arguments(parser, arguments)
    processor, model = load_with_attentions(args.model)
    seeds = range(args.first_seed, args.first_seed + args.pairs)
    folder = args.encoded or args.output / "pairs"
    with PartialState().main_process_first():
        encode_pairs(model, processor.image_processor, seeds, folder)
    if args.adapter:
        adapted = continue_adapter(model, args.adapter)
    else:
        adapted = add_adapter(model, ModelOptions(use_peft=True, lora_r=RANK, lora_alpha=RANK, lora_dropout=0.0))
    width = model.config.text_config.hidden_size
    # Parts of the model, so that they are trained with it; none of the adapter, so that they are not saved.
    adapted.heads = torch.nn.ModuleList([torch.nn.Linear(width, number) for number in HISTORY.values()])
    args.workers = 0
    dataset = PairQuestions(folder, seeds, model.config, args.together)
    collator = PairCollator(processor, model.config.grids, args.budget, together=True)
    if args.matching and not any(args.output.glob("checkpoints/checkpoint-*")):
        match_first(adapted, dataset, collator, args.matching)
    stop = args.minutes and time.monotonic() + 60 * args.minutes
    train(PairTrainer, adapted, dataset, args, {"adam_beta2": 0.98}, data_collator=collator, stop=stop)
    # As the adapter sees it: both may be moved together.
    adapted.active_peft_config.base_model_name_or_path = os.path.relpath(args.model.resolve(), args.output.resolve())
    for parameter in filter(lambda one: one.requires_grad, adapted.parameters()):
        parameter.data = parameter.data.bfloat16()
    adapted.save_pretrained(args.output)
    (args.output / "README.md").unlink(missing_ok=True)  # of peft, which says nothing


if __name__ == "__main__":
    raise SystemExit(main())
