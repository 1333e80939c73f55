"""A small plain model, trained as vision-language models are: whole pictures at several zooms and crops, up to 1,024 visual
tokens, one picture or two in a prompt; no levels, no budget, no selection.

    uhr-bat tiny plain --form qwen3_vl --pictures DIR --output runs/plain_qwen [--steps 4000] [--vision-steps 2500]

Two stages. First the tower: linear heads on the visual tokens of pictures name what stands in each (as in `vision.py`), and
the words get their vectors. Then all of it, by the language model's loss on the answers alone. The questions about a picture
stand behind it in one sequence, and none sees another (`packed`). Scenes are painted once, into `--pictures`.

Letters: B pictures of a step, M tokens of a sequence, V visual tokens.
"""

import math
from functools import cached_property, partial
from multiprocessing import get_context
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from ...common.commands import tells_errors
from ...common.files import whole_files
from ...common.outputs import MODEL_FILES, Output, check_outputs
from ...modeling_outputs_uhr_bat import CACHE
from ...scenes.layout import ASPECTS, FINEST, OBJECTS, PAINTS, SITES, WIDTH, make_scene
from ...scenes.native import native_scene, picture_of
from ...scenes.painting import paint
from ...scenes.questions import draw_question, make_question
from ..collator import IGNORED
from .plain_models import AROUND, CELL, DECODER, FORMS, MARKERS, ROWS, TILE, image_processor_of, model_of, save_plain, tokenizer_of
from .stages import make_parser, train

PLAIN_SEED = 2_000_000  # of the first scene; crowded ones, for the tower, and such with native objects have seeds of their own
KINDS = {"ordinary": 0, "crowded": 100_000, "native": 200_000}
STORED = 768  # px, the width at which scenes are kept: twice the finest scale of UHR-BAT-Tiny
WINDOW = 256  # px, the side of a part of a scene with native objects, at its own pixels
WINDOWS = 4  # of such a scene
LEAST_SEEN = 1.0  # px of a picture that an object must have to be asked about
LARGEST = 512  # px, of a whole picture
NOISE = 0.15
CROWDED = (300, 360)  # objects outside the sites of scenes for the tower: one in every third visual token, or more
QUESTIONS = 16  # about a picture
SITE = 1400 * FINEST / WIDTH  # px at the finest scale


# ---- Pictures --------------------------------------------------------------------------------------------------------


def scene_of(kind, number):
    seed = PLAIN_SEED + KINDS[kind] + number
    if kind == "native":
        return native_scene(seed)
    return make_scene(seed, objects_outside=CROWDED) if kind == "crowded" else make_scene(seed)


def _paint(kind, number, folder):
    scene = scene_of(kind, number)
    if kind == "native":  # parts around an object of a site, or a site, at the image's own pixels
        picture, rng, parts = picture_of(scene), np.random.default_rng([scene.seed, 8]), []
        around = [thing.centre for thing in scene.objects if thing.site is not None] or [scene.sites[0].centre]
        for _ in range(WINDOWS):
            centre = np.array(around[rng.integers(len(around))]) * picture.width / WIDTH
            left, top = (centre - rng.uniform(0.2, 0.8, 2) * WINDOW).round().astype(int)
            left, top = np.clip((left, top), 0, (picture.width - WINDOW, picture.height - WINDOW))
            parts.append(picture.paint((top, left, top + WINDOW, left + WINDOW), (picture.width, picture.height)))
            parts[-1] = (np.asarray(parts[-1]), (left, top))
        arrays = {"pixels": np.stack([part for part, _ in parts]), "corners": np.array([at for _, at in parts])}
    else:
        small = paint(scene).resize((STORED, round(STORED / scene.aspect)), Image.LANCZOS)
        arrays = {"pixels": np.asarray(small)}
    with whole_files(folder) as built:
        for name, array in arrays.items():
            np.save(built / f"{kind}_{number}_{name}.npy", array)


def paint_scenes(folder: Path, counts: dict[str, int], workers: int):
    """The scenes of each kind, from 0 on, as files of pixels; those that are there are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(kind, number) for kind, count in counts.items() for number in range(count)
               if not (folder / f"{kind}_{number}_pixels.npy").exists()]  # fmt: skip
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = [pool.submit(_paint, kind, number, folder) for kind, number in missing]
        for job in tqdm(jobs, desc="Painting scenes", unit="scene", disable=not jobs):
            job.result()


class View:
    """A part of a scene as a picture of some pixels.

    Args:
        box: (left, top, right, bottom) in units of the scene.
        size: (width, height) in pixels.
    """

    def __init__(self, scene, box, size):
        self.scene, self.box, self.size = scene, np.array(box, float), size

    def place(self, points) -> np.ndarray:
        """float[..., 2] in units -> (x, y) in pixels of the picture."""
        return (np.asarray(points, float) - self.box[:2]) * self.pixel_of_unit

    @property
    def pixel_of_unit(self):
        """float[2]: of x and y, which differ where a picture is pressed into a square."""
        return self.size / (self.box[2:] - self.box[:2])

    def holds(self, points, margin=0.0):
        at = self.place(np.asarray(points, float).reshape(-1, 2))
        return bool(((at >= margin) & (at <= np.subtract(self.size, margin))).all())

    @cached_property
    def sites(self):
        """Indices of the sites that lie in the picture whole."""
        half = 1400 / 2 * 0.92
        return [index for index, site in enumerate(self.scene.sites)
                if self.holds(site.placed([(-half, -half), (-half, half), (half, -half), (half, half)]))]  # fmt: skip

    def shows(self, question) -> bool:
        """Whether the picture holds all that a question needs."""
        if any(thing.size * self.pixel_of_unit.min() < LEAST_SEEN for thing in question.objects):
            return False
        if question.kind in ("colour", "type"):
            return self.holds([thing.centre for thing in question.objects], margin=2)
        return set(question.sites) <= set(self.sites)

    def questions(self, number, rng, whole):
        """Up to so many different questions that the picture answers."""
        found = {}
        for _ in range(3 * number):
            question = draw_question(self.scene, rng)
            if (whole or question.kind != "quadrant") and self.shows(question):
                found.setdefault(question.text, question)
            if len(found) == number:
                break
        return list(found.values())


class Pictures:
    """The painted scenes, and views of them."""

    def __init__(self, folder: Path, counts: dict[str, int]):
        self.folder, self.counts, self.scenes = folder, counts, {}
        self.by_aspect = {aspect: [] for aspect in ASPECTS}
        for number in range(counts.get("ordinary", 0)):
            self.by_aspect[self.scene("ordinary", number).aspect].append(number)

    def scene(self, kind, number):
        if (kind, number) not in self.scenes:
            self.scenes[kind, number] = scene_of(kind, number)
        return self.scenes[kind, number]

    def read(self, kind, number, name="pixels"):
        return np.load(self.folder / f"{kind}_{number}_{name}.npy", mmap_mode="r")

    def picture(self, kind, number, view) -> Image.Image:
        pixels = self.read(kind, number)
        scale = STORED / WIDTH
        box = view.box * scale
        left, top = np.floor(box[:2]).astype(int).clip(0) - 0
        right, bottom = np.minimum(np.ceil(box[2:]).astype(int), pixels.shape[1::-1])
        part = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
        inside = (box - (left, top, left, top)).clip(0, (*part.size, *part.size))
        return part.resize(view.size, Image.BICUBIC, tuple(inside))

    def crop(self, kind, rng, size, zooms, numbers=None):
        """A part of a scene, one of some, around a site, at a zoom of the finest scale."""
        while True:
            number = int(rng.integers(self.counts[kind]) if numbers is None else numbers[rng.integers(len(numbers))])
            scene = self.scene(kind, number)
            if not scene.sites:
                continue
            zoom = np.exp(rng.uniform(*np.log(zooms)))
            extent = np.array(size) / zoom * WIDTH / FINEST
            extent /= max(1, *(extent / (WIDTH, scene.height)))  # no larger than the scene
            site = scene.sites[rng.integers(len(scene.sites))]
            room = np.maximum(extent - 1400 * 1.3, 0) / 2 if rng.random() < 0.8 else extent / 3
            corner = np.array(site.centre) + rng.uniform(-room, room) - extent / 2
            corner = corner.clip(0, np.array((WIDTH, scene.height)) - extent)
            view = View(scene, (*corner, *(corner + extent)), size)
            view.number = number
            return view, self.picture(kind, number, view)

    def whole(self, rng, aspect, size, number=None):
        number = self.by_aspect[aspect][rng.integers(len(self.by_aspect[aspect]))] if number is None else number
        scene = self.scene("ordinary", number)
        view = View(scene, (0, 0, WIDTH, scene.height), size)
        return view, self.picture("ordinary", number, view)

    def native(self, rng, size):
        """A part of a part of a scene with native objects, at its own pixels or half of them."""
        number, part = int(rng.integers(self.counts["native"])), rng.integers(WINDOWS)
        scene = self.scene("native", number)
        corner = self.read("native", number, "corners")[part]
        extent = np.minimum(np.array(size) * (1 if rng.random() < 0.7 else 2), WINDOW)
        offset = rng.integers(0, WINDOW - extent + 1)
        left, top = offset
        pixels = np.ascontiguousarray(self.read("native", number)[part, top : top + extent[1], left : left + extent[0]])
        unit = WIDTH / scene.width
        start = (corner + offset) * unit
        view = View(scene, (*start, *(start + extent * unit)), size)
        return view, Image.fromarray(pixels).resize(size, Image.BICUBIC)


# ---- The tower -------------------------------------------------------------------------------------------------------

HEADS = {"colour": tuple(PAINTS), "kind": OBJECTS}


def labels_of(view) -> dict[str, np.ndarray]:
    """What stands in each visual token of a picture: float[V, names] of each head, and long[V] of the site; -1 where none of
    it is sure."""
    columns, rows = view.size[0] // CELL, view.size[1] // CELL
    made = {name: np.zeros((rows * columns, len(names)), np.float32) for name, names in HEADS.items()}
    for thing in view.scene.objects:
        (x, y), seen = view.place(thing.centre), thing.size * view.pixel_of_unit.min()
        if not (0 <= x < view.size[0] and 0 <= y < view.size[1]):
            continue
        token = int(y // CELL) * columns + int(x // CELL)
        near_edge = min(x % CELL, CELL - x % CELL, y % CELL, CELL - y % CELL) < seen / 4
        value = -1.0 if seen < LEAST_SEEN or near_edge else 1.0
        for name, what in (("colour", thing.colour), ("kind", thing.kind)):
            column = HEADS[name].index(what)
            made[name][token, column] = 1 if value > 0 else made[name][token, column] or -1
    centres = np.stack(np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5), -1).reshape(-1, 2) * CELL
    points = centres / view.pixel_of_unit + view.box[:2]
    site = np.zeros(len(points), np.int64)
    for place in view.scene.sites:
        site[place.contains(points)] = SITES.index(place.kind) + 1
    return {**made, "site": site}


class LabelledPictures(Dataset):
    """Batches of pictures of one size, and what their tokens show."""

    def __init__(self, pictures, form, batch_size, length):
        self.pictures, self.form, self.batch_size, self.length = pictures, form, batch_size, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([index, 11])
        size = (TILE, TILE) if self.form == "gemma3" else [(96, 96), (128, 128)][rng.integers(2)]
        number = self.batch_size * (192 * 192) // (size[0] * size[1])
        found = []
        for _ in range(number):
            draw = rng.random()
            if draw < 0.1:
                found.append(self.pictures.native(rng, size))
            elif draw < 0.15 and self.form == "gemma3":
                found.append(self.pictures.whole(rng, ASPECTS[rng.integers(3)], size))
            else:
                kind = "crowded" if rng.random() < 0.8 else "ordinary"
                found.append(self.pictures.crop(kind, rng, size, (0.7, 2.2)))
        labels = [labels_of(view) for view, _ in found]
        return {
            "images": [picture for _, picture in found],
            **{name: torch.from_numpy(np.concatenate([one[name] for one in labels])) for name in labels[0]},
        }


class Tower(nn.Module):
    """A plain model's way from pictures to visual tokens, and linear heads that name what stands in each."""

    def __init__(self, model, form):
        super().__init__()
        self.form, self.image_processor = form, image_processor_of(form)
        self.__dict__["model"] = model  # whose decoder is not trained, nor saved with the heads
        inner = model.model
        self.encoder = nn.ModuleList([inner.visual] if hasattr(inner, "visual") else [inner.vision_tower, inner.multi_modal_projector])
        width = model.config.text_config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.register_buffer("length", torch.tensor(1.0))  # of the rows, root mean square
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(names)) for name, names in HEADS.items()})
        self.heads["site"] = nn.Linear(width, len(SITES) + 1)
        for head in self.heads.values():
            nn.init.normal_(head.weight, std=0.02)
            nn.init.constant_(head.bias, -3.0)

    def rows(self, images):
        outputs = self.model.get_image_features(**pixels_of(self.form, self.image_processor, [(one,) for one in images]))
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
            loss = loss + (each * weight).sum() / (target > 0).sum().clamp_min(1) / 2
            held = (target > 0).sum(1) == 1
            found[name] = (logits[held].argmax(1) == target[held].argmax(1)).float().mean()
        found["site"] = (self.heads["site"](rows).argmax(1) == site)[site > 0].float().mean()
        return {"loss": loss, **found}


def quicken(model, form):
    """The same sums, faster on a CPU: short attention by plain products, a convolution of whole patches as one product."""
    model.set_attn_implementation({"vision_config": "eager"})
    if form == "qwen3_vl":
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
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.o_proj.weight.div_((2 * len(decoder.layers)) ** 0.5)
        layer.mlp.down_proj.weight.div_((2 * len(decoder.layers)) ** 0.5)
        for group in range(model.config.text_config.num_key_value_heads):
            head = group * attention.num_key_value_groups
            keys, queries = (slice(part * attention.head_dim, (part + 1) * attention.head_dim) for part in (group, head))
            attention.q_proj.weight[queries] = attention.k_proj.weight[keys]
            if attention.q_proj.bias is not None:
                attention.q_proj.bias[queries] = attention.k_proj.bias[keys]
            attention.o_proj.weight[:, queries] = attention.v_proj.weight[keys].T


# ---- All of it -------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Prompts with pictures of the same sizes (width, height), encoded: the views that are asked about, and of each picture of
    a prompt bfloat16[N, V, W] of its rows, with DeepStack's beside the decoder's."""

    views: list
    whole: bool
    sizes: list
    rows: list


def draw_views(pictures, form, rng, number):
    """(pictures of each prompt, view that its questions are about, whether that is whole): of one kind and one size."""
    draw, tile = rng.random(), (TILE, TILE) if form == "gemma3" else None
    if draw < 0.4:
        aspect = ASPECTS[rng.integers(len(ASPECTS))]
        sides = np.arange(96, LARGEST + 1, 32)  # mostly large ones, in which objects can be seen
        side = int(rng.choice(sides, p=sides**1.5 / (sides**1.5).sum()))
        size = tile or (side, max(round(side / aspect / CELL) * CELL, CELL))
        made = [pictures.whole(rng, aspect, size) for _ in range(number)]
    elif draw < 0.55:
        size = tile or tuple(int(side) for side in rng.choice([96, 128, 160, 192], 2))
        made = [pictures.native(rng, size) for _ in range(number)]
    elif draw < 0.85:
        size = tile or tuple(int(side) for side in rng.choice([96, 128, 160, 192, 224, 256, 288], 2))
        made = [pictures.crop("ordinary", rng, size, (0.6, 2.0)) for _ in range(number)]
    else:  # the whole picture, and a part of it
        aspect, side = ASPECTS[rng.integers(len(ASPECTS))], int(rng.choice([96, 128, 192]))
        first = tile or (side, max(round(side / aspect / CELL) * CELL, CELL))
        size = tile or tuple(int(side) for side in rng.choice([96, 128, 160, 192], 2))
        made = []
        for _ in range(number):
            view, picture = pictures.crop("ordinary", rng, size, (0.8, 2.0), pictures.by_aspect[aspect])
            made.append((view, (pictures.whole(rng, aspect, first, view.number)[1], picture)))
    rng = np.random.default_rng(0)
    kept = [(picture, view) for view, picture in made if view.questions(1, rng, draw < 0.4)]
    return [one if isinstance(one, tuple) else (one,) for one, _ in kept], [view for _, view in kept], draw < 0.4


@torch.no_grad()
def encode_views(model, form, image_processor, pictures, count, seed) -> list[Encoded]:
    """About so many views of scenes, encoded by the tower as it is."""
    rng, found, total = np.random.default_rng([seed, 13]), [], 0
    with tqdm(total=count, desc="Encoding pictures", unit="picture") as bar:
        while total < count:
            images, views, whole = draw_views(pictures, form, rng, 12)
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
    if form == "qwen3_vl":
        return dict(image_processor(images=[one for prompt in images for one in prompt], return_tensors="pt", do_resize=False))
    made = dict(image_processor(images=[one for prompt in images for one in prompt], return_tensors="pt", do_resize=False))
    return {"pixel_values": made["pixel_values"]}


class AskedAgain(Dataset):
    """Steps of questions about encoded pictures: one index is one step, the same whenever it is asked for."""

    def __init__(self, encoded, form, tokenizer, tokens, length):
        self.encoded, self.form, self.tokenizer, self.tokens, self.length = encoded, form, tokenizer, tokens, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([index, 14])
        generator, parts, spent = torch.Generator().manual_seed(index), [], 0
        while spent < self.tokens:
            group = self.encoded[rng.integers(len(self.encoded))]
            visual = sum(rows.shape[1] for rows in group.rows)
            number = int(np.clip((self.tokens - spent) // (visual + 200), 1, len(group.views)))
            chosen = rng.permutation(len(group.views))[:number]
            asked = [(int(idx), questions) for idx in chosen if (questions := group.views[idx].questions(QUESTIONS, rng, group.whole))]
            spent += number * (visual + 200)
            if not asked:
                continue
            noisy = []
            for rows in group.rows:
                rows = rows[[idx for idx, _ in asked]].float()
                noisy.append(rows + NOISE * torch.randn(rows.shape, generator=generator))
            visuals = [rows.shape[1] for rows in noisy]
            parts.append({**packed(self.form, self.tokenizer, group.sizes, [questions for _, questions in asked], visuals), "rows": noisy})
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
            ids = tokenizer(text.replace(MARKERS[form], AROUND[form]))["input_ids"]
            at = len(ids) - ids[::-1].index(image_id)
            answer = tokenizer(f" {question.answer}")["input_ids"] + [tokenizer.eos_token_id]
            rows.append((prompt_idx, ids[at:] + answer, [IGNORED] * len(ids[at:]) + answer))
        start, places, following, lengths = [], [], 0, iter(zip(visuals, sizes))
        for token in ids[:at]:
            if token == image_id:
                visual, (width, height) = next(lengths)
                start += [image_id] * visual
                if form == "qwen3_vl":
                    columns = width // CELL
                    places += [(following, following + i // columns, following + i % columns) for i in range(visual)]
                    following += max(width, height) // CELL
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
        "start": {"input_ids": torch.tensor(starts), "position_ids": places.unsqueeze(-2).expand(*places.shape[:-1], len(starts), -1)} | types,
        "picture": torch.tensor([picture_idx for picture_idx, _, _ in rows]),
        "questions": {
            "input_ids": pad(1, tokenizer.pad_token_id),
            "attention_mask": (torch.arange(len(starts[0]) + longest) < lengths[:, None]).long(),
            "position_ids": following.unsqueeze(-2).expand(*following.shape[:-1], len(rows), -1),
        },
        "labels": pad(2, IGNORED),
    }


class AskedAnew(Dataset):
    """Steps of questions about pictures that the tower sees as well: one index is one step."""

    def __init__(self, pictures, form, tokenizer, image_processor, tokens, length):
        self.pictures, self.form, self.tokenizer, self.image_processor = pictures, form, tokenizer, image_processor
        self.tokens, self.length = tokens, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng, parts, spent = np.random.default_rng([index, 15]), [], 0
        while spent < self.tokens:
            images, views, whole = draw_views(self.pictures, self.form, rng, 4)
            asked = [(image, questions) for image, view in zip(images, views)
                     if (questions := view.questions(QUESTIONS, rng, whole))]  # fmt: skip
            if not asked:
                continue
            pixels = pixels_of(self.form, self.image_processor, [image for image, _ in asked])
            sizes = [one.size for one in images[0]]
            visuals = [self.rows_of(size) for size in sizes]
            parts.append({**packed(self.form, self.tokenizer, sizes, [questions for _, questions in asked], visuals), "pixels": pixels})
            spent += len(asked) * (sum(visuals) + 200)
        return parts

    def rows_of(self, size):
        return ROWS if self.form == "gemma3" else size[0] * size[1] // CELL**2


def taken(form, rows):
    """Encoded pictures, of each of a prompt float[N, V, W], as `mm_encoder_outputs`."""
    rows = [row for prompt in zip(*rows) for row in prompt]
    if form == "qwen3_vl":
        whole = list(zip(*(row.split(DECODER["hidden_size"], dim=-1) for row in rows)))
        made = BaseModelOutputWithDeepstackFeatures(pooler_output=whole[0], deepstack_features=[list(one) for one in whole[1:]])
    else:
        made = BaseModelOutputWithPooling(pooler_output=torch.stack(rows))
    return {"mm_encoder_outputs": {"image": made}}


class PlainTrainer(Trainer):
    """The language model's loss on the answers."""

    right, form = None, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, count = 0, 0
        for part in inputs["parts"]:
            loss, answers = self.loss_of(model, part)
            losses, count = losses + loss, count + answers
        return (losses / count, None) if return_outputs else losses / count

    def loss_of(self, model, part):
        """(sum over the tokens of the answers, how many they are)"""
        inner, labels = self.accelerator.unwrap_model(model), part["labels"]
        with self.compute_loss_context_manager():
            image = taken(self.form, part["rows"]) if "rows" in part else part["pixels"]
            cache = inner.model(**part["start"], **image, use_cache=True)[CACHE]
            cache.batch_select_indices(part["picture"])
            hidden = inner.model(**part["questions"], **{CACHE: cache}, use_cache=True).last_hidden_state
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        logits = inner.lm_head(hidden[rows, columns].float())
        wanted = labels[rows, columns + 1]
        self.right = self.right or []
        spot = wanted != inner.generation_config.eos_token_id
        self.right.append(float((logits.argmax(-1) == wanted)[spot].float().mean()))
        return F.cross_entropy(logits, wanted, reduction="sum"), len(wanted)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.right:
            logs["right"] = round(float(np.mean(self.right)), 3)
            self.right = []
        super().log(logs, *args, **kwargs)
