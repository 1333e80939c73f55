"""Whole questions: what encoding holds, and seconds and memory from the file to the answer."""

import os
import statistics
import subprocess
import sys
import weakref
from functools import partial
from importlib.util import find_spec

import torch
from tqdm import tqdm

from ...common import asking
from ...common.loading import load_model
from .. import meters, sides
from ..compare import CLOCK, GIGABYTE, NO_RASTERIO, Row, alternate, check_question, ratios, show_ratio
from ..images import compressed_tiff, photograph, tiled_tiff

# What a question needs of the libraries, and the same with the model: each in a process of its own.
LIBRARIES = "import torch, transformers.modeling_utils, transformers.processing_utils"
LOADED = "from uhr_bat import load_model; load_model()"
# Tiles that a question about the pyramid of a raster may encode.
MAX_TILES = 128


def encoding_memory(sizes) -> list[Row]:
    """Outputs of the vision tower's layers that are alive at once, in tiles; quick geometry: the tiles are the same."""
    path, held = photograph(sizes.folder, (400, 400)), {}
    for name in sides.SIDES:
        side = sides.side_of(name, "quick")
        held[name] = most_tiles_alive(side, path)
    chunk, layers = side.model.vision_chunk_size, side.model.config.vision_config.num_hidden_layers
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


def end_to_end(sizes) -> list[Row]:
    """A whole question, file to answer, in a process pair in turns: seconds by stage, and all that is resident."""
    size = (600, 600) if sizes.quick else (8500, 8500)
    path = photograph(sizes.folder, size)
    seconds = {name: [] for name in sides.SIDES}
    with sides.process_pair() as pair:
        for _ in tqdm(range(sizes.repetitions), desc="end to end", leave=False):
            results, partition = {}, None
            for name, process in pair.items():
                task = process.submit(run_question, name, sizes.geometry, path, partition)
                stages, results[name] = task.result()
                partition = results[name]["regions"]
                seconds[name].append(stages)
            agreement = check_question(results["ours"], results["straightforward"])
        peaks = {name: process.submit(meters.peak_bytes).result() for name, process in pair.items()}
    totals = {name: [sum(stages.values()) for stages in runs] for name, runs in seconds.items()}
    stages = {}
    for stage in sides.STAGES:
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
    """Seconds of every stage, and what [`sides.ask`] returns, inside a process."""
    side = sides.side_of(name, geometry)
    mark = sides.Meter(CLOCK)
    result = sides.ask(side, path, sides.prompt_ids(side.model.config), mark, partition=partition)
    return mark.stages, result


def native_levels(sizes) -> list[Row]:
    """A question that looks closer, down to the pixels of a raster, by UHR-BAT-Tiny: a large file against a small one."""
    small, large = (300, 1200) if sizes.quick else (4000, 30_000)
    what = f"A JPEG GeoTIFF of {large:,} x {large:,} px with overviews, file to answer, at most {MAX_TILES} tiles"
    goals = {f"{what}: against {small:,} x {small:,} px, processor's time": "<= 1.2x", f"{what}: bytes read": "<= 10 %"}
    if find_spec("rasterio") is None:
        return [Row(name, goal, NO_RASTERIO) for name, goal in goals.items()]
    paths = {"ours": compressed_tiff(sizes.folder, small), "straightforward": compressed_tiff(sizes.folder, large)}
    processor, model = load_model(dtype=torch.float32, device_map=None)
    functions = {side: partial(look_closer, processor, model, path) for side, path in paths.items()}
    seconds, read = alternate(functions, sizes.repetitions, "native levels")
    ratio, size = ratios(seconds), os.path.getsize(paths["straightforward"])
    fraction = read["straightforward"] / size
    numbers = {"ratio": ratio, "seconds": {small: seconds["ours"], large: seconds["straightforward"]}}
    numbers |= {"read_bytes": read["straightforward"], "file_bytes": size}
    results = [show_ratio(ratio), f"{100 * fraction:.1f} % of {size / 1e6:.0f} MB"]
    met = ratio["median"] <= 1.2, fraction <= 0.1
    return [Row(*goal, *row, numbers) for goal, row in zip(goals.items(), zip(results, met))]


def largest_raster(sizes) -> list[Row]:
    """The same question about a raster of 5.7 gigapixels, read without a limit stated, against one of 16,000 px: processor's
    time, and peak memory of a process each."""
    small, large = ((400, 188), (1600, 752)) if sizes.quick else ((16_000, 7552), (110_162, 51_992))
    what = f"A tiled TIFF of {large[0]:,} x {large[1]:,} px with overviews against {small[0]:,} x {small[1]:,} px, file to answer"
    goals = {f"{what}: processor's time": "<= 1.2x", f"{what}: peak resident memory": "<= 1.2x"}
    if find_spec("rasterio") is None:
        return [Row(name, goal, NO_RASTERIO) for name, goal in goals.items()]
    paths = {
        side: tiled_tiff(sizes.folder, size, num_overviews=(size[0] // 256).bit_length() - 1)
        for side, size in (("ours", small), ("straightforward", large))
    }
    peaks = {}
    for side, path in paths.items():
        with sides.one_process() as process:
            peaks[side] = process.submit(closer_alone, path).result()
    processor, model = load_model(dtype=torch.float32, device_map=None)
    functions = {side: partial(look_closer, processor, model, path) for side, path in paths.items()}
    seconds, _ = alternate(functions, sizes.repetitions, "largest raster")
    ratio, memory = ratios(seconds), peaks["straightforward"] / peaks["ours"]
    numbers = {"ratio": ratio, "seconds": dict(zip(("small", "large"), seconds.values())), "peak_bytes": peaks}
    shown = f"{memory:.2f}x ({peaks['straightforward'] / GIGABYTE:.2f} GB against {peaks['ours'] / GIGABYTE:.2f} GB)"
    met = ratio["median"] <= 1.2, memory <= 1.2
    return [Row(*goal, *row, numbers) for goal, row in zip(goals.items(), zip((show_ratio(ratio), shown), met))]


def closer_alone(path) -> int:
    """Peak bytes of a process that asks about a file, libraries and model included."""
    processor, model = load_model(dtype=torch.float32, device_map=None)
    for _ in range(2):
        look_closer(processor, model, path)
    return meters.peak_bytes()


@torch.no_grad()
def look_closer(processor, model, path) -> int:
    """Ask a question of 8 tokens about a file; the bytes that were asked of files meanwhile."""
    before = meters.read_bytes()
    text = asking.prompt_text(processor, "What colour is the plane at the runway?")
    inputs = processor(text=text, images=path, max_tiles=MAX_TILES, native=True, return_tensors="pt")
    asking.generate(model, inputs, min_new_tokens=8, max_new_tokens=8)
    return meters.read_bytes() - before


def many_questions(sizes) -> list[Row]:
    """What a question costs UHR-BAT-Tiny by how many are asked about an image, in processor's seconds of one thread: the
    first from the file, others about the encoded image, alone and eight at a time."""
    number, size = (8, 300) if sizes.quick else (96, 4000)
    path = photograph(sizes.folder, (size, size))
    processor, model = load_model(dtype=torch.float32, device_map=None)
    asked = [f"How many ships are at the pier in part {idx} of the scene?" for idx in range(number)]

    @torch.no_grad()
    def ask(questions, **image):
        texts = [asking.prompt_text(processor, question) for question in questions]
        inputs = processor(text=texts, padding=True, return_tensors="pt", **image)
        return asking.generate(model, inputs, min_new_tokens=4, max_new_tokens=4)

    features = asking.encode(model, processor.image_processor(path, return_tensors="pt"))
    functions = {
        "first": lambda: ask(asked[:1], images=path),
        "second": lambda: ask(asked[1:2], image_features=features),
        "all": lambda: [ask(asked[at : at + 8], image_features=features * 8) for at in range(0, number, 8)],
    }
    seconds, _ = alternate(functions, sizes.repetitions, "many questions")
    first, second, every = (statistics.median(seconds[name]) for name in ("first", "second", "all"))
    every /= number
    result = f"{first:.2f} s, {second:.3f} s, {every:.3f} s: 1, 1/{first / second:.0f}, 1/{first / every:.0f}"
    name = f"UHR-BAT-Tiny, {size:,} px: the first question, the second, each of {number} eight at a time"
    return [Row(name, "", result, None, {"seconds": seconds})]


def start_up(sizes) -> list[Row]:
    """Processor's seconds from a fresh process to UHR-BAT-Tiny loaded, against those of the libraries' imports alone."""

    def process(code) -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL, cwd=sizes.folder)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    seconds = {"ours": [], "straightforward": []}
    if not sizes.quick:
        process(LOADED)  # what lies in the system's cache from then on
    for _ in range(sizes.repetitions):
        seconds["ours"].append(process(LIBRARIES))
        seconds["straightforward"].append(process(LOADED))
    ratio, loaded = ratios(seconds), statistics.median(seconds["straightforward"])
    numbers = {"ratio": ratio, "libraries": seconds["ours"], "loaded": seconds["straightforward"]}
    result = f"{show_ratio(ratio)}, {loaded:.2f} s"
    name = "Start-up: UHR-BAT-Tiny loaded, against the imports of torch and transformers alone"
    return [Row(name, "<= 1.25x", result, ratio["median"] <= 1.25, numbers)]
