"""What a command writes, checked before its work begins: nothing that it reads is written over, and all can be written.

Every command that has an option for a file or a folder to write asks `check_outputs` as soon as its options are read.
"""

import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .files import stale_sidecars
from .images import local_path

# What a model folder holds that is read, and what a saved model writes.
MODEL_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "adapter_config.json", "*.index.json",
    "chat_template.*", "*.safetensors", "*.bin", "*_uhr_bat.py",
)  # fmt: skip
# What a folder holds that is one image.
STORES = (".zarray", ".zgroup", ".zmetadata", "zarr.json")
# Beside an image, with the whole of its name or without its ending: what GDAL reads with it.
BESIDE = (
    ".aux.xml", ".ovr", ".msk", ".hdr", ".wld", ".prj", ".tfw", ".tifw", ".jgw", ".jpgw", ".pgw", ".pngw", ".j2w", ".tab", ".aux", ".rrd",
)  # fmt: skip
# Longer names are images themselves, in base64.
LONGEST_NAME = 4096


class Output(NamedTuple):
    """A file that is written, or a folder.

    Attributes:
        option: that names it, as "--raster".
        path: None where it was not asked for.
        endings: of a file, in any case; () for any.
        names: of a folder: what is written into it, patterns too. None for a file.
    """

    option: str
    path: Path | None
    endings: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None


def check_outputs(reads: Iterable[Any], *outputs: Output):
    """Raises where outputs of a command cannot be written, or must not be. Nothing is written or made by it.

    Args:
        reads: whatever the command reads: paths, `file://` URLs, names of GDAL's, model folders; None says nothing.
        outputs: all that it writes.

    Raises:
        ValueError: a file with another ending; a folder where a file is meant, or the other way round; a file that is read
            by the command, under whatever name; two outputs that are one file.
        PermissionError: it cannot be written.
    """
    outputs = [output._replace(path=Path(output.path)) for output in outputs if output.path is not None]
    for output in outputs:
        _check_kind(output)
        _check_place(output)
    written = [(output, path) for output in outputs for path in _written(output)]
    taken = {}
    for output, path in written:
        for key in _keys(path):
            other = taken.setdefault(key, output)
            if other is not output:
                raise ValueError(
                    f"{path}: {other.option} and {output.option} would be one file. Give another name to one."
                )
    replaced = {key: (output, path) for output, path in written for key in _keys(path)}
    for output, path in written:
        for sidecar in stale_sidecars(path):
            replaced |= dict.fromkeys(_keys(sidecar), (output, sidecar))
    if not replaced:
        return
    for source in reads:
        for file in files_read(source) if source is not None else ():
            for key in _keys(file):
                if key in replaced:
                    output, path = replaced[key]
                    same = "" if Path(file) == path else f" (as {file})"
                    raise ValueError(
                        f"{path}: {output.option} would write over a file that is read{same}. Give it another name."
                    )


def _check_kind(output):
    path = output.path
    if output.names is None:
        if output.endings and path.suffix.lower() not in output.endings:
            raise ValueError(f"{path}: the file of {output.option} ends in {' or '.join(output.endings)}.")
        _check_file(path, output.option)
    elif path.exists() and not path.is_dir():
        raise ValueError(f"{path}: {output.option} is a folder, and this is a file.")
    else:
        for written in _written(output):
            _check_file(written, output.option)


def _check_file(path, option):
    if path.is_dir():
        raise ValueError(f"{path}: {option} writes a file of this name, and this is a folder.")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: {option} writes a file, and this is none.")
    # A file without a right to write is meant to stay, though its folder would let it be replaced.
    if path.exists() and not (os.access(path, os.W_OK) and path.stat().st_mode & 0o222):
        raise PermissionError(f"{path}: {option} would write over a file that is protected against writing.")


def _check_place(output):
    """The folder is there and takes a file, or the nearest one above that is there does."""
    folder = output.path if output.names is not None else output.path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{output.path}: {output.option} cannot be written, {folder} is no folder.")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise PermissionError(
            f"{output.path}: {output.option} cannot be written into {folder} ({error.strerror or error})."
        ) from error


def _written(output) -> list[Path]:
    if output.names is None:
        return [output.path]
    found = []
    for name in output.names:
        found += sorted(output.path.glob(name)) if re.search(r"[*?\[]", name) else [output.path / name]
    return found


def _keys(path) -> list:
    """What two names of one file have in common: the path behind links, and the file itself where it is there."""
    keys = [os.path.realpath(path)]
    try:
        stat = os.stat(path)
        keys.append((stat.st_dev, stat.st_ino))
    except OSError:
        pass
    return keys


def files_read(source: Any) -> Iterator[Path]:
    """The files of this machine that are read with a path, a URL or a name of GDAL's: the file, what lies beside it, what
    a VRT is made of, the model of a folder."""
    if not isinstance(source, (str, os.PathLike)):
        return
    text = os.fspath(source)
    if text.startswith(("http://", "https://", "data:")) or len(text) > LONGEST_NAME:
        return
    text = local_path(text)
    if os.path.isdir(text):
        folder, is_store = Path(text), any(os.path.exists(os.path.join(text, name)) for name in STORES)
        patterns = ("**/*",) if is_store else MODEL_FILES
        yield from (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
        for path in () if is_store else folder.iterdir():  # a mosaic
            if path.is_file() and _starts_as_raster(path):
                yield from _image_files(str(path), set())
        yield from map(Path, _gdal_files(text))
        return
    yield Path(text)  # it may be yet to come
    yield from _image_files(text, set())


def files_beside(path: Path) -> list[Path]:
    """The files beside an image that GDAL reads with it."""
    endings = [spelled for ending in BESIDE for spelled in (ending, ending.upper())]
    named = [beside for ending in endings for beside in (Path(f"{path}{ending}"), path.with_suffix(ending))]
    return [beside for beside in named if beside != path and beside.is_file()]


def _image_files(name, seen) -> Iterator[Path]:
    for path in _named_in(name):
        yield path
        yield from files_beside(path)
    if name in seen:
        return
    seen.add(name)
    for part in _gdal_files(name):
        if part != name and (part.lower().endswith(".vrt") or _is_vrt(part)):
            yield from _image_files(part, seen)  # a VRT of VRTs states the first ones alone
        else:
            yield from _named_in(part)


def _named_in(text) -> list[Path]:
    """Files whose paths stand anywhere in a name: "/vsizip//data/a.zip/b.tif", 'NETCDF:"a.nc":Band1', "GTIFF_DIR:2:a.tif"."""
    if os.path.exists(text):
        return [Path(text)]
    edges = [match.start() for match in re.finditer(r"""[/:"'{}()!?=,&;|<>]""", text)]
    starts = sorted({0, *edges, *(edge + 1 for edge in edges)})
    parts = {text[start:end] for start in starts for end in (*edges, len(text)) if start < end}
    return [Path(part) for part in sorted(parts) if os.path.isfile(part)]


def _gdal_files(name) -> list[str]:
    """What GDAL says that an image is read from; nothing where it is none, or no GDAL is here."""
    try:
        import rasterio
    except ImportError:
        return []
    from ..image_raster_files_uhr_bat import gdal_settings

    try:
        with warnings.catch_warnings(), rasterio.Env(**gdal_settings(name)):
            warnings.simplefilter("ignore")
            with rasterio.open(name) as raster:
                return list(raster.files)
    except Exception:  # whatever reads it says what is wrong with it
        return []


def _starts_as_raster(path) -> bool:
    from ..image_raster_files_uhr_bat import is_raster

    try:
        with open(path, "rb") as file:
            return is_raster(file.read(16))
    except OSError:
        return False


def _is_vrt(path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(11) == b"<VRTDataset"
    except OSError:
        return False
