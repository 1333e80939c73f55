"""What a run is worth: means over samples and over tasks, with 95 % of a bootstrap over images, beside its controls.

Whatever failed or refused counts as wrong and is listed. Two runs are compared sample by sample.

Letters: N samples.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common.files import whole_files, write_json
from ..common.models import model_in_words
from ..common.tables import drawn_anew, mean_of_intervals, percent_interval, table, wilson
from .running import BLANK, IMAGE, TEXT, VIEWS
from .samples import Sample
from .scoring import Scorer
from .suites import Suite

ALL = "all"
FILES = ("figures.json", "figures.md")
LISTED = 20  # failures and refusals that a report names; the JSON file names all


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def means(values, groups, images) -> dict:
    """{"micro", "macro": Interval, "groups": {name: Interval}}: the mean over the samples, that of the groups' means, and
    the mean of every group, with intervals from images drawn anew.

    Args:
        values: float[N], of every sample; differences where two runs are compared.
        groups, images: str[N], what each sample belongs to.
    """
    names, of_group = np.unique(groups, return_inverse=True)
    of_image = np.unique(images, return_inverse=True)[1]
    shape = of_image.max() + 1, len(names)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (of_image, of_group), values)
    np.add.at(counts, (of_image, of_group), 1)
    drawn = drawn_anew(len(sums), np.random.default_rng(0))
    sums, counts = np.vstack((sums.sum(0), drawn @ sums)), np.vstack((counts.sum(0), drawn @ counts))
    with np.errstate(invalid="ignore"):
        by_group = sums / counts  # nan where a draw has no sample of a group, which then does not count in its mean
    micro, macro = sums.sum(1) / counts.sum(1), np.nanmean(by_group, axis=1)
    of_group = {name: _interval(by_group[:, t]) for t, name in enumerate(names)}
    return {"micro": _interval(micro), "macro": _interval(macro), "groups": of_group}


def wilson_means(values, groups, images) -> dict:
    """{"micro", "macro", "groups"} as `means` has them, with Wilson's 95 %: an image is a trial, however many questions
    it has."""
    values, groups, images = np.asarray(values, float), np.asarray(groups), np.asarray(images)
    of_group = {}
    for name in np.unique(groups):
        chosen = groups == name
        of_group[str(name)] = Interval(*wilson(values[chosen].mean(), len(set(images[chosen]))))
    micro = Interval(*wilson(values.mean(), len(set(images))))
    return {"micro": micro, "macro": Interval(*mean_of_intervals(list(of_group.values()))), "groups": of_group}


def _interval(means) -> Interval:
    """The mean itself stands first, those of the draws behind it."""
    return Interval(float(means[0]), *map(float, np.nanpercentile(means[1:], (2.5, 97.5))))


def scores(samples: list[Sample], lines: dict, scorer: Scorer, view: str) -> np.ndarray:
    """float[N], 0 to 1, of every sample; one without an answer is worth what the scorer says, 0 for all of ours."""
    found = ((sample, lines[sample.id, view]) for sample in samples)
    return np.array([scorer.score(sample, line["answer"], line.get("boxes")) for sample, line in found])


def sections_of(samples) -> list[str]:
    named = sorted({sample.section for sample in samples if sample.section})
    return [ALL, *named] if len(named) > 1 else [ALL]


class Part(NamedTuple):
    """Samples that are averaged together: which ones, of which group and images each is."""

    section: str
    average: str
    chosen: list[int]
    groups: list[str]
    images: list[str]


def parts_of(suite: Suite, samples: list[Sample]) -> list[Part]:
    """Every average of the suite, over all samples and over every section."""
    parts = []
    for section in sections_of(samples):
        chosen = [n for n, sample in enumerate(samples) if section in (ALL, sample.section)]
        images = ["\n".join(samples[n].picture_keys) for n in chosen]
        for average, group_of in suite.averages.items():
            groups = [group_of(samples[n]) or "none" for n in chosen]
            parts.append(Part(section, average, chosen, groups, images))
    return parts


def evaluate(suite: Suite, samples: list[Sample], lines: dict, scorers) -> dict:
    """All figures of a run, as JSON.

    Returns:
        {"suite", "samples", "images", "errors", "refusals", "scores": [...]}; an entry of "scores" is one scorer, view,
        section and average: micro, macro, groups, and minus_blank and minus_text, paired, where the view is the image.
    """
    rows, parts = [], parts_of(suite, samples)
    views = [view for view in VIEWS if all((sample.id, view) in lines for sample in samples)]
    for scorer in scorers:
        values = {view: scores(samples, lines, scorer, view) for view in views}
        for part in parts:
            for view in views:
                rows.append(
                    {"scorer": scorer.name, "section": part.section, "view": view, "average": part.average}
                    | figures_of(part, values, view)
                )
    return {
        "suite": suite.name,
        "samples": len(samples),
        "images": len({sample.picture_keys for sample in samples}),
        "errors": errors_of(samples, lines),
        "refusals": {scorer.name: refusals_of(samples, lines, scorer) for scorer in scorers},
        "scores": rows,
    }


def figures_of(part: Part, values, view) -> dict:
    found = means(values[view][part.chosen], part.groups, part.images)
    row = {
        "samples": len(part.chosen),
        **found,
        "samples_of_groups": {name: part.groups.count(name) for name in found["groups"]},
        "wilson": wilson_means(values[view][part.chosen], part.groups, part.images),
    }
    if view == IMAGE:
        for name, control in ("minus_blank", BLANK), ("minus_text", TEXT):
            if control in values:
                row[name] = means((values[view] - values[control])[part.chosen], part.groups, part.images)["micro"]
    return row


def errors_of(samples, lines) -> list[dict]:
    """Samples that failed with their image, and why; control views fail where the model does."""
    kept = ("id", "view", "error")
    of_samples = [lines[sample.id, view] for sample in samples for view in VIEWS if (sample.id, view) in lines]
    return [{name: line[name] for name in kept} for line in of_samples if line["error"] is not None]


def refusals_of(samples, lines, scorer) -> list[dict]:
    """Answers with the image in which a scorer finds nothing to score."""
    found = ((sample, lines[sample.id, IMAGE]) for sample in samples if (sample.id, IMAGE) in lines)
    return [
        {"id": sample.id, "answer": line["answer"]}
        for sample, line in found
        if line["answer"] is not None and scorer.refuses(sample, line["answer"], line.get("boxes"))
    ]


# ---- Reports ---------------------------------------------------------------------------------------------------------


def report(suite: Suite, result: dict, settings: dict) -> str:
    """Markdown of what `evaluate` returned."""
    budgets = settings["budgets"]
    spent = budgets if isinstance(budgets, int) else f"{sum(budgets)} ({' + '.join(map(str, budgets))})"
    parts = [
        f"# {suite.title}: {result['samples']} samples, {result['images']} images",
        f"Model {model_in_words(settings)}, {spent} visual tokens at most, selector {settings['selector']}, prompt "
        f"{settings['prompt']}, seed {settings['seed']}"
        + (f", at most {settings['max_tiles']} tiles" if settings.get("max_tiles") else "")
        + (", two dates compared" if settings.get("dates") else "")
        + (" of levels down to each image's own resolution" if settings.get("native") else "")
        + (f"; a part of the suite, {settings['limit']} samples" if settings["limit"] else "")
        + ". Percent, with 95 % intervals of a bootstrap over images, and Wilson's, an image a trial, which hold where few or all "
        "answers are right. Micro is the mean over samples, macro the mean "
        "of the groups' means. Failed samples and refusals count as wrong.",
        scores_table(result),
        "\n".join(f"- {scorer.name}: {scorer.says}" for scorer in suite.scorers if scorer.name in result["refusals"]),
    ]
    first_scorer = result["scores"][0]["scorer"]
    for average in suite.averages:
        rows = [row for row in result["scores"] if row["scorer"] == first_scorer and row["average"] == average]
        parts += [f"## By group: {average}, {first_scorer}, with Wilson's intervals", groups_table(rows)]
    parts += ["## Failures and refusals", failures(result)]
    if suite.paper:
        parts += [
            "## Beside the paper's figures",
            "Rows marked as the paper's are quoted from it: they were not measured here, and hold for other weights.",
            paper_table(suite, result, settings["model"]),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def paper_table(suite, result, model) -> str:
    """Figures of this run, each with what it is a mean of, and the paper's with what they are."""
    own = []
    for row in result["scores"]:
        if row["view"] == IMAGE and row["scorer"] == result["scores"][0]["scorer"]:
            of_part = f"{row['section']}, {row['samples']} samples"
            if row["average"] == next(iter(suite.averages)):
                own.append([model, "this run", percent_interval(row["micro"]), f"micro, {of_part}"])
            macro = f"{row['average']} over {len(row['groups'])} groups, {of_part}"
            own.append([model, "this run", percent_interval(row["macro"]), macro])
    quoted = [[one.model, "the paper's", f"{one.percent:g}", one.says] for one in suite.paper]
    return table(["model", "whose", "%", "what it is"], [*own, *quoted])


def scores_table(result) -> str:
    rows = []
    for row in result["scores"]:
        differences = [
            percent_interval(row[name], signed=True) if name in row else "" for name in ("minus_blank", "minus_text")
        ]
        figures = [
            percent_interval(row["micro"]),
            percent_interval(row["wilson"]["micro"]),
            percent_interval(row["macro"]),
            percent_interval(row["wilson"]["macro"]),
            f"{row['average']}, {len(row['groups'])}",
        ]
        rows.append([row["scorer"], row["section"], row["view"], row["samples"], *figures, *differences])
    header = [
        "score",
        "part",
        "shown",
        "samples",
        "micro",
        "Wilson's",
        "macro",
        "Wilson's",
        "groups",
        f"minus {BLANK}",
        f"minus {TEXT}",
    ]
    return table(header, rows)


def groups_table(rows) -> str:
    """One line a group, one column a view, with Wilson's intervals: groups are small."""
    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        of_view = {row["view"]: row for row in rows if row["section"] == section}
        shown = next(iter(of_view.values()))
        lines = [
            [section, name, shown["samples_of_groups"][name]]
            + [percent_interval(row["wilson"]["groups"][name]) for row in of_view.values()]
            for name in shown["groups"]
        ]
        parts += lines
        header = ["part", "group", "samples", *of_view]
    return table(header, parts)


def failures(result) -> str:
    """How many, and the first of them by name."""
    lines = [f"{len(result['errors'])} answers failed."]
    lines += [f"- {one['id']}, {one['view']}: {one['error']}" for one in result["errors"][:LISTED]]
    for name, refusals in result["refusals"].items():
        lines.append(f"{len(refusals)} answers say nothing that {name} can read.")
        lines += [f"- {one['id']}: {one['answer'][:80]!r}" for one in refusals[:LISTED]]
    return "\n".join(lines)


def write(suite: Suite, result: dict, settings: dict, folder: Path) -> str:
    """`FILES`, each whole or not at all; the text."""
    text = report(suite, result, settings)
    with whole_files(folder) as built:
        write_json(built / FILES[0], {"settings": settings} | result)
        (built / FILES[1]).write_text(text, encoding="utf-8")
    return text


# ---- Two runs --------------------------------------------------------------------------------------------------------


def compare(suite: Suite, samples: list[Sample], one: dict, other: dict, scorers) -> list[dict]:
    """Differences of two runs on the same samples, paired: what the first is worth less what the second is."""
    rows = []
    for scorer in scorers:
        pair = [scores(samples, lines, scorer, IMAGE) for lines in (one, other)]
        for part in parts_of(suite, samples):
            found = [means(values[part.chosen], part.groups, part.images) for values in (*pair, pair[0] - pair[1])]
            rows.append({
                "scorer": scorer.name, "section": part.section, "average": part.average, "samples": len(part.chosen),
                "micro": [each["micro"] for each in found], "macro": [each["macro"] for each in found],
                "wilson_difference": difference_of(*(values[part.chosen] for values in pair), part),
                "only_first_right": int((pair[0] > pair[1])[part.chosen].sum()),
                "only_second_right": int((pair[1] > pair[0])[part.chosen].sum()),
            })  # fmt: skip
    return rows


def difference_of(one, other, part: Part) -> Interval:
    """The micro difference with 95 % from both runs' Wilson's intervals, as if they were independent: too wide, never
    empty."""
    pair = [wilson_means(values, part.groups, part.images)["micro"] for values in (one, other)]
    return Interval(*mean_of_intervals(pair, (1, -1)))


def compare_table(rows, names=("first", "second")) -> str:
    return table(
        [
            "score", "part", "average", "samples", f"micro {names[0]}", f"micro {names[1]}", "micro difference",
            "from Wilson's", "macro difference", "better in first", "better in second",
        ],
        [
            [
                row["scorer"], row["section"], row["average"], row["samples"], *map(percent_interval, row["micro"][:2]),
                percent_interval(row["micro"][2], signed=True), percent_interval(row["wilson_difference"], signed=True),
                percent_interval(row["macro"][2], signed=True),
                row["only_first_right"], row["only_second_right"],
            ]
            for row in rows
        ],
    )  # fmt: skip


def read_settings(folder: Path) -> dict:
    path = folder / "settings.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: this is no run of `uhr-bat evaluate`, there is no settings.json in it.")
    return json.loads(path.read_text(encoding="utf-8"))
