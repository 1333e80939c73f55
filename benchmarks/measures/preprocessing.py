"""From the file to the tiles: seconds and memory, the tiles bit-equal."""

import hashlib
import time
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...common.loading import load_processor
from ...image_processing_uhr_bat import UHRBatImageProcessor
from .. import meters, sides
from ..compare import CLOCK, GIGABYTE, NO_RASTERIO, Row, alternate, expect, ratios, show_ratio
from ..images import photograph, tiled_tiff

# Overviews of a raster, the last one of 469 px where it has 30,000.
NUM_OVERVIEWS = 6
# Over what a raster of 1.2 gigapixels needs.
LIMIT = 2_000_000_000


def preprocessing(sizes) -> list[Row]:
    """From the file to the tiles. Ours resizes in threads, so here the clock on the wall counts."""
    size = (600, 600) if sizes.quick else (8500, 8500)
    runs = preprocess_in_turns(sizes, photograph(sizes.folder, size), sizes.repetitions)
    wall, processor = (
        ratios({side: [run[clock] for run in runs[side]] for side in sides.SIDES}) for clock in ("wall", "processor")
    )
    name = f"Preprocessing of a {size[0]:,} x {size[1]:,} px JPEG, tiles bit-equal"
    result = f"{show_ratio(wall)}; of the processor's time, all threads, {show_ratio(processor)}"
    return [Row(name, ">= 1x", result, wall["median"] >= 1, {"ratio": wall, "ratio_of_processor": processor, **runs})]


def preprocessing_memory(sizes) -> list[Row]:
    """From the file to the tiles, once: all that is resident, the libraries (0.4 GB) included."""
    size = (1000, 750) if sizes.quick else (20_000, 15_000)
    name, goal = (
        f"Preprocessing of a {size[0]:,} x {size[1]:,} px PNG, tiles bit-equal, peak resident memory",
        "<= 1.0 GB",
    )
    runs = preprocess_in_turns(sizes, photograph(sizes.folder, size, "png"), 1)
    peaks = {side: run["peak_bytes"] for side, (run,) in runs.items()}
    result = ", ".join(f"{side} {peak / GIGABYTE:.2f} GB" for side, peak in peaks.items())
    return [Row(name, goal, result, peaks["ours"] <= GIGABYTE, runs)]


def gigapixel(sizes) -> list[Row]:
    """A tiled TIFF without overviews, once: all that is resident, the libraries (0.4 GB) included."""
    size = (1000, 750) if sizes.quick else (40_000, 30_000)
    name, goal = f"A tiled TIFF of {size[0]:,} x {size[1]:,} px, every pixel read, peak", "<= 1.1 GB"
    if find_spec("rasterio") is None:
        return [Row(name, goal, NO_RASTERIO)]
    run = alone("ours", sizes.geometry, tiled_tiff(sizes.folder, size))
    return [Row(name, goal, f"{run['peak_bytes'] / GIGABYTE:.2f} GB", run["peak_bytes"] <= 1.1 * GIGABYTE, run)]


def overviews(sizes) -> list[Row]:
    """A tiled TIFF with overviews, read from them and whole: time, what is read, how tiles differ, memory."""
    size = (2000, 2000) if sizes.quick else (30_000, 30_000)
    what = f"A tiled TIFF of {size[0]:,} x {size[1]:,} px with overviews"
    goals = {f"{what}: whole against from overviews": ">= 8x", f"{what}, from overviews, peak": "<= 0.8 GB"}
    if find_spec("rasterio") is None:
        return [Row(name, goal, NO_RASTERIO) for name, goal in goals.items()]
    path, runs = tiled_tiff(sizes.folder, size, num_overviews=NUM_OVERVIEWS), {"auto": [], "off": []}
    for _ in tqdm(range(sizes.repetitions), desc=what, leave=False):
        for mode in runs:
            runs[mode].append(alone("ours", sizes.geometry, path, overviews=mode, keep=True))
    tiles = {mode: run[-1].pop("tiles") for mode, run in runs.items()}
    difference = np.abs(tiles["auto"] - tiles["off"])
    ratio = ratios(
        {"ours": [run["wall"] for run in runs["auto"]], "straightforward": [run["wall"] for run in runs["off"]]}
    )
    read = runs["auto"][-1]["read_bytes"] / runs["off"][-1]["read_bytes"]
    peak = max(run["peak_bytes"] for run in runs["auto"])
    for run in (*runs["auto"], *runs["off"]):
        run.pop("tiles", None)
    numbers = {
        "ratio": ratio,
        "read": read,
        "mean": float(difference.mean()),
        "largest": float(difference.max()),
        **runs,
    }
    results = [
        f"{show_ratio(ratio)}; {100 * read:.1f} % of the bytes read, the program's own included; tiles differ by {difference.mean():.2f} of 255 in the "
        f"mean, {difference.max():.0f} at most",
        f"{peak / GIGABYTE:.2f} GB",
    ]
    met = ratio["median"] >= 8, peak <= 0.8 * GIGABYTE
    return [Row(*goal, *row, numbers) for goal, row in zip(goals.items(), zip(results, met))]


def jpeg(sizes) -> list[Row]:
    """The example as a JPEG, from the file to UHR-BAT-Tiny's tiles and to those of the paper's scales: every pixel read,
    against libjpeg's smaller picture where that is enough; and by how much the tiles differ."""
    size = (3200, 2560) if sizes.quick else (10_000, 8000)
    path, rows = photograph(sizes.folder, size), []
    what = f"The example, a JPEG of {size[0]:,} x {size[1]:,} px, file to tiles"
    tiny = load_processor().image_processor
    larger = [672, 1344] if sizes.quick else UHRBatImageProcessor.scales
    for whose, scales, goal in (("UHR-BAT-Tiny's", tiny.scales, 3), ("the paper's", larger, None)):
        options = {"scales": scales, "do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        functions = {
            side: partial(tiny, path, overviews=mode, **options)
            for side, mode in (("ours", "auto"), ("straightforward", "off"))
        }
        seconds, found = alternate(functions, sizes.repetitions, "jpeg")
        reduced, whole = (found[side]["pixel_values"] for side in functions)
        ratio, mean = ratios(seconds), float(np.abs(reduced - whole).mean())
        numbers = {"ratio": ratio, "seconds": seconds, "mean": mean}
        result = f"{show_ratio(ratio)}; tiles differ by {mean:.2f} of 255 in the mean"
        met = None if goal is None else ratio["median"] >= goal and mean <= 0.3
        goal = "" if goal is None else f">= {goal}x, <= 0.3 of 255"
        rows.append(
            Row(
                f"{what} of {whose} scales: whole against as `auto` reads it, processor's time",
                goal,
                result,
                met,
                numbers,
            )
        )
    return rows


def strips(sizes) -> list[Row]:
    """A portrait strip against the same one lying down."""
    length = 2000 if sizes.quick else 30_000
    images = {
        side: Image.new("RGB", size) for side, size in (("ours", (length, 300)), ("straightforward", (300, length)))
    }
    processor = sides.image_processor(sides.CONFIGS[sizes.geometry]())
    functions = {side: partial(processor, image) for side, image in images.items()}
    seconds, _ = alternate(functions, sizes.repetitions, "strips")
    ratio = ratios(seconds)
    name = f"Preprocessing of 300 x {length:,} px against {length:,} x 300 px, processor's time"
    return [Row(name, "<= 1.5x", show_ratio(ratio), ratio["median"] <= 1.5, {"ratio": ratio, "seconds": seconds})]


def alone(*arguments, **options) -> dict:
    """What [`preprocess`] returns, in a process of its own."""
    with sides.one_process() as process:
        return process.submit(partial(preprocess, **options), *arguments).result()


def preprocess_in_turns(sizes, path, repetitions) -> dict[str, list[dict]]:
    """What [`preprocess`] returns for both sides, a process for each; raises where one bit of the tiles differs."""
    runs = {side: [] for side in sides.SIDES}
    with ExitStack() as stack:
        processes = {side: stack.enter_context(sides.one_process()) for side in sides.SIDES}
        for _ in tqdm(range(repetitions), desc=f"preprocessing {Path(path).name}", leave=False):
            for side, process in processes.items():
                runs[side].append(process.submit(preprocess, side, sizes.geometry, path).result())
            digests = {run[-1]["digest"] for run in runs.values()}
            expect(len(digests) == 1, f"The tiles of {Path(path).name} are not the same.")
    return runs


def preprocess(name, geometry, path, overviews=None, keep=False) -> dict:
    """Seconds, peak bytes, bytes read and a digest of the tiles of all scales, inside a process; `keep` returns the tiles,
    0..255, too. The straightforward side is handed an image that is held whole."""
    ours = name == "ours"
    # Pixels alone: ours needs no model, whose memory would count.
    side = sides.image_processor(sides.CONFIGS[geometry]()) if ours else sides.side_of(name, geometry)
    start = time.perf_counter(), CLOCK(), meters.read_bytes()
    if ours:
        options = {"overviews": overviews, "max_image_pixels": LIMIT, "return_tensors": "pt"}
        inputs = side(path, do_rescale=not keep, do_normalize=not keep, **options)
    else:
        inputs = side.preprocess(Image.open(path).convert("RGB"))
    wall, processor = time.perf_counter() - start[0], CLOCK() - start[1]
    numbers = {"wall": wall, "processor": processor, "read_bytes": meters.read_bytes() - start[2]}
    numbers["peak_bytes"] = meters.peak_bytes()
    digest = hashlib.sha256()
    for part in inputs[0] if name == "straightforward" else inputs["pixel_values"]:
        digest.update(part.numpy())
    kept = {"tiles": inputs["pixel_values"].numpy()} if keep else {}
    return {**numbers, "digest": digest.hexdigest(), **kept}
