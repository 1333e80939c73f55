"""Compare two runs of one benchmark, sample by sample.

    uhr-bat compare RUN_A RUN_B [--scorers NAME ...]

Differences are paired: what the first run's answer to a sample is worth less what the second's is, with 95 % of a
bootstrap over images.
"""

import argparse
import sys
from pathlib import Path

from ..common.commands import tells_errors
from . import figures
from .evaluate import scorers_of
from .running import IMAGE, read_predictions
from .suites import SUITES


def compare(folders, names=None) -> str:
    """Markdown.

    Raises:
        FileNotFoundError: a folder that holds no run.
        ValueError: runs of two suites, or on other samples.
    """
    settings = [figures.read_settings(folder) for folder in folders]
    suites = [one["suite"] for one in settings]
    if suites[0] != suites[1]:
        raise ValueError(
            f"{folders[0]} is a run of {suites[0]}, {folders[1]} one of {suites[1]}: they cannot be paired."
        )
    suite = SUITES[suites[0]]
    samples = suite.load(settings[0]["data"], settings[0]["limit"])
    runs = [read_predictions(folder) for folder in folders]
    both = [sample for sample in samples if all((sample.id, IMAGE) in lines for lines in runs)]
    if len(both) < len(samples):
        raise ValueError(
            f"Both runs answer {len(both)} of {len(samples)} samples: finish them with the same --limit first."
        )
    rows = figures.compare(suite, both, *runs, scorers_of(suite, names))
    what = "\n".join(
        f"- {folder}: {one['model']}, budgets {one['budgets']}, {one['selector']}, {one['prompt']}"
        for folder, one in zip(folders, settings)
    )
    return f"# {suite.title}: two runs\n\n{what}\n\n{figures.compare_table(rows, [str(one) for one in folders])}\n"


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat compare", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="output folder of `uhr-bat evaluate`")
    parser.add_argument("--scorers", nargs="+", metavar="NAME", help="some of the suite's scores (default: all)")
    args = parser.parse_args(arguments)
    print(compare(args.runs, args.scorers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
