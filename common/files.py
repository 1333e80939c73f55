"""Files and folders that are written whole or not at all."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path

# What GDAL and QGIS keep beside an image, by the whole of its name: overviews, statistics and a mask of its old pixels.
SIDECARS = (".aux.xml", ".ovr", ".msk")


def user_folder() -> Path:
    """Where what was measured on this machine is kept for its user; it may not exist yet."""
    stated = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is none, the standard says: it would be another folder from each place.
    return Path(stated if os.path.isabs(stated) else os.path.expanduser("~/.cache")) / "uhr_bat"


def stale_sidecars(path: Path) -> list[Path]:
    """What lies beside a file that is there and would be wrong of the one that replaces it."""
    return [beside for ending in SIDECARS if (beside := Path(f"{path}{ending}")).is_file()] if path.exists() else []


@contextmanager
def whole_files(folder: Path):
    """A folder for a `with` block: the files that it leaves there replace those of `folder`, or none does if it fails.

    Weights come last: where they are, all else is. What GDAL kept beside a file that is replaced goes with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as built:
        yield Path(built)
        paths = sorted(Path(built).iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
        for path in paths:
            if (folder / path.name).is_dir():
                raise IsADirectoryError(
                    f"{folder / path.name}: a file of this name is to be written, and this is a folder."
                )
        for path in paths:
            for sidecar in stale_sidecars(folder / path.name):
                sidecar.unlink()
            os.replace(path, folder / path.name)


@contextmanager
def whole_outputs(paths: Iterable[Path]):
    """{path: a path to write in its place} for a `with` block: files of several folders that are replaced at its end, or
    none of them is if it fails."""
    paths = [Path(path) for path in paths]
    with ExitStack() as stack:
        folders = {folder: stack.enter_context(whole_files(folder)) for folder in {path.parent for path in paths}}
        yield {path: folders[path.parent] / path.name for path in paths}


# What SQLite keeps beside a database that a program has open, or writes to.
JOURNALS = ("-wal", "-journal")


def journals(path: Path) -> list[Path]:
    """Those of a database that are there."""
    return [journal for ending in JOURNALS if (journal := Path(f"{path}{ending}")).exists()]


@contextmanager
def edited_alone(path: Path | None):
    """For a `with` block around a file's changed copy and its replacement by it: no other run of ours edits a file of that
    folder meanwhile, and later ones wait. None says nothing.

    Yields:
        A function to call before the file is replaced, which raises `OSError` where another program has changed it.
    """
    if path is None:
        yield lambda: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = _state_of(path)

        def check():
            if _state_of(path) != before:
                raise OSError(
                    f"{path}: another program has changed it since it was read. Nothing is written: ask again."
                )

        yield check
    finally:
        os.close(folder)


def _state_of(path):
    stats = [file.stat() for file in (path, *journals(path)) if file.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


@contextmanager
def whole_folder(folder: Path):
    """A folder for a `with` block, which becomes `folder`, new or empty so far, when the block ends well.

    Until then its name ends in ".incomplete". A run that is killed leaves that behind, and the next run removes it.
    """
    building = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        for path in building.iterdir():
            path.chmod(0o644)  # safetensors makes files for their owner alone
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def report_files(name: str) -> tuple[str, ...]:
    """What `write_report` writes."""
    return f"{name}.json", f"{name}.md", f"{name}.png"


def write_report(folder: Path, name: str, result, text: str, plot):
    """A measurement as name.json, name.md and name.png, which `plot(path)` draws; all whole or none is there."""
    with whole_files(folder) as built:
        write_json(built / f"{name}.json", result)
        (built / f"{name}.md").write_text(text, encoding="utf-8")
        plot(built / f"{name}.png")


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
