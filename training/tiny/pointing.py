"""Pointing: a model learns which of the visual tokens show the objects that a question asks about, and to say what it points to.

    uhr-bat tiny point --model . --output runs/pointing --encoded DIR [--scenes 600] [--native 150] [--minutes 20] [--workers 2]

Nothing but the pointer is trained (`modeling_pointing_uhr_bat.py`). So what it reads is computed once and kept in a file for
each scene: visual tokens and the decoder's states of questions. Questions are asked as users ask them, each with the tokens
that the model chooses for it, of ordinary scenes and of such with native objects; of ordinary ones sixteen share many
tokens or all, too. Some ask about what a scene has not.

Letters: Q questions, V visual tokens, M text tokens, D decoder width.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer

from ...common.asking import compress, encode, expand_placeholder, write_prompts
from ...common.budgets import counts_of_fraction
from ...common.commands import tells_errors
from ...common.files import whole_files
from ...common.loading import load_model, save_model
from ...configuration_uhr_bat import PointerSettings
from ...modeling_outputs_uhr_bat import CACHE, TokenMaps, UHRBatCompressionOutput
from ...modeling_pointing_uhr_bat import MOST_COUNTED, Seen, UHRBatPointer
from ...scenes.evidence import points_of_tokens, site_tokens, tokens_at
from ...scenes.layout import FINETUNING_SEED, OBJECTS, PAINTS, WIDTH, make_scene
from ...scenes.native import native_scene, picture_of
from ...scenes.painting import paint
from ...scenes.questions import ABSENT, draw_question, make_absent_question, make_question
from ..collator import IGNORED
from .finetune import NOISE, Collator
from .stages import ByTheClock, LogsParts, add_minutes, make_parser, read_arguments, train
from .vision import CROWDED

FIRST_SEED = FINETUNING_SEED + 200_000  # of either kind of scenes
TOLD_SEED = FIRST_SEED + 1000  # others, of which a pointer is no surer than of what it will be asked
CROWDED_SEED = FIRST_SEED + 2000

TOGETHER, ALONE, NATIVE_ALONE = 16, 4, 8  # questions of a scene
ABSENT_SHARE = 0.15  # of the questions
COMPARED_SHARE = 0.3  # of them, beside those that are drawn: what is compared at a second place is missed most
FRACTIONS = (0.005, 0.06)  # of all tokens, from which a question alone is answered, drawn log-uniformly
NATIVE_TILES = 128
# An object of fewer pixels of a level is not wanted there; of even fewer it is wrong to be found.
LEAST_PIXELS, UNSEEN_PIXELS = 1.5, 0.8
EDGE = (0.9, 1.4)  # of a site, in its own frame: nothing stands between the two
NEAR_PIXELS = 1.2  # of a level, from the middle of an object to the edge of its token
TELL_NOISE = 0.5  # on what a told answer hears of them, likewise
LOUD = 0.1  # of a name that is told, at first
STATE_NOISE = 0.1  # on the decoder's states and words, as a part of their own length
CROWDS = 2  # crowded scenes of a step, for each other one
THINNED = 0.7
EMPTY_TIMES = 4  # tokens that show nothing, for each one that is looked at
PLACE_WEIGHTS = (1.0, 3.0)  # fewer questions have a second place
LEFT_ALONE = ("colour", "type", "yes/no", "quadrant")  # kinds that the decoder answers well by itself
REFUSED_SCENES, END = 12, "<|im_end|>"
ONE_FOR_ALL = ("tokens", "centres", "sides", "object")  # of questions that share tokens


def draw_questions(scene):
    """The questions about a scene that are asked alone, and those that are asked together."""
    rng, number = np.random.default_rng([scene.seed, 12]), ALONE if scene.width is None else NATIVE_ALONE
    drawn = [draw_asked(scene, rng) for _ in range(number + TOGETHER)]
    return drawn[:number], drawn[number:]


def draw_asked(scene, rng):
    kind = rng.random()
    if kind < ABSENT_SHARE:
        return make_absent_question(scene, rng=rng)
    compared = make_question(scene, "comparison", rng=rng) if kind < ABSENT_SHARE + COMPARED_SHARE else None
    return compared or draw_question(scene, rng)


class PointCollator(Collator):
    """Questions whose answers begin with what is pointed to says: numbers stand without a space before them, as their first
    token is the number then."""

    def words(self, question) -> torch.Tensor:
        """long[M]: the text behind the image, up to the answer."""
        _, after, labels = self.write(question)
        return after[: int((labels != IGNORED).nonzero()[0])]

    def first_token(self, kind, answer) -> int:
        """Id of the first token of an answer to a question of some kind."""
        said = answer if kind == "count" else f" {answer}"
        return self.processor.tokenizer(said, add_special_tokens=False)["input_ids"][0]

    def tokens_of_counted(self, question, scene) -> list[int]:
        """First tokens of the answers by what is counted: of every number; of a comparison of the second place, of what is right and
        of the first place, as an order of -1, 0 and 1 says; of other questions none."""
        if question.kind == "count":
            return [self.first_token("count", str(number)) for number in range(MOST_COUNTED + 1)]
        if question.kind != "comparison":
            return []
        first, second = (scene.sites[index].kind for index in question.sites)
        return [self.first_token(question.kind, one) for one in (second, question.answer, first)]


def read_levels(compressed):
    """{name: tensor of all visual tokens of an image}: level's side in tokens, position on its grid."""
    maps, sides, positions = compressed.slots[0], [], []
    for slots, places, grid in zip(maps.values, maps.positions, maps.grids):
        kept = places[slots >= 0][slots[slots >= 0].argsort()]
        positions.append(kept)
        sides.append(torch.full_like(kept, grid[0]))
    return {"side": torch.cat(sides), "position": torch.cat(positions)}


@torch.no_grad()
def encode_scene(model, processor, collator, seed, native):
    """What a file keeps of a scene: for every group of questions that share tokens "tokens", bfloat16[V, D] without scale
    embedding, "side" and "position", long[V]; "states" bfloat16[Q, M, D] of the text behind the image, padded on the left, and
    their number "length" long[Q]."""
    scene = native_scene(seed) if native else make_scene(seed)
    rng, stored = np.random.default_rng([seed, 11]), {}
    image = picture_of(scene) if native else paint(scene)
    cutting = {"native": True, "max_tiles": NATIVE_TILES} if native else {}
    features = encode(model, processor.image_processor([image], return_tensors="pt", **cutting))[0]
    total = sum(height * width for height, width in model.config.grids)
    alone, shared = draw_questions(scene)
    kept = []
    for idx, question in enumerate(alone):
        fraction = float(np.exp(rng.uniform(*np.log(FRACTIONS))))
        # With budgets per scale and with one for all scales in turn: users have both.
        if native or rng.random() < 0.5:
            options = {"budgets": max(8, round(total * fraction))}
        else:
            options = {"counts": [counts_of_fraction(fraction, features.available, processor.default_budgets)]}
        options |= {"max_tiles": NATIVE_TILES} if native else {}
        inputs = write_prompts(model, processor, [question.text], [[features]], **options)
        compressed = compress(model, inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        pointer, model.model.pointer = model.model.pointer, None  # states are the decoder's, whatever is pointed to already
        states = model.model(input_ids=ids, attention_mask=mask, **model.visual_inputs(ids, mask, compressed))
        model.model.pointer = pointer
        start = int((ids[0] == processor.image_token_id).nonzero()[-1]) + 1
        stored |= of_group(f"alone.{idx}", model, compressed, [states.last_hidden_state[0, start:]])
        kept.append(compressed)
    if native:
        compressed = joined(kept)
    else:
        fraction = 1.0 if rng.random() < 0.3 else float(np.exp(rng.uniform(*np.log((0.05, 1.0)))))
        compressed = choose_any(model, features, scene, fraction, rng)
    states = states_together(model, collator, shared, compressed)
    return stored | of_group("together", model, compressed, states)


@torch.no_grad()
def encode_crowd(model, processor, seed):
    """What a file keeps of a crowded scene, of which nothing is asked: "tokens", bfloat16[N, D], of all that show an object and some
    others, and "object", long[N], whether they do (-1: that is not known)."""
    scene = make_scene(seed, objects_outside=CROWDED)
    image = encode(model, processor.image_processor([paint(scene)], return_tensors="pt"))[0]
    side = np.repeat([grid[0] for grid in image.grids], image.available)
    position = torch.cat(image.positions).numpy()
    known = objects_of_tokens(label_tokens(scene, side, position, model.config.patch_size))
    tokens = torch.cat([model.model.without_scale(image, idx) for idx in range(len(image.grids))])
    kept = thin(known)
    return {"tokens": tokens[kept].bfloat16(), "object": known[kept]}


def of_group(name, model, compressed, states):
    tokens = model.model.seen_tokens(compressed, 0)[0]
    lengths = torch.tensor([len(one) for one in states])
    padded = pad_sequence([one.flip(0) for one in states], True).flip(1)
    found = {"tokens": tokens.bfloat16(), "states": padded.bfloat16(), "length": lengths} | read_levels(compressed)
    return {f"{name}.{key}": value.contiguous() for key, value in found.items()}


def choose_any(model, features, scene, fraction, rng):
    """Some tokens of the sites and others at random, of every scale."""
    grids, chosen, maps = model.config.grids, [], []
    of_sites, share = site_tokens(scene, range(len(scene.sites)), grids), rng.uniform(0.5, 1.0)
    for scale, (tokens, positions) in enumerate(zip(features.tokens, features.positions)):
        inside = np.isin(positions.numpy(), [token for at, token in of_sites if at == scale])
        kept = torch.from_numpy(rng.random(len(positions)) < np.where(inside, max(share, fraction), fraction))
        kept[int(rng.integers(len(kept)))] = True
        maps.append(torch.where(kept, kept.cumsum(0) - 1, -1))
        chosen.append(tokens[kept])
    slots = [TokenMaps(maps, features.positions, features.grids, fill=-1, flat=True)]
    return UHRBatCompressionOutput(
        [torch.cat(chosen)], [chosen], slots=slots, images_per_prompt=[1], scales=[list(features.scales)]
    )


def joined(kept):
    """What any of some questions keeps of an image."""
    tokens, maps, positions = [], [], []
    grids = kept[0].slots[0].grids
    for level_idx in range(len(grids)):
        found = {}
        for one in kept:
            slots, places = one.slots[0].values[level_idx], one.slots[0].positions[level_idx]
            for place, slot in zip(places[slots >= 0].tolist(), slots[slots >= 0].tolist()):
                found[place] = one.tokens[0][level_idx][slot]
        positions.append(torch.tensor(sorted(found), dtype=torch.long))
        maps.append(torch.arange(len(found)))
        width = kept[0].tokens[0][0].shape[1]
        tokens.append(torch.stack([found[place] for place in sorted(found)]) if found else torch.zeros(0, width))
    slots = [TokenMaps(maps, positions, grids, fill=-1, flat=True)]
    return UHRBatCompressionOutput(
        [torch.cat(tokens)], [tokens], slots=slots, images_per_prompt=[1], scales=kept[0].scales
    )


def states_together(model, collator, questions, compressed):
    """[float[M, D]]: last states of the text of every question behind the same tokens."""
    before, padded = collator.write_together(questions)
    start = expand_placeholder(before, model.config.image_token_id, len(compressed.pooler_output[0]))[None]
    cache = model.model(input_ids=start, **model.visual_inputs(start, None, compressed), use_cache=True)[CACHE]
    cache.batch_repeat_interleave(len(questions))
    mask = torch.cat(
        (padded["attention_mask"].new_ones(len(questions), start.shape[1]), padded["attention_mask"]), dim=1
    )
    states = model.model(input_ids=padded["input_ids"], attention_mask=mask, cache=cache).last_hidden_state
    ends = (padded["labels"] != IGNORED).int().argmax(1).tolist()
    return [of_question[:end] for of_question, end in zip(states, ends)]


_worker = {}


def _start_worker(folder):
    torch.set_num_threads(1)
    processor, model = load_model(folder, torch.float32, device_map=None)
    _worker["about"] = model, processor, PointCollator(processor, model.config.grids, None, True)


def _make(seed, kind, folder):
    model, processor, collator = _worker["about"]
    torch.manual_seed(seed)
    crowded = kind == "crowded"
    stored = (
        encode_crowd(model, processor, seed)
        if crowded
        else encode_scene(model, processor, collator, seed, kind == "native")
    )
    with whole_files(folder) as built:
        save_file(stored, built / f"{seed}.safetensors")


def encode_scenes(model_folder: Path, seeds, kind: str, folder: Path, workers: int) -> dict[int, dict]:
    """{seed: what is kept of a scene, "fixed", "native" or "crowded"}, read from files, which are made where they are missing."""
    folder = folder / kind
    missing = [seed for seed in seeds if not (folder / f"{seed}.safetensors").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (model_folder,)) as pool:
            jobs = [pool.submit(partial(_make, kind=kind, folder=folder), seed) for seed in missing]
            for job in tqdm(jobs, desc=f"Encoding {folder.name}", unit="scene"):
                job.result()
    return {seed: load_file(folder / f"{seed}.safetensors") for seed in seeds}


# ---- What is right ---------------------------------------------------------------------------------------------------


def label_tokens(scene, side, position, patch_size):
    """What visual tokens of a scene show, from their level's `side` in tokens and their `position`, long[V] each.

    Returns:
        (long[V] index of the largest object whose middle lies in a token, -1 for none; float[V] its size in pixels of the level;
        bool[V], whether the middle of one lies near; float[V, sites], the larger coordinate of a token's centre in the frame of each site, at most 1 inside it).
    """
    shown, pixels = np.full(len(side), -1), np.zeros(len(side))
    offsets = NEAR_PIXELS * np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])
    near = np.zeros(len(side), bool)
    around = np.zeros((len(side), len(scene.sites)))
    for one in np.unique(side):
        rows = np.flatnonzero(side == one)
        grid, per_unit = (one, one), one * patch_size / WIDTH
        found = {}
        for idx, token in enumerate(tokens_at(scene, [thing.centre for thing in scene.objects], grid)):
            if token not in found or scene.objects[found[token]].size < scene.objects[idx].size:
                found[token] = idx
        for row in rows:
            if (idx := found.get(int(position[row]))) is not None:
                shown[row], pixels[row] = idx, scene.objects[idx].size * per_unit
        # An object at the edge of its token is seen in its neighbour, too: which is no fault.
        centres = np.array([thing.centre for thing in scene.objects if thing.size * per_unit >= LEAST_PIXELS]).reshape(
            -1, 2
        )
        around_them = (centres[:, None] + offsets / per_unit).reshape(-1, 2).tolist()
        near[rows] = np.isin(position[rows], tokens_at(scene, around_them, grid))
        points = points_of_tokens(scene, grid, position[rows])
        for idx, site in enumerate(scene.sites):
            around[rows, idx] = np.abs(site.local(points)).max(-1)
    return shown, pixels, near, around


def objects_of_tokens(labels) -> torch.Tensor:
    """long[V]: 1 where a token shows an object, 0 where it shows none, -1 where neither would be wrong; of `label_tokens`."""
    _, pixels, near, _ = labels
    return torch.from_numpy(np.where(pixels >= LEAST_PIXELS, 1, np.where((pixels > UNSEEN_PIXELS) | near, -1, 0)))


def thin(known) -> torch.Tensor:
    """bool[V]: of tokens all that show an object, and of the others one of EMPTY_TIMES."""
    return (known != 0) | (torch.rand(len(known)) < 1 / EMPTY_TIMES)


def is_meant(question, thing) -> bool:
    """Whether an object is of the type or the colour that a question names; of one that names none, any is."""
    named = [word.removesuffix(" object") for word in question.words]
    return all(
        getattr(thing, name) in named
        for name, options in (("kind", OBJECTS), ("colour", PAINTS))
        if any(word in options for word in named)
    )


class PointedScene:
    """A scene and what was computed of it, with what is right.

    Args:
        stored: what `encode_scene` returned.
        collator: [`PointCollator`].
    """

    def __init__(self, scene, stored, collator, patch_size):
        self.scene, self.groups = scene, []
        alone, shared = draw_questions(scene)
        names = [(f"alone.{idx}", [question]) for idx, question in enumerate(alone)] + [("together", shared)]
        for name, questions in names:
            group = {key: stored[f"{name}.{key}"] for key in ("tokens", "states", "length", "side", "position")}
            side, position = group["side"].numpy(), group["position"].numpy()
            labels = label_tokens(scene, side, position, patch_size)
            shown, _, _, around = labels
            words = pad_sequence([collator.words(question).flip(0) for question in questions], True).flip(1)
            if words.shape != group["states"].shape[:2]:
                raise ValueError(f"Scene {scene.seed}: the states of {name} are of other questions.")
            meant = [[is_meant(question, thing) for thing in scene.objects] + [False] for question in questions]
            # Of a place: 1 inside, 0 outside, -1 where nothing stands, at its edge.
            inside = np.where(around < EDGE[0], 1, np.where(around < EDGE[1], -1, 0))
            inside = np.concatenate((inside, np.zeros((len(side), 1), int)), axis=1)
            places = [(*question.sites, -1, -1)[:2] for question in questions]
            self.groups.append({
                "tokens": group["tokens"], "states": group["states"], "words": words,
                "heard": torch.arange(group["states"].shape[1]).flip(0) < group["length"][:, None],
                "centres": torch.from_numpy((np.stack((position // side, position % side), axis=1) + 0.5) / side[:, None]).float(),
                "sides": 1 / group["side"].float(),
                "object": objects_of_tokens(labels),
                "meant": torch.from_numpy(np.array(meant)[:, shown]),
                "there": torch.from_numpy(inside.T[np.array(places)]),  # [Q, 2, V]
                "second": torch.tensor([len(question.sites) > 1 for question in questions]).float(),
                "asked": torch.tensor([question.kind != "quadrant" for question in questions]).float(),
                "answer": torch.tensor([collator.first_token(one.kind, one.answer) for one in questions]),
                "by_count": [collator.tokens_of_counted(question, scene) for question in questions],
                "questions": questions,
            })  # fmt: skip


# ---- Training --------------------------------------------------------------------------------------------------------


def batches_of(scene: PointedScene, share_thinned: float = 0.0):
    """The groups of a scene as inputs of a pointer: those asked alone padded to one batch, and those asked together, a share of
    which about fewer tokens."""
    *alone, together = scene.groups
    if torch.rand(()) < share_thinned:
        kept = thinned(together)
        axis = {"meant": 1, "there": 2} | dict.fromkeys(ONE_FOR_ALL, 0)
        together = together | {name: together[name].index_select(at, kept) for name, at in axis.items()}
    pad = partial(pad_sequence, batch_first=True)
    joined = {}
    for name in ONE_FOR_ALL:
        joined[name] = pad([group[name] for group in alone])
    for name in ("states", "words", "heard"):
        joined[name] = pad([group[name][0].flip(0) for group in alone]).flip(1)
    joined["meant"] = pad([group["meant"][0] for group in alone])
    joined["there"] = pad([group["there"][0].T for group in alone]).transpose(1, 2)
    for name in ("second", "asked", "answer"):
        joined[name] = torch.cat([group[name] for group in alone])
    lengths = torch.tensor([len(group["sides"]) for group in alone])
    joined["visible"] = torch.arange(joined["sides"].shape[1]) < lengths[:, None]
    for name in ("questions", "by_count"):
        joined[name] = [group[name][0] for group in alone]
    one = {name: value[None] if name in ONE_FOR_ALL else value for name, value in together.items()}
    return joined, one | {"visible": torch.ones(1, len(together["sides"]), dtype=torch.bool)}


def thinned(group):
    """long[V']: of the tokens of a group all that show an object or lie at a site, and a part of the others."""
    at_sites = (group["there"] > 0).any(1).any(0)
    return (at_sites | thin(group["object"])).nonzero()[:, 0]


def point(model, batch, noisy=False):
    """(Pointing, Seen) of a batch."""
    pointer, words = model.model.pointer, model.get_input_embeddings()(batch["words"])
    tokens, states = batch["tokens"].float(), batch["states"].float()
    if noisy:
        tokens = tokens + NOISE * torch.randn_like(tokens)
        states, words = (one + STATE_NOISE * one.std() * torch.randn_like(one) for one in (states, words))
    seen, B = Seen(tokens, batch["centres"], batch["sides"]), len(states)
    pointing = pointer.point(
        pointer.see(tokens), seen.centres.expand(B, -1, -1), batch["visible"], states, words, batch["heard"]
    )
    return pointing, seen


def loss_of_objects(logits, labels, times=1.0):
    """Of which tokens show an object, float[N] and long[N], -1 where that is not known, for every one that does; tokens that show
    none stand for so many."""
    known = labels >= 0
    wrong = F.binary_cross_entropy_with_logits(logits[known], (labels[known] > 0).float(), reduction="none")
    return torch.where(labels[known] > 0, wrong, times * wrong).sum() / (labels > 0).sum().clamp_min(1)


def losses(model, batch, noisy=False) -> dict[str, torch.Tensor]:
    """Every factor's loss, and that of the first token of the answer."""
    pointing, seen = point(model, batch, noisy)
    cross = partial(F.binary_cross_entropy_with_logits, reduction="none")
    visible, last = batch["visible"], batch["states"][:, -1].float()
    B = len(last)
    labels = batch["object"].expand(len(visible), -1)
    found = {}
    if len(visible) > 1:  # of tokens that are asked about together, others are looked at
        found["object"] = loss_of_objects(pointing.object[visible], labels[visible])
    there = batch["there"]
    things = (visible & (labels > 0)).expand(B, -1)
    if things.any():
        found["meant"] = cross(pointing.meant, batch["meant"].float())[things].mean()
    wanted = torch.stack((torch.ones_like(batch["second"]), batch["second"]), dim=1)[..., None] > 0
    known = visible.expand(B, -1)[:, None] & (there >= 0) & wanted
    weight = torch.tensor(PLACE_WEIGHTS)[:, None].expand_as(there)
    by_token = weight * cross(pointing.there, there.clamp_min(0).float())
    for tokens in (known, known & things[:, None]):
        if tokens.any():
            found["there"] = found.get("there", 0) + by_token[tokens].sum() / weight[tokens].sum()
    # Where a place is by what each token shows: most of its tokens are to fit better than any other.
    inside = (there > 0) & known
    named = inside.any(-1)
    if named.any():
        fits = pointing.fits.masked_fill(~visible[:, None], -torch.inf).log_softmax(-1)
        missed = -fits.masked_fill(~inside, 0).sum(-1) / inside.sum(-1).clamp_min(1)
        weight = weight[..., 0][named]
        found["fits"] = (missed[named] * weight).sum() / weight.sum()
    found["second"] = cross(pointing.second, batch["second"]).mean()
    found["asked"] = cross(pointing.asked, batch["asked"]).mean()
    pointer, visible = model.model.pointer, visible.expand(B, -1)
    words = model.get_input_embeddings()(batch["words"])
    names = pointer.names(batch["states"].float(), words, batch["heard"])
    told = pointer.tell(pointing, pointer.count(pointing, seen, visible), names @ words, visible, last)
    found["answer"] = F.cross_entropy(model.lm_head(last + told), batch["answer"])
    return found


def loss_of_answers(model, batch) -> dict[str, torch.Tensor]:
    """Of the first token of the answer alone, from what is pointed to without noise; and how far the decoder is led away where it is
    right by itself, of questions that it answers well: the divergence of its tokens. Numbers and comparisons are to say what was
    counted, right or wrong: else an answer that is right by chance teaches that points need not be heard."""
    pointer = model.model.pointer
    with torch.no_grad():
        pointing, seen = point(model, batch)
        visible = batch["visible"].expand(len(batch["states"]), -1)
        counted = pointer.count(pointing, seen, visible)
    last, words = batch["states"][:, -1].float(), model.get_input_embeddings()(batch["words"])
    # Noise, so that answers are not learnt by heart from the states.
    heard = last + TELL_NOISE * last.std() * torch.randn_like(last)
    names = pointer.names(batch["states"].float(), words, batch["heard"])
    told = pointer.tell(pointing, counted, names @ words, visible, heard)
    logits, alone = model.lm_head(last + told), model.lm_head(last)
    answer = batch["answer"].clone()
    for row, tokens in enumerate(batch["by_count"]):
        if tokens:
            kind = batch["questions"][row].kind
            number = (
                int(counted.numbers[row, 0].clamp_max(MOST_COUNTED)) if kind == "count" else int(counted.order[row]) + 1
            )
            answer[row] = tokens[number]
    found = {"answer": F.cross_entropy(logits, answer)}
    # Which words name the places, and which answers are a number or one of them.
    kinds = [question.kind for question in batch["questions"]]
    wanted = torch.tensor([[kind == "count", kind == "comparison"] for kind in kinds]).float()
    found["which"] = F.binary_cross_entropy_with_logits(pointer.tell_which(heard)[:, :2], wanted)
    compared = [row for row, kind in enumerate(kinds) if kind == "comparison"]
    if compared:
        ids = torch.tensor([[tokens[2], tokens[0]] for tokens in (batch["by_count"][row] for row in compared)])
        there = batch["words"][compared][:, None] == ids[..., None]
        found["names"] = -(names[compared] * there).sum(-1).clamp_min(1e-6).log().mean()
    own = torch.tensor([question.kind in LEFT_ALONE for question in batch["questions"]])
    own &= alone.argmax(-1) == batch["answer"]
    if own.any():
        found["led away"] = F.kl_div(
            logits[own].log_softmax(-1), alone[own].log_softmax(-1), reduction="batchmean", log_target=True
        )
    return found


class PointTrainer(LogsParts, ByTheClock, Trainer):
    """Args:
    told: whether what is told is trained alone (`loss_of_answers`).
    """

    def __init__(self, *args, told=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.told = told

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner, total = self.accelerator.unwrap_model(model), 0
        for batch in inputs["batches"]:
            of_batch = loss_of_answers(inner, batch) if self.told else losses(inner, batch, noisy=True)
            for name, loss in of_batch.items():
                self.parts[name].append(float(loss.detach()))
                total = total + loss / len(inputs["batches"])
        if inputs["crowds"]:
            tokens, labels = inputs["crowds"]
            tokens = tokens.float() + NOISE * torch.randn(tokens.shape, device=tokens.device)
            logits = inner.model.pointer.show(inner.model.pointer.see(tokens))[..., 0]
            total = total + loss_of_objects(logits, labels, EMPTY_TIMES)
        return (total, None) if return_outputs else total


@torch.no_grad()
def start_pointer(model):
    """A pointer for a model that has none, untrained."""
    model.config.pointer = asdict(PointerSettings())
    model.model.pointer = pointer = UHRBatPointer(model.config)
    for layer in pointer.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
    for layer in (pointer.tell_2, pointer.tell_number):
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(pointer.tell_loud.weight, LOUD)


def end_refusals(model, processor, seeds, steps=300):
    """The word for what is not there was never said: its row in the embedding table is learnt, so that it ends an answer as other
    words do. Asked is what the scenes of some seeds have not."""
    (none,) = processor.tokenizer(f" {ABSENT}", add_special_tokens=False)["input_ids"]
    questions, features = [], []
    for seed in seeds:
        scene, rng = make_scene(seed), np.random.default_rng([seed, 15])
        image = encode(model, processor.image_processor([paint(scene)], return_tensors="pt"))[0]
        questions += [make_absent_question(scene, rng=rng).text for _ in range(ALONE)]
        features += [[image]] * ALONE
    prompts = []
    for budget, start in zip((20, 40, 80, 160), range(0, len(questions), -(-len(questions) // 4))):
        part = slice(start, start + -(-len(questions) // 4))
        inputs = write_prompts(model, processor, questions[part], features[part], budget)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        seen = model.visual_inputs(ids, mask, compress(model, inputs))
        with torch.no_grad():
            cache = model.model(input_ids=ids, attention_mask=mask, **seen, use_cache=True)[CACHE]
        prompts.append((cache, torch.nn.functional.pad(mask, (0, 1), value=1)))
    rows = model.get_input_embeddings().weight
    words = [processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in (*PAINTS, *OBJECTS)]
    with torch.no_grad():
        row = rows[[ids[0] for ids in words if len(ids) == 1]].mean(0).clone().requires_grad_(True)
    ends = torch.full((1,), processor.tokenizer.convert_tokens_to_ids(END))
    optimiser = torch.optim.Adam([row], 0.02)
    for _ in range(steps):
        loss = 0
        for cache, mask in prompts:
            said = row.expand(len(mask), 1, -1)
            states = model.model.language_model(
                inputs_embeds=said, attention_mask=mask, **{CACHE: cache}
            ).last_hidden_state[:, 0]
            cache.crop(-1)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            logits = states @ rows.index_copy(0, torch.tensor([none]), row[None]).T
            loss = loss + F.cross_entropy(logits, ends.expand(len(mask)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        rows[none] = row
    return float(loss.detach()) / len(prompts)


@tells_errors
def main(arguments=None):
    parser = make_parser("tiny point", __doc__, steps=4000, batch_size=4, learning_rate=2e-3)
    parser.add_argument("--encoded", type=Path, required=True, metavar="DIR", help="what is computed of scenes, kept")
    parser.add_argument("--scenes", type=int, default=900, help="ordinary ones")
    parser.add_argument("--native", type=int, default=320, help="with native objects")
    parser.add_argument("--crowded", type=int, default=1000, help="with many objects, about which nothing is asked")
    parser.add_argument("--fresh", action="store_true", help="begin a pointer, also if the model has one")
    parser.add_argument(
        "--told",
        action="store_true",
        help="train what is told to the answer alone, by what is pointed to in other scenes",
    )
    add_minutes(parser)
    args = read_arguments(parser, arguments)
    processor, model = load_model(args.model, torch.float32, device_map=None)
    kinds = (("fixed", args.scenes, make_scene), ("native", args.native, native_scene))
    collator = PointCollator(processor, model.config.grids, None, True)
    scenes = []
    for name, number, made in kinds:
        first = TOLD_SEED if args.told else FIRST_SEED
        seeds = range(first, first + number)
        stored = encode_scenes(args.model, seeds, name, args.encoded, args.workers)
        scenes += [PointedScene(made(seed), stored.pop(seed), collator, model.config.patch_size) for seed in seeds]
    if args.fresh or model.config.pointer is None:
        torch.manual_seed(args.seed)
        start_pointer(model)
        model.requires_grad_(False)
        end_refusals(model, processor, range(CROWDED_SEED, CROWDED_SEED + REFUSED_SCENES))
    model.requires_grad_(False)
    pointer = model.model.pointer
    for name, parameter in pointer.named_parameters():
        parameter.requires_grad_(name.startswith("tell") or not args.told)
    seeds = range(CROWDED_SEED, CROWDED_SEED + (0 if args.told else args.crowded))
    crowds = encode_scenes(args.model, seeds, "crowded", args.encoded, args.workers)
    crowds = [(crowd["tokens"], crowd["object"]) for crowd in crowds.values()]
    args.workers = 0  # scenes are in memory: worker processes would copy them
    stop = args.minutes and time.monotonic() + 60 * args.minutes
    dataset = PointedScenes(scenes, crowds, args.steps * args.batch_size)
    train(PointTrainer, model, dataset, args, {"bf16": False}, data_collator=dataset.collate, stop=stop, told=args.told)
    save_model(model, processor, args.output)


class PointedScenes(Dataset):
    """Scenes in turn, and with each of them some crowds, (bfloat16[N, D] tokens, long[N] whether they show an object) each."""

    def __init__(self, scenes, crowds, length):
        self.scenes, self.crowds, self.length = scenes, crowds, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        turn, idx = divmod(index, len(self.scenes))
        order = np.random.default_rng([turn, 13]).permutation(len(self.scenes))
        drawn = np.random.default_rng([index, 14]).permutation(len(self.crowds))[:CROWDS]
        return self.scenes[order[idx]], [self.crowds[one] for one in drawn]

    @staticmethod
    def collate(items):
        crowds = [crowd for _, drawn in items for crowd in drawn]
        return {
            "batches": [batch for scene, _ in items for batch in batches_of(scene, THINNED)],
            "crowds": [torch.cat(column) for column in zip(*crowds)],
        }


if __name__ == "__main__":
    raise SystemExit(main())
