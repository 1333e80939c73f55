"""From the file to the tiles: seconds and memory, the tiles bit-equal."""

import hashlib
import time
from contextlib import ExitStack
from importlib.util import find_spec

from tqdm import tqdm

from .. import meters, sides
from ..compare import CLOCK, Row, expect, ratios, show_ratio
from ..images import photograph, tiled_tiff

GIGABYTE = 1e9


def readers() -> dict[str, str]:
    """Names of the ways to the tiles, and what they are called: ours with Pillow, and with pyvips where it is."""
    names = {"ours": "Pillow", "streamed": "the optional reader", "straightforward": "straightforward"}
    if find_spec("pyvips") is None:
        names.pop("streamed")
    return names


def preprocessing(sizes) -> list[Row]:
    """From the file to the tiles. Ours resizes in threads, so here the clock on the wall counts."""
    size = (600, 600) if sizes.quick else (8500, 8500)
    names = readers()
    runs = preprocess_in_turns(sizes, size, names, sizes.repetitions)
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


def preprocessing_memory(sizes) -> list[Row]:
    """From the file to the tiles, once: all that is resident, the libraries (0.4 GB) included."""
    size = (1000, 750) if sizes.quick else (20_000, 15_000)
    name = f"Preprocessing of {size[0]:,} x {size[1]:,} px, tiles bit-equal, peak resident memory"
    names = readers()
    runs = preprocess_in_turns(sizes, size, names, 1)
    peaks = {side: run["peak_bytes"] for side, (run,) in runs.items()}
    result = ", ".join(f"{names[side]} {peak / GIGABYTE:.2f} GB" for side, peak in peaks.items())
    return [Row(name, "<= 1.0 GB", result, min(peaks.values()) <= GIGABYTE, runs)]


def gigapixel(sizes) -> list[Row]:
    """A tiled TIFF through the optional reader, once: all that is resident, the libraries (0.4 GB) included."""
    size = (1000, 750) if sizes.quick else (40_000, 30_000)
    name, goal = f"A tiled TIFF of {size[0]:,} x {size[1]:,} px through the optional reader, peak", "<= 1.1 GB"
    if find_spec("pyvips") is None:
        return [Row(name, goal, "not measured: pyvips is not installed")]
    path = tiled_tiff(sizes.folder, size)
    with sides.one_process() as process:
        run = process.submit(preprocess, "streamed", sizes.geometry, path).result()
    return [Row(name, goal, f"{run['peak_bytes'] / GIGABYTE:.2f} GB", run["peak_bytes"] <= 1.1 * GIGABYTE, run)]


def preprocess_in_turns(sizes, size, names, repetitions) -> dict[str, list[dict]]:
    """What [`preprocess`] returns for every name, a process for each; raises where one bit of the tiles differs."""
    path, runs = photograph(sizes.folder, size), {name: [] for name in names}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(sides.one_process()) for name in names}
        for _ in tqdm(range(repetitions), desc=f"preprocessing {size[0]} x {size[1]} px", leave=False):
            for name, process in processes.items():
                runs[name].append(process.submit(preprocess, name, sizes.geometry, path).result())
            digests = {run[-1]["digest"] for run in runs.values()}
            expect(len(digests) == 1, f"The tiles of {size} px are not the same.")
    return runs


def preprocess(name, geometry, path) -> dict:
    """Seconds, peak bytes and a digest of the tiles of all scales, inside a process. "streamed" is ours, by the optional
    reader."""
    side = sides.side_of("ours" if name == "streamed" else name, geometry)
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
