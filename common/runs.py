"""Runs that go on where they were stopped: a file of lines, one for each thing that is done, and settings that are the same
for the whole run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class Line:
    """A file to which lines are appended whole; what a killed process left of a line is ended first.

    `settings`: of a run, which are the first line of its file.
    """

    def __init__(self, path: Path, settings: dict | None = None):
        torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        is_new = settings is not None and next(_lines(path), None) is None
        self.file = open(path, "a", encoding="utf-8")
        if torn:
            self.file.write("\n")
        if is_new:
            self.write(settings)

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
        except (json.JSONDecodeError, RecursionError):
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{path}: {line[:80]!r} is no line of a run.")
        yield record


def _lines(path) -> Iterator[dict]:
    yield from whole_lines(path) if path.is_file() else ()


def lines_of_run(path: Path, settings: dict) -> list[dict]:
    """The records that a run with these settings left in a file of [`Line`], without its first one; [] where there is none yet.

    Raises:
        ValueError: it had other settings.
    """
    kept, *records = list(_lines(path)) or [None]
    if kept is not None:
        check_same_settings(path, kept.get("settings", kept), settings)
    return records


def check_same_settings(place: Path, old: dict, new: dict, mend: str = "Give another --output"):
    """Raises `ValueError` where a run at `place` had other settings, and names the first one that differs; one that only either
    run has is None of the other."""
    if not isinstance(old, dict):
        raise ValueError(f"{place}: its settings are no record of settings. {mend}.")
    new = json.loads(json.dumps(new))
    for name in new | old:
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{place} holds a run with {name} {old.get(name)!r}, but {new.get(name)!r} is asked for. {mend}, or ask for the "
                "same."
            )
