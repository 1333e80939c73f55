"""Does question-guided, region-faithful compression keep evidence of few pixels? Accuracy against visual tokens.

    uhr-bat evidence [--model DIR] [--scenes 60] [--seeds 3] [--output DIR]

Questions about made-up scenes that nothing was trained on, each answered from every choice of visual tokens at 0.5, 1,
2, 4 and 8 % of them, and from all of them; and about two sets of harder scenes, crowded ones and some with bright
specks all over, at 1 %. Writes evidence.json, evidence.md and evidence.png. Evidence is kept where every object that a
question needs has a visual token of its own, unmerged, at one of the two finest scales. Intervals are 95 % of a
bootstrap over scenes, differences are paired by question.
"""

import argparse
import math
import os
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..common.asking import expand_placeholder, write_prompt
from ..common.budgets import counts_of_fraction
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files, write_report
from ..common.loading import ROOT, check_files, load_model
from ..common.outputs import Output, check_outputs
from ..common.tables import interval, percent, percent_interval, table
from ..modeling_outputs_uhr_bat import UHRBatCompressionOutput
from ..scenes import questions
from ..scenes.evidence import evidence_of
from ..scenes.layout import FINETUNING_SEED, OBJECTS_OUTSIDE, TEST_SEEDS, make_scene
from ..scenes.painting import add_specks, paint
from .choices import (
    CHOICES,
    DISTINCT,
    DOWNSAMPLING,
    PAPER,
    PROPORTIONS,
    REFINED,
    ROWS,
    RULES,
    TOP_K,
    ZOOMED,
    Downsampling,
    choose,
    encode_share,
    gather,
    keeps,
)

FRACTIONS = (0.005, 0.01, 0.02, 0.04, 0.08)
FULL = "no compression"
NO_IMAGE = "model without image"
TEXT_ONLY = "text-only control"
# What a row is compared with, paired by question.
BASELINES = {"paper": PAPER, "top_k": TOP_K, "full": FULL}
# Harder scenes: objects outside the sites, and bright specks all over. Asked from all tokens and by these rows.
STRESS = {"crowded": ((100, 160), 0), "specks": (OBJECTS_OUTSIDE, 700)}
STRESS_ROWS, STRESS_FRACTIONS = (PAPER, TOP_K, DISTINCT, REFINED), (0.01,)
PLAIN = "plain"
SIZES = {"1-2": (0, 2.5), "3-4": (2.5, 4.5), "5-8": (4.5, 99)}  # px, bins of the rounded size
CONTROL_SCENES = 5000
MAX_NEW_TOKENS = 6


# ---- Answers ---------------------------------------------------------------------------------------------------------


def answer(model, processor, prompt, visual) -> list[str]:
    """Greedy answers to one prompt with one image, from several choices of visual tokens float[n, D]."""
    (ids,), config = prompt["input_ids"], model.config
    rows = [expand_placeholder(ids, config.image_token_id, len(tokens)) for tokens in visual]
    length = max(map(len, rows))
    batch = torch.full((len(rows), length), model.generation_config.pad_token_id or 0)
    mask = torch.zeros_like(batch)
    for number, row in enumerate(rows):
        batch[number, length - len(row) :], mask[number, length - len(row) :] = row, 1
    images = UHRBatCompressionOutput(pooler_output=visual, images_per_prompt=[1] * len(visual))
    output = model.generate(
        input_ids=batch, attention_mask=mask, mm_encoder_outputs={"image": images},
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
    )  # fmt: skip
    return [text.strip() for text in processor.batch_decode(output[:, length:], skip_special_tokens=True)]


def text_only(num_scenes, first_seed=FINETUNING_SEED) -> dict[str, str]:
    """The best a reader of the questions alone can do: the most frequent answer to every text in training."""
    answers = defaultdict(Counter)
    for seed in tqdm(range(first_seed, first_seed + num_scenes), desc="Text-only control", unit="scene"):
        scene, rng = make_scene(seed), np.random.default_rng([seed, 3])
        for kind in questions.KINDS:
            if (question := questions.make_question(scene, kind, rng=rng)) is not None:
                answers[question.text][question.answer] += 1
    return {text: counts.most_common(1)[0][0] for text, counts in answers.items()}


class Answer(NamedTuple):
    """What was said to one question from one choice of visual tokens; `kept`: whether the evidence was among them."""

    method: str
    fraction: float
    num_tokens: int
    said: str | None
    kept: bool


def answers_without_a_choice(model, processor, question, features, control) -> list[Answer]:
    """From all tokens, from the text of the question alone, and by the model without an image."""
    prompt = write_prompt(processor, question.text).to(model.device)
    (from_all,) = answer(model, processor, prompt, [torch.cat(features.tokens)])
    text = processor.apply_chat_template(
        [{"role": "user", "content": question.text}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**text, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    blind = processor.decode(output[0, text["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return [
        Answer(FULL, 1.0, sum(features.available), from_all, True),
        Answer(TEXT_ONLY, 0.0, 0, control.get(question.text), False),
        Answer(NO_IMAGE, 0.0, 0, blind, False),
    ]


def choices_without_a_question(model, image, features, fraction, methods, downsampling) -> dict:
    """{method: (slots long[V] per scale or None, visual tokens float[n, D])} of what is the same for any question."""
    counts = counts_of_fraction(fraction, features.available, PROPORTIONS)
    chosen = {}
    for method in methods:
        if method == DOWNSAMPLING:
            chosen[method] = None, downsampling(image, round(fraction * sum(features.available)))
        elif method in CHOICES:
            slots = choose(method, model, features, counts)
            chosen[method] = slots, gather(features, slots)
    return chosen


def answers_from_a_fraction(
    model, processor, question, features, fraction, methods, blind, evidence, zoomed=None
) -> list[Answer]:
    """From what each method chooses of a fraction of the tokens.

    Args:
        zoomed: the image for the row ZOOMED, from `encode_share`.
        blind: what `choices_without_a_question` returned.
        evidence: of every object that has to be seen, its (scale, position).
    """
    prompt = write_prompt(processor, question.text).to(model.device)
    visual, kept = [], []
    for method in methods:
        if method in RULES or method == ZOOMED:
            rules, proportions = RULES[REFINED if method == ZOOMED else method]
            counts = counts_of_fraction(fraction, features.available, proportions)
            images = {"image_features": [zoomed if method == ZOOMED else features], "token_counts": [counts]}
            compressed = model.compress(**prompt, **images, rules=rules)
            tokens = compressed.pooler_output[0]
            slots = [slot[positions] for slot, positions in zip(compressed.slots[0], features.positions)]
        else:
            slots, tokens = blind[method]
        visual.append(tokens)
        kept.append(slots is not None and keeps(slots, features.positions, evidence))
    said = answer(model, processor, prompt, visual)
    return [Answer(method, fraction, len(tokens), *rest) for method, tokens, *rest in zip(methods, visual, said, kept)]


@torch.no_grad()
def ask_scene(model, processor, downsampling, scene, fractions, methods, control, rng, specks=0) -> list[dict]:
    """One record per question and choice of tokens: kind, method, fraction, tokens, right, kept, pixels."""
    image = paint(scene)
    if specks:
        add_specks(image, specks, np.random.default_rng([scene.seed, 4]))
    (features,) = model.encode_image(**processor.image_processor(image, return_tensors="pt").to(model.device))
    zoomed = encode_share(model, processor, image) if ZOOMED in methods else None
    blind = {one: choices_without_a_question(model, image, features, one, methods, downsampling) for one in fractions}
    records = []
    for kind in questions.KINDS:
        question = questions.make_question(scene, kind, rng=rng)
        if question is None:
            continue
        evidence = evidence_of(scene, question, model.config.grids)
        answers = answers_without_a_choice(model, processor, question, features, control)
        for one in fractions:
            answers += answers_from_a_fraction(
                model, processor, question, features, one, methods, blind[one], evidence, zoomed
            )
        for one in answers:
            records.append({
                "scene": scene.seed, "kind": kind, "method": one.method, "fraction": one.fraction,
                "tokens": one.num_tokens, "right": one.said == question.answer,
                "kept": one.kept if evidence else None, "pixels": question.pixels,
            })  # fmt: skip
    return records


# ---- Results ---------------------------------------------------------------------------------------------------------


def summarise(records) -> dict:
    """Accuracy, evidence kept and the paired differences from `BASELINES` by method and fraction, and by kind; what is
    answered from all tokens and not from the compressed ones, by the size of the objects."""
    rng, by_method = np.random.default_rng(0), defaultdict(list)
    for record in records:
        by_method[record["method"], record["fraction"]].append(record)
    rows = []
    for (method, fraction), asked in by_method.items():
        groups = [record["scene"] for record in asked]
        right = np.array([record["right"] for record in asked])
        evident = [record for record in asked if record["kept"] is not None]
        row = {
            "method": method,
            "fraction": fraction,
            "questions": len(asked),
            "tokens": float(np.mean([record["tokens"] for record in asked])),
            "accuracy": interval(right, groups, rng),
            "kept": interval([record["kept"] for record in evident], [record["scene"] for record in evident], rng),
            "by_kind": {
                kind: float(np.mean([record["right"] for record in asked if record["kind"] == kind]))
                for kind in questions.KINDS
                if any(record["kind"] == kind for record in asked)
            },
        }
        row["differences"] = {}
        for name, baseline in BASELINES.items():
            other = by_method.get((baseline, 1.0 if baseline == FULL else fraction))
            if other and method != baseline and method in ROWS:
                # Records of every method stand in the order of the questions.
                row["differences"][name] = interval(right - np.array([r["right"] for r in other], float), groups, rng)
        full = by_method[FULL, 1.0]
        if method in STRESS_ROWS:
            row["lost_by_size"] = {}
            for name, (low, high) in SIZES.items():
                held = [
                    record["right"]
                    for record, whole in zip(asked, full)
                    if whole["right"] and whole["pixels"] is not None and low <= whole["pixels"] < high
                ]
                row["lost_by_size"][name] = {"right_in_full": len(held), "lost": len(held) - sum(held)}
        rows.append(row)
    return {"rows": rows}


def report(result) -> str:
    """Markdown: the tables of evidence.md."""
    rows, about = result["rows"], result["about"]

    def cells(row, *values):
        return [f"{100 * row['fraction']:g} %", row["method"], *values]

    def difference(row, name):
        return percent_interval(row["differences"][name], signed=True) if name in row["differences"] else ""

    kinds = [
        [percent(row["by_kind"][kind]) if kind in row["by_kind"] else "" for kind in questions.KINDS] for row in rows
    ]
    losing = [row for row in rows if "lost_by_size" in row]
    lost = [
        cells(row, *[f"{part['lost']} of {part['right_in_full']}" for part in row["lost_by_size"].values()])
        for row in losing
    ]
    stress = [
        [name, *cells(row, percent_interval(row["accuracy"]), percent_interval(row["kept"]), difference(row, "full"))]
        for name, hard in result.get("stress", {}).items()
        for row in hard["rows"]
        if row["method"] in (FULL, *STRESS_ROWS)
    ]
    parts = [
        "# Evidence kept and questions answered, by visual tokens",
        f"UHR-BAT-Tiny on {about['questions']} questions about {about['scenes']} made-up scenes that nothing was "
        f"trained on, in {about['seeds']} seeded sets. Made by `{about['command']}`. Percent, with 95 % intervals of a "
        "bootstrap over scenes. Kept: every object that the question needs has a token of its own at one of the two "
        "finest scales (questions that need an object only). Differences of accuracy are paired by question. Scales "
        "share the tokens 16:24:40:66, or 4:8:40:94 (distinct with budgets per scale; refined, that is UHR-BAT-Tiny's "
        "default), or compete for them (top-k with one budget, distinct, distinct with its regions told of, distinct "
        "and refined, from all tiles or from a quarter of those behind the anchor's, chosen by the question).",
        table(
            ["tokens", "method", "mean number", "accuracy", "kept", *[f"minus {name}" for name in BASELINES.values()]],
            [
                cells(
                    row,
                    f"{row['tokens']:.0f}",
                    percent_interval(row["accuracy"]),
                    percent_interval(row["kept"]),
                    *[difference(row, name) for name in BASELINES],
                )
                for row in rows
            ],
        ),
        "## By kind of question",
        table(["tokens", "method", *questions.KINDS], [cells(row, *values) for row, values in zip(rows, kinds)]),
        "## What the compression loses, by size",
        "Questions that are answered right from all tokens and wrong from some of them, by the smallest object that "
        "they need, in pixels of the finest scale (side of a square of its area).",
        table(["tokens", "method", *[f"{name} px" for name in SIZES]], lost),
        "## Harder scenes",
        "Crowded: 100 to 160 objects outside the sites instead of 20 to 40. Specks: 700 bright specks, of the size of "
        "the smallest objects, anywhere.",
        table(["scenes", "tokens", "method", "accuracy", "kept", f"minus {FULL}"], stress),
    ]
    return "\n\n".join(parts) + "\n"


def plot(result, path):
    """Accuracy and evidence kept against the fraction of visual tokens."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    colours = dict(zip(ROWS, colormaps["tab20"].colors))
    for axes, name, title in zip(
        figure.subplots(1, 2), ("accuracy", "kept"), ("Questions answered right", "Evidence kept")
    ):
        for method in ROWS:
            rows = [row for row in result["rows"] if row["method"] == method]
            if not rows:
                continue
            x = [100 * row["fraction"] for row in rows]
            mean, low, high = 100 * np.array([row[name] for row in rows]).T
            style = (
                {"linestyle": "-", "marker": "o"} if method in (*RULES, ZOOMED) else {"linestyle": "--", "marker": "x"}
            )
            axes.errorbar(x, mean, (mean - low, high - mean), label=method, capsize=2, color=colours[method], **style)
        if name == "accuracy":
            for method, style in (FULL, "-"), (TEXT_ONLY, ":"):
                (row,) = (row for row in result["rows"] if row["method"] == method)
                axes.axhline(100 * row[name][0], color="black", linestyle=style, label=method)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        axes.set(xscale="log", xlabel="visual tokens, % of all", ylabel="%", title=title, ylim=(0, 100))
        axes.set_xticks([100 * fraction for fraction in result["about"]["fractions"]])
        axes.get_xaxis().set_major_formatter("{x:g}")
        axes.minorticks_off()
    figure.savefig(path, dpi=110)


def write_results(result, folder):
    """The three files, each whole or not at all."""
    write_report(folder, "evidence", result, report(result), partial(plot, result))


_worker = {}


def _start_worker(folder, num_threads, settings):
    torch.set_num_threads(num_threads)
    processor, model = load_model(folder, torch.float32)
    _worker.update(model=model, processor=processor, downsampling=Downsampling(processor, model), **settings)


def _ask(seed, objects_outside=OBJECTS_OUTSIDE, **settings):
    scene = make_scene(seed, objects_outside=objects_outside)
    return ask_scene(scene=scene, rng=np.random.default_rng([seed, 3]), **{**_worker, **settings})


def scene_workers(start_worker, folder, settings, workers) -> ProcessPoolExecutor:
    """Processes that ask about scenes, each begun by `start_worker(folder, threads, settings)`; several have a thread each."""
    start = (folder, 1 if workers > 1 else torch.get_num_threads(), settings)
    return ProcessPoolExecutor(workers, get_context("spawn"), start_worker, start)


def evaluate(
    folder, seeds, fractions=FRACTIONS, methods=ROWS, workers=1, control_scenes=CONTROL_SCENES, stress_seeds=()
) -> dict[str, list[dict]]:
    """Records of all questions about the scenes of `seeds`, and about those of `stress_seeds` for each set of harder
    scenes, by the name of the set. Several workers are processes of one thread each."""
    settings = {"fractions": fractions, "methods": methods, "control": text_only(control_scenes)}
    jobs = [(PLAIN, seed, {}) for seed in seeds]
    for name, (objects_outside, specks) in STRESS.items():
        hard = {"objects_outside": objects_outside, "specks": specks}
        hard |= {"fractions": STRESS_FRACTIONS, "methods": STRESS_ROWS}
        jobs += [(name, seed, hard) for seed in stress_seeds]
    records = {name: [] for name, _, _ in jobs}
    with scene_workers(_start_worker, folder, settings, workers) as pool:
        running = [(name, pool.submit(_ask, seed, **changes)) for name, seed, changes in jobs]
        for name, job in tqdm(running, desc="Asking", unit="scene"):
            records[name] += job.result()
    return records


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT, metavar="DIR", help="model folder (default: UHR-BAT-Tiny)")
    parser.add_argument("--scenes", type=int, default=60, help="per seed, with up to six questions each")
    parser.add_argument("--seeds", type=int, default=3, help="independent sets of scenes")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--output", type=Path, default=Path("evidence_out"), metavar="DIR", help="default: evidence_out"
    )
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "scenes", "seeds", "workers")
    require("evaluate", "matplotlib")
    check_files(None, args.model)
    check_outputs((args.model,), Output("--output", args.output, names=report_files("evidence")))
    if args.scenes * args.seeds > len(TEST_SEEDS):
        raise ValueError(f"There are {len(TEST_SEEDS)} test scenes, but {args.scenes} x {args.seeds} are asked for.")
    seeds = TEST_SEEDS[: args.scenes * args.seeds]
    # The harder scenes are laid out from the first set of seeds.
    records = evaluate(args.model, seeds, workers=args.workers, stress_seeds=seeds[: args.scenes])
    plain = records.pop(PLAIN)
    result = summarise(plain) | {"stress": {name: summarise(hard) for name, hard in records.items()}}
    result["about"] = {
        "command": f"uhr-bat evidence --scenes {args.scenes} --seeds {args.seeds}",
        "questions": sum(record["method"] == FULL for record in plain),
        "scenes": len(seeds),
        "seeds": args.seeds,
        "fractions": FRACTIONS,
    }
    write_results(result, args.output)
    print(report(result))
    print(f"Written: {args.output}/evidence.json, evidence.md, evidence.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
