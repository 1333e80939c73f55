"""The last stage: the decoder learns to look closer, level by level down to an image's own pixels, and to answer from there.

    uhr-bat tiny zoom --model runs/tiny --output runs/zoom --fresh --pools DIR [--native 600] [--fixed 400]
                       [--steps 1500] [--minutes 5] [--workers 16]

Scenes with objects of a few native pixels, and ordinary ones, are encoded once, as pools of tiles (`pools.py`). A step
asks four questions about each of some scenes of both kinds. For every level, the question looks at some of its tokens, as
`look_closer` has it do: the divergence of its attention from those that show what it needs is a loss. It is answered from
visual tokens of all levels that no question chose: the evidence, most of the time, and others. The losses of the earlier
stages that say what to read stay (`finetune.py`), as do sixteen questions about all tokens of an ordinary scene.

Letters: V tokens, Q questions, L levels.
"""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset

from ...common.asking import expand_placeholder
from ...common.commands import tells_errors
from ...common.loading import save_model
from ...export.build_tiny import NATIVE_SCALES
from ...modeling_outputs_uhr_bat import UHRBatCompressionOutput
from ...scenes.evidence import site_cells
from ...scenes.layout import FINETUNING_SEED, make_scene
from ...scenes.native import native_scene
from ...scenes.questions import draw_question
from ..collator import IGNORED
from .encoding import freeze_vision
from .finetune import FRACTION_TOGETHER, NOISE, Collator, GuidedTrainer, draw_tokens, look, targets_of
from .pools import PooledScene, make_pools
from .stages import ByTheClock, add_minutes, load_with_attentions, make_parser, read_arguments, train

NATIVE_SEED = FINETUNING_SEED + 100_000  # of the first scene with native objects
QUESTIONS = 4  # about a scene
NATIVE_SHARE = 2 / 3  # of the scenes of a step
TILES_LOOKED_AT = 10  # of a level, whose tokens the question looks at
ANSWERED_FROM = (60, 220)  # visual tokens, drawn log-uniformly
# How often an object that is needed is among the visual tokens of the finest level, the one before, and so on.
EVIDENCE_SHOWN = (0.9, 0.7, 0.5, 0.3)


# ---- Questions -------------------------------------------------------------------------------------------------------


def pads_of(scene, question) -> list[tuple[float, float]]:
    """The pads of the sites of a question."""
    sites = [scene.sites[index] for index in question.sites]
    return [pad.centre for pad in scene.pads if any(site.contains(pad.centre) for site in sites)]


def points_of(scene, question) -> list[tuple[float, float]]:
    """What a question has to see: the objects; pads of the site where there is none; the middle of a site that it asks for
    the place of."""
    if question.kind == "quadrant":
        return [scene.sites[index].centre for index in question.sites]
    return [thing.centre for thing in question.objects] or pads_of(scene, question)


def draw_look(pooled, question, level_idx, num_tokens, rng):
    """What a question looks at of a level, and where it should.

    Returns:
        (long[V] places among the pool's tokens of the level, ascending positions; float[V] of sum 1), or None where the
        pool has nothing of what is needed.
    """
    tiles, sites = pooled.tiles[level_idx], pooled.inside[level_idx]
    wanted = pooled.find(level_idx, points_of(pooled.scene, question))
    if not len(wanted):
        wanted = np.flatnonzero(np.isin(sites, question.sites))
    if not len(wanted):
        return None
    groups = tiles[wanted], tiles[np.isin(sites, question.sites)], tiles
    shuffled = [rng.permutation(np.unique(group)) for group in groups]
    # Tiles of what is needed first, most of them; then half of the rest from the site, half from anywhere.
    chosen = list(shuffled[0][: max(1, TILES_LOOKED_AT - 3)])
    for group, share in ((shuffled[1], 0.5), (shuffled[2], 1)):
        others = [tile for tile in group if tile not in chosen]
        chosen += others[: round(share * (TILES_LOOKED_AT - len(chosen)))]
    candidates = np.flatnonzero(np.isin(tiles, chosen))
    needed = np.intersect1d(wanted, candidates)
    order = np.concatenate((needed, rng.permutation(np.setdiff1d(candidates, needed))))
    places = np.sort(order[: max(num_tokens, len(needed))])
    places = places[pooled.positions[level_idx][places].argsort()]
    portion = np.isin(places, needed)
    return places, portion / portion.sum()


def draw_answered_from(pooled, question, num_tokens, rng):
    """[(level, place)] of the visual tokens that a question is answered from, by level and position, and which of them show
    its evidence, bool[V]."""
    points, num_levels = points_of(pooled.scene, question), len(pooled.grids)
    chosen, evidence = set(), set()
    for point in points:
        for depth, share in enumerate(EVIDENCE_SHOWN[: num_levels - 1]):
            level_idx = num_levels - 1 - depth
            found = {(level_idx, int(place)) for place in pooled.find(level_idx, [point])}
            if question.kind == "quadrant" or depth < 2:
                evidence |= found
            if rng.random() < share:
                chosen |= found
    pads = pads_of(pooled.scene, question)
    for level_idx in range(num_levels):
        near = np.isin(pooled.inside[level_idx], question.sites)
        # Of coarse levels the site, of finer ones what stands out in it and some of its ground.
        chosen |= {(level_idx, int(place)) for place in rng.permutation(near.nonzero()[0])[:6]}
        if rng.random() < 0.5:
            chosen |= {(level_idx, int(place)) for place in pooled.find(level_idx, pads)}
        chosen |= {(level_idx, int(place)) for place in rng.permutation(len(near))[: num_tokens // (2 * num_levels)]}
    others = rng.permutation(np.array([token for token in chosen if token not in evidence], int).reshape(-1, 2))
    shown = [token for token in chosen if token in evidence]
    kept = shown + [tuple(token) for token in others[: max(0, num_tokens - len(shown))].tolist()]
    kept.sort(key=lambda token: (token[0], pooled.positions[token[0]][token[1]]))
    return kept, [token in evidence for token in kept]


class ZoomQuestions(Dataset):
    """Questions about native and ordinary scenes in turn, other ones each time that a scene comes round again."""

    def __init__(self, native, fixed, config, num_together, length):
        self.native, self.fixed, self.num_together, self.length = native, fixed, num_together, length
        self.refinement = config.refinement

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([index, 8])
        scenes = self.native if rng.random() < NATIVE_SHARE else self.fixed
        pooled = scenes[rng.integers(len(scenes))]
        questions = [draw_question(pooled.scene, rng) for _ in range(QUESTIONS)]
        item = {"index": index, "pooled": pooled, "asked": [self._ask(pooled, question, rng) for question in questions]}
        if scenes is self.fixed:
            item["together"] = [draw_question(pooled.scene, rng) for _ in range(self.num_together)]
        return item

    def _ask(self, pooled, question, rng):
        anchor = site_cells(pooled.scene, question.sites, pooled.grids[0])[pooled.positions[0]]
        looks = [(0, np.arange(len(anchor)), anchor / anchor.sum())]  # in the pool's order, which is tile by tile
        for level_idx in range(1, len(pooled.grids)):
            step = min(level_idx, len(self.refinement)) - 1
            drawn = draw_look(pooled, question, level_idx, self.refinement[step], rng)
            if drawn is not None:
                looks.append((level_idx, *drawn))
        num_tokens = round(np.exp(rng.uniform(*np.log(ANSWERED_FROM))))
        return {"question": question, "looks": looks, "read": draw_answered_from(pooled, question, num_tokens, rng)}


class ZoomCollator(Collator):
    """Questions about pooled scenes -> inputs of `ZoomTrainer.compute_loss`. Visual tokens are named by their index in the
    tensor of all pools, their level's side and their position."""

    def __init__(self, processor, config):
        super().__init__(processor, config.grids, None, True)
        self.config = config

    def __call__(self, items):
        asked = [(item["pooled"], drawn) for item in items for drawn in item["asked"]]
        inputs = {"looks": self.collate_looks(asked), "answers": self.collate_answers(asked)}
        if together := next((item for item in items if "together" in item), None):
            inputs["together"] = self.collate_all(together)
        return inputs

    def _named(self, pooled, level_idx, places):
        """long[V, 3]: index, side of the level, position."""
        indices, positions = pooled.indices[level_idx][places], pooled.positions[level_idx][places]
        return np.stack((indices, np.full_like(indices, pooled.scales[level_idx]), positions), axis=-1)

    def collate_looks(self, asked):
        config, num_steps = self.config, len(self.config.refinement)
        rows, tokens, portions, readers, layers, anchors = [], [], [], [], [], []
        for pooled, drawn in asked:
            for level_idx, places, portion in drawn["looks"]:
                (ids, labels), first = self.sequence(drawn["question"], len(places))
                end = int((labels != IGNORED).nonzero()[0])  # of the question
                rows.append((ids[:end], labels[:end]))
                tokens.append(self._named(pooled, level_idx, places))
                portions.append(portion)
                step = min(level_idx, num_steps) - 1
                # The finest scale, and what is deeper, is read by the last token alone.
                last = level_idx > 0 and step == num_steps - 1
                readers.append((end - 1 if last else first + len(places), end))
                layers.append(config.importance_layer if level_idx == 0 else config.refinement_layers[step])
                anchors.append(level_idx == 0)
        padded = self.pad(rows)
        padded.pop("labels")
        return padded | {
            "tokens": torch.from_numpy(np.concatenate(tokens)),
            "portions": torch.from_numpy(np.concatenate(portions)).float(),
            "readers": torch.tensor(readers),
            "layers": torch.tensor(layers),
            "anchors": torch.tensor(anchors),
        }

    def collate_answers(self, asked):
        rows, tokens, in_sequence, spans = [], [], [], []
        for pooled, drawn in asked:
            question, (read, shows) = drawn["question"], drawn["read"]
            row, first = self.sequence(question, len(read))
            rows.append(row)
            tokens += [self._named(pooled, level_idx, np.array([place])) for level_idx, place in read]
            inside = [pooled.inside[level_idx][place] in question.sites for level_idx, place in read]
            in_sequence.append(self.with_words(question, {
                "sites": [first + number for number, within in enumerate(inside) if within],
                "evidence": [first + number for number, shown in enumerate(shows) if shown],
            }))  # fmt: skip
            spans.append((first, first + len(read)))
        return {
            **self.pad(rows),
            "tokens": torch.from_numpy(np.concatenate(tokens)),
            "in_sequence": in_sequence,
            "spans": spans,
        }

    def collate_all(self, item):
        """An ordinary scene's tokens of every scale, and the questions that are asked about them together."""
        pooled, rng = item["pooled"], np.random.default_rng([item["index"], 9])
        order = [positions.argsort() for positions in pooled.positions]
        targets = [
            self.with_words(question, targets_of(pooled.scene, question, pooled.grids)) for question in item["together"]
        ]
        before, padded = self.write_together(item["together"])
        return {
            "named": [torch.from_numpy(self._named(pooled, idx, places)) for idx, places in enumerate(order)],
            "sites": sorted({token for target in targets for token in target["sites"]}),
            "fraction": float(np.exp(rng.uniform(*np.log(FRACTION_TOGETHER)))),
            "index": item["index"],
            "before": before,
            "targets": targets,
            **padded,
        }


# ---- Training --------------------------------------------------------------------------------------------------------


class ZoomTrainer(ByTheClock, GuidedTrainer):
    """Args:
    pool_tokens: bfloat16[V, D] of all pools, without a scale embedding.
    stop: as in [`ByTheClock`].
    """

    def __init__(self, *args, pool_tokens, **kwargs):
        super().__init__(*args, **kwargs)
        self.pool_tokens = pool_tokens.to(self.args.device)

    def visual(self, model, named) -> torch.Tensor:
        """float[V, D] of tokens long[V, 3] (`ZoomCollator`), with their scale embedding and noise."""
        index, scale, position = named.to(self.pool_tokens.device).unbind(1)
        tokens = self.pool_tokens[index].float()
        tokens = tokens + model.model.scale_embedding(scale, position)
        return tokens + NOISE * torch.randn_like(tokens)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner = self.accelerator.unwrap_model(model)
        loss = self.loss_of_looks(inner, **inputs["looks"]) + self.loss_of_answers(model, inner, **inputs["answers"])
        if together := inputs.get("together"):
            loss = loss + self.loss_of_all(inner, **together)
        return (loss, None) if return_outputs else loss

    def loss_of_looks(self, inner, input_ids, attention_mask, tokens, portions, readers, layers, anchors):
        """Mean divergence of what questions pay to the tokens of the anchor, and of every finer level, from what they
        need (eq. 2 at the layers of the refinement)."""
        embeds = inner.get_input_embeddings()(input_ids)
        placeholder = input_ids == inner.config.image_token_id
        embeds = embeds.masked_scatter(placeholder[..., None], self.visual(inner, tokens).to(embeds))
        outputs = inner.model.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, output_attentions=True
        )
        maps = torch.stack([attention.float().mean(1) for attention in outputs.attentions])
        maps = maps[layers, torch.arange(len(layers), device=layers.device)]
        place = torch.arange(input_ids.shape[1], device=readers.device)
        reads = (place >= readers[:, :1]) & (place < readers[:, 1:])
        paid = torch.einsum("rq,rqk->rk", reads.float(), maps)[placeholder]
        row = placeholder.nonzero()[:, 0]
        totals = paid.new_zeros(len(input_ids)).index_add(0, row, paid)
        found = (paid / totals[row]).clamp_min(1e-9)
        each = portions * (portions.clamp_min(1e-9).log() - found.log())
        each = paid.new_zeros(len(input_ids)).index_add(0, row, each)
        divergences = {"divergence": each[anchors].mean(), "refined": each[~anchors].mean()}
        for name, part in divergences.items():
            self.parts[name].append(float(part.detach()))
        return sum(divergences.values())

    def loss_of_answers(self, model, inner, tokens, in_sequence, spans, **inputs):
        """Loss of questions that are each answered from tokens of all levels."""
        visual = self.visual(inner, tokens).split([stop - start for start, stop in spans])
        images = UHRBatCompressionOutput(pooler_output=list(visual), images_per_prompt=[1] * len(visual))
        seen = inner.visual_inputs(inputs["input_ids"], inputs["attention_mask"], images)
        outputs = model(**inputs, **seen, output_attentions=True)
        starts, stops = zip(*spans)
        return self.total(outputs.loss, look(inner.config, outputs.attentions, inputs, starts, stops, in_sequence))

    def loss_of_all(self, inner, named, sites, fraction, index, before, **inputs):
        """Loss of questions about one ordinary scene that share its tokens, or a fraction of them and all of the sites."""
        generator = torch.Generator().manual_seed(index)
        features = SimpleNamespace(tokens=named, positions=[tokens[:, 2].cpu() for tokens in named])
        image = draw_tokens(features, sites, fraction, inner.config.grids, generator, partial(self.visual, inner))
        start = expand_placeholder(before, inner.config.image_token_id, len(image.pooler_output[0]))
        return self.loss_together(inner, start[None], image, **inputs)


@torch.no_grad()
def start_native_scales(model, scales=NATIVE_SCALES):
    """Give deeper levels scale vectors of their own, which start as that of the finest scale, what they had without."""
    embedding, config = model.model.scale_embedding, model.config
    vectors = embedding.scale_vectors[: len(config.scales)]
    config.native_scales = list(scales)
    embedding.scales = [*config.scales, *scales]
    embedding.scale_vectors = nn.Parameter(torch.cat((vectors, vectors[-1:].repeat(len(scales), 1))))


def pooled_scenes(model, lay_out, pools, start):
    """[PooledScene] of pools by their seed, and the index after their last token. `lay_out`: the scene of a seed."""
    pooled = []
    for seed, pool in pools.items():
        pooled.append(PooledScene(lay_out(seed), pool, start, model.config.patch_size))
        start += pool["tokens"].shape[0] * pool["tokens"].shape[1]
    return pooled, start


@tells_errors
def main(arguments=None):
    parser = make_parser("tiny zoom", __doc__, steps=1500, batch_size=18, learning_rate=3e-4)
    parser.add_argument("--pools", type=Path, required=True, metavar="DIR", help="keeps the encoded scenes")
    parser.add_argument("--fresh", action="store_true", help="levels beyond the scales are untrained: prepare them")
    parser.add_argument("--native", type=int, default=600, help="scenes with native objects")
    parser.add_argument("--fixed", type=int, default=400, help="ordinary scenes")
    parser.add_argument("--first-seed", type=int, default=FINETUNING_SEED + 9000, help="of the ordinary scenes")
    parser.add_argument("--tiles", type=int, default=40, help="tiles of every finer level in a pool")
    parser.add_argument("--together", type=int, default=16, metavar="N", help="questions about a whole ordinary scene")
    add_minutes(parser)
    args = read_arguments(parser, arguments)
    native_seeds, fixed_seeds = (
        range(first, first + number) for first, number in ((NATIVE_SEED, args.native), (args.first_seed, args.fixed))
    )
    start, seconds = time.monotonic(), None if args.minutes is None else 60 * args.minutes
    with PartialState().main_process_first():
        fixed, native = (
            make_pools(args.model, seeds, is_native, args.tiles, args.pools / name, args.workers, limit)
            for name, is_native, seeds, limit in (
                ("fixed", False, fixed_seeds, seconds and seconds / 10),
                ("native", True, native_seeds, seconds and seconds * 7 / 30),
            )
        )
    processor, model = load_with_attentions(args.model)
    if args.fresh:
        start_native_scales(model)
    freeze_vision(model)
    model.model.scale_embedding.scale_vectors.requires_grad_(True)
    pool_tokens = torch.cat([pool["tokens"].flatten(0, 1) for pools in (native, fixed) for pool in pools.values()])
    native, end = pooled_scenes(model, native_scene, native, 0)
    fixed, _ = pooled_scenes(model, make_scene, fixed, end)
    steps = args.steps * args.batch_size * args.accumulation
    dataset = ZoomQuestions(native, fixed, model.config, args.together, steps)
    collator = ZoomCollator(processor, model.config)
    train(
        ZoomTrainer, model, dataset, args, {"adam_beta2": 0.98},
        data_collator=collator, pool_tokens=pool_tokens, stop=seconds and start + seconds,
    )  # fmt: skip
    save_model(model, processor, args.output)


if __name__ == "__main__":
    raise SystemExit(main())
