"""Rows of a table: settings by which the same questions of a suite are asked, one record an answer.

A row says how an image is encoded, which rules choose how many of its visual tokens, and thereby all that evidence, recall
and ablations compare. An image is encoded once in each way that its rows want; rows that spend equally much are answered
together.

Letters: S scales, N tokens of a scale, D width of a token, M tokens of a prompt.
"""

import copy
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..common import asking
from ..common.budgets import counts_of_fraction
from ..common.loading import load_model
from ..common.resizing import resize_image
from ..common.runs import Line, lines_of_run
from ..export.build_tiny import BUDGETS
from ..export.build_tiny import RULES as SHIPPED
from ..geometry_uhr_bat import letterbox
from ..image_raster_files_uhr_bat import reason
from ..modeling_layers_uhr_bat import UHRBatScaleEmbedding
from ..modeling_outputs_uhr_bat import UHRBatCompressionOutput
from ..planning.flops import FlopMeter
from .plain import PLAIN, OtherSettings, PlainHost, plain_records
from .reducers import conditional_diversity, diversity, dominant_and_contextual, similarity_merging
from .running import groups_of
from .samples import Sample
from .suites import SUITES

ALL_TILES = 10**6  # more than any image of fixed scales has
FINEST = 2  # scales at which an object counts as seen: the two finest


# ---- What is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        name: of the row; `x`: where it stands on the axis of a plot, `line`: on which line; none: across the plot.
        counts: int[S], tokens that every scale has -> int[S], those that it spends, or int[1], those of all scales; None of
            LRS-VQA's mode: its share of the last level.
        rules: other values for fields of the configuration, see `compress`.
        view: name and settings of the way in which the image is encoded, see `WAYS`; "plain": a host by itself is asked.
        settings: of a host that are others than those of the run, as `--set` has them.
    """

    name: str
    x: float
    counts: Callable[[list[int]], list[int]]
    rules: dict | None
    line: str = ""
    view: tuple = ("whole",)
    settings: dict | None = None


def _rules(selector, **changes):
    """All that the rows vary, so that none depends on the configuration's choice."""
    return {"selector": selector, "refinement": [], "refinement_layers": [], "coverage": False, **changes}


def regions_merged(importance, regions, tokens, budget):
    """One token of each region."""
    return regions


PAPER, TOP_K, DISTINCT, REFINED = "preserve-and-merge", "top-k per scale", "distinct", "distinct, refined"
FULL, DOWNSAMPLING = "no compression", "downsampling"
# By the rules of REFINED, but of the tiles behind the anchor's only the quarter is encoded where the question looks.
ZOOMED, ENCODED_SHARE = "distinct, refined, a quarter of the tiles", 1 / 4
# Of each scale after the anchor, how many tokens the question looks at once more, and up to which decoder layer: those of
# UHR-BAT-Tiny. A model of another family has its own, see `rules_for`.
REFINEMENT = {name: SHIPPED[name] for name in ("refinement", "refinement_layers")}
# Proportions in which the scales share the tokens: the paper's, and such that leave more to the finest scale.
PROPORTIONS, FINE_PROPORTIONS = (16, 24, 40, 66), tuple(BUDGETS)
ALL = _rules("uniform", region_method="none")
# Rules by which the model's own `compress` is each row, and the proportions; None is one budget for all scales.
RULES = {
    PAPER: (_rules("preserve_and_merge"), PROPORTIONS),
    "with coverage": (_rules("preserve_and_merge", coverage=True), PROPORTIONS),
    TOP_K: (_rules("top_k"), PROPORTIONS),
    "top-k, one budget": (_rules("top_k"), None),
    DISTINCT: (_rules("distinct"), None),
    "distinct, budgets per scale": (_rules("distinct"), FINE_PROPORTIONS),
    "distinct, regions told of": (_rules("distinct", coverage=True), None),
    REFINED: (_rules("distinct", **REFINEMENT), None),
    "distinct, refined, budgets per scale": (_rules(**SHIPPED), FINE_PROPORTIONS),
    "CDPruner": (_rules(conditional_diversity), PROPORTIONS),
    "VisionZip": (_rules(dominant_and_contextual), PROPORTIONS),
}
# Blind to the question.
BLIND = {
    "DivPrune": (_rules(diversity, region_method="none"), PROPORTIONS),
    "ToMe": (_rules(similarity_merging, region_method="none"), PROPORTIONS),
    "uniform": (ALL, PROPORTIONS),
    "k-means merge": (_rules(regions_merged, region_method="kmeans", num_regions=None), PROPORTIONS),
}
METHODS = RULES | BLIND


def row_of(method: str, fraction: float, view=("whole",)) -> Row:
    """One of `METHODS`, `ZOOMED` or `DOWNSAMPLING`, where a fraction of all tokens is spent; x is percent."""
    x = 100 * fraction
    if method == DOWNSAMPLING:
        return Row(method, x, list, ALL, method, ("downsampled", fraction))
    rules, proportions = METHODS[REFINED if method == ZOOMED else method]
    counts = partial(spend_fraction, fraction, proportions)
    return Row(method, x, counts, rules, method, ("share", ENCODED_SHARE) if method == ZOOMED else view)


def spend_fraction(fraction: float, proportions, available: list[int]) -> list[int]:
    """`counts_of_fraction` for any number of scales: proportions of four are drawn out, or together, to as many."""
    if proportions is not None and len(proportions) != len(available):
        here, wanted = (np.linspace(0, 1, number) for number in (len(proportions), len(available)))
        proportions = np.exp(np.interp(wanted, here, np.log(proportions))).round().astype(int).tolist()
    return counts_of_fraction(fraction, available, proportions)


ALL_TOKENS = Row(FULL, 100.0, list, ALL)


# ---- An image --------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """An image that was encoded, and by whom.

    Attributes:
        available: int[S], tokens of which a row spends some: those of the fixed scales.
        seconds: that encoding took.
        letterboxed: whether its grids are those of the letterboxed square.
        small: whether it was made small: then there is no evidence in it.
    """

    processor: Any
    model: Any
    features: Any
    available: list[int]
    seconds: float
    letterboxed: bool = True
    small: bool = False


def all_tiles(image_processor):
    """The same one, which cuts all tiles of every scale unless it is told to look closer."""
    copied = copy.copy(image_processor)
    copied.max_tiles = copied.native = None
    return copied


class Views:
    """An image of a suite, encoded once in each way that is wanted.

    Args:
        pair: (processor, model).
        image: what the image processor takes, with `height` and `width`.
        focus: (processor, model) of LRS-VQA's mode.
        variants: other settings of a host -> (processor, model).
    """

    def __init__(self, pair, image, focus=None, variants=None):
        self.pair, self.image, self.focus, self.variants = pair, image, focus, variants
        self.views, self.others = {}, {}

    @cached_property
    def pyramid(self):
        """The fixed scales, cut for no question: their numbers alone are asked for."""
        return all_tiles(self.pair[0].image_processor)(self.image, max_tiles=ALL_TILES)["image_pyramids"][0]

    @cached_property
    def available(self) -> list[int]:
        """int[S], tokens of every fixed scale that show the image; nothing is encoded to know them."""
        if ("whole",) in self.views:
            return self.views["whole",].available
        if all(map(self.pyramid.is_known, range(len(self.pyramid.scales)))):
            return self.pyramid.available
        processor = self.pair[0]
        cut = all_tiles(processor.image_processor)(self.image, return_tensors="pt")
        return processor.count_shown(cut["pixel_attention_mask"])[0]

    def seen(self, view=("whole",), settings=None) -> Seen:
        if settings:
            pair = self.variants(settings)
            if not ENCODED & set(settings):  # rows of its tiles are the same
                return self.seen(view)._replace(processor=pair[0], model=pair[1])
            other = self.others.setdefault(repr(sorted(settings.items())), Views(pair, self.image))
            coarse = pair[1].config.scales[-1] < self.pair[1].config.scales[-FINEST:][0]
            return other.seen(view)._replace(small=coarse)
        if view not in self.views:
            name, *settings = view
            self.views[view] = WAYS[name](self, *settings)
        return self.views[view]

    def encode(self, image=None, pair=None, available=None, options=None, **kind) -> Seen:
        processor, model = pair or self.pair
        reads, options = all_tiles(processor.image_processor), options or {}
        cut = reads(self.image if image is None else image, return_tensors="pt", **options)
        (features,), seconds = timed(partial(asking.encode, model, cut))
        return Seen(processor, model, features, available or features.available, seconds, **kind)

    def evidence(self, seen: Seen, boxes) -> list[list[tuple[int, int]]]:
        """For every box its (scale, position) at the two finest scales or levels."""
        grids, size = seen.features.grids, (self.image.height, self.image.width)
        finest = range(len(grids))[-FINEST:]
        return [
            [
                (scale, token)
                for scale in finest
                for token in tokens_in_box(box, size, grids[scale], seen.letterboxed).tolist()
            ]
            for box in boxes
        ]


# Settings of a host by which its tiles are others.
ENCODED = {"tile", "anchor", "levels", "scales", "mask_padding"}


def timed(call):
    """(what a call returns, its seconds), with the accelerator's work done."""
    start = time.perf_counter()
    result = call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return result, time.perf_counter() - start


def resized(views: Views, share: float) -> Seen:
    """The image at a share of its height and width."""
    height, width = (max(round(share * length), 1) for length in (views.image.height, views.image.width))
    return views.encode(resize_image(views.image, (height, width)))


def tiles_of_share(views: Views, share: float) -> Seen:
    """Of the tiles behind the anchor's a share, where the question looks."""
    anchor, *finer = views.pyramid.num_chosen  # of all tiles those that show the image
    return views.encode(available=views.available, options={"max_tiles": anchor + round(share * sum(finer))})


def native(views: Views, max_tiles: int) -> Seen:
    """Levels down to the image's own pixels, of which `max_tiles` tiles are encoded where the question looks."""
    return views.encode(available=views.available, options={"max_tiles": max_tiles, "native": True})


def descended(views: Views, pruned_by: str = "module", changes: tuple = ()) -> Seen:
    """The image as LRS-VQA's system descends it.

    Args:
        pruned_by: one of `PRUNED_BY`, whose scores take the place of the module's.
        changes: (name, value) of fields of `region_focus`.
    """
    if pruned_by != "module" or changes:  # of the same tiles
        seen = views.seen(("descended",))
        return seen._replace(model=focus_variant(seen.model, PRUNED_BY[pruned_by], dict(changes)))
    pair, options = views.focus or views.pair, {"dynamic_pyramid": True}
    return views.encode(pair=pair, available=views.available, options=options, letterboxed=False)


def at_random(before, after, found):
    """What `focus_scores` returns, by the tokens' number alone."""
    return torch.rand(len(found.places), generator=torch.Generator().manual_seed(len(found.places))).to(before.device)


def like_the_thumbnail(num_tokens, before, after, found):
    """By how alike a token and the mean of the thumbnail's are, whose `num_tokens` stand before the separator."""
    thumbnail = before[-1 - num_tokens : -1].float().mean(0)
    return 1 + torch.cosine_similarity(found.tokens.float(), thumbnail[None], dim=-1)


PRUNED_BY = {"module": None, "random": at_random, "thumbnail": like_the_thumbnail}


def focus_variant(model, scores, changes):
    """The same weights with other scores of a level's tokens, and other fields of `region_focus`."""
    variant = copy.deepcopy(model, {id(one): one for one in model.parameters()})
    variant.config.region_focus = {**variant.config.region_focus, **changes}
    if scores is like_the_thumbnail:
        scores = partial(scores, (model.config.tile_size // model.config.patch_size) ** 2)
    if scores is not None:
        variant.model.focus_scores = scores
    return variant.eval()


def downsampled(views: Views, fraction: float) -> Seen:
    """The image at the largest single scale whose letterboxed square is within a fraction of all tokens."""
    processor, model = views.pair
    config, num_tokens = model.config, round(fraction * sum(views.available))
    side = max(1, int(num_tokens**0.5) // (config.tile_size // config.patch_size)) * config.tile_size
    return views.encode(pair=(processor, one_scale_model(model, side)), options={"scales": [side]}, small=True)


def one_scale_model(model, side):
    """The same weights for an image of one scale; of the scale vectors the one of the scale nearest to it."""
    held = {id(one): one for one in model.parameters()}
    single = copy.deepcopy(model, held)  # which shares its weights
    config = single.config
    nearest = min(range(len(config.scales)), key=lambda scale: abs(config.scales[scale] - side))
    config.scales, config.native_scales, config.budgets = [side], [], [(side // config.patch_size) ** 2]
    if not hasattr(model.model, "scale_embedding"):  # of another family, whose rows know nothing of scales
        return single.eval()
    embedding = UHRBatScaleEmbedding(config).to(model.device)
    embedding.load_state_dict(
        {
            "table": model.model.scale_embedding.table,
            "scale_vectors": model.model.scale_embedding.scale_vectors[[nearest]],
        }
    )
    single.model.scale_embedding = embedding
    return single.eval()


WAYS = {
    "whole": Views.encode,
    "resized": resized,
    "share": tiles_of_share,
    "native": native,
    "descended": descended,
    "downsampled": downsampled,
}


# ---- Evidence --------------------------------------------------------------------------------------------------------


def lies_in(box, image_size) -> bool:
    """Whether a box (x0, y0, x1, y1) has a part in the image, and its edges are numbers in their order."""
    (x0, y0, x1, y1), (h, w) = box, image_size
    return x0 <= x1 and y0 <= y1 and x1 > 0 and y1 > 0 and x0 < w and y0 < h and all(map(math.isfinite, box))


def tokens_in_box(box, image_size, grid, letterboxed=True) -> np.ndarray:
    """int64[K]: the tokens of a grid whose centres lie in a box, or the one that shows its middle where none does.

    Args:
        box: (x0, y0, x1, y1) in pixels of the image.
        image_size: (height, width) in pixels.
        grid: (height, width) in tokens, over the letterboxed square or over the image alone.

    Raises:
        ValueError: a box that lies outside the image, or whose edges are turned round or no numbers.
    """
    (x0, y0, x1, y1), (h, w) = box, image_size
    if not lies_in(box, image_size):
        raise ValueError(f"The box {box} does not lie in the image of {w} x {h} px (width x height).")
    side, top, left = letterbox(image_size)
    sides = (side, side) if letterboxed else image_size
    top, left = (top, left) if letterboxed else (0, 0)
    edges = (max(y0, 0) + top, min(y1, h) + top), (max(x0, 0) + left, min(x1, w) + left)
    # The centre of token i lies (i + 1/2) / number of the side below the edge.
    rows, columns = (
        np.arange(math.ceil(low * number / side - 0.5), math.ceil(high * number / side - 0.5))
        for (low, high), number, side in zip(edges, grid, sides)
    )
    if len(rows) and len(columns):
        return (rows[:, None] * grid[1] + columns).ravel()
    row, column = (min(int(sum(pair) / 2 * n / side), n - 1) for pair, n, side in zip(edges, grid, sides))
    return np.array([row * grid[1] + column])


def size_of(box, image_size, scales) -> float:
    """Side of a square of the box's area, in pixels of the finest scale."""
    return math.sqrt(max((box[2] - box[0]) * (box[3] - box[1]), 0)) * scales[-1] / max(image_size)


def alone(slots) -> torch.Tensor:
    """bool[N]: the tokens of a scale, slots long[N], that have a place of their own."""
    sizes = torch.bincount(slots[slots >= 0], minlength=1)
    return (slots >= 0) & (sizes[slots.clamp_min(0)] == 1)


def keeps(slots, evidence) -> bool | None:
    """Whether every object, a list of its (scale, position), has a token of its own at one of them, unmerged; None without an
    object. This is what "kept" means, whatever the rule and the suite.

    `slots`: long[N] per scale or level, of its whole grid.
    """
    if not evidence:
        return None
    single = {scale: alone(slots[scale]) for scale in {scale for one in evidence for scale, _ in one}}
    return all(any(bool(single[scale][position]) for scale, position in one) for one in evidence)


# ---- Records ---------------------------------------------------------------------------------------------------------


def choose(views: Views, row: Row, question: str):
    """(input_ids and attention_mask long[1, M] with one placeholder, what was kept of the image) for a row."""
    seen = views.seen(row.view, row.settings)
    if bare := without_regions(seen.model.config, [row]):
        warnings.warn(bare, stacklevel=2)
    prompt = asking.write_prompt(seen.processor, question).to(seen.model.device)
    counts = row.counts(seen.available)
    spend = {"token_counts": [counts]} if seen.letterboxed else {} if counts is None else {"budgets": sum(counts)}
    inputs, rules = prompt | {"image_features": [seen.features]} | spend, rules_for(seen.model, row.rules)
    blind = hasattr(seen.model, "host") and (rules or {}).get("selector") == "uniform"
    with unlooked(seen.model) if blind else nullcontext():
        return prompt, asking.compress(seen.model, inputs, rules)


def without_regions(config, rows: list[Row]) -> str:
    """What is to be said of rows whose rule is one over regions where the model, as an export of the released layout, has none: they
    are top-k by another name; "" of no such row."""

    def is_bare(rules):
        over_regions = rules.get("selector") == "preserve_and_merge" or rules.get("coverage")
        return over_regions and "region_method" not in rules and getattr(config, "region_method", None) == "none"

    names = [row.name for row in rows if is_bare(row.rules or {})]
    if not names:
        return ""
    return (
        f"{', '.join(names)}: `region_method` of this model is 'none', so every token is a region of its own, and kept is what top-k "
        "keeps. `--set region_method=kmeans` gives the paper's regions."
    )


@contextmanager
def unlooked(model):
    """A rule that asks for no look takes none, and pays for none: of a host."""
    before = vars(model).get("read_attention")
    model.read_attention = lambda input_ids, rows, *args, **options: torch.ones(len(rows), device=rows.device)
    try:
        yield
    finally:
        del model.read_attention
        if before is not None:
            model.read_attention = before


def rules_for(model, rules: dict | None) -> dict | None:
    """Those of a row; looks are refined by the numbers and layers of the model itself where it is of another family."""
    if not hasattr(model, "host") or not (rules or {}).get("refinement"):
        return rules
    return rules | {name: getattr(model.config, name) for name in REFINEMENT}


def say(seen: Seen, prompt, chosen: list[UHRBatCompressionOutput], **generation) -> list[str]:
    """Answers to one prompt about one image, from several choices of its visual tokens."""
    parts = {name: [one[name] for one in chosen] for name in chosen[0] if all(name in one for one in chosen)}
    images = UHRBatCompressionOutput(**{name: sum(values, []) for name, values in parts.items()})
    repeated = (prompt[name].expand(len(chosen), -1) for name in asking.PROMPT)
    inputs = dict(zip(asking.PROMPT, seen.model.expand_placeholders(*repeated, images)))
    return asking.answer_texts(seen.processor, asking.generate(seen.model, inputs, images, **generation))


@torch.no_grad()
def count_flops(pair, image, rows, question, limit, variants=None) -> list[int]:
    """FLOPs of every row for a first question about an image and `limit` tokens of its answer, counted while it is asked."""
    views, found = Views(pair, image, variants=variants), []
    with FlopMeter() as meter:
        whole = views.seen()
    encoding = {(("whole",), ""): meter.get_total_flops()}
    for row in rows:
        own = views
        if row.view != ("whole",):  # of its tiles each question pays for its own
            own = Views(pair, image, variants=variants)
            own.views["whole",] = whole
        encoded = repr(row.settings) if row.settings and ENCODED & set(row.settings) else ""
        if row.settings:
            variants(row.settings)
        with FlopMeter() as meter:
            seen = own.seen(row.view, row.settings)
        encoding.setdefault((row.view, encoded), meter.get_total_flops())
        if own is views:
            seen.features.partitions.clear()
        with FlopMeter() as meter:
            inputs, kept = choose(own, row, question)
            say(seen, inputs, [kept], max_new_tokens=limit, min_new_tokens=limit)
        found.append(encoding[row.view, encoded] + meter.get_total_flops())
    return found


@contextmanager
def looked_once(model):
    """A look at the same rows by the same question, which many rows of a table have, is taken once: of a host."""
    found, look = {}, model.read_attention

    def read_attention(input_ids, rows, places, *args, **options):
        shown = [rows, *(one.positions for one in places or ())]
        values = b"".join(one.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes() for one in shown)
        key = repr(input_ids.tolist()), hash(values), tuple(rows.shape), repr(args), repr(sorted(options.items()))
        if key not in found:
            found[key] = look(input_ids, rows, places, *args, **options)
        return found[key]

    model.read_attention = read_attention
    try:
        yield
    finally:
        del model.read_attention


def about_of(sample, size, scales) -> tuple[dict, list]:
    """(what records of a sample about an image of a size (height, width) repeat, those of its boxes that lie in it)."""
    boxes = [box for box in sample.boxes if lies_in(box, size)]
    finest = min((size_of(box, size, scales) for box in boxes), default=None)
    about = {"sample": sample.id, "image": sample.pictures[0].key, "task": sample.task, "section": sample.section}
    return about | {"pixels": finest, "native": None if finest is None else finest * max(size) / scales[-1]}, boxes


def check_window(model, views, rows):
    """Raises `ValueError` for a row whose visual tokens alone fill the context window, which a host would leave in silence."""
    for row in rows if hasattr(model, "host") else ():
        if row.settings is None or not ENCODED & set(row.settings):
            spent = 0 if row.counts is list else sum(row.counts(views.available))
            if spent >= model.context_window:
                says = f"{row.name} at {row.x:g} % spends {spent} visual tokens, but the context window holds"
                raise ValueError(f"{says} {model.context_window} tokens and needs room for text.")


@torch.no_grad()
def records_of(
    pair, suite, prompt, rows, group, options=None, focus=None, apart=False, variants=None, plain=None, count=False
) -> list[dict]:
    """One record a sample and row, of all samples about one image: what was right, spent and kept.

    Args:
        pair: (processor, model).
        prompt: name of the suite's prompt.
        options: of reading.
        focus, variants: see `Views`.
        apart: whether every row is answered by itself, and pays for its regions; records then have its seconds.
        plain: [`PlainHost`] that answers the rows whose view is "plain".
        count: whether records of the first sample have the FLOPs of a first question.
    """
    image = pair[0].image_processor.process_image(suite.open(group[0].pictures[0]), **(options or {}))
    views, limit = Views(pair, image, focus, variants), {"max_new_tokens": suite.max_new_tokens}
    size, scales = (image.height, image.width), pair[1].config.scales
    asked = [(sample, suite.prompts[prompt](sample), *about_of(sample, size, scales)) for sample in group]
    check_window(pair[1], views, rows)
    plain_rows, rows = ([row for row in rows if (row.view[0] == PLAIN) == wanted] for wanted in (True, False))
    records = plain_records(plain, views, suite, plain_rows, asked, count)
    flops = count_flops(pair, image, rows, asked[0][1], suite.max_new_tokens, variants) if count else []
    for sample, question, about, boxes in asked:
        batches = defaultdict(list)
        with ExitStack() as looks:
            hosts = set()
            for number, row in enumerate(rows):
                seen = views.seen(row.view, row.settings)
                if apart:
                    seen.features.partitions.clear()
                elif hasattr(seen.model, "host") and id(seen.model) not in hosts:
                    hosts.add(id(seen.model))
                    looks.enter_context(looked_once(seen.model))
                (inputs, kept), compressing = timed(partial(choose, views, row, question))
                held = False if seen.small and boxes else keeps(kept.slots[0], views.evidence(seen, boxes))
                record = {"row": row.name, "x": row.x, "line": row.line, **about}
                record |= {"tokens": len(kept.pooler_output[0]), "kept": held}
                record |= {"flops": flops[number]} if flops and sample is group[0] else {}
                record["seconds"] = {"encode": seen.seconds, "compress": compressing}
                key = len(batches) if apart else (id(seen.model), row.x)
                batches[key].append((seen, inputs, kept, record))
                records.append(record)
        for batch in batches.values():
            seen, inputs, *_ = batch[0]
            chosen = [kept for _, _, kept, _ in batch]
            texts, generating = timed(partial(say, seen, inputs, chosen, **limit))
            for (*_, record), text in zip(batch, texts):
                record |= {"answer": text, "right": suite.scorers[0].score(sample, text)}
                record["seconds"]["generate"] = generating
    return records


class Kept:
    """Records that a run has so far, image by image, in a file of lines that it goes on with.

    Raises:
        ValueError: a run with other `settings` wrote them.
    """

    def __init__(self, path: Path, settings: dict):
        try:
            lines = lines_of_run(path, settings)
            self.done = {(line["suite"], *line["pictures"]): line["records"] for line in lines}
        except (KeyError, TypeError):
            raise ValueError(f"{path} holds lines that are none of such a run. Give another --output.") from None
        self.file = Line(path, settings)

    def keep(self, suite: str, pictures, records: list[dict]):
        self.file.write({"suite": suite, "pictures": list(pictures), "records": records})


def measure_groups(
    samples: Iterable[Sample], measure, description: str, pool=None, kept=None
) -> tuple[list, list[dict]]:
    """What `measure(group)` returns of the samples of every image, one after the other or by the processes of a pool, and
    {"image", "error"} of those that failed.

    `kept`: (name of the suite, [`Kept`]) of a run that goes on where it was stopped.
    """
    errors, groups, name, run = [], groups_of(samples), *(kept or ("", None))
    found = {} if run is None else {key: run.done.get((name, *key)) for key in (one[0].picture_keys for one in groups)}
    waiting = [group for group in groups if not found.get(group[0].picture_keys)]
    results = (pool.map if pool else map)(partial(_attempt, measure), waiting)
    bar = tqdm(results, desc=description, unit="image", total=len(groups), initial=len(groups) - len(waiting))
    for group, (records, failed) in zip(waiting, bar):
        found[group[0].picture_keys] = records
        errors += failed
        if run is not None and records:
            run.keep(name, group[0].picture_keys, records)
    return [record for group in groups for record in found[group[0].picture_keys]], errors


def _attempt(measure, group):
    try:
        return measure(group), []
    except (OSError, ValueError) as error:
        return [], [{"image": group[0].pictures[0].key, "error": reason(error)}]


_worker = {}


def _start_worker(folder, focus, threads, changes, dtype):
    torch.set_num_threads(threads)
    pair = load_model(folder, dtype, **changes)
    _worker.update(pair=pair, focus=focus and load_model(focus, torch.float32))
    if hasattr(pair[1], "host"):
        _worker.update(variants=OtherSettings(folder, pair, changes), plain=PlainHost(*pair))


def _start_process(*start):
    """A pool whose processes fail at their start is broken without a word: the first group says why."""
    try:
        _start_worker(*start)
    except (OSError, ValueError, ImportError) as error:
        _worker["failed"] = error


def _measure(suite, prompt, rows, counted, record, group):
    if "failed" in _worker:
        raise _worker["failed"]
    rows = rows(_worker["pair"]) if callable(rows) else rows
    own = {name: _worker.get(name) for name in ("focus", "variants", "plain")}
    return record(_worker["pair"], SUITES[suite], prompt, rows, group, count=group[0].id == counted, **own)


def ask_rows(
    folder, jobs, workers=1, focus=None, changes=None, dtype=torch.float32, run=None, count=False, record=records_of
) -> dict[str, tuple[list[dict], list[dict]]]:
    """(records, errors) by suite; several workers are processes of one thread each.

    Args:
        jobs: {suite: (samples, rows)}; or a function of (processor, model) that returns them.
        focus: folder of a model with LRS-VQA's module, or None.
        changes: other values for settings of the model.
        dtype: of its weights.
        run: [`Kept`] to go on with.
        count: whether the first sample of each suite has the FLOPs of every row.
        record: what asks about an image, as `records_of` does.
    """
    start = folder, focus, 1 if workers > 1 else torch.get_num_threads(), changes or {}, dtype
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_process, start) if workers > 1 else None
    if pool is None:
        _start_worker(*start)
    found = {}
    try:
        for name, (samples, rows) in jobs.items():
            counted = samples[0].id if count and samples else None
            measure = partial(_measure, name, next(iter(SUITES[name].prompts)), rows, counted, record)
            found[name] = measure_groups(samples, measure, f"Asking {name}", pool, run and (name, run))
            if not found[name][0]:
                raise ValueError(f"No image could be asked about. The first failure: {found[name][1][0]['error']}")
    except BrokenProcessPool:
        raise OSError(
            "A process was ended while it worked, as for lack of memory: fewer --workers take less."
        ) from None
    finally:
        _worker.clear()
        if pool:
            pool.shutdown()
    return found
