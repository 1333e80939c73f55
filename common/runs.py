"""Runs that go on where they were stopped: a file of lines, one for each thing that is done, and settings that are the same
for the whole run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class Line:
    """A file to which lines are appended whole; what a killed process left of a line is ended first."""

    def __init__(self, path: Path):
        torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self.file = open(path, "a", encoding="utf-8")
        if torn:
            self.file.write("\n")

    def write(self, record: dict):
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()


@contextmanager
def alone(lines: Path):
    """Nobody else writes these lines meanwhile: their folder is made, and a second run is refused. A killed run's lock is free.

    Raises:
        ValueError: a run that goes on writes them.
    """
    lines.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lines.with_name(f"{lines.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{lines}: another run is writing it. Wait for that run, or give another --output.") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def whole_lines(path: Path) -> Iterator[dict]:
    """The records of a file that `Line` wrote; one that was torn by a killed process is left out, wherever that was."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{path}: {line[:80]!r} is no line of a run.")
        yield record


def check_same_settings(place: Path, old: dict, new: dict):
    """Raises `ValueError` where a run at `place` had other settings, and names the first one that differs."""
    if not isinstance(old, dict):
        raise ValueError(f"{place}: its settings are no record of settings. Give another --output.")
    for name, value in json.loads(json.dumps(new)).items():
        if old.get(name) != value:
            raise ValueError(
                f"{place} holds a run with {name} {old.get(name)!r}, but {value!r} is asked for. Give another --output."
            )
