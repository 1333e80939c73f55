"""A small plain model, trained as vision-language models are: whole pictures at several zooms and crops, up to 1,024 visual
tokens, one picture or two in a prompt; no levels, no budget, no selection.

    uhr-bat tiny plain --form qwen3_vl --pictures DIR --output runs/plain_qwen3_vl

Three stages. The tower: linear heads on the visual tokens of pictures name what stands in each, and the words get their
vectors, as in `vision.py`. The decoder: by the language model's loss on the answers alone, from pictures that are encoded
once, those with few objects first. The decoder anew: from other pictures at every step, since the same ones are learnt by
heart. A run that was cut off goes on, stage by stage and from its last checkpoint.

The questions about a picture stand behind it, each at the positions that it would have alone, and none sees another.

Letters: N prompts of a step, V rows of a picture, W their width.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, Trainer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from ...common.commands import check_range, tells_errors
from ...common.files import whole_files, write_json
from ...common.outputs import MODEL_FILES, Output, check_outputs
from ...common.runs import check_same_settings
from ...modeling_outputs_uhr_bat import CACHE
from ...scenes.layout import OBJECTS, PAINTS, SITES, VALIDATION_SEEDS
from ..collator import IGNORED
from . import plain_models as forms
from .finetune import begin_by_matching
from .plain_pictures import LEAST_SEEN, RESOLVED, Pictures, draw_views, lists, paint_scenes, strewn
from .stages import train

QUESTIONS = 28  # about a picture
LISTS = 2  # of the objects of a site, besides
CLOSE = 0.35  # of the pictures are parts of scenes that are hardly larger than a site
# The share of the pictures with fewest objects that the decoder begins with, and the share of its steps after which it sees all:
# among many objects it would not find the right one.
FEW_FIRST, GROWING = 0.4, 0.275
NOISE = 0.15  # on rows of length 1 (root mean square): without it, scenes are learnt by heart
TOWER_PIXELS = 10 * 192 * 192  # of a step that trains the tower
STEP_TOKENS = 3500  # of a step, those of the questions among them, about
ADAM = {"adam_beta2": 0.98}
WHOLE = 448  # px, the width of whole scenes that a trained model is asked about


# ---- The tower -------------------------------------------------------------------------------------------------------

HEADS = {"colour": tuple(PAINTS), "kind": OBJECTS}
LOSS_WEIGHTS = {"colour": 0.5, "kind": 3.0}  # types are the hardest to read


def labels_of(view) -> dict[str, np.ndarray]:
    """What stands in each visual token of a picture: float[V, names] of each head, -1 where it may be named or not; and long[V]
    of the site."""
    columns, rows = view.size[0] // forms.CELL, view.size[1] // forms.CELL
    made = {name: np.zeros((rows * columns, len(names)), np.float32) for name, names in HEADS.items()}
    for thing in view.scene.objects:
        (x, y), seen = view.place(thing.centre), thing.size * view.pixel_of_unit.min()
        if not (0 <= x < view.size[0] and 0 <= y < view.size[1]):
            continue
        # The token of its centre names it, those that it reaches into need not.
        reach = [np.clip(((at - seen / 2) // forms.CELL, (at + seen / 2) // forms.CELL), 0, side - 1).astype(int)
                 for at, side in ((y, rows), (x, columns))]  # fmt: skip
        touched = [row * columns + column for row in range(reach[0][0], reach[0][1] + 1)
                   for column in range(reach[1][0], reach[1][1] + 1)]  # fmt: skip
        token = int(y // forms.CELL) * columns + int(x // forms.CELL)
        for name, what in (("colour", thing.colour), ("kind", thing.kind)):
            marks = made[name][:, HEADS[name].index(what)]
            marks[touched] = np.where(marks[touched] > 0, 1, -1)
            if seen >= LEAST_SEEN:
                marks[token] = 1
    centres = np.stack(np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5), -1).reshape(-1, 2) * forms.CELL
    points = centres / view.pixel_of_unit + view.box[:2]
    site = np.zeros(len(points), np.int64)
    for place in view.scene.sites:
        site[place.contains(points)] = SITES.index(place.kind) + 1
    return {**made, "site": site}


class LabelledPictures(Dataset):
    """Batches of pictures of one size, and what their tokens show."""

    def __init__(self, pictures, form, length):
        self.pictures, self.form, self.length = pictures, form, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([index, 11])
        size = (forms.TILE, forms.TILE) if self.form == "gemma3" else [(96, 96), (128, 128)][rng.integers(2)]
        # Large objects first: from small ones alone the types are not learnt in a thousand steps.
        smallest = 4.0 - 1.5 * min(index / self.length, 1)
        number = TOWER_PIXELS // (size[0] * size[1])
        found = []
        for _ in range(number):
            draw = rng.random()
            if draw < 0.1 and self.form == "gemma3":
                found.append(self.pictures.whole(rng, self.pictures.draw_aspect(rng), size))
            elif draw < 0.25:
                found.append(strewn(*self.pictures.native(rng, size), rng, smallest))
            else:
                found.append(strewn(*self.pictures.crop("ordinary", rng, size, (0.5, 2.0)), rng, smallest))
        labels = [labels_of(view) for view, _ in found]
        return {
            "images": [picture for _, picture in found],
            **{name: torch.from_numpy(np.concatenate([one[name] for one in labels])) for name in labels[0]},
        }


class Tower(nn.Module):
    """A plain model's way from pictures to visual tokens, and linear heads that name what stands in each."""

    def __init__(self, model, form):
        super().__init__()
        self.form, self.image_processor = form, forms.image_processor_of(form)
        self.__dict__["model"] = model  # whose decoder is not trained, nor saved with the heads
        inner = model.model
        self.encoder = nn.ModuleList(
            [inner.visual] if hasattr(inner, "visual") else [inner.vision_tower, inner.multi_modal_projector]
        )
        width = model.config.text_config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.register_buffer("length", torch.tensor(1.0))  # of the rows, root mean square
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(names)) for name, names in HEADS.items()})
        self.heads["site"] = nn.Linear(width, len(SITES) + 1)
        for head in self.heads.values():
            nn.init.normal_(head.weight, std=0.02)
            nn.init.constant_(head.bias, -3.0)

    def rows(self, images):
        outputs = self.model.get_image_features(
            **pixels_of(self.form, self.image_processor, [(one,) for one in images])
        )
        return torch.cat(list(outputs.pooler_output))

    def forward(self, images, site, **labels):
        rows = self.rows(images).float()
        with torch.no_grad():
            self.length.lerp_(rows.square().mean().sqrt(), 0.05)
        rows = self.norm(rows)
        loss = F.cross_entropy(self.heads["site"](rows), site)
        found = {}
        for name, target in labels.items():
            logits = self.heads[name](rows)
            sure = target >= 0
            weight = torch.where(target > 0, 4.0, 1.0) * sure
            each = F.binary_cross_entropy_with_logits(logits, target.clamp_min(0), reduction="none")
            loss = loss + LOSS_WEIGHTS[name] * (each * weight).sum() / (target > 0).sum().clamp_min(1)
            held = (target > 0).sum(1) == 1
            found[name] = (logits[held].argmax(1) == target[held].argmax(1)).float().mean()
        found["site"] = (self.heads["site"](rows).argmax(1) == site)[site > 0].float().mean()
        return {"loss": loss, **found}


def quicken(model):
    """The same sums, faster on a CPU: short attention by plain products, a convolution of whole patches as one product."""
    model.set_attn_implementation({"vision_config": "eager"})
    if hasattr(model.model, "visual"):
        embed = model.model.visual.patch_embed
        embed.forward = lambda pixels: F.linear(
            pixels.to(embed.proj.weight.dtype).flatten(1), embed.proj.weight.flatten(1), embed.proj.bias
        )


class TowerTrainer(Trainer):
    seen = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.seen = self.seen or {}
        for name, value in outputs.items():
            if name != "loss":
                self.seen.setdefault(name, []).append(float(value))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.seen:
            logs |= {name: round(float(np.nanmean(values)), 3) for name, values in self.seen.items()}
            self.seen = {}
        super().log(logs, *args, **kwargs)


@torch.no_grad()
def name_words(tower, embedding, tokenizer):
    """As `vision.name_words`: the words for colours, types and sites get the vectors by which the heads tell them apart."""
    embedding.weight.div_(embedding.weight.square().mean().sqrt())
    names = {"colour": (tuple(PAINTS), 0), "kind": (OBJECTS, 0), "site": (SITES, 1)}
    for head, (words, first) in names.items():
        vectors = (tower.norm.weight * tower.heads[head].weight)[first:]
        vectors = vectors - vectors.mean(0)
        for name, vector in zip(words, vectors):
            parts = [word for word in name.split() if head != "site" or word not in OBJECTS]  # "tank farm"
            for token in tokenizer("".join(f" {part}" for part in parts))["input_ids"]:
                embedding.weight[token] = vector / vector.square().mean().sqrt()


@torch.no_grad()
def prepare_decoder(model, tower):
    """As `finetune.prepare_decoder`: visual tokens of length 1 (root mean square) and heads that look for what resembles them."""
    decoder = model.model.language_model
    # Entries of length 1, root mean square: what the heads' norm sees.
    if hasattr(model.model, "visual"):
        first, *others = (model.model.visual.merger, *model.model.visual.deepstack_merger_list)
        first.linear_fc2.weight.div_(tower.length)
        first.linear_fc2.bias.div_(tower.length)
        for merger in others:  # what DeepStack adds begins at nothing
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
        decoder.norm.weight.fill_(model.config.text_config.hidden_size**-0.5)
    else:
        model.model.multi_modal_projector.mm_input_projection_weight.div_(tower.length)
        decoder.embed_tokens.weight.div_(model.config.text_config.hidden_size**0.5)  # the family multiplies by it
    begin_by_matching(decoder)


# ---- All of it -------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Prompts with pictures of the same sizes (width, height), encoded: the views that are asked about, and of each picture of
    a prompt bfloat16[N, V, W] of its rows, with DeepStack's beside the decoder's."""

    views: list
    whole: bool
    sizes: list
    rows: list


@torch.no_grad()
def encode_views(model, form, image_processor, pictures, count, seed) -> list[Encoded]:
    """About so many views of scenes, encoded by the tower as it is."""
    rng, found, total = np.random.default_rng([seed, 13]), [], 0
    with tqdm(total=count, desc="Encoding pictures", unit="picture") as bar:
        while total < count:
            images, views, whole = draw_views(pictures, form, rng, 12, close=total < CLOSE * count)
            if not views:
                continue
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model.get_image_features(**pixels_of(form, image_processor, images))
            rows = list(outputs.pooler_output)
            if deepstack := getattr(outputs, "deepstack_features", None):
                rows = [torch.cat(parts, dim=-1) for parts in zip(rows, *deepstack)]
            each = len(images[0])
            rows = [torch.stack(rows[first::each]).bfloat16() for first in range(each)]
            found.append(Encoded(views, whole, [one.size for one in images[0]], rows))
            total += len(views)
            bar.update(len(views))
    return found


def pixels_of(form, image_processor, images) -> dict:
    """What the family's image processor makes of the pictures of prompts, all of which have pictures of the same sizes."""
    flat = [one for prompt in images for one in prompt]
    made = dict(image_processor(images=flat, return_tensors="pt", do_resize=False))
    return {name: value for name, value in made.items() if name != "num_crops"}


def drawn(view, rng, whole) -> list:
    """Questions about a picture, and what is at its sites."""
    questions = view.questions(QUESTIONS, rng, whole)
    return questions and questions + lists(view, LISTS, rng)


class AskedAgain(Dataset):
    """Steps of questions about encoded pictures: one index is one step, the same whenever it is asked for."""

    def __init__(self, encoded, form, tokenizer, length):
        self.encoded = sorted(encoded, key=lambda group: np.mean([view.crowd for view in group.views]))
        self.form, self.tokenizer, self.length = form, tokenizer, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([index, 14])
        generator, parts, spent = torch.Generator().manual_seed(index), [], 0
        share = np.clip(index / (GROWING * self.length), FEW_FIRST, 1)
        while spent < STEP_TOKENS:
            group = self.encoded[rng.integers(max(1, round(share * len(self.encoded))))]
            visual = sum(rows.shape[1] for rows in group.rows)
            number = int(np.clip((STEP_TOKENS - spent) // (visual + 200), 1, len(group.views)))
            chosen = rng.permutation(len(group.views))[:number]
            asked = [
                (int(idx), questions) for idx in chosen if (questions := drawn(group.views[idx], rng, group.whole))
            ]
            spent += number * (visual + 200)
            if not asked:
                continue
            noisy = []
            for rows in group.rows:
                rows = rows[[idx for idx, _ in asked]].float()
                noisy.append(rows + NOISE * torch.randn(rows.shape, generator=generator))
            visuals = [rows.shape[1] for rows in noisy]
            parts.append(
                {
                    **packed(self.form, self.tokenizer, group.sizes, [questions for _, questions in asked], visuals),
                    "rows": noisy,
                }
            )
        return parts


def packed(form, tokenizer, sizes, questions_of, visuals) -> dict:
    """Inputs of the model's `forward` for prompts with pictures and questions: the pictures, and behind them each question at
    the positions that it would have alone.

    Args:
        sizes: (width, height) of the pictures of each prompt, the same for all.
        questions_of: of each prompt.
        visuals: rows of each picture.
    """
    image_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
    written = [{"type": "image"}] * len(sizes)
    starts, rows = [], []
    for prompt_idx, questions in enumerate(questions_of):
        for question in questions:
            messages = [{"role": "user", "content": [*written, {"type": "text", "text": question.text}]}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text.replace(forms.MARKERS[form], forms.AROUND[form]))["input_ids"]
            at = len(ids) - ids[::-1].index(image_id)
            answer = tokenizer(f" {question.answer}")["input_ids"] + [tokenizer.eos_token_id]
            rows.append((prompt_idx, ids[at:] + answer, [IGNORED] * len(ids[at:]) + answer))
        start, places, following, lengths = [], [], 0, iter(zip(visuals, sizes))
        for token in ids[:at]:
            if token == image_id:
                visual, (width, height) = next(lengths)
                start += [image_id] * visual
                if form == "qwen3_vl":
                    columns = width // forms.CELL
                    places += [(following, following + i // columns, following + i % columns) for i in range(visual)]
                    following += max(width, height) // forms.CELL
                    continue
            else:
                visual = 1
                start.append(token)
            places += [(following + i,) * 3 for i in range(visual)]
            following += visual
        starts.append(start)
    longest = max(len(ids) for _, ids, _ in rows)
    places, following = torch.tensor(places).T, (following + torch.arange(longest)).expand(3, -1)
    if form != "qwen3_vl":
        places, following = places[0], following[0]

    types = {"token_type_ids": (torch.tensor(starts) == image_id).long()} if form == "gemma3" else {}

    def pad(number, filler):
        return torch.tensor([row[number] + [filler] * (longest - len(row[number])) for row in rows])

    lengths = torch.tensor([len(starts[0]) + len(ids) for _, ids, _ in rows])
    return {
        "start": {
            "input_ids": torch.tensor(starts),
            "position_ids": places.unsqueeze(-2).expand(*places.shape[:-1], len(starts), -1),
        }
        | types,
        "picture": torch.tensor([picture_idx for picture_idx, _, _ in rows]),
        "questions": {
            "input_ids": pad(1, tokenizer.pad_token_id),
            "attention_mask": (torch.arange(len(starts[0]) + longest) < lengths[:, None]).long(),
            "position_ids": following.unsqueeze(-2).expand(*following.shape[:-1], len(rows), -1),
        },
        "labels": pad(2, IGNORED),
    }


class AskedAnew(Dataset):
    """Steps of questions about pictures that no other step has: one index is one step."""

    def __init__(self, pictures, form, tokenizer, image_processor, length):
        self.pictures, self.form, self.tokenizer, self.image_processor = pictures, form, tokenizer, image_processor
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng, parts, spent = np.random.default_rng([index, 15]), [], 0
        while spent < STEP_TOKENS:
            images, views, whole = draw_views(self.pictures, self.form, rng, 4, close=rng.random() < CLOSE)
            asked = [(image, questions) for image, view in zip(images, views)
                     if (questions := drawn(view, rng, whole))]  # fmt: skip
            if not asked:
                continue
            pixels = pixels_of(self.form, self.image_processor, [image for image, _ in asked])
            sizes = [one.size for one in images[0]]
            visuals = [forms.rows_of(self.form, size) for size in sizes]
            parts.append(
                {
                    **packed(self.form, self.tokenizer, sizes, [questions for _, questions in asked], visuals),
                    "pixels": pixels,
                }
            )
            spent += len(asked) * (sum(visuals) + 200)
        return parts


def taken(form, rows):
    """Encoded pictures, of each of a prompt float[N, V, W], as `mm_encoder_outputs`."""
    rows = [row for prompt in zip(*rows) for row in prompt]
    if form == "qwen3_vl":
        whole = list(zip(*(row.split(forms.DECODER["hidden_size"], dim=-1) for row in rows)))
        made = BaseModelOutputWithDeepstackFeatures(
            pooler_output=whole[0], deepstack_features=[list(one) for one in whole[1:]]
        )
    else:
        made = BaseModelOutputWithPooling(pooler_output=torch.stack(rows))
    return {"mm_encoder_outputs": {"image": made}}


def read(model, form, part) -> torch.Tensor:
    """The questions' last hidden states, behind their pictures."""
    image = taken(form, part["rows"]) if "rows" in part else part["pixels"]
    cache = model.model(**part["start"], **image, use_cache=True)[CACHE]
    cache.batch_select_indices(part["picture"])
    return model.model(**part["questions"], **{CACHE: cache}, use_cache=True).last_hidden_state


def loss_of(model, form, part, right=None) -> tuple[torch.Tensor, int]:
    """(sum over the tokens of the answers, how many they are); `right` gets the share of those that are right."""
    hidden, labels = read(model, form, part), part["labels"]
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    logits, wanted = model.lm_head(hidden[rows, columns]).float(), labels[rows, columns + 1]
    if right is not None:
        words = wanted != model.generation_config.eos_token_id
        right.append(float((logits.argmax(-1) == wanted)[words].float().mean()))
    return F.cross_entropy(logits, wanted, reduction="sum"), len(wanted)


class PlainTrainer(Trainer):
    """The language model's loss on the answers."""

    def __init__(self, *args, form, **kwargs):
        super().__init__(*args, **kwargs)
        self.form, self.right = form, []  # shares of the answers' tokens that are right, since the last line of the log

    def _load_from_checkpoint(self, folder, model=None):
        # The Trainer leaves out weights that the family names otherwise in files (Gemma 3).
        self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, counts = 0, 0
        for part in inputs["parts"]:
            with self.compute_loss_context_manager():
                loss, count = loss_of(self.accelerator.unwrap_model(model), self.form, part, self.right)
            losses, counts = losses + loss, counts + count
        return (losses / counts, None) if return_outputs else losses / counts

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.right:
            logs["right"] = round(float(np.mean(self.right)), 3)
            self.right = []
        super().log(logs, *args, **kwargs)


# ---- Answers ---------------------------------------------------------------------------------------------------------


def answers_right(model, form, pictures, number) -> dict[str, list[bool]]:
    """Whether answers are right, word for word: to questions about so many batches of parts of scenes, and of whole ones where the
    form takes them in more than one size. Objects that a question needs have `RESOLVED` px and more."""
    tokenizer, image_processor = forms.tokenizer_of(form), forms.image_processor_of(form)
    found = {"parts": []} | ({} if form == "gemma3" else {"whole": []})
    for name, right in found.items():
        rng, whole = np.random.default_rng(5), name == "whole"
        for _ in tqdm(range(number), desc=f"Asking about {name}"):
            if whole:
                aspect = pictures.draw_aspect(rng)
                size = WHOLE, round(WHOLE / aspect / forms.CELL) * forms.CELL
                made = [pictures.whole(rng, aspect, size) for _ in range(4)]
            else:
                size = forms.TILE, forms.TILE
                made = [pictures.crop("ordinary", rng, size, (1.0, 1.8)) for _ in range(6)]
            asked = [(picture, questions) for view, picture in made
                     if (questions := view.questions(12, rng, whole, RESOLVED))]  # fmt: skip
            if asked:
                right += right_of(model, form, tokenizer, image_processor, size, asked)
    return found


@torch.no_grad()
def right_of(model, form, tokenizer, image_processor, size, asked) -> list[bool]:
    """Of (picture, questions) of one size: whether each answer would be written as it is, to its end."""
    questions = [questions for _, questions in asked]
    part = packed(form, tokenizer, [size], questions, [forms.rows_of(form, size)])
    part["pixels"] = pixels_of(form, image_processor, [(picture,) for picture, _ in asked])
    hidden = read(model, form, part)
    written, wanted = model.lm_head(hidden).argmax(-1)[:, :-1], part["labels"][:, 1:]
    return ((written == wanted) | (wanted == IGNORED)).all(1).tolist()


# ---- The run ---------------------------------------------------------------------------------------------------------


# Steps and learning rate of each stage, by default.
STAGES = {"tower": (2500, 2e-3), "decoder": (3600, 1e-3), "anew": (3000, 8e-4)}
# What a run that goes on must have as before, besides those.
SETTINGS = ("form", "ordinary", "native", "views", "seed")


def keep_stages(folder: Path, args):
    """Raises `ValueError` where a run in `folder` had other settings."""
    names = *SETTINGS, *(f"{stage}_{name}" for stage in STAGES for name in ("steps", "rate"))
    settings, path = {name: getattr(args, name) for name in names}, folder / "settings.json"
    if path.exists():
        check_same_settings(folder, json.loads(path.read_text(encoding="utf-8")), settings)
    else:
        with whole_files(folder) as built:
            write_json(built / path.name, settings)


def weights(path: Path, module, make):
    """A stage's weights, from its file, or made and kept."""
    if not path.exists():
        make()
        with whole_files(path.parent) as built:
            save_file({name: one.detach().clone() for name, one in module.state_dict().items()}, built / path.name)
    module.load_state_dict(load_file(path))


def trained(args):
    """All stages of the run, those that are done from their files, and the model folder."""
    counts = {kind: getattr(args, kind) for kind in ("ordinary", "native")}
    stages = args.output / "stages"
    keep_stages(stages, args)
    paint_scenes(args.pictures, counts, args.workers)
    pictures = Pictures(args.pictures, counts)
    tokenizer, image_processor = forms.tokenizer_of(args.form), forms.image_processor_of(args.form)
    model = forms.model_of(args.form, args.seed)
    quicken(model)
    decoder = [parameter for name, parameter in model.named_parameters() if "language_model" in name]

    def run(stage, trainer, module, dataset, options=None, collator=lambda items: {"parts": items[0]}):
        settings = argparse.Namespace(
            output=stages / stage, steps=getattr(args, f"{stage}_steps"), learning_rate=getattr(args, f"{stage}_rate"),
            batch_size=1, accumulation=1, seed=args.seed, save_steps=args.save_steps, workers=0,
        )  # fmt: skip
        # In the order of their indices: what comes first is chosen.
        in_order = {"train_sampling_strategy": "sequential"} | (options or {})
        train(trainer, module, dataset, settings, in_order, data_collator=collator)

    tower = Tower(model, args.form)

    def train_tower():
        data = LabelledPictures(pictures, args.form, args.tower_steps)
        run("tower", TowerTrainer, tower, data, collator=lambda items: items[0])

    weights(stages / "tower.safetensors", tower, train_tower)

    answers = partial(PlainTrainer, form=args.form)

    def train_decoder():
        name_words(tower, model.get_input_embeddings(), tokenizer)
        prepare_decoder(model, tower)
        encoded = encode_views(model, args.form, image_processor, pictures, args.views, args.seed)
        run("decoder", answers, model, AskedAgain(encoded, args.form, tokenizer, args.decoder_steps), ADAM)

    def train_anew():
        run("anew", answers, model, AskedAnew(pictures, args.form, tokenizer, image_processor, args.anew_steps), ADAM)

    model.requires_grad_(False)
    for parameter in decoder:
        parameter.requires_grad_(True)
    weights(stages / "decoder.safetensors", model, train_decoder)
    weights(stages / "anew.safetensors", model, train_anew)
    forms.save_plain(model.to(torch.bfloat16), args.form, args.output)


@tells_errors
def main(arguments=None):
    parser = argparse.ArgumentParser(prog="uhr-bat tiny plain", description=__doc__.splitlines()[0])
    parser.add_argument("--form", choices=forms.FORMS, required=True, help="class of the library that the model is of")
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR", help="where painted scenes are kept")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="model folder to write")
    for kind, number in ("ordinary", 2600), ("native", 500):
        parser.add_argument(f"--{kind}", type=int, default=number, metavar="N", help=f"{kind} scenes")
    parser.add_argument("--views", type=int, default=4000, help="pictures that are encoded for the second stage")
    for stage, (steps, rate) in STAGES.items():
        parser.add_argument(f"--{stage}-steps", type=int, default=steps, metavar="N")
        parser.add_argument(f"--{stage}-rate", type=float, default=rate, metavar="RATE", help="its learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-steps", type=int, default=200, help="a checkpoint every so many steps")
    parser.add_argument("--workers", type=int, default=2, help="processes that paint scenes")
    parser.add_argument("--ask", type=int, default=60, metavar="N", help="validation scenes that it is asked about")
    args = parser.parse_args(arguments)
    check_range(args, 1, len(VALIDATION_SEEDS), "ask")
    check_range(args, 1, math.inf, "ordinary", "native", "views", "workers", "save_steps")
    check_range(args, 1, math.inf, *(f"{stage}_steps" for stage in STAGES))
    check_range(args, 0, 1, *(f"{stage}_rate" for stage in STAGES), above=True)
    if args.pictures.exists() and not args.pictures.is_dir():
        raise ValueError(f"--pictures {args.pictures} is a file. Give a folder, which may be new.")
    check_outputs((args.pictures,), Output("--output", args.output, names=MODEL_FILES))
    if args.pictures.resolve() == args.output.resolve():
        raise ValueError(f"--pictures and --output are both {args.output}. Give another folder to one.")
    kept = args.output / "config.json"
    if not kept.exists():
        trained(args)
    elif (other := json.loads(kept.read_text(encoding="utf-8")).get("model_type")) != args.form:
        raise ValueError(
            f"{args.output} holds a model of the type {other!r}, but --form is {args.form!r}. Give its own."
        )
    model = AutoModelForImageTextToText.from_pretrained(args.output, dtype="float32").eval()
    seen = args.pictures / "validation", {"ordinary": args.ask}
    paint_scenes(*seen, args.workers, VALIDATION_SEEDS.start)
    pictures = Pictures(*seen, VALIDATION_SEEDS.start)
    for name, right in answers_right(model, args.form, pictures, args.ask).items():
        print(f"{name}: {np.mean(right):.1%} of {len(right)} answers right")


if __name__ == "__main__":
    raise SystemExit(main())
