"""How many looks it takes until the evidence is in sight at full resolution: guided by `where`, and by searches without it.

    uhr-bat evidence looks [--model MODEL] [--scenes 30] [--sides 1024 1536 2048] [--tiles 128]

Questions about made-up scenes with objects of a few native pixels (`scenes/native.py`), which nothing was trained on. A look is one
picture of some pixels a side; evidence is in sight when every object that the question needs lay whole in a picture of an image's own
pixels. `where`: the windows of `uhr-bat mcp`, then what they left out, row by row. Quadtree: from the whole image into those quarters
that the site of the question reaches into, which it is told, deeper first. Raster and random: windows of the whole image, row by row
and in any order. Fewest: as few windows as could hold the objects, placed one after the other by someone who knows where they are.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from ..common import asking
from ..common.commands import check_range, tells_errors
from ..common.loading import load_model
from ..common.models import add_model_argument, find_model, stay_offline
from ..common.tables import interval, percent_interval, table
from ..common.windows import best_windows
from ..scenes.layout import SITE_SIDE, TEST_SEEDS, WIDTH
from ..scenes.native import native_scene, picture_of
from ..scenes.questions import KINDS, make_question
from .suites.made_up_scenes import box_of

# Pixels by which windows of a search overlap, twice the largest object: none is cut by all of them.
OVERLAP = 16
WHERE, WINDOWS = "where", 50
WITHIN = (1, 2, 3, 5, 10)


# ---- Searches: windows (top, left, bottom, right) in the order in which they are looked at --------------------------------


def raster(size, side) -> list[tuple[int, int, int, int]]:
    """Windows of the whole image, row by row."""
    rows, columns = ([*range(0, max(length - side, 0), side - OVERLAP), max(length - side, 0)] for length in size)
    return [(top, left, min(top + side, size[0]), min(left + side, size[1])) for top in rows for left in columns]


def shuffled(size, side, rng) -> list[tuple[int, int, int, int]]:
    windows = raster(size, side)
    return [windows[idx] for idx in rng.permutation(len(windows))]


def quadtree(size, side, sites, box=None) -> Iterator[tuple[int, int, int, int]]:
    """A box and then its quarters that reach into a site, those with the most of it first, down to `side` pixels."""
    box = box or (0, 0, *size)
    top, left, bottom, right = box
    yield box
    if max(bottom - top, right - left) <= side:
        return
    halves = (
        [(low, high)] if high - low <= side else [(low, middle + OVERLAP // 2), (middle - OVERLAP // 2, high)]
        for low, high, middle in ((top, bottom, (top + bottom) // 2), (left, right, (left + right) // 2))
    )
    rows, columns = halves
    quarters = [(low, first, high, last) for low, high in rows for first, last in columns]
    shares = [sum(_shared(quarter, site) for site in sites) for quarter in quarters]
    for idx in np.argsort(shares, kind="stable")[::-1]:
        if shares[idx]:
            yield from quadtree(size, side, sites, quarters[idx])


def fewest(boxes, side) -> int:
    """Windows until all boxes are held, each that which holds the most of those that are left."""
    left, number = list(boxes), 0
    while left:
        corners = [(one[0], other[1]) for one in left for other in left]
        held = max(([box for box in left if _holds((y, x, y + side, x + side), box)] for y, x in corners), key=len)
        left = [box for box in left if box not in held]
        number += 1
    return number


def _shared(one, other) -> float:
    sides = (min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1))
    return math.prod(max(side, 0) for side in sides)


def _holds(window, box) -> bool:
    return window[0] <= box[0] and window[1] <= box[1] and box[2] <= window[2] and box[3] <= window[3]


def looks(windows, boxes, side) -> int:
    """How many windows are looked at until every box lay whole in one at full resolution."""
    left = list(boxes)
    for number, window in enumerate(windows, 1):
        if max(window[2] - window[0], window[3] - window[1]) <= side:
            left = [box for box in left if not _holds(window, box)]
        if not left:
            return number
    raise ValueError(f"{len(left)} of {len(boxes)} boxes lie in no window of {side} px.")


# ---- The measure -----------------------------------------------------------------------------------------------------


def measure(pair, seeds, sides: list[int], tiles: int) -> dict[int, dict[str, list[tuple[int, str, int]]]]:
    """{side: {search: [(seed, kind of question, looks)]}} of all questions that need an object."""
    processor, model = pair
    found = {side: defaultdict(list) for side in sides}
    for seed in tqdm(seeds, desc="Looking", unit="scene"):
        scene, rng = native_scene(seed), np.random.default_rng([seed, 3])
        image = picture_of(scene)
        size = image.height, image.width
        cut = processor.image_processor(image, max_tiles=tiles, native=True, return_tensors="pt")
        (features,) = asking.encode(model, cut)
        for number, kind in enumerate(KINDS):
            question = make_question(scene, kind, rng=rng)
            if question is None or not question.objects:
                continue
            boxes = [np.array(box_of(thing, scene.width))[[1, 0, 3, 2]].tolist() for thing in question.objects]
            sites = [site_box(scene, index) for index in question.sites]
            kept = asking.compress(model, asking.write_prompts(model, processor, [question.text], [[features]]))
            for side in sides:
                guided = [window.box for window in best_windows(kept, size, side, WINDOWS)]
                rest = raster(size, side)
                searches = {
                    "fewest": fewest(boxes, side),
                    WHERE: looks([*guided, *rest], boxes, side),
                    "quadtree": looks([*quadtree(size, side, sites), *rest], boxes, side),
                    "raster": looks(rest, boxes, side),
                    "random": looks(shuffled(size, side, np.random.default_rng([seed, number])), boxes, side),
                }
                for name, taken in searches.items():
                    found[side][name].append((seed, kind, taken))
    return found


def site_box(scene, index) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) around a site in pixels of the scene's image."""
    half, scale = SITE_SIDE / 2, scene.width / WIDTH
    corners = scene.sites[index].placed([(x, y) for x in (-half, half) for y in (-half, half)]) * scale
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    return top, left, bottom, right


def report(found) -> str:
    """Markdown: of every search how many questions need at most so many looks, in percent; those of `where` by kind."""
    rows = []
    for name, records in found.items():
        taken, rng = np.array([taken for _, _, taken in records]), np.random.default_rng(0)
        shares = [percent_interval(interval(taken <= most, [seed for seed, _, _ in records], rng)) for most in WITHIN]
        rows.append([name, *shares, f"{np.median(taken):g}", f"{taken.mean():.1f}"])
    heads = ["search", *(f"{most} or fewer" if most > 1 else "1 look" for most in WITHIN), "median", "mean"]
    by_kind = defaultdict(list)
    for _, kind, taken in found[WHERE]:
        by_kind[kind].append(taken)
    kinds = ", ".join(f"{kind} {100 * np.mean(np.array(taken) <= 3):.1f}" for kind, taken in by_kind.items())
    return f"{table(heads, rows)}\n\n`{WHERE}`, 3 or fewer, by kind of question: {kinds}."


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence looks", description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("--scenes", type=int, default=30, help="with up to five questions each (default: 30)")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[1024, 1536, 2048], metavar="N",
        help="of pictures in pixels (default: 1024 1536 2048)",
    )  # fmt: skip
    parser.add_argument("--tiles", type=int, default=128, help="that a question may look at (default: 128)")
    args = parser.parse_args(arguments)
    stay_offline(args.model)
    check_range(args, 1, len(TEST_SEEDS), "scenes")
    check_range(args, 1, math.inf, "tiles")
    check_range(args, 4 * OVERLAP, math.inf, "sides")
    seeds = TEST_SEEDS[: args.scenes]
    found = measure(load_model(find_model(args.model), **args.set), seeds, args.sides, args.tiles)
    print(
        f"{len(found[args.sides[0]][WHERE])} questions about {args.scenes} scenes: percent with so many looks, with 95 % intervals of a "
        "bootstrap over scenes."
    )
    for side, searches in found.items():
        print(f"\n# Pictures of {side} px\n\n{report(searches)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
