"""Files and folders that are written whole or not at all."""

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# What GDAL and QGIS keep beside an image, by the whole of its name: overviews, statistics and a mask of its old pixels.
SIDECARS = (".aux.xml", ".ovr", ".msk")
# Beginning of the hidden folders in which files are written.
BUILDS = ".build-uhr_bat-"
# So many times as long as a folder is looked through, it is not looked through again.
LEAST_WAIT = 20
_next_look = {}  # folder -> seconds of the clock


def user_folder() -> Path:
    """Where what was measured on this machine is kept for its user; it may not exist yet."""
    stated = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is none, the standard says: it would be another folder from each place.
    return Path(stated if os.path.isabs(stated) else os.path.expanduser("~/.cache")) / "uhr_bat"


def stale_sidecars(path: Path) -> list[Path]:
    """What lies beside a file that is there and would be wrong of the one that replaces it."""
    return [beside for ending in SIDECARS if (beside := Path(f"{path}{ending}")).is_file()] if path.exists() else []


@contextmanager
def _held(folder: Path, waits: bool = False):
    """For a `with` block: whether a folder is there and is this run's alone, which ends with the run, however that does; no where
    the file system has no locks. Raises `BlockingIOError` where a living run holds it and nobody `waits` for that."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            is_held = os.path.samestat(os.fstat(held), os.stat(folder))  # it may have been removed or renamed meanwhile
        except BlockingIOError:
            raise
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(held)


def _clear(folder):
    """Removes what killed runs left in a folder. One of very many files is not looked through for each that is written."""
    start = time.monotonic()
    if start < _next_look.get(folder, 0):
        return
    for left in folder.glob(f"{BUILDS}*"):
        with suppress(BlockingIOError), _held(left) as is_held:
            if is_held:
                shutil.rmtree(left, ignore_errors=True)
    _next_look[folder] = start + LEAST_WAIT * (time.monotonic() - start)


@contextmanager
def whole_files(folder: Path):
    """A folder for a `with` block: the files that it leaves there replace those of `folder`, or none does if it fails.

    Weights come last: where they are, all else is. What GDAL kept beside a file that is replaced goes with it. So does what
    killed runs left in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    with ExitStack() as stack:
        is_held = False
        while not is_held:  # another run may take it for a killed one's before it is held
            built = Path(tempfile.mkdtemp(dir=folder, prefix=BUILDS))
            is_held = stack.enter_context(_held(built, waits=True)) or built.is_dir()
        stack.callback(shutil.rmtree, built, ignore_errors=True)
        yield built
        paths = sorted(built.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
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
    with _held(path.parent, waits=True):
        before = _state_of(path)

        def check():
            if _state_of(path) != before:
                raise OSError(
                    f"{path}: another program has changed it since it was read. Nothing is written: ask again."
                )

        yield check


def _state_of(path):
    stats = [file.stat() for file in (path, *journals(path)) if file.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


@contextmanager
def whole_folder(folder: Path):
    """A folder for a `with` block, which becomes `folder`, new or empty so far, when the block ends well.

    Until then its name ends in ".incomplete". A run that is killed leaves that behind, and the next run removes it.

    Raises:
        OSError: another run is making it.
    """
    building = folder.with_name(f"{folder.name}.incomplete")
    building.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(_held(building))
        except BlockingIOError:
            raise OSError(f"{folder}: another run is writing it. Wait for that run, or give another folder.") from None
        stack.callback(shutil.rmtree, building, ignore_errors=True)
        for left in building.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield building
        for path in building.iterdir():
            path.chmod(0o644)  # safetensors makes files for their owner alone
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rmdir()
        building.rename(folder)


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
