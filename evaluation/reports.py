"""What rows that were asked the same questions are worth: their figures, as tables in Markdown, JSON and a plot.

Intervals are 95 % of a bootstrap over images; differences are paired by question.
"""

from collections import defaultdict
from functools import partial

import numpy as np

from ..common.files import report_files, write_report
from ..common.tables import interval, percent, percent_interval, table
from .suites import SUITES

# ---- Figures ---------------------------------------------------------------------------------------------------------


def in_bins(field: str, bins: dict) -> dict:
    """{label: record -> whether its `field` lies in the bin}, for `summarise`."""

    def belongs(low, high, record):
        return record[field] is not None and low <= record[field] < high

    return {label: partial(belongs, *bounds) for label, bounds in bins.items()}


def summarise(records, baselines=None, groups=None) -> list[dict]:
    """What the records of every row say.

    Args:
        baselines: {name: x} of rows with which the others are compared; x None: that of the other row; or a function of that.
        groups: {name: record -> whether it belongs to it}: parts of the records with figures of their own.

    Returns:
        Of each row its name, x, line, mean tokens and seconds, FLOPs of a first question where they were counted, evidence kept, the share of right answers by task and by
        section, and over all records and in each group: questions, accuracy, differences from the baselines, how many
        answers the last baseline has right ("held"), and how many of those are wrong here ("lost").
    """
    by_row, rng, found = defaultdict(list), np.random.default_rng(0), []
    for record in records:
        by_row[record["row"], record["x"]].append(record)
    for (name, x), asked in by_row.items():
        place = {
            other: x if own is None else own(x) if callable(own) else own for other, own in (baselines or {}).items()
        }
        at = {other: by_row.get((other, own)) for other, own in place.items()}
        evident = [record for record in asked if record["kept"] is not None]
        row = {"name": name, "x": x, "line": asked[0]["line"]}
        row |= {"tokens": float(np.mean([record["tokens"] for record in asked])), **_figures(asked, at, rng)}
        row["kept"] = interval([one["kept"] for one in evident], images_of(evident), rng) if evident else None
        row["groups"] = {}
        for label, belongs in (groups or {}).items():
            inside = [number for number, record in enumerate(asked) if belongs(record)]
            if inside:
                parts = {other: of and [of[number] for number in inside] for other, of in at.items()}
                row["groups"][label] = _figures([asked[number] for number in inside], parts, rng)
        for field in ("task", "section"):
            right = defaultdict(list)
            for record in asked:
                right[record[field]].append(record["right"])
            row[f"by_{field}"] = {value: float(np.mean(of)) for value, of in right.items() if value}
        counted = [record["flops"] for record in asked if "flops" in record]
        row |= {"first_question_flops": counted[0]} if counted else {}
        stages = asked[0]["seconds"]
        row["seconds"] = {stage: float(np.mean([record["seconds"][stage] for record in asked])) for stage in stages}
        found.append(row)
    return found


def images_of(records) -> list:
    return [record["image"] for record in records]


def _figures(asked, baselines, rng) -> dict:
    """Records of every row stand in the order of the questions."""
    right = np.array([record["right"] for record in asked], float)
    figures = {"questions": len(asked), "accuracy": interval(right, images_of(asked), rng), "differences": {}}
    for name, others in baselines.items():
        if others and others[0]["row"] != asked[0]["row"]:
            before = np.array([record["right"] for record in others], float)
            figures["differences"][name] = interval(right - before, images_of(asked), rng)
            figures |= {"held": int(before.sum()), "lost": int((before > right).sum())}
    return figures


# ---- Tables ----------------------------------------------------------------------------------------------------------


def labels(rows) -> tuple[list[str], list[list[str]]]:
    """Heads and cells that name rows: an ablation's by their names, others by percent of the tokens too."""
    if "flops" in rows[0]:
        return ["row"], [[row["name"]] for row in rows]
    return ["tokens", "method"], [[f"{row['x']:g} %", row["name"]] for row in rows]


def difference(part, name) -> str:
    return percent_interval(part["differences"][name], signed=True) if name in part["differences"] else ""


def figures_table(rows) -> str:
    head, names = labels(rows)
    baselines = max((list(row["differences"]) for row in rows), key=len)
    sections, columns = list(rows[0]["by_section"]), {"mean number": lambda row: f"{row['tokens']:.0f}"}
    if any({"flops", "first_question_flops"} & set(row) for row in rows):
        columns["GFLOPs"] = lambda row: f"{row.get('flops', row.get('first_question_flops', np.nan)) / 1e9:.3g}"
    columns["accuracy"] = lambda row: percent_interval(row["accuracy"])
    if any(row["kept"] for row in rows):
        columns["kept"] = lambda row: percent_interval(row["kept"]) if row["kept"] else ""
    columns |= {f"minus {name}": partial(lambda name, row: difference(row, name), name) for name in baselines}
    columns |= {name: partial(lambda name, row: percent(row["by_section"][name]), name) for name in sections}
    if "flops" in rows[0]:
        columns |= {
            f"{stage} (s)": partial(lambda at, row: f"{row['seconds'][at]:.3f}", stage) for stage in rows[0]["seconds"]
        }
    return table(
        [*head, *columns], [[*name, *(cell(row) for cell in columns.values())] for name, row in zip(names, rows)]
    )


def groups_table(rows, cell) -> str:
    """A column a group, with its number of questions."""
    groups = dict(item for row in rows[::-1] for item in row["groups"].items())
    groups = {name: groups[name] for name in rows[0]["groups"]}
    head, names = labels(rows)
    heads = [*head, *(f"{name} ({part['questions']})" for name, part in groups.items())]
    cells = [[cell(row["groups"][name]) for name in groups] for row in rows]
    return table(heads, [[*name, *own] for name, own in zip(names, cells)])


def report(result) -> str:
    """Markdown of "about" (title, says, and of groups what they are), "rows" and "errors", and where they are there "harder"
    {suite: rows} and "more" texts."""
    about, rows = result["about"], result["rows"]
    head, names = labels(rows)
    parts = [f"# {about['title']}", about["says"], figures_table(rows)]
    tasks = list(rows[0]["by_task"])
    if len(tasks) > 1:
        cells = [[*name, *(percent(row["by_task"][task]) for task in tasks)] for name, row in zip(names, rows)]
        parts += ["## By kind of question", table([*head, *tasks], cells)]
    if rows[0]["groups"]:
        compared = [row for row in rows if row["differences"]]
        last = list(max((row["differences"] for row in compared), key=len))[-1]
        parts += [f"## By size: {about['groups']}", "Accuracy (number of questions):"]
        parts.append(groups_table(rows, lambda part: percent_interval(part["accuracy"])))
        parts += [f"Minus {last}:", groups_table(compared, lambda part: difference(part, last))]
        parts.append(f"Wrong answers, of those that are right by {last}:")
        parts.append(groups_table(compared, lambda part: f"{part['lost']} of {part['held']}"))
    for name, hard in result.get("harder", {}).items():
        parts += [f"## {SUITES[name].title}", figures_table(hard)]
    parts += [*result.get("more", []), list_errors(result["errors"])]
    return "\n\n".join(parts) + "\n"


def list_errors(errors: list[dict], what="images failed") -> str:
    """How many images failed, and which."""
    return f"{len(errors)} {what}." + "".join(f"\n- {one['image']}: {one['error']}" for one in errors)


# ---- Plots -----------------------------------------------------------------------------------------------------------


def draw_lines(axes, lines: dict[str, list[tuple]], dashed=(), log=False):
    """Lines {label: [(x, (mean, low, high)), ...]} in percent, each with its intervals; x from 0.5 to 8 wants a logarithm."""
    from matplotlib import colormaps

    for number, (label, points) in enumerate(lines.items()):
        x = [one for one, _ in sorted(points)]
        mean, low, high = 100 * np.array([of for _, of in sorted(points)]).T
        style = {"marker": "x", "linestyle": "--"} if label in dashed else {"marker": "o"}
        style["color"] = colormaps["tab20"].colors[number % 20]
        # Intervals and means are rounded apart.
        axes.errorbar(x, mean, np.maximum((mean - low, high - mean), 0), label=label or None, capsize=2, **style)
    if log:
        axes.set(xscale="log", ylim=(0, 100))
        axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
        axes.get_xaxis().set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.grid(alpha=0.3)


def plot(result, fields=("accuracy",), dashed=(), log=False):
    """A figure: what the rows of each line are worth over x; rows without a line go across it, where others have one."""
    from matplotlib.figure import Figure

    rows, fields = result["rows"], {field: title for field, title in TITLES.items() if field in fields}
    figure = Figure(figsize=(7 * len(fields) + 1, 5.5), layout="constrained")
    for axes, (field, title) in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields.items()):
        lines, named = defaultdict(list), any(row["line"] for row in rows)
        for row in rows:
            if row["line"] or not named:
                lines[row["line"]].append((row["x"], row[field]))
            elif field == "accuracy":
                axes.axhline(100 * row[field][0], color="black", linestyle="-" if row["x"] else ":", label=row["name"])
        draw_lines(axes, lines, dashed, log)
        axes.set(xlabel=result["about"]["axis"], ylabel="%", title=title)
        if field == "accuracy" and named:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


TITLES = {"accuracy": "Questions answered right", "kept": "Evidence kept"}


def finish(folder, name: str, result, text: str, figure):
    """The three files, each whole or not at all, and what a command says of them."""
    write_report(folder, name, result, text, partial(figure.savefig, dpi=110))
    print(text)
    print(f"Written: {', '.join(f'{folder}/{one}' for one in report_files(name))}")
