"""Which layer of a decoder looks at what a question asks about? Measured on made-up scenes, whose evidence is known.

    uhr-bat calibrate [--model MODEL] [--scenes 40] [--output DIR]

Each question about a scene goes through the model once, with an empty one beside it, over the rows of the whole scene at the
anchor; the attention of all layers of full attention is read on the way. The layer whose look falls most on the sites that are
asked about is kept where `load_model` finds it (`common/measured.py`), for a model of another family. Nothing is learnt, and
no answer is needed. With `--output` it writes calibrate.json, calibrate.md and calibrate.png.

Letters: L layers, G groups of heads that share a key, V rows of the anchor, N questions, R draws of a bootstrap over scenes.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..common.asking import encode, write_prompt
from ..common.commands import check_range, tells_errors
from ..common.extras import require
from ..common.files import report_files
from ..common.loading import is_host, load_config, load_model
from ..common.measured import keep_measured, measured_file, read_measured
from ..common.models import add_model_argument, base_of, find_model, model_name, model_option
from ..common.outputs import Output, check_outputs
from ..common.tables import drawn_anew, percent, percent_interval, table
from ..hosts.looks import relative_attention
from ..modeling_layers_uhr_bat import mean_attention, queries_and_keys
from ..scenes.evidence import evidence_tokens, site_cells
from ..scenes.layout import SITE_SIDE, VALIDATION_SEEDS, WIDTH, make_scene
from ..scenes.painting import paint
from ..scenes.questions import KINDS, make_question
from .reports import draw_lines, finish

FORMS = ("attention", "relative attention")  # as it is, and divided by that of an empty question
TARGETS = ("sites", "evidence")
RIVALS = 0.05  # layers that so many draws pick are named
SAYS = """{questions} questions about {scenes} made-up scenes that nothing was trained on. Made by `{command}`. The share of \
a question's look at the rows of the whole scene ({rows} on average) that falls on the sites that it names, and on the rows \
with the objects that it needs: percent, with 95 % intervals of a bootstrap over scenes, and how many times as large as their \
share of the image that is. Relative attention is divided by that of an empty question."""


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


def shares_of(looks, targets) -> dict[tuple[str, str], np.ndarray]:
    """{(form, target): float[L, 1 + G]}: the share of a look that falls on a target, by all heads of a layer and by each group;
    float[1 + G] of a layer are nan where the question has no such target.

    `looks`: of a question and an empty one, float32[2, G, V] of each layer.
    """
    found = {}
    for form in FORMS:
        layers = []
        for pair in looks:
            asked, empty = torch.cat((pair.mean(1, keepdim=True), pair), dim=1).cpu()
            layers.append(relative_attention(asked, empty) if form == FORMS[1] else asked / asked.sum(-1, keepdim=True))
        for target, portion in targets.items():
            on_it = [(layer.double() @ torch.from_numpy(portion)).numpy() for layer in layers]
            found[form, target] = np.stack(on_it) if portion.any() else np.full_like(np.stack(on_it), np.nan)
    return found


@torch.no_grad()
def measure(processor, model, seeds) -> dict:
    """What scenes of some seeds say: "layers" [L], "scenes" [N], "rows" [N], and by target "area" float[N], its share of the
    image, and by form and target "shares" float[N, L, 1 + G], see `shares_of`."""
    jobs = [(scene, question) for scene in map(make_scene, seeds) for question in _questions(scene)]
    empty, image_of = write_prompt(processor, "")["input_ids"][0].to(model.device), None
    found = {"layers": layers_of(model), "scenes": [], "rows": [], "area": {name: [] for name in TARGETS}}
    shares = {(form, target): [] for form in FORMS for target in TARGETS}
    for scene, question in tqdm(jobs, desc="Looking", unit="question"):
        if image_of != scene.seed:
            # Coarse to fine: of these, the anchor alone is encoded before a question is asked.
            cut = processor.image_processor(paint(scene), max_tiles=10**6, return_tensors="pt")
            (image,), image_of = encode(model, cut), scene.seed
        prompt = write_prompt(processor, question.text)["input_ids"][0].to(model.device)
        targets = targets_of(scene, question, image)
        for key, share in shares_of(looks_of(model, [prompt, empty], image), targets).items():
            shares[key].append(share)
        found["scenes"].append(scene.seed)
        found["rows"].append(len(image.anchor_tokens))
        for name, portion in targets.items():
            found["area"][name].append(portion.mean() if portion.any() else np.nan)
    return found | {"shares": {key: np.stack(of) for key, of in shares.items()}}


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
    drawn = np.vstack((np.ones(len(sums)), drawn_anew(len(sums), np.random.default_rng(0))))
    return np.tensordot(drawn, sums, 1) / (drawn @ counts).reshape(-1, *[1] * (values.ndim - 1)).clip(1)


def interval_of(means) -> tuple[float, float, float]:
    """(mean, low, high): 95 % of what `resampled` returned."""
    return float(means[0]), *map(float, np.percentile(means[1:], (2.5, 97.5)))


def summarise(found) -> dict:
    """{"layers": a row each, "picked": {form: layer and how sure}, "area": {target: share of the image}} of what `measure`
    found, as JSON."""
    layers, scenes = found["layers"], found["scenes"]
    area = {target: float(np.nanmean(values)) for target, values in found["area"].items()}
    rows, picked = [{"layer": layer} for layer in layers], {}
    for form in FORMS:
        for target in TARGETS:
            means = resampled(found["shares"][form, target], scenes)  # float[1 + R, L, 1 + G]
            for row, of_layer in zip(rows, means.swapaxes(0, 1)):
                row.setdefault(form, {})[target] = {
                    "share": interval_of(of_layer[:, 0]), "times": float(of_layer[0, 0] / area[target]),
                    "groups": [float(one / area[target]) for one in of_layer[0, 1:]],
                }  # fmt: skip
            if target == TARGETS[0]:
                picked[form] = _pick(layers, means[..., 0], means[:, :, 1:], area[target])
    return {"layers": rows, "picked": picked, "area": area}


def _pick(layers, means, groups, area) -> dict:
    """The layer of the largest share on the sites, and how sure that is, of means float[1 + R, L] and float[1 + R, L, G]."""
    first, *others = np.argsort(-means[0], kind="stable").tolist()
    draws = np.bincount(means[1:].argmax(1), minlength=len(layers)) / (len(means) - 1)
    layer, group = np.unravel_index(groups[0].argmax(), groups[0].shape)
    share = interval_of(means[:, first])
    return {
        "layer": layers[first], "share": share, "times": share[0] / area, "sure": float(draws[first]),
        "looks": share[1] > area,  # at the sites more than at the rest
        "rivals": {str(layers[idx]): float(draws[idx]) for idx in others if draws[idx] >= RIVALS},
        "lead": interval_of(means[:, first] - means[:, others[0]]) if others else None,
        "group": {
            "layer": layers[layer], "group": int(group), "times": float(groups[0].max() / area),
            "lead": interval_of(groups[:, layer, group] - means[:, first]),
        },
    }  # fmt: skip


# ---- Reports ---------------------------------------------------------------------------------------------------------


def tell(pick) -> str:
    """What `_pick` found, as a sentence or two."""
    if not pick["looks"]:
        return "no layer looks at the sites more than at the rest of the image."
    lead = f", {percent_interval(pick['lead'], signed=True)} points more than the next" if pick["lead"] else ""
    rivals = ", ".join(f"layer {layer}: {100 * draws:.0f} %" for layer, draws in pick["rivals"].items())
    group = pick["group"]
    return (
        f"layer {pick['layer']}. {percent_interval(pick['share'])} % of its look falls on the sites, {pick['times']:.1f} times "
        f"their share of the image{lead}. {100 * pick['sure']:.0f} % of the resampled sets of scenes pick it"
        + f" ({rivals})"
        * bool(rivals)
        + f". Of all groups of heads, group {group['group']} of layer {group['layer']} looks there most, {group['times']:.1f} "
        f"times ({percent_interval(group['lead'], signed=True)} points to all heads of layer {pick['layer']})."
    )


def report(result) -> str:
    """Markdown of what `summarise` made, "about" and what was kept of it."""
    columns = [(form, target) for form in FORMS for target in TARGETS]
    heads = ["layer", *(f"{form}: {target}{unit}" for form, target in columns for unit in (" (%)", ", times"))]
    cells = []
    for row in result["layers"]:
        parts = [row[form][target] for form, target in columns]
        figures = ((percent_interval(part["share"]), f"{part['times']:.1f}") for part in parts)
        cells.append([row["layer"], *(figure for pair in figures for figure in pair)])
    area = {target: percent(share) for target, share in result["area"].items()}
    parts = [f"# {result['about']['title']}", result["about"]["says"]]
    parts += [f"- By {form}: {tell(pick)}" for form, pick in result["picked"].items()]
    parts += [f"Share of the image: sites {area['sites']} %, evidence {area['evidence']} %.", table(heads, cells)]
    most = max(len(row[FORMS[0]]["sites"]["groups"]) for row in result["layers"])
    for form in FORMS:
        groups = [[row["layer"], *(f"{one:.1f}" for one in row[form]["sites"]["groups"])] for row in result["layers"]]
        parts += [f"## By group of heads that share a key: {form}, times the sites' share"]
        parts.append(table(["layer", *range(most)], [cells + [""] * (most + 1 - len(cells)) for cells in groups]))
    return "\n\n".join([*parts, result["kept"]]) + "\n"


def plot(result):
    """Shares on the sites by layer, with intervals, and by group of heads as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes, *pictures = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    of_form = {form: [(row["layer"], row[form]["sites"]["share"]) for row in result["layers"]] for form in FORMS}
    draw_lines(axes, of_form)
    axes.axhline(100 * result["area"]["sites"], color="black", linestyle=":", label="their share of the image")
    axes.set(xlabel="layer", ylabel="% of the look", title="Looked at: the sites that are asked about", ylim=0)
    axes.legend()
    layers = [row["layer"] for row in result["layers"]]
    for axes, form in zip(pictures, FORMS):
        groups = [row[form]["sites"]["groups"] for row in result["layers"]]
        most = max(map(len, groups))
        shown = axes.imshow([one + [np.nan] * (most - len(one)) for one in groups], aspect="auto")
        axes.set(xlabel="group of heads", ylabel="layer", title=form, xticks=range(most))
        axes.set_yticks(range(len(layers)), layers)
        figure.colorbar(shown, ax=axes, label="times the sites' share of the image")
    return figure


# ---- The command -----------------------------------------------------------------------------------------------------


def keep(folder, model, picked) -> str:
    """Keeps the layer for `load_model`, of a model of another family; what is said of that. A configuration is its owner's."""
    if hasattr(model, "looks"):
        divides = model.settings.relative_attention
        pick, num_layers = picked[FORMS[divides]], model.config.text_config.num_hidden_layers
        if not pick["looks"]:
            return "Nothing is kept."
        # A share of the depth is above 0: of the first layer it is nearer to that than to the next.
        settings = {"look": max(pick["layer"], 0.25) / max(num_layers - 1, 1), "relative_attention": divides}
        path, words = keep_measured(folder, settings), ", ".join(f"{name} {value}" for name, value in settings.items())
        return f"Kept for {model_name(folder)} in {path}: {words}. Loading finds it there."
    pick, config = picked[FORMS[0]], model.config
    own = config.importance_layer % config.text_config.num_hidden_layers
    if not pick["looks"] or pick["layer"] == own:
        return f"Nothing is kept: `importance_layer` of config.json is {own}."
    return f"`importance_layer` of config.json is {own}: write {pick['layer']} there to look at another layer."


def check(args):
    """`args.model` becomes its folder; raises before anything is loaded where the command cannot end well."""
    check_range(args, 2, len(VALIDATION_SEEDS), "scenes")
    args.model = find_model(args.model)
    output = Output("--output", args.output, names=report_files("calibrate"))
    if is_host(base_of(args.model) or args.model):
        check_outputs((args.model,), output, Output("the file of measured settings", measured_file()))
        read_measured()
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
