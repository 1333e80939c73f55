"""Region partitions compared over budgets, and k-means over k: the paper's Tables 8 and 7 on the embedded default.

    uhr-bat evidence partitions [--output DIR] [--questions N] [--checkpoint SAM | --masks FILE.pt]

The paper's tables hold accuracy: `uhr-bat evidence` measures that. What this measures, on a made-up scene
with ships planted at known places: the share of ships whose token keeps a slot of its own at the two finest scales, the
tokens spent, and the seconds of the partition. Writes partitions.md, partitions.json and partitions.png, and the scene as
scene.png (masks for it: `uhr-bat regions DIR/scene.png ...`).

Letters: S scales, N tokens of a scale. Sizes are (height, width), except those of `scenes`.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import ImageDraw

from ..budgets_uhr_bat import apportion, is_one_budget
from ..common.asking import encode, write_prompt
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files, whole_files, write_json
from ..common.loading import load_model
from ..common.measured import told_as_measured
from ..common.models import add_model_argument, find_model, model_in_words, stay_offline
from ..common.outputs import Output, check_outputs
from ..common.tables import percent, table
from ..geometry_uhr_bat import tokens_of_points
from ..regions.cache import add_segmenter_arguments, check_job, job_from, read_labels
from ..regions.segment import load_segmenter, region_labels, segment_image
from ..scenes import layout, painting
from .rows import all_tiles, alone

PARTITIONS = ("kmeans", "birch", "grid", "none")
# Table 8 goes from 4k to 10k tokens, 1.4 to 3.5 times the 3000 of appendix A; the lower half is where tokens are short.
BUDGET_FACTORS = (0.25, 0.5, 1, 2, 4)
# Table 7.
CLUSTER_COUNTS = (10, 50, 120, 240, 360, 480, 600, 720, 1000)
NUM_SHIPS = 200
SCALES_MEASURED = 2
REPEATS = 5
QUESTIONS = (
    "What colour is the ship at the runway?",
    "What is the blue object at the tank farm?",
    "Is there a ship at the runway?",
    "How many objects are at the tank farm?",
    "Where is the pier?",
    "Which has more objects, the runway or the quarry?",
    "Count the objects at the roundabout.",
    "Can you see a ship at the pier?",
)
NOT_MEASURED = (
    "Accuracy is measured by `uhr-bat evidence`, not here. This measures what each partition does to small "
    "objects that stand anywhere in the scene, mostly where no question asks, and what it costs."
)


# The scene


def plant_ships(image, num_ships: int, seed: int = 0) -> np.ndarray:
    """Paint ships, 2 to 4 pixels of the finest scale long, at random places into it; float[num_ships, 2] their centres,
    (row, column) in pixels, no two nearer than three ships' length."""
    rng = np.random.default_rng(seed)
    painter = painting.Painter(ImageDraw.Draw(image), rng, image.width / layout.WIDTH)
    colours, bottom = list(layout.PAINTS.values()), layout.WIDTH * image.height / image.width
    places = []
    for _ in range(30 * num_ships):
        if len(places) == num_ships:
            break
        place = rng.uniform((100, 100), (layout.WIDTH - 100, bottom - 100))
        if all(np.hypot(*(place - other)) > 288 for other in places):
            places.append(place)
    if len(places) < num_ships:
        raise ValueError(f"Only {len(places)} of {num_ships} ships find a place in the scene: plant fewer.")
    for ship, (place, half) in enumerate(zip(places, rng.uniform(24, 48, num_ships))):
        side = half / 4
        painter.origin, painter.angle = tuple(place), rng.uniform(0, 2 * np.pi)
        hull = [(-half, -side), (half / 2, -side), (half, 0), (half / 2, side), (-half, side)]
        painter.polygon(hull, colours[ship % len(colours)])
    return np.array(places)[:, ::-1] * painter.unit


# Measuring


def fractions_of_ships(slots: torch.Tensor, ships: torch.Tensor) -> tuple[float, float]:
    """Fractions of the tokens `ships` that keep a slot of their own, and that are averaged, from slots long[N]."""
    own = alone(slots)[ships]
    return own.double().mean().item(), ((slots[ships] >= 0) & ~own).double().mean().item()


def partition_seconds(model, prompt, image, budgets, rules) -> float:
    """Seconds that the partition of an encoded image takes: a call less the same call with the partition at hand, the
    fastest of `REPEATS` each. The partition stays with the image."""
    with_it, without = [], []
    for _ in range(REPEATS):
        image.partitions.clear()
        for seconds in (with_it, without):
            start = time.perf_counter()
            model.compress(**prompt, image_features=[image], budgets=budgets, rules=rules)
            seconds.append(time.perf_counter() - start)
    return max(0.0, min(with_it) - min(without))


def measure_row(model, prompts, image, budgets, ships, rules) -> dict:
    """One row of a table: means over the prompts.

    Args:
        image: one encoded image.
        ships: long[num_ships] for every scale, the tokens that show a ship.
        rules: of the partition that is measured, where the configuration has others.
    """
    fractions = []
    for prompt in prompts:
        out = model.compress(**prompt, image_features=[image], budgets=budgets, rules=rules)
        scales = list(zip(out.slots[0], ships))[-SCALES_MEASURED:]
        fractions.append([fractions_of_ships(slots, tokens) for slots, tokens in scales])
    own, merged = np.mean(fractions, 0).T.tolist()
    num_regions = [int(regions.max()) + 1 for regions in out.regions[0]]
    spent = {"budgets": budgets, "tokens": len(out.pooler_output[0]), "regions": num_regions}
    return spent | {"own": own, "merged": merged}


def default_budgets(config, features) -> list[int]:
    """int[S]: the model's, or its one budget in the proportions of the tokens that the scales have."""
    if not is_one_budget(config.budgets):
        return list(config.budgets)
    return apportion(min(config.budgets, sum(features.available)), features.available, features.available)


def run(model, prompts, features, ships, methods, factors, cluster_counts, labels=None) -> dict[str, list[dict]]:
    """Both tables: {"methods": rows, "clusters": rows}. `labels` long[1, N]: label maps of SAM, one method more."""
    from tqdm import tqdm

    config = model.config
    available, default = features.available, default_budgets(config, features)
    scaled = [
        ({"factor": factor}, [min(max(1, round(factor * budget)), most) for budget, most in zip(default, available)])
        for factor in dict.fromkeys(factors)
    ]
    unscaled = [({}, [min(pair) for pair in zip(default, available)])]
    with_labels = features
    if labels is not None:
        sizes = [height * width for height, width in config.grids]
        split = [
            part[places.cpu()].to(places.device) for part, places in zip(labels[0].split(sizes), features.positions)
        ]
        with_labels = dataclasses.replace(features, regions=split, partitions={})
    jobs = [("methods", {"method": name}, features, {"region_method": name}, scaled) for name in methods]
    if labels is not None:  # label maps go before any method
        jobs.append(("methods", {"method": "sam"}, with_labels, {}, scaled))
    for k in cluster_counts:
        rules = {"region_method": "kmeans", "num_regions": k}
        jobs.append(("clusters", {"method": "kmeans", "k": k}, features, rules, unscaled))
    rows = {"methods": [], "clusters": []}
    with tqdm(total=sum(len(job[-1]) for job in jobs), desc="Measuring", unit="row") as bar:
        for name, about, image, rules, settings in jobs:
            seconds = partition_seconds(model, prompts[0], image, settings[0][1], rules)
            for setting, budgets in settings:
                row = measure_row(model, prompts, image, budgets, ships, rules)
                rows[name].append({**about, **setting, **row, "partition_seconds": seconds})
                bar.update()
    return rows


# Reporting


def report(result: dict) -> str:
    """Markdown of what `main` measured."""
    fine = [f"{scale} px" for scale in result["scales"][-SCALES_MEASURED:]]
    columns = ["tokens", "regions per scale", *[f"own slot {name} (%)" for name in fine]]
    columns += [f"averaged {name} (%)" for name in fine] + ["partition (s)"]

    def cells(row):
        fractions = [percent(part) for part in (*row["own"], *row["merged"])]
        return [row["tokens"], " / ".join(map(str, row["regions"])), *fractions, f"{row['partition_seconds']:.2f}"]

    chance = [percent(b / n) for b, n in list(zip(result["default_budgets"], result["tokens_seen"]))[-SCALES_MEASURED:]]
    by = f" Model: {model_in_words(result)}." if result.get("revision") else ""
    parts = [
        "# Region partitions on the made-up scene",
        NOT_MEASURED,
        f"{result['num_ships']} ships, painted at random places, on land too, into the scene of "
        f"{result['image_size'][1]:,} x {result['image_size'][0]:,} pixels (width x height); "
        f"{result['num_questions']} questions, means over them. "
        '"Own slot": the token that shows the middle of the ship reaches the decoder unmixed; "averaged": as part of a '
        f"mean.{by} At the default budgets a choice of tokens by chance would give {' and '.join(chance)} % at "
        f"{' and '.join(fine)}. Seconds are those of all scales together, beside whatever else the machine did.",
        "## Methods over budgets (as Table 8)",
        table(["method", *columns], [[row["method"], *cells(row)] for row in result["methods"]]),
        "## k-means over k at the default budgets (as Table 7)",
        table(["k", *columns], [[row["k"], *cells(row)] for row in result["clusters"]]),
    ]
    if result["sam"] is None:
        parts.append("SAM was not run: it needs `--checkpoint` or `--masks`.")
    elif result["sam"]["seconds"] is not None:
        parts.append(f"SAM's masks took {result['sam']['seconds']:.1f} s, which the table does not hold.")
    return "\n\n".join(parts) + "\n"


def plot(result: dict):
    """The two tables as an RGB image: ships with a slot of their own over tokens and over k, and seconds by method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    from ..pictures.drawing import PALETTE
    from ..pictures.pages import DPI, MARKERS, WIDTH, render

    figure = Figure(figsize=(WIDTH / DPI, 4.9), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle("Region partitions on the made-up scene (no accuracy is measured)", fontsize=13)
    over_budgets, over_k, bars = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 0.8))
    names = list(dict.fromkeys(row["method"] for row in result["methods"]))
    style = {name: {"color": colour, "marker": marker} for name, colour, marker in zip(names, PALETTE, MARKERS)}
    finest = f"{result['scales'][-1]} px"
    for name in names:
        rows = [row for row in result["methods"] if row["method"] == name]
        values = [100 * row["own"][-1] for row in rows]
        over_budgets.plot([row["tokens"] for row in rows], values, label=name, markersize=8, linewidth=2, **style[name])
    over_budgets.set_xlabel("visual tokens, all scales", fontsize=11)
    over_budgets.set_title("Methods over budgets", fontsize=12, loc="left")
    over_budgets.legend(fontsize=10.5)
    ks = [row["k"] for row in result["clusters"]]
    looks = ("own", "slot of its own", "o-", PALETTE[0]), ("merged", "averaged with others", "s--", PALETTE[4])
    for key, label, line, colour in looks:
        values = [100 * row[key][-1] for row in result["clusters"]]
        over_k.plot(ks, values, line, label=label, markersize=7, linewidth=2, color=colour)
    over_k.set_xlabel("k of k-means, default budgets", fontsize=11)
    over_k.set_title("k-means over k", fontsize=12, loc="left")
    over_k.legend(fontsize=10.5)
    for axes in (over_budgets, over_k):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"ships at {finest} (%)", fontsize=11)
        axes.grid(alpha=0.3)
    over_budgets.set_ylabel(f"ships with a slot of their own at {finest} (%)", fontsize=11)
    over_budgets.set_xticks([row["tokens"] for row in result["methods"] if row["method"] == names[0]])
    over_k.set_xticks([10, 50, 120, 360, 1000] if set(ks) == set(CLUSTER_COUNTS) else ks)
    for axes in (over_budgets, over_k):
        axes.minorticks_off()

    of_method = {row["method"]: row["partition_seconds"] for row in result["methods"]}
    seconds = [of_method[name] for name in names]
    bars.barh(names, seconds, color=[style[name]["color"] for name in names])
    for row, value in enumerate(seconds):
        bars.text(value, row, f" {value:.2f} s", va="center", fontsize=10.5)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.25 * max(*seconds, 0.01))
    bars.set_title("Partition of all scales (s)", fontsize=12, loc="left")
    bars.spines[["top", "right"]].set_visible(False)
    return render(figure, WIDTH)


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence partitions", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("partitions_out"), metavar="DIR", help="default: partitions_out"
    )
    add_model_argument(parser)
    parser.add_argument("--questions", type=int, default=4, metavar="N", help=f"1 to {len(QUESTIONS)} (default: 4)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(2500, 2000), metavar=("WIDTH", "HEIGHT"), help="of the scene"
    )
    parser.add_argument("--ships", type=int, default=NUM_SHIPS, metavar="N", help=f"to plant (default: {NUM_SHIPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the scene and the ships")
    parser.add_argument("--methods", nargs="+", choices=PARTITIONS, default=PARTITIONS)
    parser.add_argument("--factors", type=float, nargs="+", default=BUDGET_FACTORS, metavar="X", help="of the budgets")
    parser.add_argument("--clusters", type=int, nargs="*", default=CLUSTER_COUNTS, metavar="K")
    parser.add_argument("--masks", type=Path, metavar="FILE", help="mask cache of this scene, instead of --checkpoint")
    add_segmenter_arguments(parser)
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "ships", "clusters", "size")
    check_range(args, 0, math.inf, "factors", above=True)
    check_range(args, 0, math.inf, "seed")
    stay_offline(args.model)
    if not 1 <= args.questions <= len(QUESTIONS):
        raise ValueError(f"--questions must be 1 to {len(QUESTIONS)}. Got {args.questions}.")
    if args.masks and args.checkpoint:
        raise ValueError("--masks and --checkpoint are two ways to the same thing: give one of them.")
    args.model = find_model(args.model)
    names = ("scene.png", *report_files("partitions"))
    check_outputs((args.model, args.masks, args.checkpoint), Output("--output", args.output, names=names))
    if args.checkpoint:
        check_job(job_from(args))
    require("evaluate", "matplotlib")
    compare(args)
    return 0


def compare(args):
    """Everything from the scene to the three files."""
    processor, model = load_model(args.model, **args.set)
    config = model.config

    image = painting.example(tuple(args.size), args.seed)
    places = plant_ships(image, args.ships, args.seed)

    labels, sam = None, None
    if args.checkpoint:
        job = job_from(args)
        segmenter = load_segmenter(job.checkpoint, job.settings, job.model_type)
        start = time.perf_counter()
        labels = segment_image(image, segmenter, config.scales, config.patch_size, job.view)
        sam = {"checkpoint": args.checkpoint.name, "seconds": time.perf_counter() - start}
    elif args.masks:
        labels = read_labels(args.masks)
        if missing := sorted(set(config.scales) - set(labels)):
            raise ValueError(f"{args.masks} has masks for the scales {sorted(labels)}, but not for {missing}.")
        sam = {"checkpoint": args.masks.name, "seconds": None}

    prompts = [write_prompt(processor, question).to(model.device) for question in QUESTIONS[: args.questions]]
    (features,) = encode(model, all_tiles(processor.image_processor)(image, return_tensors="pt"))
    image_size = (image.height, image.width)
    ships = [torch.from_numpy(tokens_of_points(places, image_size, grid)) for grid in config.grids]
    rows = run(
        model, prompts, features, ships, args.methods, args.factors, args.clusters,
        None if labels is None else region_labels({scale: labels[scale] for scale in config.scales}),
    )  # fmt: skip
    result = {
        "not_measured": NOT_MEASURED,
        **told_as_measured(args.model, args.set),
        "scales": config.scales,
        "image_size": [image.height, image.width],
        "tokens_seen": [len(tokens) for tokens in features.tokens],
        "default_budgets": default_budgets(config, features),
        "num_ships": args.ships,
        "num_questions": len(prompts),
        "seed": args.seed,
        "sam": sam,
        **rows,
    }
    text = report(result)
    with whole_files(args.output) as built:
        image.save(built / "scene.png")
        write_json(built / "partitions.json", result)
        (built / "partitions.md").write_text(text, encoding="utf-8")
        plot(result).save(built / "partitions.png")
    print(text)
    print(f"Written: {args.output}/partitions.md, partitions.json, partitions.png, scene.png")


if __name__ == "__main__":
    sys.exit(main())
