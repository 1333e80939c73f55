"""Objects of a few native pixels in images of 4,000 to 16,000 px: fixed scales against levels down to the image's own pixels.

    uhr-bat evidence native [--model DIR] [--focus DIR] [--scenes 60] [--tiles 128] [--output DIR]

Questions about made-up scenes that nothing was trained on (`scenes/native.py`), each answered from all tokens of the fixed
scales, and from so many of them by the paper's rule and by ours, and of an image's own levels by ours, encoded where the
question looks; with `--focus`, by LRS-VQA's system too, a model that has its module (`uhr-bat tiny focus`). Writes native.json, native.md and native.png. Intervals are 95 % of a bootstrap over scenes, differences
are paired by question.
"""

import argparse
import math
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..common.asking import write_prompt
from ..common.budgets import counts_of_fraction
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files, write_report
from ..common.loading import ROOT, check_files, load_model
from ..common.outputs import Output, check_outputs
from ..common.tables import interval, percent, percent_interval, table
from ..scenes import questions
from ..scenes.evidence import evidence_of
from ..scenes.layout import FINEST, NATIVE_WIDTHS, TEST_SEEDS
from ..scenes.native import native_scene, picture_of
from .choices import PAPER, PROPORTIONS, REFINED, RULES
from .evidence import FULL, answer, scene_workers

ZOOM, FOCUS = "coarse to fine", "LRS-VQA's mode"
# Row: rules, the proportions in which fixed scales share a budget (None: they compete), whether levels are the image's own.
ROWS = {
    PAPER: (RULES[PAPER][0], PROPORTIONS, False),
    REFINED: (RULES[REFINED][0], None, False),
    ZOOM: (RULES[REFINED][0], None, True),
}
NATIVE_BINS = {"2-3": (2, 3), "3-4.5": (3, 4.5), "4.5-8": (4.5, 8.001)}  # px of the image
FIXED_BINS = {"< 0.25": (0, 0.25), "0.25-0.5": (0.25, 0.5), "0.5-1": (0.5, 1)}  # px of the finest fixed scale
FRACTIONS, TILES = (0.01, 0.02, 0.04), 128


@torch.no_grad()
def ask_scene(model, processor, scene, fractions, rows, tiles, rng, focus=None) -> list[dict]:
    """One record per question and row: kind, method, fraction, tokens, right, kept, pixels (of the image) and fixed (pixels
    of the finest fixed scale) of the smallest object that has to be seen. `focus`: (processor, model) of `FOCUS`, or None."""
    picture = picture_of(scene)
    (whole,) = model.encode_image(**processor.image_processor(picture, return_tensors="pt").to(model.device))
    (zoomed,) = model.encode_image(**processor.image_processor(picture, max_tiles=tiles, native=True))
    if focus:
        (descended,) = focus[1].encode_image(**focus[0].image_processor(picture, dynamic_pyramid=True))
    records = []
    for kind in questions.KINDS:
        question = questions.make_question(scene, kind, rng=rng)
        if question is None:
            continue
        prompt = write_prompt(processor, question.text).to(model.device)
        said = [(FULL, 1.0, sum(whole.available), *answer(model, processor, prompt, [torch.cat(whole.tokens)]), None)]
        for fraction in fractions:
            chosen = []
            for method, (rules, proportions, native) in rows.items():
                counts = counts_of_fraction(fraction, whole.available, proportions)
                image = zoomed if native else whole
                compressed = model.compress(**prompt, image_features=[image], token_counts=[counts], rules=rules)
                evidence = evidence_of(scene, question, image.grids)
                chosen.append((method, compressed.pooler_output[0], _shows(compressed.slots[0], evidence)))
            answers = answer(model, processor, prompt, [tokens for _, tokens, _ in chosen])
            said += [(name, fraction, len(one), text, kept) for (name, one, kept), text in zip(chosen, answers)]
            if focus:
                seen = write_prompt(focus[0], question.text).to(model.device)
                compressed = focus[1].compress(**seen, image_features=[descended], budgets=sum(counts))
                (tokens,), evidence = compressed.pooler_output, evidence_of(scene, question, descended.grids, False)
                (text,) = answer(focus[1], focus[0], seen, [tokens])
                said.append((FOCUS, fraction, len(tokens), text, _shows(compressed.slots[0], evidence)))
        fixed = question.pixels  # `Object.pixels` are those of the finest fixed scale
        for method, fraction, number, text, kept in said:
            records.append({
                "scene": scene.seed, "width": scene.width, "kind": kind, "method": method, "fraction": fraction,
                "tokens": number, "right": text == question.answer, "kept": kept,
                "fixed": fixed, "pixels": None if fixed is None else fixed * scene.width / FINEST,
            })  # fmt: skip
    return records


def _shows(slots, evidence) -> bool | None:
    """Whether each object, a list of its (scale, position), has a token at one of these; None without an object."""
    if not evidence:
        return None
    return all(any(int(slots[scale][position]) >= 0 for scale, position in one) for one in evidence)


# ---- Results ---------------------------------------------------------------------------------------------------------


def summarise(records) -> dict:
    """By row and fraction: accuracy on the questions that need an object of so many pixels, evidence kept, and the paired
    difference from all tokens of the fixed scales."""
    by_method = defaultdict(list)
    for record in records:
        by_method[record["method"], record["fraction"]].append(record)
    full, rows, rng = by_method[FULL, 1.0], [], np.random.default_rng(0)
    for (method, fraction), asked in by_method.items():
        groups = {"all": [True] * len(asked), "with an object": [one["pixels"] is not None for one in asked]}
        for name, bins in (("pixels", NATIVE_BINS), ("fixed", FIXED_BINS)):
            for label, (low, high) in bins.items():
                inside = [one[name] is not None and low <= one[name] < high for one in asked]
                groups[f"{name} {label}"] = inside
        row = {"method": method, "fraction": fraction, "tokens": float(np.mean([one["tokens"] for one in asked]))}
        for name, chosen in groups.items():
            pairs = [pair for pair, inside in zip(zip(asked, full), chosen) if inside]
            if pairs:
                right = np.array([one["right"] for one, _ in pairs], float)
                before = np.array([other["right"] for _, other in pairs], float)
                scenes = [one["scene"] for one, _ in pairs]
                row[name] = {
                    "questions": len(pairs),
                    "accuracy": interval(right, scenes, rng),
                    "difference": interval(right - before, scenes, rng),
                }
        held = [one for one in asked if one["kept"] is not None]
        row["kept"] = interval([one["kept"] for one in held], [one["scene"] for one in held], rng) if held else None
        row["by_kind"] = {
            kind: float(np.mean([one["right"] for one in asked if one["kind"] == kind]))
            for kind in questions.KINDS
            if any(one["kind"] == kind for one in asked)
        }
        rows.append(row)
    return {"rows": rows}


def report(result) -> str:
    """Markdown: the tables of native.md."""
    rows, about = result["rows"], result["about"]

    def name_of(row):
        return [f"{100 * row['fraction']:g} %", row["method"]]

    def cell(row, group, field="accuracy", signed=False):
        return percent_interval(row[group][field], signed=signed) if group in row else ""

    sizes = [f"pixels {label}" for label in NATIVE_BINS] + [f"fixed {label}" for label in FIXED_BINS]
    first = rows[0]
    heads = [f"{label} px" for label in NATIVE_BINS] + [f"{label} px of the fixed view" for label in FIXED_BINS]
    heads = [f"{head} ({first[group]['questions'] if group in first else 0})" for head, group in zip(heads, sizes)]
    parts = [
        "# Objects of a few native pixels",
        f"{about['questions']} questions about {about['scenes']} made-up scenes that nothing was trained on, images of "
        f"{NATIVE_WIDTHS[0]:,} to {NATIVE_WIDTHS[1]:,} px with objects of 2 to 8 of their pixels. Made by "
        f"`{about['command']}`. Coarse to fine: at most {about['tiles']} tiles of an image's own levels. LRS-VQA's mode: at "
        "most as many tokens as the other rows, thumbnail, separator and newlines included. Tokens are parts of "
        "all those of the fixed scales. Percent, with 95 % intervals of a bootstrap over scenes; differences are paired by "
        "question with all tokens of the fixed scales. Kept: every object that the question needs has a token at one of the "
        "two finest scales or levels.",
        table(
            ["tokens", "method", "mean number", "accuracy", "with an object", "minus all fixed tokens", "kept"],
            [
                [
                    *name_of(row), f"{row['tokens']:.0f}", cell(row, "all"), cell(row, "with an object"),
                    cell(row, "with an object", "difference", True), percent_interval(row["kept"]) if row["kept"] else "",
                ]
                for row in rows
            ],
        ),
        "## By size of the smallest object that a question needs (number of questions)",
        table(["tokens", "method", *heads], [[*name_of(row), *(cell(row, group) for group in sizes)] for row in rows]),
        "## By kind of question",
        table(
            ["tokens", "method", *questions.KINDS],
            [[*name_of(row), *(percent(row["by_kind"][kind]) for kind in row["by_kind"])] for row in rows],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def plot(result, path):
    """Accuracy against the size of the smallest object, in pixels of the image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, most = figure.subplots(), max(result["about"]["fractions"])
    for row in result["rows"]:
        if row["fraction"] in (1.0, most):
            groups = [row.get(f"pixels {label}") for label in NATIVE_BINS]
            shown = [(number, group["accuracy"]) for number, group in enumerate(groups) if group]
            x = [number for number, _ in shown]
            mean, low, high = 100 * np.array([accuracy for _, accuracy in shown]).T
            label = f"{row['method']}, {row['tokens']:.0f} tokens"
            axes.errorbar(x, mean, (mean - low, high - mean), label=label, capsize=2, marker="o")
    axes.set_xticks(range(len(NATIVE_BINS)), [f"{label} px" for label in NATIVE_BINS])
    axes.set(xlabel="smallest object that is needed, pixels of the image", ylabel="questions answered right, %")
    axes.set_ylim(0, 100)
    axes.legend()
    figure.savefig(path, dpi=110)


_worker = {}


def _start_worker(folder, num_threads, settings):
    torch.set_num_threads(num_threads)
    processor, model = load_model(folder, torch.float32)
    focus = settings["focus"] and load_model(settings["focus"], torch.float32)
    _worker.update(model=model, processor=processor, **{**settings, "focus": focus})


def _ask(seed):
    return ask_scene(scene=native_scene(seed), rng=np.random.default_rng([seed, 3]), **_worker)


def evaluate(folder, seeds, fractions=FRACTIONS, rows=ROWS, tiles=TILES, workers=1, focus=None) -> list[dict]:
    """Records of all questions about the scenes of `seeds`; several workers are processes of one thread each."""
    settings, records = {"fractions": fractions, "rows": rows, "tiles": tiles, "focus": focus}, []
    with scene_workers(_start_worker, folder, settings, workers) as pool:
        for found in tqdm(pool.map(_ask, seeds), total=len(seeds), desc="Asking", unit="scene"):
            records += found
    return records


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence native", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT, metavar="DIR", help="model folder (default: UHR-BAT-Tiny)")
    parser.add_argument(
        "--focus", type=Path, metavar="DIR", help="model folder with a region focus module: LRS-VQA's mode"
    )
    parser.add_argument("--scenes", type=int, default=60, help="with up to six questions each")
    parser.add_argument("--tiles", type=int, default=TILES, help="that may be encoded for a question")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--output", type=Path, default=Path("native_out"), metavar="DIR", help="default: native_out")
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "scenes", "tiles", "workers")
    require("evaluate", "matplotlib")
    check_files(None, args.model)
    check_outputs((args.model, args.focus), Output("--output", args.output, names=report_files("native")))
    if args.focus:
        check_files(None, args.focus)
    if not 1 <= args.scenes <= len(TEST_SEEDS):
        raise ValueError(f"There are {len(TEST_SEEDS)} test scenes, but {args.scenes} are asked for.")
    records = evaluate(args.model, TEST_SEEDS[: args.scenes], tiles=args.tiles, workers=args.workers, focus=args.focus)
    result = summarise(records)
    result["about"] = {
        "command": "uhr-bat evidence native"
        f"{' --focus DIR' * bool(args.focus)} --scenes {args.scenes} --tiles {args.tiles}",
        "questions": sum(record["method"] == FULL for record in records),
        "scenes": args.scenes,
        "tiles": args.tiles,
        "fractions": FRACTIONS,
    }
    write_report(args.output, "native", result, report(result), partial(plot, result))
    print(report(result))
    print(f"Written: {args.output}/native.json, native.md, native.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
