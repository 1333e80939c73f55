"""Tables of what was measured, and the machine that it was measured on."""

import os
import platform

import PIL
import torch
import transformers

from ..common.tables import table
from .compare import show_ratio

MARKS = {True: "met", False: "**missed**", None: "-"}


def goals_table(measures) -> str:
    """Every row of every measure; {name: [row]}."""
    cells = [
        [row["measure"], row["goal"], row["result"], MARKS[row["met"]], f"`--only {name}`"]
        for name, rows in measures.items()
        for row in rows
    ]
    return table(["Measure", "Goal", "Result", "", "Command"], cells)


def stages_table(stages) -> str:
    """Seconds of every stage of a question, medians, and the ratio."""
    cells = [
        [
            stage,
            f"{taken['ours']:.2f}",
            f"{taken['straightforward']:.2f}",
            show_ratio(taken["ratio"]),
        ]
        for stage, taken in stages.items()
    ]
    return table(["Stage", "ours (s)", "straightforward (s)", "ratio (min to max)"], cells)


def machine() -> str:
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread per process, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, Pillow "
        f"{PIL.__version__}"
    )
