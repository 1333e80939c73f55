"""Both implementations on the same input, measure by measure, against the goals; the last line is JSON.

    uhr-bat bench [--only kmeans,selection] [--repetitions 3] [--quick] [--output benchmarks]

Exit status 1 where the two sides do not agree; a goal that is missed is no failure, it is said in the table.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from ..common.commands import tells_errors
from ..common.files import whole_files, write_json
from ..common.outputs import Output, check_outputs
from .compare import Disagreement, Row, Sizes
from .measures import MEASURES
from .sides import one_thread
from .tables import goals_table, machine, stages_table


def report(result) -> str:
    """Markdown of results.json."""
    note = (
        "Written by `uhr-bat bench --output benchmarks`; the last column is the option that measures a row "
        "alone. What is measured: [README.md](README.md). Ratios: how many times as long, or as much, the "
        "straightforward implementation takes; median (minimum to maximum) of alternating repetitions. "
        f"Machine: {result['machine']}."
    )
    parts = ["# Results", note, goals_table(result["measures"])]
    for row in result["measures"].get("end_to_end", []):
        if "stages" in row["numbers"]:
            parts += ["## The scaled model, stage by stage", stages_table(row["numbers"]["stages"])]
    return "\n\n".join(parts) + "\n"


def write(output, result):
    """results.json and results.md; measures that did not run now keep what they gave before."""
    path = output / "results.json"
    known = json.loads(path.read_text(encoding="utf-8"))["measures"] if path.exists() else {}
    known |= result["measures"]
    result = result | {"measures": {name: known[name] for name in MEASURES if name in known}}
    with whole_files(output) as built:
        write_json(built / path.name, result)
        (built / "results.md").write_text(report(result), encoding="utf-8")


def run(names, sizes) -> tuple[dict, list[str]]:
    """({name: rows as dictionaries}, what did not agree) of the chosen measures."""
    measures, disagreements = {}, []
    for name in tqdm(names, desc="measures"):
        try:
            rows = MEASURES[name](sizes)
        except Disagreement as error:
            disagreements.append(f"{name}: {error}")
            rows = [Row(name, "both sides agree", str(error), False)]
        measures[name] = [vars(row) for row in rows]
    return measures, disagreements


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat bench", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(MEASURES)}")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="alternating ones (default: 3)")
    parser.add_argument("--quick", action="store_true", help="sizes of a test: the figures mean nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write results.md and results.json there")
    args = parser.parse_args(arguments)
    names = args.only.split(",") if args.only else list(MEASURES)
    if unknown := [name for name in names if name not in MEASURES]:
        parser.error(f"unknown measures: {', '.join(unknown)}. Known ones: {', '.join(MEASURES)}.")
    if args.repetitions < 1:
        parser.error(f"--repetitions must be at least 1. Got {args.repetitions}.")
    check_outputs((), Output("--output", args.output, names=("results.md", "results.json")))
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        measures, disagreements = run(names, Sizes(args.quick, args.repetitions, Path(folder)))
    result = {"machine": machine(), "quick": args.quick, "measures": measures, "disagreements": disagreements}
    if args.output:
        write(args.output, result)
    print(report(result))
    for line in disagreements:
        print(f"The two sides do not agree: {line}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
