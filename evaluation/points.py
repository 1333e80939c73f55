"""What answers point to, what they refuse as not there, and how sure a model with a pointer is of them.

    uhr-bat evidence points [--model MODEL] [--scenes 60] [--native] [--validation] [--output DIR]

Questions about made-up scenes that nothing was trained on, those of `uhr-bat evidence` (with `--native` those of `uhr-bat evidence
native`) and two about what a scene has not, each answered from all tokens of the fixed scales and from 4, 2 and 1 % of them. A
point is a visual token that an answer names. It is right if the middle of an object that the question asks about lies at most one
token, of its own level, beside it; points and objects are paired one to one. As many validation scenes are asked, on which the
threshold is chosen below which an answer is refused; with `--validation` these alone. Writes points.json, points.md and points.png.

Letters: P points, O objects that are asked about.
"""

import sys
from collections import defaultdict
from functools import partial

import numpy as np
import torch

from ..common import asking
from ..common.commands import tells_errors
from ..common.loading import is_host, load_config
from ..common.models import base_of, model_option
from ..common.tables import interval, percent, percent_interval, table
from ..geometry_uhr_bat import letterbox
from ..scenes.layout import TEST_SEEDS, VALIDATION_SEEDS
from ..scenes.questions import ABSENT, KINDS, make_absent_question
from .evidence import SIZES, check_scenes, samples_of, scenes_parser
from .native import TILES, zoomed_row
from .native import SUITE as NATIVE
from .reports import finish, labels, report, summarise
from .rows import ALL_TOKENS, FULL, REFINED, Views, about_of, ask_rows, choose, keeps, row_of
from .samples import Picture, Sample
from .suites import SUITES

FRACTIONS, ABSENT_QUESTIONS = (0.04, 0.02, 0.01), 2  # of a scene
REACH = 1.5  # sides of a token from its middle: one beside its edge
BINS, MOST_REFUSED = 10, 0.02
TEMPERATURES = (1.0, *np.geomspace(0.25, 8, 61).round(3).tolist())
SAYS = """{questions} questions about {scenes} {seeds} scenes that nothing was trained on, and {absent} about what a scene has not. \
Made by `{command}`. Percent, with 95 % intervals of a bootstrap over scenes; differences are paired by question. Kept: every \
object that the question needs has a token of its own, unmerged, at one of the two finest scales or levels."""
SAYS_POINTS = """A point is right if the middle of an object that the question asks about lies at most one token, of its own level, \
beside it, one point for each object; inside: in the token itself. Questions for a quadrant, those that "no" answers, and those \
about what is not there want no point. Twice: objects with another point in reach. The number said: how many counts say the \
number of their points."""
SAYS_SURE = """Of all questions, the absent ones too, whose right answer is "none". Calibration error: expected, of ten bins; and with \
the temperature that makes it least on these answers. AURC: area under the curve of risk against coverage. Refused: "none" is \
said. Unsure: the answer is less sure than a threshold of each row, with which at most {most:g} % of the answerable questions of \
{chosen} validation scenes{same}, are refused or unsure."""


def samples_with_absent(suite: str, seeds) -> list[Sample]:
    """The questions of a suite about scenes, and two about what each has not."""
    found = []
    for seed in seeds:
        scene, rng = SUITES[suite].lay_out(seed), np.random.default_rng([seed, 16])
        found += samples_of(suite, [seed])
        for number in range(ABSENT_QUESTIONS):
            question, picture = make_absent_question(scene, rng=rng), (Picture(str(seed), seed),)
            found.append(Sample(f"{seed}/absent {number}", picture, question.text, ABSENT, task=question.kind))
    return found


# ---- Points ----------------------------------------------------------------------------------------------------------


def match_points(centres, sides, middles) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Points and objects, one to one, as many as can be.

    Args:
        centres, sides: float[P, 2] and float[P], of the tokens, in any unit.
        middles: float[O, 2], of the objects, likewise.

    Returns:
        (bool[P] points that are right, bool[P] those whose token holds the middle, bool[O] objects that are found, number of
        objects that have another point in reach).
    """
    from scipy.optimize import linear_sum_assignment

    centres, middles = (np.reshape(one, (-1, 2)) for one in (centres, middles))
    apart = np.abs(centres[:, None] - middles).max(-1) / np.reshape(sides, (-1, 1))
    near = apart <= REACH * (1 + 1e-6)
    # One pair more is worth more than any distance.
    rows, columns = linear_sum_assignment(np.where(near, 1000 - apart, 0), maximize=True)
    paired = np.zeros_like(near)
    paired[rows, columns] = near[rows, columns]
    right = paired.any(1)
    twice = {int(apart[idx].argmin()) for idx in np.flatnonzero(near.any(1) & ~right)}
    return right, (paired & (apart <= 0.5 * (1 + 1e-6))).any(1), paired.any(0), len(twice)


def judge_points(pointed, grids, boxes, image_size) -> dict:
    """Of an answer "points", "inside" and "found", lists of bool, and "twice", see `match_points`.

    Args:
        pointed: (label, level, position on its grid, probability) of every point.
        grids: (height, width) in tokens of every level, over the letterboxed square.
        boxes: of the objects that are asked about.
        image_size: (height, width).
    """
    side, top, left = letterbox(image_size)
    middles = [((y0 + y1) / 2 + top, (x0 + x1) / 2 + left) for x0, y0, x1, y1 in boxes]
    sides = np.array([side / grids[level][0] for _, level, _, _ in pointed])
    cells = np.array([divmod(position, grids[level][1]) for _, level, position, _ in pointed], float).reshape(-1, 2)
    found = match_points((cells + 0.5) * sides[:, None], sides, middles)
    return dict(zip(("points", "inside", "found"), (one.tolist() for one in found[:3]))) | {"twice": found[3]}


@torch.no_grad()
def point_records(pair, suite, prompt, rows, group, **_) -> list[dict]:
    """One record a sample and row, for `ask_rows`: those of `records_of`, with points and confidences."""
    processor, model = pair
    image = processor.image_processor.process_image(suite.open(group[0].pictures[0]))
    views, size, records = Views(pair, image), (image.height, image.width), []
    for sample in group:
        about, boxes = about_of(sample, size, model.config.scales)
        wanted = [] if sample.answer == "no" else boxes
        for row in rows:
            seen = views.seen(row.view)
            inputs, kept = choose(views, row, suite.prompts[prompt](sample))
            expanded = model.expand_placeholders(*(inputs[name] for name in asking.PROMPT), kept)
            inputs = dict(zip(asking.PROMPT, expanded))
            ids, (logits,) = asking.generate_logits(model, inputs, kept, max_new_tokens=suite.max_new_tokens)
            (said,), (pointed,) = asking.answer_texts(processor, ids), model.point(ids, kept)
            record = {"row": row.name, "x": row.x, "line": row.line, **about, "seconds": {}, "answer": said}
            record |= {"tokens": len(kept.pooler_output[0]), "right": suite.scorers[0].score(sample, said)}
            record |= {"kept": keeps(kept.slots[0], views.evidence(seen, boxes))}
            record |= judge_points(pointed, kept.slots[0].grids, wanted, size)
            sure = [asking.confidence_of(asking.logprobs_of(logits, ids[0], by)) for by in TEMPERATURES]
            records.append(record | {"sure": sure, "refused": said.strip(" .").lower() == ABSENT})
    return records


# ---- Figures ---------------------------------------------------------------------------------------------------------


def calibration_error(sure, right) -> float:
    """Expected calibration error, 0 to 1, of float[N] confidences."""
    bins = np.minimum((np.asarray(sure) * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, np.subtract(right, sure), BINS)).sum() / len(sure))


def risks(sure, right) -> np.ndarray:
    """float[N]: share of wrong answers among the 1, 2, ... N surest."""
    wrong = 1 - np.asarray(right, float)[np.argsort(-np.asarray(sure), kind="stable")]
    return wrong.cumsum() / np.arange(1, len(wrong) + 1)


def choose_threshold(records) -> float:
    """The largest confidence below which answers are refused, so that at most 2 % of the answerable questions are, those that are
    refused by a word included; 0 where these are more already."""
    answerable = [record for record in records if record["task"] != "absent"]
    left = sorted(record["sure"][0] for record in answerable if not record["refused"])
    spare = int(MOST_REFUSED * len(answerable)) - (len(answerable) - len(left))
    return left[spare] if 0 <= spare < len(left) else 0.0


def figures_of(records, threshold: float) -> dict:
    """What one row's records say of points, refusals and confidences; shares are (mean, low, high), those by kind of question a
    mean, None of nothing."""
    rng = np.random.default_rng(0)

    def share(values, of=records):
        pairs = [(value, record["image"]) for record in of for value in values(record)]
        return interval(*zip(*pairs), rng) if pairs else None

    absent, rest = ([one for one in records if (one["task"] == "absent") == is_so] for is_so in (True, False))
    counts = [one for one in records if one["task"] == "count"]
    found = {"precision": share(lambda one: one["points"]), "recall": share(lambda one: one["found"])}
    found |= {"inside": share(lambda one: one["inside"]), "twice": sum(one["twice"] for one in records)}
    found["number_said"] = share(lambda one: [one["answer"] == str(len(one["points"]))], counts)
    found["by_kind"] = {}  # precision and recall
    for kind in (*KINDS, "absent"):
        values = (
            [value for one in records if one["task"] == kind for value in one[name]] for name in ("points", "found")
        )
        found["by_kind"][kind] = [float(np.mean(of)) if of else None for of in values]
    for name, of in (("absent", absent), ("answerable", rest)):
        found[f"{name}_refused"] = share(lambda one: [one["refused"]], of)
        found[f"{name}_refused_or_unsure"] = share(lambda one: [one["refused"] or one["sure"][0] < threshold], of)
    right, sure = [one["right"] for one in records], np.array([one["sure"] for one in records]).T
    errors = [calibration_error(of, right) for of in sure]
    best = int(np.argmin(errors))
    found |= {"calibration_error": errors[0], "temperature": TEMPERATURES[best], "least_error": errors[best]}
    risk = risks(sure[0], right)
    steps = np.unique(np.linspace(0, len(risk) - 1, 51).round().astype(int))
    found["risk"] = [((step + 1) / len(risk), float(risk[step])) for step in steps]
    return found | {"aurc": float(risk.mean()), "threshold": threshold, "absent": len(absent)}


def points_tables(rows) -> list[str]:
    head, names = labels(rows)

    def cell(one):
        return percent_interval(one) if one else "-"

    shares, found, by_kind, sure = ("precision", "inside", "recall", "number_said"), [], [], []
    refused = ("absent_refused", "answerable_refused", "absent_refused_or_unsure", "answerable_refused_or_unsure")
    for row in rows:
        own = row["points"]
        found.append([*(cell(own[name]) for name in shares), own["twice"]])
        kinds = own["by_kind"].values()
        by_kind.append([" / ".join("-" if one is None else percent(one) for one in of) for of in kinds])
        errors = [percent(own["calibration_error"]), f"{percent(own['least_error'])} at {own['temperature']:g}"]
        sure.append([*errors, percent(own["aurc"]), *(cell(own[name]) for name in refused), f"{own['threshold']:.3f}"])
    refusals = [name.replace("_", ": ", 1).replace("_", " ") for name in refused]
    heads = (*shares[:3], "the number said", "twice"), (*KINDS, "absent")
    heads = *heads, ("calibration error", "least", "AURC", *refusals, "threshold")
    return [
        table([*head, *of], [[*name, *own] for name, own in zip(names, cells)])
        for of, cells in zip(heads, (found, by_kind, sure))
    ]


def plot(rows):
    """Risk against coverage, a line for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(*(100 * np.array(row["points"]["risk"])).T, label=f"{row['name']}, {row['x']:g} % of the tokens")
    axes.set(xlabel="answers kept, the surest first, %", ylabel="wrong answers among them, %", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


# ---- The command -----------------------------------------------------------------------------------------------------


def check_pointer(folder, changes):
    """Raises `ValueError` for a model that points to nothing."""
    if is_host(base_of(folder) or folder) or load_config(folder, **changes).pointer is None:
        raise ValueError(
            f"{folder} has no pointer: its answers name no visual tokens. `uhr-bat tiny point` trains one."
        )


def measure(folder, suite: str, seeds, chosen_on, workers=1, changes=None) -> dict:
    """{"rows", "errors"} of scenes of some seeds; thresholds are chosen on those of others, or the same."""
    if suite == NATIVE:
        rows, groups = [zoomed_row(fraction, TILES) for fraction in FRACTIONS], None
    else:
        rows, groups = [ALL_TOKENS, *(row_of(REFINED, fraction) for fraction in FRACTIONS)], SIZES
    samples = samples_with_absent(suite, dict.fromkeys((*seeds, *chosen_on)))
    jobs = {suite: (samples, rows)}
    ((records, errors),) = ask_rows(folder, jobs, workers, changes=changes, record=point_records).values()
    by_row, before = defaultdict(list), defaultdict(list)
    for record in records:
        key = record["row"], record["x"]
        for found, of in ((by_row, seeds), (before, chosen_on)):
            if int(record["image"]) in of:
                found[key].append(record)
    answerable = [record for of_row in by_row.values() for record in of_row if record["task"] != "absent"]
    found = summarise(answerable, {FULL: ALL_TOKENS.x}, groups)
    for row in found:
        key = row["name"], row["x"]
        row["points"] = figures_of(by_row[key], choose_threshold(before[key]))
    return {"rows": found, "errors": errors}


@tells_errors
def main(arguments=None) -> int:
    parser = scenes_parser("uhr-bat evidence points", __doc__.splitlines()[0], "points_out")
    parser.add_argument("--native", action="store_true", help=f"objects of a few native pixels, at {TILES} tiles")
    parser.add_argument("--validation", action="store_true", help="validation scenes instead of test scenes")
    args = parser.parse_args(arguments)
    check_scenes(args, "points")
    check_pointer(args.model, args.set)
    chosen_on = VALIDATION_SEEDS[: args.scenes]
    seeds = chosen_on if args.validation else TEST_SEEDS[: args.scenes]
    result = measure(args.model, NATIVE if args.native else "scenes", seeds, chosen_on, args.workers, args.set)
    command = f"uhr-bat evidence points{model_option(args.model, args.set)} --scenes {args.scenes}"
    about = {"command": command + " --native" * args.native + " --validation" * args.validation, "scenes": args.scenes}
    about |= {"seeds": "validation" if args.validation else "test", "questions": result["rows"][0]["questions"]}
    about |= {"absent": result["rows"][0]["points"]["absent"], "title": "What answers point to, and what they refuse"}
    about["groups"] = "the smallest object that a question needs, side of a square of its area at the finest scale"
    about["says"] = SAYS.format(**about)
    says_sure = SAYS_SURE.format(most=100 * MOST_REFUSED, chosen=args.scenes, same=", these" * args.validation)
    points, by_kind, sure = points_tables(result["rows"])
    more = ["## Points", SAYS_POINTS, points, "Precision / recall by kind of question:", by_kind]
    more += ["## Sure or refused", says_sure, sure]
    result = {"about": about, **result, "more": more}
    finish(args.output, "points", result, report(result), plot(result["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
