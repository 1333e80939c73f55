"""Which layer of a decoder looks at what a question asks about? Measured on made-up scenes, whose evidence is known.

    uhr-bat calibrate [--model MODEL] [--scenes 40] [--output DIR]

Each question about a scene goes through the model once, with an empty one beside it, over the rows of the whole scene at the
anchor; the attention of all layers of full attention is read on the way. The layer whose look falls most on the sites that are
asked about is kept where `load_model` finds it (`common/measured.py`), for a model of another family. Nothing is learnt, and
no answer is needed. With `--output` it writes calibrate.json, calibrate.md and calibrate.png.

Letters: L layers, G groups of heads that share a key, V rows of the anchor, N questions, R draws of a bootstrap over scenes.
"""

import argparse
import math
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..common.asking import encode, write_prompt
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files
from ..common.loading import is_host, load_config, load_model
from ..common.measured import form_of, keep_measured, measured_file, measured_settings, read_measured
from ..common.models import add_model_argument, base_of, find_model, model_name, model_option
from ..common.outputs import Output, check_outputs
from ..common.tables import drawn_anew, percent, percent_interval, table, wilson
from ..hosts.looks import relative_attention
from ..modeling_layers_uhr_bat import mean_attention, queries_and_keys
from ..scenes.evidence import evidence_tokens, site_cells
from ..scenes.layout import SITE_SIDE, VALIDATION_SEEDS, WIDTH, make_scene
from ..scenes.painting import paint
from ..scenes.questions import KINDS, make_question
from .reports import draw_lines, finish

FORMS = ("attention", "relative attention")  # as it is, and divided by that of an empty question
TARGETS = ("sites", "evidence")
FIGURES = ("share", "recall")
FIRST = (0.01, 0.02, 0.04, 0.1)  # parts of the rows, those that are looked at most, in which a target is found or not
RIVALS = 0.05  # layers that so many draws pick are named
SAYS = """{questions} questions about {scenes} made-up scenes that nothing was trained on. Made by `{command}`. What the \
layers look at of the whole scene, {rows} rows on average: the sites that a question names, and the rows that show the middle of \
an object that it needs (evidence). Share: of a look, and how many times as large as that of the image. Recall: how much of them \
lies in the 1, 2, 4 and 10 % of the rows that are looked at most, of as much as so many rows can hold, the mean of the four. \
Percent, with 95 % intervals of a bootstrap over scenes. Relative attention is divided by that of an empty question. The layer \
with the largest recall of the sites is picked."""


# ---- Looks -----------------------------------------------------------------------------------------------------------


def looks_of(model, prompts, image) -> list[torch.Tensor]:
    """float32[B, G, V] of every layer of full attention in turn, from one pass a batch: what each of B prompts long[M] with one
    image pays to the anchor of an encoded image, by groups of heads."""
    rows = image.anchor_tokens
    if hasattr(model, "looks"):  # of another family
        return model.looks(prompts, rows, [image.anchor_places], list(model.attention))
    inner, found = model.model, []
    for ids in prompts:
        (start,) = inner.find_placeholders(ids).nonzero()[:, 0].tolist()
        embeds = inner.get_input_embeddings()(ids)
        sequence = torch.cat((embeds[:start], rows.to(embeds), embeds[start + 1 :]))[None]
        stop, last = start + len(rows), sequence.shape[1] - 1
        read = partial(_by_group, begin=min(stop, last) if model.config.question_tokens == "all" else last)
        layers = inner.language_model.layers
        seen = inner.read_layers(layers, sequence, read, range(len(layers)))
        found.append(torch.stack(seen)[..., start:stop])
    return list(torch.stack(found, dim=1))


def _by_group(attention, hidden_states, position_embeddings, begin) -> torch.Tensor:
    """float32[G, M]: eq. 2 of each group of heads, see `read_layers`."""
    query, key = queries_and_keys(attention, hidden_states, position_embeddings)
    groups = zip(*(one.split(attention.num_key_value_groups, dim=1) for one in (query, key)))
    return torch.stack([mean_attention(*group, attention.scaling, begin) for group in groups])


def layers_of(model) -> list[int]:
    """Indices of the layers that `looks_of` reads."""
    return list(model.attention) if hasattr(model, "looks") else list(range(model.config.text_config.num_hidden_layers))


# ---- Shares ----------------------------------------------------------------------------------------------------------


def targets_of(scene, question, image) -> dict[str, np.ndarray]:
    """{target: float[V]}: the portion of each row of the anchor that shows the question's sites, and whether it shows the
    middle of an object that is needed."""
    grid, positions = image.grids[image.anchor_idx], image.anchor_positions.cpu().numpy()
    cells = len(question.sites) * (SITE_SIDE * grid[1] / WIDTH) ** 2 * site_cells(scene, question.sites, grid)
    evidence = np.zeros(grid[0] * grid[1])
    evidence[[position for _, position in evidence_tokens(scene, question, [grid])]] = 1
    return {"sites": cells.clip(max=1)[positions], "evidence": evidence[positions]}


def figures_of(looks, targets) -> dict[tuple[str, str], np.ndarray]:
    """{(form, target): float[L, 1 + G, F]}: the `FIGURES` of a look and a target, by all heads of a layer and by each group; nan
    where the question has no such target, and where other layers have more groups.

    `looks`: of a question and an empty one, float32[2, G, V] of each layer.
    """
    most = max(pair.shape[1] for pair in looks)
    found = {key: np.full((len(looks), 1 + most, len(FIGURES)), np.nan) for key in product(FORMS, TARGETS)}
    for layer, pair in enumerate(looks):
        asked, empty = torch.cat((pair.mean(1, keepdim=True), pair), dim=1).cpu().double()
        weights = asked / asked.sum(-1, keepdim=True).clamp(min=1e-30), relative_attention(asked, empty)
        for (form, look), (target, portion) in product(zip(FORMS, weights), targets.items()):
            if portion.any():
                portion = torch.from_numpy(portion)
                last, best = _first_rows(portion)
                recall = portion[look.argsort(dim=-1, descending=True)].cumsum(-1)[:, last] / best
                figures = torch.stack((look @ portion, recall.mean(-1)), dim=-1)
                found[form, target][layer, : len(look)] = figures.numpy()
    return found


def _first_rows(portion) -> tuple[list[int], torch.Tensor]:
    """(index of the last row of each of the parts FIRST, float64[F] the most of a target that such parts can hold)."""
    last = [math.ceil(part * len(portion)) - 1 for part in FIRST]
    return last, portion.sort(descending=True).values.cumsum(0)[last]


def by_chance(portion) -> dict[str, float]:
    """The `FIGURES` of a target that is looked at as all of the image is; nan of none."""
    if not portion.any():
        return dict.fromkeys(FIGURES, math.nan)
    last, best = _first_rows(torch.from_numpy(portion))
    recall = (torch.tensor(last) + 1) * portion.mean() / best
    return {"share": float(portion.mean()), "recall": float(recall.mean())}


@torch.no_grad()
def measure(processor, model, seeds) -> dict:
    """What scenes of some seeds say: "layers" [L], "scenes" [N], "rows" [N], by target "chance" [N], see `by_chance`,
    and by form and target "figures" float[N, L, 1 + G, F], see `figures_of`."""
    jobs = [(scene, question) for scene in map(make_scene, seeds) for question in _questions(scene)]
    empty, image_of = write_prompt(processor, "")["input_ids"][0].to(model.device), None
    found = {"layers": layers_of(model), "scenes": [], "rows": [], "chance": {name: [] for name in TARGETS}}
    figures = {key: [] for key in product(FORMS, TARGETS)}
    for scene, question in tqdm(jobs, desc="Looking", unit="question"):
        if image_of != scene.seed:
            # Coarse to fine: of these, the anchor alone is encoded before a question is asked.
            cut = processor.image_processor(paint(scene), max_tiles=10**6, return_tensors="pt")
            (image,), image_of = encode(model, cut), scene.seed
        prompt = write_prompt(processor, question.text)["input_ids"][0].to(model.device)
        targets, looks = targets_of(scene, question, image), looks_of(model, [prompt, empty], image)
        for layer, look in zip(found["layers"], looks):
            if not look.isfinite().all():
                raise ValueError(
                    f"The attention of layer {layer} holds what is no number, in {model.dtype}: nothing to measure."
                )
        for key, of_question in figures_of(looks, targets).items():
            figures[key].append(of_question)
        found["scenes"].append(scene.seed)
        found["rows"].append(len(image.anchor_tokens))
        for name, portion in targets.items():
            found["chance"][name].append(by_chance(portion))
    return found | {"figures": {key: np.stack(of) for key, of in figures.items()}}


def _questions(scene) -> list:
    rng = np.random.default_rng([scene.seed, 3])
    drawn = (make_question(scene, kind, rng=rng) for kind in KINDS)
    return [question for question in drawn if question is not None]


# ---- Figures ---------------------------------------------------------------------------------------------------------


def resampled(values, scenes) -> np.ndarray:
    """float[1 + R, ...]: means of values float[N, ...] over the questions that have one, first of all, then of scenes that are
    drawn anew."""
    values, of_scene = np.asarray(values, float), np.unique(scenes, return_inverse=True)[1]
    has = ~np.isnan(values.reshape(len(values), -1)[:, 0])
    sums = np.zeros((of_scene.max() + 1, *values.shape[1:]))
    np.add.at(sums, of_scene[has], values[has])
    counts = np.bincount(of_scene[has], minlength=len(sums))
    drawn = np.vstack((np.ones(len(sums)), _drawn(len(sums))))
    return np.tensordot(drawn, sums, 1) / (drawn @ counts).reshape(-1, *[1] * (values.ndim - 1)).clip(1)


def _drawn(num_scenes) -> np.ndarray:
    """long[R, scenes]: the draws that all figures share."""
    return drawn_anew(num_scenes, np.random.default_rng(0))


def interval_of(means) -> tuple[float, float, float]:
    """(mean, low, high): 95 % of what `resampled` returned."""
    return float(means[0]), *map(float, np.percentile(means[1:], (2.5, 97.5)))


def summarise(found) -> dict:
    """{"layers": a row each, "picked": {form: layer and how sure}, "chance": the figures of a target by chance, "divided": what
    division adds to the recall} of what `measure` found, as JSON."""
    layers, rows = found["layers"], [{"layer": layer} for layer in found["layers"]]
    chance = {
        target: {figure: float(np.nanmean([one[figure] for one in values])) for figure in FIGURES}
        for target, values in found["chance"].items()
    }
    # float[1 + R, L, 1 + G, F] each, by the same draws.
    means = {key: resampled(values, found["scenes"]) for key, values in found["figures"].items()}
    for (form, target), of_target in means.items():
        for row, of_layer in zip(rows, of_target.swapaxes(0, 1)):
            groups = of_layer[0, 1:][~np.isnan(of_layer[0, 1:, 0])].T.tolist()
            row.setdefault(form, {})[target] = {
                **{name: interval_of(of_layer[:, 0, idx]) for idx, name in enumerate(FIGURES)},
                "times": float(of_layer[0, 0, 0] / chance[target]["share"]), "groups": dict(zip(FIGURES, groups)),
            }  # fmt: skip
    # A set that is one scene over and over says nothing of another scene.
    several = (_drawn(len(set(found["scenes"]))) > 0).sum(1) > 1
    picked = {form: _pick(layers, means[form, TARGETS[0]], chance[TARGETS[0]]["recall"], several) for form in FORMS}
    own, divided = (means[form, TARGETS[0]][:, layers.index(picked[form]["layer"]), 0, 1] for form in FORMS)
    return {"layers": rows, "picked": picked, "chance": chance, "divided": interval_of(divided - own)}


def _pick(layers, means, chance, several) -> dict:
    """The layer of the largest recall of the sites, and how sure that is, of means float[1 + R, L, 1 + G, F]; `several` bool[R]:
    the draws that have more than one scene, without which a draw picks nothing."""
    recall, groups = means[:, :, 0, 1], means[:, :, 1:, 1]
    best, *others = np.argsort(-recall[0], kind="stable").tolist()
    draws = np.bincount(recall[1:][several].argmax(1), minlength=len(layers)) / len(several)
    layer, group = np.unravel_index(np.nanargmax(groups[0]), groups[0].shape)
    return {
        # At the sites more than at the rest of the image, as the best of so many layers, each of which may seem to.
        "looks": bool(np.percentile(recall[1:, best], 2.5 / len(layers)) > chance),
        "layer": layers[best], "recall": interval_of(recall[:, best]), "sure": float(draws[best]),
        "rivals": {str(layers[idx]): float(draws[idx]) for idx in others if draws[idx] >= RIVALS},
        "lead": interval_of(recall[:, best] - recall[:, others[0]]) if others else None,
        "group": {
            "layer": layers[layer], "group": int(group), "lead": interval_of(groups[:, layer, group] - recall[:, best]),
        },
    }  # fmt: skip


# ---- Reports ---------------------------------------------------------------------------------------------------------


def tell(pick, num_scenes: int) -> str:
    """What `_pick` found, as sentences; how sure that is, with what so few scenes leave open."""
    if not pick["looks"]:
        return "no layer looks at the sites more than at the rest of the image."
    text = f"layer {pick['layer']}, with {percent_interval(pick['recall'])} % of the sites"
    if pick["lead"]:
        text += f", {percent_interval(pick['lead'], signed=True)} points more than the next"
    text += (
        f". {percent_interval(wilson(pick['sure'], num_scenes))} % of the resampled sets of {num_scenes} scenes pick it"
    )
    if pick["rivals"]:
        text += f" ({', '.join(f'layer {layer}: {percent(draws)} %' for layer, draws in pick['rivals'].items())})"
    group = pick["group"]
    return (
        f"{text}. The best group of heads is group {group['group']} of layer {group['layer']}: "
        f"{percent_interval(group['lead'], signed=True)} points."
    )


def report(result) -> str:
    """Markdown of what `summarise` made, "about" and what was kept of it."""
    parts = [f"# {result['about']['title']}", result["about"]["says"]]
    parts += [f"- By {form}: {tell(pick, result['about']['scenes'])}" for form, pick in result["picked"].items()]
    parts[-1] += f"\n- Division adds {percent_interval(result['divided'], signed=True)} points to that."
    chance = [
        f"{target}: share {percent(by['share'])} %, recall {percent(by['recall'])} %"
        for target, by in result["chance"].items()
    ]
    parts.append(f"By chance: {'; '.join(chance)}.")
    heads = [f"{target}: {figure}" for target in TARGETS for figure in ("share (%)", "times", "recall (%)")]
    for form in FORMS:
        lines, groups = [], []
        for row in result["layers"]:
            line = [row["layer"]]
            for of_target in (row[form][target] for target in TARGETS):
                line += [percent_interval(of_target["share"]), f"{of_target['times']:.1f}"]
                line.append(percent_interval(of_target["recall"]))
            lines.append(line)
            groups.append([row["layer"], *map(percent, row[form][TARGETS[0]]["groups"]["recall"])])
        most = max(map(len, groups))
        parts += [
            f"## {form.capitalize()}",
            table(["layer", *heads], lines),
            "By group of heads, recall of the sites (%):",
        ]
        parts.append(table(["layer", *range(most - 1)], [line + [""] * (most - len(line)) for line in groups]))
    return "\n\n".join([*parts, result["kept"]]) + "\n"


def plot(result):
    """What each layer finds of the sites, with intervals, and what each group of heads does, as a picture."""
    from matplotlib.figure import Figure

    figure, layers = Figure(figsize=(12, 5), layout="constrained"), [row["layer"] for row in result["layers"]]
    axes, *pictures = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    lines = {form: [(row["layer"], row[form][TARGETS[0]]["recall"]) for row in result["layers"]] for form in FORMS}
    draw_lines(axes, lines)
    axes.axhline(100 * result["chance"][TARGETS[0]]["recall"], color="black", linestyle=":", label="chance")
    axes.set(xlabel="layer", ylabel="% of the sites", title="Found in the rows that are looked at most", ylim=(0, 100))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    for axes, form in zip(pictures, FORMS):
        groups = [row[form][TARGETS[0]]["groups"]["recall"] for row in result["layers"]]
        most = max(map(len, groups))
        shown = [[100 * one for one in of_layer] + [np.nan] * (most - len(of_layer)) for of_layer in groups]
        picture = axes.imshow(shown, aspect="auto", vmin=0, vmax=100)
        axes.set(xlabel="group of heads", ylabel="layer", title=form, xticks=range(most))
        axes.set_yticks(range(len(layers)), layers)
    figure.colorbar(picture, ax=pictures, label="% of the sites")
    return figure


# ---- The command -----------------------------------------------------------------------------------------------------


def keep(folder, model, picked) -> str:
    """Keeps the layer for `load_model`, of a model of another family; what is said of that. A configuration is its owner's."""
    if hasattr(model, "looks"):
        divides = model.settings.relative_attention
        pick, num_layers = picked[FORMS[divides]], model.config.text_config.num_hidden_layers
        if not pick["looks"]:
            before = measured_settings(folder)
            return "Nothing is kept." + f" What was kept before stays: {_listed(before)}." * bool(before)
        # A share of the depth is above 0: of the first layer it is nearer to that than to the next.
        settings = {"look": max(pick["layer"], 0.25) / max(num_layers - 1, 1), "relative_attention": divides}
        path = keep_measured(folder, settings, form_of(folder))
        return f"Kept for {model_name(folder)} in {path}: {_listed(settings)}. Loading finds it there."
    pick, config = picked[FORMS[0]], model.config
    own = config.importance_layer % config.text_config.num_hidden_layers
    if not pick["looks"] or pick["layer"] == own:
        return f"Nothing is kept: `importance_layer` of config.json is {own}."
    return f"`importance_layer` of config.json is {own}: write {pick['layer']} there to look at another layer."


def _listed(settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def check(args):
    """`args.model` becomes its folder; raises before anything is loaded where the command cannot end well."""
    check_range(args, 2, len(VALIDATION_SEEDS), "scenes")
    args.model = find_model(args.model)
    output = Output("--output", args.output, names=report_files("calibrate"))
    if is_host(base_of(args.model) or args.model):
        check_outputs((args.model,), output, Output("the file of measured settings", measured_file()))
        read_measured(needed=True)
    else:
        check_outputs((args.model,), output)
        if load_config(args.model, **args.set).importance_source != "decoder":
            why = "weighs by its region focus module: no layer of its decoder is read"
            raise ValueError(f"{model_name(args.model)} {why}. Pass --set importance_source=decoder to measure that.")
    if args.output:
        require("evaluate", "matplotlib")


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat calibrate", description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("--scenes", type=int, default=40, help="with up to six questions each (default: 40)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a folder for a table and a picture")
    args = parser.parse_args(arguments)
    check(args)
    processor, model = load_model(args.model, **args.set)
    found = measure(processor, model, VALIDATION_SEEDS[: args.scenes])
    about = {
        "title": f"Where the layers of {model_name(args.model)} look",
        "command": f"uhr-bat calibrate{model_option(args.model, args.set)} --scenes {args.scenes}",
        "scenes": args.scenes, "questions": len(found["scenes"]), "rows": round(np.mean(found["rows"])),
    }  # fmt: skip
    about["says"] = SAYS.format(**about)
    result = {"about": about, **summarise(found)}
    result["kept"] = keep(args.model, model, result["picked"])
    text = report(result)
    if args.output:
        finish(args.output, "calibrate", result, text, plot(result))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
