"""Does question-guided, region-faithful compression keep evidence of few pixels? Accuracy against visual tokens.

    uhr-bat evidence [--model DIR] [--scenes 60] [--seeds 3] [--output DIR]

Questions about made-up scenes that nothing was trained on, each answered from every choice of visual tokens at 1, 2, 4
and 8 % of them, and from all of them. Writes evidence.json, evidence.md and evidence.png. Evidence is kept where every
object that a question needs has a visual token of its own, unmerged, at one of the two finest scales. Intervals are
95 % of a bootstrap over scenes, differences are paired by question.
"""

import argparse
import copy
import os
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..common.budgets import counts_of_fraction
from ..common.extras import require
from ..common.files import whole_files, write_json
from ..common.loading import ROOT, check_files, load_model
from ..common.prompts import expand_placeholder, write_prompt
from ..common.tables import interval, percent, percent_interval, table
from ..geometry_uhr_bat import patch_centres
from ..layers_uhr_bat import UHRBatScaleEmbedding
from ..outputs_uhr_bat import UHRBatCompressionOutput
from ..scenes import questions
from ..scenes.evidence import evidence_of
from ..scenes.layout import FINETUNING_SEED, TEST_SEEDS, make_scene
from ..scenes.painting import paint
from ..token_compression_uhr_bat import cluster_regions, merge_tokens

FRACTIONS = (0.01, 0.02, 0.04, 0.08)
FULL = "no compression"
PROPOSED = "preserve-and-merge"
# Rules, other than those of the configuration, by which the model's own `compress` is each method.
RULES = {
    PROPOSED: {},
    "with coverage": {"coverage": True},
    "with kmeans_pca": {"region_method": "kmeans_pca"},
    "top-k per scale": {"region_method": "none"},
}
CHOICES = ("k-means merge", "uniform", "random", "anchor only")  # blind to the question
DOWNSAMPLING = "downsampling"
ROWS = (*RULES, *CHOICES, DOWNSAMPLING)
NO_IMAGE = "model without image"
TEXT_ONLY = "text-only control"
SIZES = {"1-2": (0, 2.5), "3-4": (2.5, 4.5), "5-8": (4.5, 99)}  # px, bins of the rounded size
CONTROL_SCENES = 5000
MAX_NEW_TOKENS = 6


# ---- Choices of visual tokens ----------------------------------------------------------------------------------------


def choose(method, model, features, counts, rng) -> list[torch.Tensor]:
    """Slots long[V] of every scale by a rule that does not know the question."""
    slots = []
    for scale, (tokens, positions, count) in enumerate(zip(features.tokens, features.positions, counts)):
        num_tokens = len(tokens)
        if method == "k-means merge":
            coords = patch_centres(positions, model.config.grids[scale])
            slots.append(cluster_regions(tokens, coords, count, coord_weight=model.config.coord_weight))
            continue
        if method == "anchor only":
            count = min(sum(counts), num_tokens) if scale == 0 else 0
        if method == "random":
            kept = np.sort(rng.permutation(num_tokens)[:count])
        else:
            kept = ((np.arange(count) + 0.5) * num_tokens / max(count, 1)).astype(int)
        slot = torch.full((num_tokens,), -1)
        slot[torch.from_numpy(kept)] = torch.arange(len(kept))
        slots.append(slot)
    return slots


def gather(features, slots) -> torch.Tensor:
    """float[n, D], the visual tokens of all scales."""
    merged = [
        merge_tokens(tokens, slot, int(slot.max()) + 1)
        for tokens, slot in zip(features.tokens, slots)
        if int(slot.max()) >= 0
    ]
    return torch.cat(merged)


def keeps(slots, positions, evidence) -> bool:
    """Whether each object, a list of its (scale, position), has a slot of its own in one of them.

    `slots`: long[V] per scale; `positions`: long[V] per scale, where these tokens stand on the grid.
    """
    alone = []
    for slot, where in zip(slots, positions):
        counts = torch.bincount(slot[slot >= 0], minlength=1)
        single = (slot >= 0) & (counts[slot.clamp_min(0)] == 1)
        alone.append(set(where[single].tolist()))
    return all(any(position in alone[scale] for scale, position in one) for one in evidence)


def one_scale_model(model, side):
    """The same weights for an image of one scale; of the scale vectors the one of the scale nearest to it."""
    single = copy.deepcopy(model)
    config = single.config
    nearest = min(range(len(config.scales)), key=lambda scale: abs(config.scales[scale] - side))
    config.scales, config.budgets = [side], [(side // config.patch_size) ** 2]
    embedding = UHRBatScaleEmbedding(config).to(model.device)
    embedding.load_state_dict(
        {
            "table": model.model.scale_embedding.table,
            "scale_vectors": model.model.scale_embedding.scale_vectors[[nearest]],
        }
    )
    single.model.scale_embedding = embedding
    return single.eval()


class Downsampling:
    """The image resized to the largest single scale that is within a number of tokens."""

    def __init__(self, processor, model):
        self.image_processor, self.model, self.models = processor.image_processor, model, {}

    def __call__(self, image, num_tokens) -> torch.Tensor:
        """float[n, D], at most `num_tokens` of the letterboxed square and those that show the image."""
        config = self.model.config
        patches_per_side = config.tile_size // config.patch_size
        side = max(1, int(num_tokens**0.5) // patches_per_side) * config.tile_size
        if side not in self.models:
            self.models[side] = one_scale_model(self.model, side)
        tiles = self.image_processor(image, scales=[side], return_tensors="pt").to(self.model.device)
        return self.models[side].encode_image(**tiles)[0].tokens[0]


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


def answers_from_a_fraction(
    model, processor, question, features, fraction, methods, small, evidence, rng
) -> list[Answer]:
    """From what each method chooses of a fraction of the tokens.

    Args:
        small: float[n, D], the tokens of the image that was downsampled to as many, where that is among the methods.
        evidence: of every object that has to be seen, its (scale, position).
    """
    prompt = write_prompt(processor, question.text).to(model.device)
    counts = counts_of_fraction(fraction, features.available, processor.default_budgets)
    visual, kept = [], []
    for method in methods:
        if method == DOWNSAMPLING:
            visual.append(small)
            kept.append(False)
            continue
        if method in RULES:
            images = {"image_features": [features], "token_counts": torch.tensor([counts])}
            compressed = model.compress(**prompt, **images, rules=RULES[method])
            visual.append(compressed.pooler_output[0])
            slots = [slot[positions] for slot, positions in zip(compressed.slots[0], features.positions)]
        else:
            slots = choose(method, model, features, counts, rng)
            visual.append(gather(features, slots))
        kept.append(keeps(slots, features.positions, evidence))
    said = answer(model, processor, prompt, visual)
    return [Answer(method, fraction, len(tokens), *rest) for method, tokens, *rest in zip(methods, visual, said, kept)]


@torch.no_grad()
def ask_scene(model, processor, downsampling, scene, fractions, methods, control, rng) -> list[dict]:
    """One record per question and choice of tokens: kind, method, fraction, tokens, right, kept, pixels."""
    image = paint(scene)
    (features,) = model.encode_image(**processor.image_processor(image, return_tensors="pt").to(model.device))
    total, records = sum(features.available), []
    small = {one: downsampling(image, round(one * total)) if DOWNSAMPLING in methods else None for one in fractions}
    for kind in questions.KINDS:
        question = questions.make_question(scene, kind, rng=rng)
        if question is None:
            continue
        evidence = evidence_of(scene, question, model.config.grids)
        answers = answers_without_a_choice(model, processor, question, features, control)
        for one in fractions:
            answers += answers_from_a_fraction(
                model, processor, question, features, one, methods, small[one], evidence, rng
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
    """Accuracy, evidence kept and the paired difference from preserve-and-merge by method and fraction, and by kind; what
    the full image answers and the compressed one does not, by the size of the objects."""
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
        if (proposed := by_method.get((PROPOSED, fraction))) and method != PROPOSED:
            # Records of every method stand in the order of the questions.
            row["difference"] = interval(right - np.array([r["right"] for r in proposed], float), groups, rng)
        full = by_method[FULL, 1.0]
        if method == PROPOSED:
            row["difference_from_full"] = interval(right - np.array([r["right"] for r in full], float), groups, rng)
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

    kinds = [
        [percent(row["by_kind"][kind]) if kind in row["by_kind"] else "" for kind in questions.KINDS] for row in rows
    ]
    losing = [row for row in rows if "lost_by_size" in row]
    lost = [
        [f"{part['lost']} of {part['right_in_full']}" for part in row["lost_by_size"].values()]
        + [percent_interval(row["difference_from_full"], signed=True)]
        for row in losing
    ]
    parts = [
        "# Evidence kept and questions answered, by visual tokens",
        f"UHR-BAT-Tiny on {about['questions']} questions about {about['scenes']} made-up scenes that nothing was "
        f"trained on, in {about['seeds']} seeded sets. Made by `{about['command']}`. Percent, with 95 % intervals of a "
        "bootstrap over scenes. Kept: every object that the question needs has a token of its own at one of the two "
        "finest scales (questions that need an object only). Difference: accuracy minus that of preserve-and-merge, "
        "paired.",
        table(
            ["tokens", "method", "mean number", "accuracy", "kept", "difference"],
            [
                cells(
                    row,
                    f"{row['tokens']:.0f}",
                    percent_interval(row["accuracy"]),
                    percent_interval(row["kept"]),
                    percent_interval(row["difference"], signed=True) if "difference" in row else "",
                )
                for row in rows
            ],
        ),
        "## By kind of question",
        table(["tokens", "method", *questions.KINDS], [cells(row, *values) for row, values in zip(rows, kinds)]),
        "## What the compression loses, by size",
        "Questions that are answered right from all tokens and wrong after preserve-and-merge, by the smallest object "
        "that they need, in pixels of the finest scale (side of a square of its area).",
        table(
            ["tokens", *[f"{name} px" for name in SIZES], "all, accuracy minus that of all tokens"],
            [[f"{100 * row['fraction']:g} %", *values] for row, values in zip(losing, lost)],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def plot(result, path):
    """Accuracy and evidence kept against the fraction of visual tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.5), layout="constrained")
    styles = dict(zip(ROWS, ("o-", "s-", "<-", "^-", "v--", "D--", "x--", "P:", "*:")))
    for axes, name, title in zip(
        figure.subplots(1, 2), ("accuracy", "kept"), ("Questions answered right", "Evidence kept")
    ):
        for method in ROWS:
            rows = [row for row in result["rows"] if row["method"] == method]
            if not rows:
                continue
            x = [100 * row["fraction"] for row in rows]
            mean, low, high = 100 * np.array([row[name] for row in rows]).T
            axes.errorbar(x, mean, (mean - low, high - mean), fmt=styles[method], label=method, capsize=2)
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
    with whole_files(folder) as built:
        write_json(built / "evidence.json", result)
        (built / "evidence.md").write_text(report(result), encoding="utf-8")
        plot(result, built / "evidence.png")


_worker = {}


def _start_worker(folder, fractions, methods, control, num_threads):
    torch.set_num_threads(num_threads)
    processor, model = load_model(folder, torch.float32)
    _worker.update(
        model=model, processor=processor, downsampling=Downsampling(processor, model), fractions=fractions,
        methods=methods, control=control,
    )  # fmt: skip


def _ask(seed):
    return ask_scene(scene=make_scene(seed), rng=np.random.default_rng([seed, 3]), **_worker)


def evaluate(folder, seeds, fractions=FRACTIONS, methods=ROWS, workers=1, control_scenes=CONTROL_SCENES) -> list[dict]:
    """Records of all questions about the scenes of `seeds`; several workers are processes of one thread each."""
    control = text_only(control_scenes)
    job = (folder, fractions, methods, control, 1 if workers > 1 else torch.get_num_threads())
    bar = {"total": len(seeds), "desc": "Asking", "unit": "scene"}
    if workers == 1:
        _start_worker(*job)
        return [record for seed in tqdm(seeds, **bar) for record in _ask(seed)]
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, job) as pool:
        return [record for records in tqdm(pool.map(_ask, seeds), **bar) for record in records]


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
    try:
        require("evaluate", "matplotlib")
        check_files(None, args.model)
        if args.scenes * args.seeds > len(TEST_SEEDS):
            raise ValueError(
                f"There are {len(TEST_SEEDS)} test scenes, but {args.scenes} x {args.seeds} are asked for."
            )
        seeds = TEST_SEEDS[: args.scenes * args.seeds]
        records = evaluate(args.model, seeds, workers=args.workers)
        result = summarise(records)
        result["about"] = {
            "command": f"uhr-bat evidence --scenes {args.scenes} --seeds {args.seeds}",
            "questions": sum(record["method"] == FULL for record in records),
            "scenes": len(seeds),
            "seeds": args.seeds,
            "fractions": FRACTIONS,
        }
        write_results(result, args.output)
    except (OSError, ValueError, ImportError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(report(result))
    print(f"Written: {args.output}/evidence.json, evidence.md, evidence.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
