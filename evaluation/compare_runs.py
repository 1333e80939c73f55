"""Compare two runs of one benchmark, sample by sample.

    uhr-bat compare RUN_A RUN_B [--scorers NAME ...]
    uhr-bat compare RUN_A FILE                              with another program's answers
    uhr-bat compare FILE_A FILE_B --suite NAME --data DIR   with those of two

Differences are paired: what the first run's answer to a sample is worth less what the second's is, with 95 % of a
bootstrap over images. Pairs are answers to equal questions about equal pictures, others are refused.
"""

import argparse
import math
import sys
from pathlib import Path

from ..common.commands import check_range, tells_errors
from ..common.models import model_in_words, stay_offline
from . import figures
from .asked import check_asked
from .evaluate import check_answered, scorers_of
from .other_answers import other_answers
from .running import IMAGE, read_predictions
from .suites import SUITES


def compare(runs, names=None, suite=None, data=None, limit=None) -> str:
    """Markdown.

    Args:
        runs: two folders of runs, or files of another program's answers.
        names: of scores; all where none is named.
        suite, data, limit: what files answer where no run says it.

    Raises:
        FileNotFoundError: a folder that holds no run.
        ValueError: runs of two suites, or on other samples.
    """
    settings = [None if Path(run).is_file() else figures.read_settings(Path(run)) for run in runs]
    told = [one for one in settings if one is not None]
    if len(told) == 2 and told[0]["suite"] != told[1]["suite"]:
        raise ValueError(
            f"{runs[0]} is a run of {told[0]['suite']}, {runs[1]} one of {told[1]['suite']}: they cannot be paired."
        )
    if told:
        suite, data, limit = (told[0][name] for name in ("suite", "data", "limit"))
    elif suite is None:
        raise ValueError("Two files do not say which benchmark they answer: give --suite and --data.")
    suite = SUITES[suite]
    samples = suite.load(data, limit)
    every = samples if limit is None or told == settings else suite.load(data)
    both = [
        other_answers(run, samples, every) if one is None else read_predictions(Path(run))
        for run, one in zip(runs, settings)
    ]
    check_pairs(runs, settings, samples, both)
    rows = figures.compare(suite, samples, *both, scorers_of(suite, names))
    what = "\n".join(
        f"- {run}: answers of another program" if one is None else
        f"- {run}: {model_in_words(one)}, budgets {one['budgets']}, {one['selector']}, {one['prompt']}"
        for run, one in zip(runs, settings)
    )  # fmt: skip
    return f"# {suite.title}: two runs\n\n{what}\n\n{figures.compare_table(rows, [str(one) for one in runs])}\n"


def check_pairs(runs, settings, samples, both):
    """Raises `ValueError` where the runs do not answer the same questions about the same pictures."""
    here = {sample.id for sample in samples}
    for run, one, lines in zip(runs, settings, both):
        answered = {name for name, view in lines if view == IMAGE}
        if answered != here:
            raise ValueError(
                f"The runs are on other samples: {run} answers {len(answered & here)} of {len(here)} samples of the data, and "
                f"{len(answered - here)} others. Finish both with the same --data and --limit first."
            )
        if one is not None:
            check_asked(
                run, samples, lines, pictures=False, mend="The runs are on other samples: they cannot be paired."
            )
        check_answered(lines, run)
    if None in settings:
        return
    for name in here:
        pair = [lines[name, IMAGE] for lines in both]
        if all(line["error"] is None for line in pair) and pair[0]["asked"] != pair[1]["asked"]:
            raise ValueError(f"The runs are on other samples: their answers to {name!r} are about different pictures.")


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat compare", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs=2, metavar="RUN",
        help="output folder of `uhr-bat evaluate`, or a file of another program's answers",
    )  # fmt: skip
    parser.add_argument("--scorers", nargs="+", metavar="NAME", help="some of the suite's scores (default: all)")
    parser.add_argument("--suite", choices=SUITES, metavar="SUITE", help="that two files answer")
    parser.add_argument("--data", metavar="DIR", help="that two files answer")
    parser.add_argument("--limit", type=int, metavar="N", help="samples of it, evenly spaced (default: all)")
    args = parser.parse_args(arguments)
    check_range(args, 1, math.inf, "limit")
    if args.data is not None:
        stay_offline(args.data)
    print(compare(args.runs, args.scorers, args.suite, args.data, args.limit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
