"""LRS-VQA's system in its own form, small: tiles of 12 x 12 patches whose tokens are pooled to 6 x 6, and a decoder whose
first layers, as its module, look at every level of a dynamic pyramid. Parts of `uhr-bat tiny focus`.

Scenes are painted once, a file each: the thumbnail, the coarse levels whole, and of finer levels tiles around what questions
need. From these tiles the tower learns to say with one pooled token what the tower that it began as says with the patch that
shows most; encoded, they are what the decoder learns from.

Letters: T tiles, P patches of a tile, p pooled tokens a side, D decoder width, n tokens of a level in the sequence.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer

from ...common.files import whole_files
from ...common.loading import load_model
from ...image_pyramids_uhr_bat import POOLING, DynamicPyramid, dynamic_levels
from ...image_views_uhr_bat import normalize_tiles
from ...modeling_layers_uhr_bat import queries_and_keys
from ...modeling_region_focus_uhr_bat import pool_tokens
from ...modeling_uhr_bat import UHRBatForConditionalGeneration
from ...scenes.layout import FINETUNING_SEED, OBJECTS, PAD_SIDE, PAINTS, SITE_SIDE, WIDTH, Object, make_scene
from ...scenes.native import native_scene, picture_of
from ...scenes.painting import GRAIN, PAD, RENDER_WIDTH, Painter, paint
from ...scenes.questions import make_question
from ..collator import IGNORED
from .encoding import freeze_vision
from .finetune import Collator
from .stages import ByTheClock, LogsParts, train
from .zooming import NATIVE_SEED

TILE, PATCH = 96, 8
ALPHA_SELECT = 0.1  # by validation scenes: of a quarter of a level N_max holds no level that shows objects of a few native pixels
WHOLE = 40  # tiles of a level that is painted whole
# Of a finer level: sites, tiles of each beyond those of its objects, and of anything else.
SITES, PER_SITE, ELSEWHERE = 3, 7, 6
SEEDS = {"native": NATIVE_SEED + 10_000, "fixed": FINETUNING_SEED + 30_000}


def scene_of(kind: str, seed: int):
    return native_scene(seed) if kind == "native" else make_scene(seed)


def tiles_at(scene, level, points) -> list[int]:
    """The tiles of a level that show points of a scene, in their order, each once."""
    points = np.asarray(points, float).reshape(-1, 2)
    places = points / (WIDTH, scene.height) * level.size[::-1] // TILE
    columns, rows = places.astype(int).T
    inside = (rows >= 0) & (columns >= 0) & (rows < level.tiles[0]) & (columns < level.tiles[1])
    return list(dict.fromkeys((rows * level.tiles[1] + columns)[inside].tolist()))


def pads_of_site(scene, site):
    return [pad.centre for pad in scene.pads if site.contains(pad.centre)]


def choose_tiles(scene, level, rng) -> np.ndarray:
    """long[T], ascending: the tiles of a level that are painted."""
    if np.prod(level.tiles) <= WHOLE:
        return np.arange(np.prod(level.tiles))
    chosen = []
    for index, site in enumerate(scene.sites[:SITES]):
        things = [thing.centre for thing in scene.objects_of[index]]
        ground = site.centre + rng.uniform(-0.5, 0.5, (3, 2)) * SITE_SIDE
        near = np.repeat(np.reshape(pads_of_site(scene, site) + things, (-1, 2)), 2, axis=0)
        near = rng.permutation(near + rng.uniform(-0.5, 0.5, near.shape) * PAD_SIDE)
        more = [tile for points in (ground[:2], near) for tile in tiles_at(scene, level, points)]
        needed = tiles_at(scene, level, things)
        chosen += needed + [tile for tile in dict.fromkeys(more) if tile not in needed][:PER_SITE]
    around = rng.permutation([thing.centre for thing in scene.objects if thing.site is None])[:ELSEWHERE]
    chosen += tiles_at(scene, level, around)[: ELSEWHERE // 2]
    return np.unique([*chosen, *rng.integers(0, np.prod(level.tiles), ELSEWHERE // 2)])


def pyramid_of(scene):
    """Whose tiles are pixels, 0 to 255."""
    image = paint(scene) if scene.width is None else picture_of(scene)
    return DynamicPyramid(image, tile_size=TILE, patch_size=PATCH, arithmetic=(None, None, None))


def pyramid_levels(scene):
    """[`DynamicLevel`] of the levels of its pyramid, for which nothing is painted."""
    width = scene.width or RENDER_WIDTH
    return dynamic_levels((round(width / scene.aspect), width), TILE, PATCH)


def _paint(kind, seed, folder):
    scene = scene_of(kind, seed)
    pyramid, rng, stored = pyramid_of(scene), np.random.default_rng([seed, 11]), {}
    for level_idx in range(len(pyramid.levels) + 1):
        chosen = choose_tiles(scene, pyramid.levels[level_idx - 1], rng) if level_idx else np.arange(1)
        pixels = pyramid.tiles(level_idx, chosen.tolist()).round().astype(np.uint8)
        stored |= {f"pixels.{level_idx}": torch.from_numpy(pixels), f"tile.{level_idx}": torch.from_numpy(chosen)}
    with whole_files(folder) as built:
        save_file(stored, built / f"{kind}_{seed}.safetensors")


def paint_scenes(folder: Path, counts: dict[str, int], workers: int) -> list[tuple[str, int, Path]]:
    """(kind, seed, file) of so many scenes of each kind; those that are there are not painted again."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [(kind, SEEDS[kind] + number, folder / f"{kind}_{SEEDS[kind] + number}.safetensors")
             for kind, count in counts.items() for number in range(count)]  # fmt: skip
    missing = [(kind, seed) for kind, seed, path in found if not path.exists()]
    if not workers:  # in this process
        for kind, seed in missing:
            _paint(kind, seed, folder)
    elif missing:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            jobs = [pool.submit(_paint, kind, seed, folder) for kind, seed in missing]
            for job in tqdm(jobs, desc="Painting scenes", unit="scene"):
                job.result()
    return found


# ---- The tower -------------------------------------------------------------------------------------------------------

STREWN = 0.6  # share of a step's tiles over which objects and pads are strewn
APART, STREWN_SIZES, STREWN_PADS = (14, 40), (1.2, 14.0), (7, 60)  # px
FINER = 4  # times as fine as the tile, where they are painted
TILES_OF_STEP = 24
WEIGHT_OBJECT, WEIGHT_PAD, WEIGHT_HEADS = 4.0, 1.5, 0.3
LEAST_OBJECT, LEAST_PAD = 1.0, 3.0  # px that they must have to count as seen


def strewn(pixels, rng):
    """A tile with objects and pads strewn over it: uint8[3, tile, tile], and [(x, y, size in px, object)], [(x, y, side)]."""
    apart = np.exp(rng.uniform(*np.log(APART)))
    steps = np.arange(apart / 2, TILE, apart)
    at = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    at = at + rng.uniform(-0.25, 0.25, at.shape) * apart
    at = at[(at > 1).all(1) & (at < TILE - 1).all(1)]
    canvas = Image.fromarray(pixels.transpose(1, 2, 0)).resize((TILE * FINER,) * 2, Image.NEAREST)
    painter, objects, pads = Painter(ImageDraw.Draw(canvas), rng, FINER), [], []  # a unit is a pixel of the tile
    side = np.exp(rng.uniform(*np.log(STREWN_PADS)))
    for x, y in at:
        if side < apart * 1.2 and rng.random() < 0.6:
            painter.origin, painter.angle = (x, y), rng.uniform(0, np.pi)
            painter.box((-side / 2, -side / 2, side, side), painter.vary(PAD))
            pads.append((x, y, side))
        if rng.random() < 0.6:
            size = min(np.exp(rng.uniform(*np.log(STREWN_SIZES))), apart / 2)
            kind, colour = OBJECTS[rng.integers(len(OBJECTS))], list(PAINTS)[rng.integers(len(PAINTS))]
            thing = Object(kind, colour, (float(x), float(y)), rng.uniform(0, 2 * np.pi), size, None)
            painter.object(thing)
            objects.append((x, y, size, thing))
    found = np.asarray(canvas.reduce(FINER), np.float32)
    found = found + rng.normal(0, rng.uniform(0, GRAIN), (TILE, TILE, 1))
    return found.clip(0, 255).round().astype(np.uint8).transpose(2, 0, 1), objects, pads


def shown_in(scene, level, tile):
    """What a tile of a level shows: [(x, y, size in px, object)], [(x, y, side)] in its pixels."""
    unit, corner = level.size[1] / WIDTH, np.array((tile % level.tiles[1], tile // level.tiles[1])) * TILE

    def inside(centre):
        at = np.array(centre) * unit - corner
        return at if (at >= 0).all() and (at < TILE).all() else None

    objects = [(*at, thing.size * unit, thing) for thing in scene.objects if (at := inside(thing.centre)) is not None]
    return objects, [(*at, PAD_SIDE * unit) for pad in scene.pads if (at := inside(pad.centre)) is not None]


def what_counts(objects, pads):
    """float[side, side]: how much each patch of a tile shows, an object's size where its centre is; and the patches and
    objects of those that are seen."""
    side = TILE // PATCH
    counts, centres = np.zeros((side, side)), (np.arange(side) + 0.5) * PATCH
    for x, y, extent in pads:
        if extent >= LEAST_PAD:
            reach = max(extent * 0.45, PATCH / 2)
            counts[np.ix_(np.abs(centres - y) <= reach, np.abs(centres - x) <= reach)] = 0.1
    seen = []
    for x, y, size, thing in sorted(objects, key=lambda one: one[2]):
        if size >= LEAST_OBJECT:
            place = int(y // PATCH), int(x // PATCH)
            counts[place] = size
            seen.append((place, size, thing))
    return counts, seen


def pooled_target(tokens, counts):
    """What pooled tokens are to say: of every 2 x 2 patches what those say that show most, on average.

    Args:
        tokens: float[T, P, D]; counts: float[T, side, side].

    Returns:
        float[T, p * p, D], and float[T, p * p], how much there is.
    """
    T, P, D = tokens.shape
    p = round(P**0.5) // POOLING

    def blocks(rows):
        return (
            rows.unflatten(2, (p, POOLING)).unflatten(1, (p, POOLING)).transpose(2, 3).reshape(T, p * p, POOLING**2, -1)
        )

    of_blocks = blocks(counts[..., None])[..., 0]
    most = of_blocks.amax(-1)
    chosen = (of_blocks == most[..., None]).float()
    chosen = chosen / chosen.sum(-1, keepdim=True)
    return (blocks(tokens.unflatten(1, (p * POOLING,) * 2)) * chosen[..., None]).sum(2), most


def pool(tokens):
    """float[T, P, D] -> float[T, p * p, D], as `level_tokens` does."""
    return pool_tokens(tokens).flatten(2).transpose(1, 2)


def start_large_tiles(folder, layers):
    """(processor, model whose tower has tiles of TILE px and begins as that of a folder, the tower's part of that model).

    The tower ends with the layer that is read. The embedding of the finest levels' scale goes into the projector, as the
    decoder knows no token without one.
    """
    processor, old = load_model(folder, torch.float32, None)
    config = type(old.config).from_dict(old.config.to_dict())
    config.vision_config.image_size = TILE
    config.vision_config.num_hidden_layers = old.model.vision_tower.num_layers
    config.vision_feature_layer = -1
    config.scales = [TILE * times for times in (1, 2, 4, 6)][: len(config.scales)]
    separator = processor.tokenizer.convert_tokens_to_ids(":")
    config.region_focus = {
        "layers": list(layers), "mask_mode": "packed", "separator_token_id": separator, "alpha_select": ALPHA_SELECT,
    }  # fmt: skip
    model = UHRBatForConditionalGeneration(config)
    held = old.state_dict()
    name = next(name for name in held if name.endswith("position_embedding.weight"))
    times = TILE // old.model.tile_size
    first, table = held[name][:1], held[name][1:]
    side = round(len(table) ** 0.5)
    held[name] = torch.cat((first, table.view(side, side, -1).repeat(times, times, 1).flatten(0, 1)))
    bias = next(name for name in held if name.endswith("multi_modal_projector.linear_2.bias"))
    embedding = old.model.scale_embedding
    of_scale = (embedding.scale_vectors[-1] + embedding.table[0].mean(0)).detach()
    held[bias] = held[bias] + of_scale
    own = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in held.items() if name in own}, strict=False)
    model.model.region_focus.start_from(model.model.language_model, layers)
    torch.nn.init.zeros_(model.model.image_newline)
    processor.image_processor.crop_size = processor.image_processor.size = {"height": TILE, "width": TILE}
    processor.image_processor.scales = config.scales
    return processor, model, old.model, of_scale


class PaintedTiles(Dataset):
    """Tiles of a painted scene for a step: pixels uint8[T, 3, tile, tile], counts float[T, side, side], and (tile, patch row,
    patch column, colour, type) long[objects, 5] of what is seen."""

    def __init__(self, painted, seed, length):
        self.painted, self.seed, self.length = painted, seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        kind, seed, path = self.painted[rng.integers(len(self.painted))]
        scene, stored = scene_of(kind, seed), load_file(path)
        levels = pyramid_levels(scene)
        tiles = [(level_idx, row, int(tile)) for level_idx in range(1, len(levels) + 1)
                 for row, tile in enumerate(stored[f"tile.{level_idx}"])]  # fmt: skip
        seen = [shown_in(scene, levels[level_idx - 1], tile) for level_idx, _, tile in tiles]
        weights = np.array([1 + 3 * any(size >= LEAST_OBJECT for _, _, size, _ in objects) for objects, _ in seen])
        chosen = rng.choice(len(tiles), TILES_OF_STEP, p=weights / weights.sum())
        pixels, counts, named = [], [], []
        for number, place in enumerate(chosen):
            level_idx, row, _ = tiles[place]
            of_tile, (objects, pads) = stored[f"pixels.{level_idx}"][row].numpy(), seen[place]
            if rng.random() < STREWN:
                of_tile, objects, pads = strewn(of_tile, rng)
            count, things = what_counts(objects, pads)
            pixels.append(of_tile)
            counts.append(count)
            named += [(number, *at, list(PAINTS).index(thing.colour), OBJECTS.index(thing.kind))
                      for at, size, thing in things if size >= 2 and count[at] == size]  # fmt: skip
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "counts": torch.from_numpy(np.stack(counts)).float(),
            "named": torch.tensor(named or np.zeros((0, 5)), dtype=torch.long),
        }


class TowerTraining(nn.Module):
    """The way from large tiles to pooled tokens, what they are to say, and heads that name what they show."""

    def __init__(self, model, teacher, of_scale):
        super().__init__()
        self.model, self.of_scale = model, of_scale
        self.teacher = [teacher.requires_grad_(False).eval()]  # no part of what is trained
        width = len(of_scale)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({"colour": nn.Linear(width, len(PAINTS)), "kind": nn.Linear(width, len(OBJECTS))})

    def forward(self, pixels, counts, named):
        tiles = torch.from_numpy(normalize_tiles(pixels.numpy()))
        with torch.no_grad():
            (teacher,), side = self.teacher, self.teacher[0].tile_size
            times = TILE // side
            small = tiles.unflatten(3, (times, side)).unflatten(2, (times, side)).permute(0, 2, 4, 1, 3, 5)
            tokens = teacher.project_tiles(small.flatten(0, 2)) + self.of_scale
            q = side // PATCH
            tokens = (
                tokens.view(len(tiles), times, times, q, q, -1)
                .transpose(2, 3)
                .reshape(len(tiles), (times * q) ** 2, -1)
            )
            target, most = pooled_target(tokens, counts)
        pooled = pool(self.model.project_tiles(tiles))
        weight = 1 + (WEIGHT_PAD - 1) * (most > 0) + (WEIGHT_OBJECT - WEIGHT_PAD) * (most >= LEAST_OBJECT)
        error = ((pooled - target) ** 2).mean(-1)
        p = TILE // PATCH // POOLING
        tile, row, column, colour, kind = named.T
        block = row // POOLING * p + column // POOLING
        loss, parts = (error * weight).sum() / weight.sum(), {}
        parts |= {name: float(error[where].detach().mean()) for name, where in
                  (("ground", most == 0), ("pads", (most > 0) & (most < LEAST_OBJECT)), ("objects", most >= LEAST_OBJECT))}  # fmt: skip
        for name, rows in (("", pooled), ("_taught", target)) if len(named) else ():
            read = self.norm(rows[tile, block])
            for head, wanted in ("colour", colour), ("kind", kind):
                logits = self.heads[head](read)
                loss = loss + WEIGHT_HEADS * F.cross_entropy(logits, wanted)
                parts[head + name] = float((logits.argmax(-1) == wanted).float().mean())
        return {"loss": loss, "parts": parts}


class PartsTrainer(LogsParts, ByTheClock, Trainer):
    mean = staticmethod(np.nanmean)  # a step may have nothing to measure


class TowerTrainer(PartsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        for name, part in outputs["parts"].items():
            self.parts[name].append(part)
        return (outputs["loss"], None) if return_outputs else outputs["loss"]


def train_tower(args, painted):
    """A model of large tiles, its tower trained, and its processor."""
    processor, model, teacher, of_scale = start_large_tiles(args.model, args.layers)
    model.model.vision_tower.vision_model.set_attn_implementation("sdpa")
    training = TowerTraining(model.model, teacher, of_scale)
    model.requires_grad_(False)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(True)
    stop = args.minutes and time.monotonic() + 60 * args.minutes
    args.batch_size = 1
    train(
        TowerTrainer, training, PaintedTiles(painted, args.seed, args.steps * args.accumulation), args, {"bf16": False},
        data_collator=lambda items: items[0], stop=stop,
    )  # fmt: skip
    return processor, model


# ---- Levels of a scene, encoded --------------------------------------------------------------------------------------

QUESTIONS = 5  # about a site, which share what is seen of it
KINDS = {"colour": 0.22, "type": 0.24, "yes/no": 0.22, "count": 0.25, "quadrant": 0.07}
COMPARED = 0.15  # share of items about two sites
TILES_SEEN = (4, 10)  # of a level, which a question looks at
ANSWERED_FROM = (50, 260)  # tokens of a level, drawn log-uniformly
EVIDENCE_SHOWN, PADS_SHOWN = 0.95, 0.6
DEPTHS = {1: 0.72, 2: 0.22, 3: 0.06}  # how often an answer is read from the last level, the one before, and so on
# Of what a question is to look at: the objects it needs, the pads of its sites and what stands there, their ground.
LOOKED_AT = ((0.6, 0.28, 0.12), (0.0, 0.75, 0.25), (0.0, 0.0, 1.0))


@torch.no_grad()
def encode_scenes(model, painted, folder: Path):
    """[(kind, seed, file)] of encoded tiles of each painted scene, tokens in bfloat16; those that are there are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, seed, path in tqdm(painted, desc="Encoding scenes", unit="scene"):
        if (folder / path.name).exists():
            continue
        stored, encoded = load_file(path), {}
        for level_idx in range(sum(name.startswith("tile.") for name in stored)):
            tiles = torch.from_numpy(normalize_tiles(stored[f"pixels.{level_idx}"].numpy()))
            tokens = torch.cat([model.model.project_tiles(some) for some in tiles.split(16)])
            encoded[f"tokens.{level_idx}"] = (pool(tokens) if level_idx else tokens).bfloat16().contiguous()
            encoded[f"tile.{level_idx}"] = stored[f"tile.{level_idx}"]
        with whole_files(folder) as built:
            save_file(encoded, built / path.name)
    return [(kind, seed, folder / path.name) for kind, seed, path in painted]


class LevelOfScene:
    """The tokens of a level that there are.

    Attributes:
        tokens: bfloat16[V, D]; tile, place: long[V], place as in `modeling_region_focus_uhr_bat`.
        site: long[V], in which site the middle of each lies, -1 for none.
    """

    def __init__(self, scene, level, tokens, tile):
        T, P, D = tokens.shape
        p = round(P**0.5)
        self.scene, self.level = scene, level
        rows = (tile // level.tiles[1] * p)[:, None, None] + np.arange(p)[:, None]
        columns = (tile % level.tiles[1] * p)[:, None, None] + np.arange(p)
        rows, columns = (idx.ravel() for idx in np.broadcast_arrays(rows, columns))
        inside = (rows < level.grid[0]) & (columns < level.grid[1])
        self.tokens = tokens.flatten(0, 1)[torch.from_numpy(inside)]
        self.tile, rows, columns = np.repeat(tile, P)[inside], rows[inside], columns[inside]
        self.place, self.width = rows * (level.grid[1] + 1) + columns, level.grid[1] + 1
        self.unit = level.size[1] / WIDTH  # pixels
        points = (np.stack((columns, rows), -1) + 0.5) * (PATCH * POOLING) / self.unit
        self.site, self.points = np.full(len(points), -1), points
        for index, site in enumerate(scene.sites):
            self.site[site.contains(points)] = index

    def at(self, points, reach=0.0) -> np.ndarray:
        """bool[V]: the tokens that show points of the scene, or what lies so near to them, in units."""
        found, half = np.zeros(len(self.place), bool), PATCH * POOLING / 2 / self.unit + reach
        for point in points:
            found |= (np.abs(self.points - point) <= half).all(1)
        return found

    def wanted(self, question) -> np.ndarray:
        """float[V] of sum 1: what a question is to look at; zeros where there is nothing of it."""
        sites = [self.scene.sites[index] for index in question.sites]
        ground = np.isin(self.site, question.sites)
        pads = self.at([centre for site in sites for centre in pads_of_site(self.scene, site)], PAD_SIDE * 0.3)
        things = [thing for index in question.sites for thing in self.scene.objects_of[index]]
        pads |= self.at([thing.centre for thing in things])
        needed = self.at([thing.centre for thing in question.objects if thing.size * self.unit >= LEAST_OBJECT])
        seen = any(thing.size * self.unit >= LEAST_OBJECT for thing in things)
        weights = LOOKED_AT[0 if needed.any() else 1 if seen or PAD_SIDE * self.unit >= LEAST_PAD and pads.any() else 2]
        total = np.zeros(len(self.place))
        for weight, part in zip(weights, (needed, pads, ground)):
            total += weight * part / max(1, part.sum())
        return total / max(total.sum(), 1e-9)

    def tiles_of(self, question, rng) -> np.ndarray:
        """bool[V]: the tokens of some tiles, as a question would come to them."""
        wanted = self.wanted(question)
        every = np.unique(self.tile)
        here = rng.permutation(np.unique(self.tile[wanted > 0]))
        others = rng.permutation(np.setdiff1d(every, here))
        number = rng.integers(*TILES_SEEN)
        chosen = [*here[:number], *others[: max(2, number - len(here))]]
        return np.isin(self.tile, every if len(every) <= 9 else chosen)

    def answered_from(self, question, rng) -> np.ndarray:
        """bool[V]: some of the tokens, those that show what is needed mostly among them."""
        number = round(np.exp(rng.uniform(*np.log(ANSWERED_FROM))))
        things = [thing.centre for index in question.sites for thing in self.scene.objects_of[index]]
        chosen = self.at(things) & np.repeat(rng.random() < EVIDENCE_SHOWN, len(self.place))
        pads = [centre for index in question.sites for centre in pads_of_site(self.scene, self.scene.sites[index])]
        pads = self.at(pads, PAD_SIDE * 0.3) & (rng.random(len(self.place)) < PADS_SHOWN)
        for some in (pads, np.isin(self.site, question.sites), np.ones(len(self.place), bool)):
            left = rng.permutation(np.flatnonzero(some & ~chosen))
            chosen[left[: max(0, (number - chosen.sum()) * 2 // 3)]] = True
        return chosen

    def sequence(self, chosen):
        """(long[n] index of each token in order, -1 for the newline at the end of its row, of those chosen)."""
        kept = np.flatnonzero(chosen)
        kept = kept[self.place[kept].argsort()]
        rows = self.place[kept] // self.width
        ends = np.flatnonzero(np.diff(rows, append=-1))
        return np.insert(kept, ends + 1, -1)


class EncodedScene:
    """A scene, its encoded thumbnail bfloat16[P, D], and [`LevelOfScene`] of every level."""

    def __init__(self, kind, seed, path):
        self.scene, stored = scene_of(kind, seed), load_file(path)
        self.thumbnail = stored["tokens.0"][0]
        self.levels = [
            LevelOfScene(self.scene, level, stored[f"tokens.{level_idx}"], stored[f"tile.{level_idx}"].numpy())
            for level_idx, level in enumerate(pyramid_levels(self.scene), 1)
        ]

    def questions(self, rng) -> list:
        """Some questions about one site, or two that are compared."""
        sites, scene = range(len(self.scene.sites[:SITES])), self.scene
        if rng.random() < COMPARED and len(sites) > 1:
            pair = tuple(rng.choice(len(sites), 2, replace=False).tolist())
            drawn = [make_question(scene, "comparison", site, rng=rng) for site in pair for _ in range(8)]
            drawn = {one.text: one for one in drawn if one is not None and set(one.sites) == set(pair)}
            if drawn:
                return list(drawn.values())[:2]
        site = int(rng.integers(len(sites)))
        kinds = rng.choice(list(KINDS), 2 * QUESTIONS, p=list(KINDS.values()))
        drawn = [make_question(scene, kind, site, rng=rng) for kind in kinds]
        return list({one.text: one for one in drawn if one is not None}.values())[:QUESTIONS]


class Descents(Dataset):
    """(scene, questions, [(level, long[n] its tokens in order, whether it is answered)]) of two looks and an answer."""

    def __init__(self, scenes, seed, length):
        self.scenes, self.seed, self.length = scenes, seed, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, 12, index])
        one = self.scenes[rng.integers(len(self.scenes))]
        questions, seen, last = [], [], len(one.levels)
        while not questions:
            questions = one.questions(rng)
        for level in (one.levels[rng.integers(max(1, last - 2))], one.levels[rng.integers(max(0, last - 3), last)]):
            seen.append((level, level.sequence(level.tiles_of(questions[0], rng)), False))
        depth = min(last, int(rng.choice(list(DEPTHS), p=list(DEPTHS.values()))))
        level = one.levels[last - depth]
        seen.append((level, level.sequence(level.answered_from(questions[0], rng)), True))
        return one, questions, [part for part in seen if len(part[1])]


# ---- The decoder -----------------------------------------------------------------------------------------------------

ANSWER_WEIGHT = 3.0  # of the language model's loss, beside those that say where to look


def shared_mask(start: int, lengths: list[int]) -> torch.Tensor:
    """bool[1, 1, M, M]: questions that follow one beginning each see that and themselves, none the other ones."""
    group = torch.cat(
        [torch.zeros(start), *(torch.full((length,), number) for number, length in enumerate(lengths, 1))]
    )
    place = torch.arange(len(group))
    return ((place <= place[:, None]) & ((group == 0) | (group == group[:, None])))[None, None]


def drawn_to(logits, wanted):
    """KL of float[n] of sum 1 from the attention by logits float[heads, n], mean over heads."""
    paid = logits.float().softmax(-1).mean(0).clamp_min(1e-9)
    there = wanted > 0
    return (wanted[there] * (wanted[there].log() - paid[there].log())).sum()


class DescentTrainer(PartsTrainer):
    """Of every level: what the last token of a question looks at, at the last of the module's layers. Of the one that is
    answered from: the answer, and what is read at the decoder's last layer."""

    def __init__(self, *args, collator, focus, **kwargs):
        super().__init__(*args, **kwargs)
        self.collator, self.focus = collator, focus

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = [
            self.loss_of(model, one, questions, *part) for one, questions, seen in inputs["items"] for part in seen
        ]
        loss = torch.stack(losses).sum() / len(inputs["items"])
        return (loss, None) if return_outputs else loss

    def loss_of(self, model, one, questions, level, order, is_answered):
        embed, inner, written = (
            model.get_input_embeddings(),
            model.model,
            [self.collator.write(one) for one in questions],
        )
        before, separator = embed(written[0][0][:-1]), embed(torch.tensor([self.focus.separator_token_id]))
        rows = torch.cat((level.tokens[torch.from_numpy(order.clip(0))].float(), inner.image_newline.view(1, -1)))
        at = torch.from_numpy(np.where(order < 0, len(order), np.arange(len(order))))
        start = torch.cat((before, one.thumbnail.float(), separator, rows[at]))
        first, lengths = len(start) - len(order), [len(after) for _, after, _ in written]
        sequence = torch.cat((start, *(embed(after) for _, after, _ in written)))[None]
        positions = torch.cat([torch.arange(len(start)), *(len(start) + torch.arange(length) for length in lengths)])[
            None
        ]
        starts = len(start) + np.cumsum([0, *lengths[:-1]])
        # Of each question: its last token, and where it is answered.
        ends = [begin + int((labels != IGNORED).nonzero()[0]) - 1 for begin, (_, _, labels) in zip(starts, written)]
        reads, last = {self.focus.layers[-1]: "looks"}, self.focus.layers[-1] + 1
        if is_answered:
            reads, last = reads | {len(inner.language_model.layers) - 1: "reads"}, len(inner.language_model.layers)
        found, hidden = self.run_layers(
            inner.language_model, sequence, positions, shared_mask(len(start), lengths), last, reads, ends
        )
        losses = {}
        wanted = [
            torch.from_numpy(np.append(level.wanted(one), 0)[order]).float() for one in questions
        ]  # -1: a newline
        for name, logits in found.items():
            kept = [
                drawn_to(rows[:, first : len(start)], wants / wants.sum())
                for rows, wants in zip(logits.unbind(1), wanted)
                if wants.sum() > 0
            ]
            if kept:
                losses[name if is_answered or name != "looks" else "level"] = torch.stack(kept).mean()
        loss = sum(losses.values())
        if is_answered:
            labels = torch.cat([labels for _, _, labels in written])
            said = (labels != IGNORED).nonzero()[:, 0] + len(start)
            logits = model.lm_head(inner.language_model.norm(hidden[0, said - 1]))
            losses["answers"] = F.cross_entropy(logits, labels[said - len(start)])
            right = torch.tensor(
                [bool(logits[said - 1 == end].argmax() == labels[end + 1 - len(start)]) for end in ends]
            )
            self.parts["right"].append(float(right.float().mean()))
            loss = loss + ANSWER_WEIGHT * losses["answers"]
        for name, part in losses.items():
            self.parts[name].append(float(part.detach()))
        return loss

    @staticmethod
    def run_layers(decoder, hidden, positions, mask, number, reads, rows):
        """({name: float[heads, rows, M] products of some rows' queries with all keys at the layers of `reads`}, the output of so
        many layers; where nothing is to be had of it, the last layer's is not computed)."""
        rotated, found = decoder.rotary_emb(hidden, positions), {}
        for layer_idx, layer in enumerate(decoder.layers[:number]):
            if layer_idx in reads:
                attention = layer.self_attn
                query, key = queries_and_keys(attention, layer.input_layernorm(hidden), rotated)
                found[reads[layer_idx]] = query[0, :, rows] @ key[0].transpose(1, 2) * attention.scaling
            if layer_idx < number - 1 or number == len(decoder.layers):
                hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotated)
        return found, hidden


def train_descents(args, model, processor, encoded):
    """The decoder learns to look at every level, and to answer; its first layers become the module."""
    model.set_attn_implementation({"text_config": "sdpa"})
    model.model.region_focus.requires_grad_(False)
    freeze_vision(model)
    scenes = [EncodedScene(*one) for one in tqdm(encoded, desc="Reading scenes", unit="scene")]
    stop, focus = args.minutes and time.monotonic() + 60 * args.minutes, model.config.focus
    collator = Collator(processor, model.config.grids, None, True)
    train(
        DescentTrainer, model, Descents(scenes, args.seed, args.steps * args.batch_size * args.accumulation), args,
        {"bf16": False, "adam_beta2": 0.98}, data_collator=lambda items: {"items": items}, collator=collator, focus=focus,
        stop=stop,
    )  # fmt: skip
    model.model.region_focus.start_from(model.model.language_model, focus.layers)
