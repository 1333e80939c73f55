"""Whole questions: what encoding holds, and seconds and memory from the file to the answer."""

import statistics
import weakref

import torch
from tqdm import tqdm

from .. import meters, sides
from ..compare import CLOCK, Row, check_question, ratios, show_ratio
from ..images import photograph

GIGABYTE = 1e9


def encoding_memory(sizes) -> list[Row]:
    """Outputs of the vision tower's layers that are alive at once, in tiles; quick geometry: the tiles are the same."""
    path, held = photograph(sizes.folder, (400, 400)), {}
    for name in sides.SIDES:
        side = sides.side_of(name, "quick")
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
