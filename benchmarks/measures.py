"""Every measure of the benchmark: one function each, in the order of the table that `uhr-bat bench` prints.

A measure takes the sizes and returns the rows that came out. Goals are ratios or counts of one run. Where the two sides
must agree and do not, the measure raises [`Disagreement`], and the benchmark fails.

Letters: N tokens, D width, R regions.
"""

import hashlib
import statistics
import time
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from ..clustering_uhr_bat import CLUSTERINGS
from ..common.loading import ROOT
from ..configuration_uhr_bat import PAPER_BUDGETS, PAPER_SCALES, UHRBatConfig
from ..geometry_uhr_bat import shown_patches
from ..modeling_uhr_bat import UHRBatForConditionalGeneration
from ..token_compression_uhr_bat import cluster_regions, merge_tokens, select_tokens
from . import flops, meters, straightforward
from .images import photograph, tiled_tiff
from .sides import (
    ANSWER_TOKENS,
    SIDES,
    STAGES,
    TEXT_AFTER,
    TEXT_BEFORE,
    Meter,
    ask,
    one_process,
    prompt_ids,
    side_of,
)

# Two sums of the same numbers in another order differ by so much in visual tokens, which are of the order of 1.
TOKEN_TOLERANCE = 1e-3
# k-means makes rounding grow: the share of the tokens that must be in the same region all the same.
SAME_REGION = 0.99
# The tokens of a 4,032 px view, and of a 2,688 px view.
FINEST, SECOND = 82_944, 36_864
WIDTH_7B = 3584
GIGABYTE = 1e9
# Seconds of the processor, in one thread: on an idle machine those of the clock on the wall, on a busy one without the
# time that others had.
CLOCK = time.process_time


class Disagreement(Exception):
    """The two sides do not give the same."""


@dataclass
class Row:
    """One row of the table: `met` is None where nothing was measured, or no goal was set."""

    measure: str
    goal: str
    result: str
    met: bool | None = None
    numbers: dict = field(default_factory=dict)


@dataclass
class Settings:
    """`quick`: sizes of a test, whose figures mean nothing. `folder`: where test images are written."""

    quick: bool
    repetitions: int
    folder: Path

    @property
    def geometry(self) -> str:
        return "quick" if self.quick else "scaled"


MEASURES = {}


def measure(function):
    MEASURES[function.__name__] = function
    return function


# Helpers


@contextmanager
def process_pair():
    """{side: executor of one process}: each side's memory is its own, and they run when they are asked to."""
    with one_process() as ours, one_process() as straightforward_side:
        yield {"ours": ours, "straightforward": straightforward_side}


def spread(values) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(seconds) -> dict[str, float]:
    """How many times as long the straightforward side took, repetition by repetition."""
    return spread([slow / fast for fast, slow in zip(seconds["ours"], seconds["straightforward"])])


def show_ratio(ratio) -> str:
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"


def alternate(functions, repetitions, desc, num_warm_up=1) -> tuple[dict[str, list[float]], dict]:
    """Seconds (`CLOCK`) of each side, in turns, and what they returned last. The first turns only warm up."""
    seconds, results = {name: [] for name in functions}, {}
    for turn in tqdm(range(num_warm_up + repetitions), desc=desc, leave=False):
        for name, function in functions.items():
            start = CLOCK()
            results[name] = function()
            if turn >= num_warm_up:
                seconds[name].append(CLOCK() - start)
    return seconds, results


def random_features(N, D, num_kinds, seed=0) -> torch.Tensor:
    """float32[N, D]: tokens of `num_kinds` kinds, of which some are more alike than others, as those of an image.

    Kinds and the variation inside them live in 96 directions of falling strength; an eighth of the variation lies in all
    directions.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = min(96, D)
    strength = torch.arange(1, rank + 1) ** -0.5
    kinds = torch.randn(num_kinds, rank, generator=generator)
    kind = torch.randint(num_kinds, (N,), generator=generator)
    inner = (kinds[kind] + torch.randn(N, rank, generator=generator)) * strength
    features = inner @ torch.randn(rank, D, generator=generator)
    return features.add_(torch.randn(N, D, generator=generator), alpha=0.125)


def grid_coords(N) -> torch.Tensor:
    """float32[N, 2], centres of the tokens of a square grid."""
    side = round(N**0.5)
    place = torch.arange(N)
    return torch.stack(((place // side + 0.5) / side, (place % side + 0.5) / side), dim=1)


def inertia(features, coords, regions, coord_weight=0.05) -> float:
    """Mean squared distance of the clustering embedding (eq. 13) to the centre of its region."""
    embedding = torch.cat([F.normalize(features, dim=1), coord_weight * coords], dim=1)
    sizes = torch.bincount(regions)
    centres = torch.zeros(len(sizes), embedding.shape[1]).index_add_(0, regions, embedding) / sizes[:, None]
    # |u - c|^2 summed over a region is the sum of |u|^2 less R_m |c|^2.
    total = embedding.square().sum(dtype=torch.float64) - (sizes * centres.double().square().sum(1)).sum()
    return (total / len(embedding)).item()


def same_region(first, second) -> float:
    """Share of the tokens long[N] that two partitions put together, whatever the names of the regions."""
    R = int(second.max()) + 1
    counts = torch.bincount(first * R + second, minlength=(int(first.max()) + 1) * R)
    return counts.view(-1, R).amax(1).sum().item() / len(first)


def expect(condition, message):
    if not condition:
        raise Disagreement(message)


def check_tokens(ours, straightforward):
    """Visual tokens float[n, D] of every scale are the same, in the same order."""
    for scale_idx, (first, second) in enumerate(zip(ours, straightforward, strict=True)):
        expect(first.shape == second.shape, f"Scale {scale_idx}: {list(first.shape)} and {list(second.shape)} tokens.")
        differing = int(((first.float() - second.float()).abs().amax(1) > TOKEN_TOLERANCE).sum())
        expect(not differing, f"Scale {scale_idx}: {differing} of {len(first)} visual tokens are not the same.")


def check_regions(ours, straightforward) -> float:
    """The least share of tokens in the same region, of partitions long[N] of every scale."""
    share = min(same_region(first, second) for first, second in zip(ours, straightforward, strict=True))
    expect(share >= SAME_REGION, f"Only {100 * share:.2f} % of the tokens are in the same region.")
    return share


def check_question(ours, straightforward) -> dict:
    """What [`ask`] returned on both sides: the same partitions, visual tokens and answer."""
    share = check_regions(ours["regions"], straightforward["regions"])
    check_tokens(ours["visual_tokens"], straightforward["visual_tokens"])
    answers = ours["answer"], straightforward["answer"]
    expect(answers[0] == answers[1], f"The answers are not the same: {answers[0]} and {answers[1]}.")
    return {"same_region": share, "visual_tokens": sum(map(len, ours["visual_tokens"])), "answer": len(answers[0])}


# FLOPs


@measure
def flop_counts(settings) -> list[Row]:
    """The 7B geometry at the paper's default budgets, by a formula that is held against a counter."""
    check_formula(settings)
    config = UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    counted = flops.question_flops(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)
    check_towers(config, counted["straightforward"])
    totals = {name: sum(stages.values()) for name, stages in counted.items()}
    again = totals["ours"] - counted["ours"]["encode"] - counted["ours"]["regions"]
    first, second = totals["straightforward"] / totals["ours"], totals["straightforward"] / again
    numbers = {name: {stage: value / 1e12 for stage, value in counted[name].items()} for name in counted}
    return [
        Row(
            "FLOPs of a question, 7B, budget 3000",
            ">= 1.5x fewer",
            f"{first:.2f}x ({totals['ours'] / 1e12:.0f} against {totals['straightforward'] / 1e12:.0f} TFLOPs)",
            first >= 1.5,
            {"ratio": first, "tflops": numbers},
        ),
        Row(
            "FLOPs of a second question about an encoded image",
            ">= 3.5x fewer",
            f"{second:.2f}x ({again / 1e12:.0f} TFLOPs)",
            second >= 3.5,
            {"ratio": second, "tflops": again / 1e12},
        ),
    ]


def check_formula(settings):
    """Every stage of a whole question on the small geometry: the formula is what the counter says."""
    path = photograph(settings.folder, (400, 400))
    for name in SIDES:
        side = side_of(name, "quick")
        config = side.model.config
        expected = flops.question_flops(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)[name]
        with meters.FlopMeter() as meter:
            mark = Meter(meter.get_total_flops)
            ask(side, path, prompt_ids(config), mark)
        counted = {stage: value for stage, value in mark.stages.items() if value}
        expect(counted == expected, f"{name}: the counter says {counted}, the formula {expected}.")


def check_towers(config, expected):
    """The 7B towers on the meta device, two tiles and the prompt with its visual tokens."""
    with torch.device("meta"), torch.no_grad():
        model = UHRBatForConditionalGeneration(config)
        prompt = torch.empty(1, TEXT_BEFORE + sum(config.budgets) + TEXT_AFTER, config.text_config.hidden_size)
        tiles = torch.empty(2, 3, config.tile_size, config.tile_size)
        with meters.FlopMeter() as meter:
            model.model.vision_tower.vision_model(tiles)
            counted = [meter.get_total_flops()]
            model.lm_head(model.model.language_model(inputs_embeds=prompt).last_hidden_state)
            counted.append(meter.get_total_flops() - counted[0])
    formula = [flops.vision_tower(config, 2), expected["prefill"]]
    expect(counted == formula, f"7B on the meta device: the counter says {counted}, the formula {formula}.")


@measure
def padding(settings) -> list[Row]:
    """Tiles that pass the vision tower, of the 228 of the letterboxed square. Quick geometry: the tiles are the same."""
    side, results, met = side_of("ours", "quick"), {}, True
    calls = []
    tower = side.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    tile, scales = side.model.config.tile_size, side.model.config.scales
    for name, size in (("4:3", (640, 480)), ("3:1", (720, 240))):
        calls.clear()
        pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
        side.encode(side.preprocess(Image.fromarray(pixels)))
        grids = [(scale // tile, scale // tile) for scale in scales]
        showing = sum(int(shown_patches((size[1], size[0]), grid).sum()) for grid in grids)
        results[name] = {"encoded": sum(calls), "show the image": showing}
        met &= sum(calls) == showing
    handle.remove()
    text = ", ".join(f"{name}: {counts['encoded']} of 228 encoded" for name, counts in results.items())
    return [Row("Padding-only tiles of a 4:3 and a 3:1 image", "not encoded", text, met, results)]


# Clustering and selection


@measure
def synchronisations(settings) -> list[Row]:
    """Clustering and selection of the paper's four scales with 10 iterations; 16 wide, which changes no count."""
    shrink = 8 if settings.quick else 1
    counts = {}
    for name in SIDES:
        with meters.SyncMeter() as meter:
            for scale, budget in zip(PAPER_SCALES, PAPER_BUDGETS):
                N, R, n = (scale // 14 // shrink) ** 2, 600 // shrink**2, max(1, budget // shrink**2)
                features, coords, importance = torch.randn(N, 16), grid_coords(N), torch.rand(N)
                if name == "ours":
                    regions = cluster_regions(features, coords, R)
                    merge_tokens(features, select_tokens(importance, regions, n), n)
                else:
                    regions = straightforward.cluster(features, coords, R, 10, 0.05)
                    straightforward.select(features, importance, regions, n, "ge")
        counts[name] = meter.count
    result = f"{counts['ours']} against {counts['straightforward']:,}"
    return [Row("Device synchronisations, clustering and selection", "<= 200", result, counts["ours"] <= 200, counts)]


@measure
def selection(settings) -> list[Row]:
    """Selection and merging at the finest scale, as wide as the 7B decoder."""
    N, R, budget, D = (2304, 100, 100, 32) if settings.quick else (FINEST, 2000, 2000, WIDTH_7B)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(N, D, generator=generator)
    importance = torch.rand(N, generator=generator)
    regions = torch.randint(R, (N,), generator=generator)
    functions = {
        "ours": lambda: merge_tokens(tokens, select_tokens(importance, regions, budget), budget),
        "straightforward": partial(straightforward.select, tokens, importance, regions, budget, "ge"),
    }
    seconds, results = alternate(functions, settings.repetitions, "selection")
    check_tokens([results["ours"]], [results["straightforward"]])
    ratio = ratios(seconds)
    name = f"Selection and merging, N = {N:,}, k = B = {R:,}, D = {D:,}, the same tokens"
    return [Row(name, ">= 12x", show_ratio(ratio), ratio["median"] >= 12, {"ratio": ratio, "seconds": seconds})]


@measure
def kmeans(settings) -> list[Row]:
    """k-means as wide as the scaled model, from the same initial centres."""
    rows = []
    for N, R, goal in ((2304, 80, 3.0), (SECOND, 600, 1.4)):
        N, R, D = (N // 16, R // 16, 32) if settings.quick else (N, R, 256)
        problem = random_features(N, D, 2 * R), grid_coords(N), R
        functions = {
            "ours": partial(cluster_regions, *problem),
            "straightforward": partial(straightforward.cluster, *problem, 10, 0.05),
        }
        seconds, results = alternate(functions, settings.repetitions, f"k-means, N = {N:,}")
        share = check_regions([results["ours"]], [results["straightforward"]])
        ratio = ratios(seconds)
        rows.append(
            Row(
                f"k-means, N = {N:,}, k = {R}, D = {D}, same labels",
                f">= {goal}x",
                f"{show_ratio(ratio)}, {100 * share:.2f} % of the labels the same",
                ratio["median"] >= goal,
                {"ratio": ratio, "seconds": seconds, "same_labels": share},
            )
        )
    return rows


@measure
def kmeans_projection(settings) -> list[Row]:
    """The option that clusters a projection, against our exact k-means; as wide as the 7B decoder."""
    name, goal = "k-means on a projection, 36,864 x 3,584, k = 600, inertia <= 1.005x", ">= 8x"
    if "kmeans_pca" not in CLUSTERINGS:
        return [Row(name, goal, 'not measured: there is no method="kmeans_pca"')]
    N, R, D = (2304, 60, 256) if settings.quick else (SECOND, 600, WIDTH_7B)
    problem = random_features(N, D, 2 * R), grid_coords(N), R
    functions = {
        "ours": partial(cluster_regions, *problem, method="kmeans_pca"),
        "straightforward": partial(straightforward.cluster, *problem, 10, 0.05),
        "exact": partial(cluster_regions, *problem),
    }
    seconds, results = alternate(functions, 1, "k-means on a projection", num_warm_up=0)  # minutes each
    of = {key: inertia(*problem[:2], regions) for key, regions in results.items()}
    worse = of["ours"] / of["exact"]
    exact = spread([slow / fast for fast, slow in zip(seconds["ours"], seconds["exact"])])
    ratio = ratios(seconds)
    return [
        Row(
            name,
            goal,
            f"{show_ratio(exact)} against our exact one, {show_ratio(ratio)} against the straightforward one, inertia "
            f"{worse:.4f}x",
            exact["median"] >= 8 and worse <= 1.005,
            {"ratio_to_exact": exact, "ratio": ratio, "inertia": worse, "seconds": seconds},
        )
    ]


@measure
def kmeans_memory(settings) -> list[Row]:
    """Resident memory that k-means takes beside its inputs, each side in a process of its own; two iterations."""
    N, R, D = (2304, 60, 256) if settings.quick else (FINEST, 2000, WIDTH_7B)
    with process_pair() as pair:
        extra = {name: pair[name].submit(extra_memory_of_kmeans, name, N, R, D).result() for name in pair}
    result = f"{extra['ours'] / 1e6:.0f} MB against {extra['straightforward'] / 1e6:,.0f} MB"
    name = f"Extra memory of k-means, {N:,} x {D:,}, k = {R:,}"
    return [Row(name, "<= 200 MB", result, extra["ours"] <= 200e6, extra)]


def extra_memory_of_kmeans(name, N, R, D) -> int:
    """Bytes, inside a process."""
    features, coords = torch.randn(N, D), grid_coords(N)
    cluster_regions(features[:4096], coords[:4096], 100, num_iterations=2)  # what the first call sets up
    before = meters.reset_peak()
    if name == "ours":
        cluster_regions(features, coords, R, num_iterations=2)
    else:
        straightforward.cluster(features, coords, R, 2, 0.05)
    return meters.peak_bytes() - before


# Images


def readers() -> dict[str, str]:
    """Names of the ways to the tiles, and what they are called: ours with Pillow, and with pyvips where it is."""
    names = {"ours": "Pillow", "streamed": "the optional reader", "straightforward": "straightforward"}
    if find_spec("pyvips") is None:
        names.pop("streamed")
    return names


@measure
def preprocessing(settings) -> list[Row]:
    """From the file to the tiles. Ours resizes in threads, so here the clock on the wall counts."""
    size = (600, 600) if settings.quick else (8500, 8500)
    names = readers()
    runs = preprocess_in_turns(settings, size, names, settings.repetitions)
    slow, rows = runs.pop("straightforward"), []
    for side, fast in runs.items():
        wall, processor = (
            ratios({"ours": [run[clock] for run in fast], "straightforward": [run[clock] for run in slow]})
            for clock in ("wall", "processor")
        )
        name = f"Preprocessing of a {size[0]:,} x {size[1]:,} px JPEG, {names[side]}, tiles bit-equal"
        result = f"{show_ratio(wall)}; of the processor's time, all threads, {show_ratio(processor)}"
        data = {"ratio": wall, "ratio_of_processor": processor, side: fast, "straightforward": slow}
        rows.append(Row(name, ">= 2x", result, wall["median"] >= 2, data))
    return rows


@measure
def preprocessing_memory(settings) -> list[Row]:
    """From the file to the tiles, once: all that is resident, the libraries (0.4 GB) included."""
    size = (1000, 750) if settings.quick else (20_000, 15_000)
    name = f"Preprocessing of {size[0]:,} x {size[1]:,} px, tiles bit-equal, peak resident memory"
    names = readers()
    runs = preprocess_in_turns(settings, size, names, 1)
    peaks = {side: run["peak_bytes"] for side, (run,) in runs.items()}
    result = ", ".join(f"{names[side]} {peak / GIGABYTE:.2f} GB" for side, peak in peaks.items())
    return [Row(name, "<= 1.0 GB", result, min(peaks.values()) <= GIGABYTE, runs)]


@measure
def gigapixel(settings) -> list[Row]:
    """A tiled TIFF through the optional reader, once: all that is resident, the libraries (0.4 GB) included."""
    size = (1000, 750) if settings.quick else (40_000, 30_000)
    name, goal = f"A tiled TIFF of {size[0]:,} x {size[1]:,} px through the optional reader, peak", "<= 1.1 GB"
    if find_spec("pyvips") is None:
        return [Row(name, goal, "not measured: pyvips is not installed")]
    path = tiled_tiff(settings.folder, size)
    with one_process() as process:
        run = process.submit(preprocess, "streamed", settings.geometry, path).result()
    return [Row(name, goal, f"{run['peak_bytes'] / GIGABYTE:.2f} GB", run["peak_bytes"] <= 1.1 * GIGABYTE, run)]


def preprocess_in_turns(settings, size, names, repetitions) -> dict[str, list[dict]]:
    """What [`preprocess`] returns for every name, a process for each; raises where one bit of the tiles differs."""
    path, runs = photograph(settings.folder, size), {name: [] for name in names}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(one_process()) for name in names}
        for _ in tqdm(range(repetitions), desc=f"preprocessing {size[0]} x {size[1]} px", leave=False):
            for name, process in processes.items():
                runs[name].append(process.submit(preprocess, name, settings.geometry, path).result())
            digests = {run[-1]["digest"] for run in runs.values()}
            expect(len(digests) == 1, f"The tiles of {size} px are not the same.")
    return runs


def preprocess(name, geometry, path) -> dict:
    """Seconds, peak bytes and a digest of the tiles of all scales, inside a process. "streamed" is ours, by the optional
    reader."""
    side = side_of("ours" if name == "streamed" else name, geometry)
    start = time.perf_counter(), CLOCK()
    if name == "streamed":
        limit = {"max_image_pixels": 2_000_000_000}
        inputs = side.processor(side.processor.open_image(path, **limit), **limit, return_tensors="pt")
    else:
        inputs = side.preprocess(side.read(path))
    wall, processor, peak = time.perf_counter() - start[0], CLOCK() - start[1], meters.peak_bytes()
    digest = hashlib.sha256()
    for part in inputs[0] if name == "straightforward" else inputs["pixel_values"]:
        digest.update(part.numpy())
    return {"wall": wall, "processor": processor, "peak_bytes": peak, "digest": digest.hexdigest()}


# Whole questions


@measure
def encoding_memory(settings) -> list[Row]:
    """Outputs of the vision tower's layers that are alive at once, in tiles; quick geometry: the tiles are the same."""
    path, held = photograph(settings.folder, (400, 400)), {}
    for name in SIDES:
        side = side_of(name, "quick")
        held[name] = most_tiles_alive(side, path)
    config = side.model.config
    chunk = config.vision_chunk_size
    layers = config.vision_config.num_hidden_layers
    result = (
        f"{held['ours']} tiles' states at once against {held['straightforward']} (chunks of {chunk} tiles; a tower of "
        f"{layers} layers)"
    )
    # A layer's input and its output, and the chunk that is kept for the projector.
    met = held["ours"] <= 3 * chunk
    return [Row("Vision features held while encoding", "chunk-sized", result, met, held)]


def most_tiles_alive(side, path) -> int:
    """Tiles whose states some layer put out and that are alive at once, while one image is encoded."""
    states, counts = [], []

    def count(module, args, output):
        states.append(weakref.ref(output))
        alive = [state() for state in states]
        counts.append(sum(len(state) for state in alive if state is not None))

    handles = [layer.register_forward_hook(count) for layer in side.model.model.vision_tower.encoder.layers]
    with torch.no_grad():
        side.encode(side.preprocess(side.read(path)))
    for handle in handles:
        handle.remove()
    return max(counts)


@measure
def end_to_end(settings) -> list[Row]:
    """A whole question, file to answer, in a process pair in turns: seconds by stage, and all that is resident."""
    size = (600, 600) if settings.quick else (8500, 8500)
    path = photograph(settings.folder, size)
    seconds = {name: [] for name in SIDES}
    with process_pair() as pair:
        for _ in tqdm(range(settings.repetitions), desc="end to end", leave=False):
            results, partition = {}, None
            for name, process in pair.items():
                task = process.submit(run_question, name, settings.geometry, path, partition)
                stages, results[name] = task.result()
                partition = results[name]["regions"]
                seconds[name].append(stages)
            agreement = check_question(**results)
        peaks = {name: process.submit(meters.peak_bytes).result() for name, process in pair.items()}
    totals = {name: [sum(stages.values()) for stages in runs] for name, runs in seconds.items()}
    stages = {}
    for stage in STAGES:
        taken = {name: [run[stage] for run in runs] for name, runs in seconds.items()}
        stages[stage] = {
            "ours": statistics.median(taken["ours"]),
            "straightforward": statistics.median(taken["straightforward"]),
            "ratio": ratios(taken),
        }
    ratio, memory = ratios(totals), peaks["straightforward"] / peaks["ours"]
    numbers = {"ratio": ratio, "seconds": totals, "stages": stages, "agreement": agreement}
    return [
        Row(
            "Scaled model end to end, the same visual tokens and answer",
            ">= 2.4x",
            show_ratio(ratio),
            ratio["median"] >= 2.4,
            numbers,
        ),
        Row(
            "Scaled model end to end, peak resident memory",
            "<= 1/2",
            f"1/{memory:.2f} ({peaks['ours'] / GIGABYTE:.2f} GB against {peaks['straightforward'] / GIGABYTE:.2f} GB)",
            memory >= 2,
            {"ratio": memory, "peak_bytes": peaks},
        ),
    ]


def run_question(name, geometry, path, partition) -> tuple[dict[str, float], dict]:
    """Seconds of every stage, and what [`ask`] returns, inside a process."""
    side = side_of(name, geometry)
    mark = Meter(CLOCK)
    result = ask(side, path, prompt_ids(side.model.config), mark, partition=partition)
    return mark.stages, result
