"""What a batch is made of: images, from a folder, a list or a STAC item collection, and the questions about each."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ..common.extras import require
from ..common.images import is_file_name
from ..evaluation.samples import read_lines

# What a folder is searched for, as it ends.
IMAGE_ENDINGS = (".tif", ".tiff", ".jp2", ".vrt", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".img")
# Of an item's assets without a name: its picture in colours, else the first raster that is no preview.
VISUAL = "visual"
RASTER_TYPES = ("image/tiff", "image/jp2", "image/vnd.stac.geotiff")
PREVIEWS = {"thumbnail", "overview"}


@dataclass(frozen=True)
class BatchImage:
    """An image that is asked about.

    Attributes:
        source: absolute path, URL or name of GDAL's, as the results have it.
        item: id of its STAC item, "" where it has none.
        before: an earlier image of the same place that it is compared with, as `source`; "" for none.
    """

    source: str
    item: str = ""
    before: str = ""

    @property
    def names(self) -> set[str]:
        """What questions may call it."""
        return {self.source, self.source.rpartition("/")[2], self.item} - {""}


# ---- Images ----------------------------------------------------------------------------------------------------------


def read_images(path: Path, asset: str | None = None) -> list[BatchImage]:
    """The images of a batch, each once: two items of one image are two.

    Args:
        path: a folder, searched with all below it but what is hidden; a STAC item collection (.json, .geojson); or a text file with a path
            or URL a line, relative to the file's folder, in which empty lines and those that start with # say nothing.
        asset: of every STAC item; None for "visual", else its first raster.

    Raises:
        FileNotFoundError: there is no such folder or file. An image of a list that is missing fails by itself.
        ValueError: no image; an item without the asset.
    """
    if path.is_dir():
        found = [BatchImage(str(file.resolve())) for file in sorted(path.rglob("*")) if _is_image(file, path)]
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such folder or file of images.")
    elif path.suffix.lower() in (".json", ".geojson"):
        found = _read_items(path, asset)
    else:
        lines = (line.strip() for line in _text(path).split("\n"))
        found = [_named(line, path) for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{path}: there is no image in it. A folder is searched for {' '.join(IMAGE_ENDINGS)}.")
    return list(dict.fromkeys(found))


def _text(path, newline=None) -> str:
    """What a file of text holds. Raises `ValueError` for another encoding than UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: it is no text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error


def _is_image(path, folder) -> bool:
    """Whether a path of a folder is a file that is named as an image, and neither hidden nor in what is: macOS writes
    "._name.tif" beside "name.tif"."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in IMAGE_ENDINGS and not hidden and path.is_file()


def _named(name, path) -> BatchImage:
    return BatchImage(str((path.parent / name).resolve()) if is_file_name(name) else name)


def _read_items(path, asset) -> list[BatchImage]:
    require("batch", "pystac")
    import pystac
    from pystac.utils import make_absolute_href

    try:
        items = list(pystac.ItemCollection.from_file(str(path)))
    except Exception as error:  # JSON of any other kind fails it in any way
        raise ValueError(f"{path}: this is no STAC item collection ({error}).") from error
    found = []
    for item in items:
        # A relative address is relative to the item where it says where it lies, else to the collection.
        start = item.get_self_href() or str(path.resolve())
        href = make_absolute_href(_choose_asset(item, asset, path).href, start)
        found.append(BatchImage(href.removeprefix("file://"), item.id))
    return found


def _choose_asset(item, name, path):
    if name is not None:
        chosen = [name] if name in item.assets else []
    else:
        rasters = [
            key
            for key, asset in item.assets.items()
            if (asset.media_type or "").startswith(RASTER_TYPES) and not PREVIEWS & set(asset.roles or ())
        ]
        chosen = [VISUAL] if VISUAL in item.assets else rasters
    if not chosen:
        wanted = f"no asset {name!r}" if name is not None else f'no asset "{VISUAL}" and no raster'
        raise ValueError(f"{path}: item {item.id} has {wanted}; it has {sorted(item.assets)}. Name one by --asset.")
    return item.assets[chosen[0]]


# ---- Questions -------------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[tuple[str | None, str, str | None]]:
    """(image, question, before) of every row; None stands for all images, and for no earlier one.

    Args:
        path: .txt, a question a line; .json or .jsonl, strings, or records with `question` and perhaps `image` and `before`; .csv
            with such columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, a row without a question or with an image that is no text, or no row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of questions.")
    ending = path.suffix.lower()
    if ending == ".txt":
        rows = [line.strip() for line in _text(path).split("\n") if line.strip()]
    elif ending in (".json", ".jsonl"):
        rows = read_lines(path)
    elif ending == ".csv":
        rows = list(csv.DictReader(io.StringIO(_text(path, newline=""), newline="")))
    else:
        raise ValueError(f"{path}: questions are .txt, .json, .jsonl or .csv.")
    found = [_question(row, number, path) for number, row in enumerate(rows, 1)]
    if not found:
        raise ValueError(f"{path}: there is no question in it.")
    return found


def _question(row, number, path):
    record = row if isinstance(row, dict) else {"question": row}
    question, named = record.get("question"), {name: record.get(name) or None for name in ("image", "before")}
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{path}, row {number}: there is no question in {row!r}.")
    for name, value in named.items():
        if not isinstance(value, str | None):
            raise ValueError(f"{path}, row {number}: {name!r} is a path, a URL or a name. Got {value!r}.")
    return named["image"], question.strip(), named["before"]


def plan(
    images: Iterable[BatchImage],
    questions: Iterable[tuple[str | None, str, str | None]],
    path: Path = Path("questions"),
) -> list[tuple[BatchImage, list[str]]]:
    """Every image that is asked about, alone or with an earlier one, with its questions, each once, in the order of both.

    Args:
        images, questions: of `read_images` and `read_questions`. A question names its image by the whole path or URL, the
            last part of it, or the id of the STAC item. So it may name the earlier one, which may also be none of the images.
        path: of the questions: that of an earlier image is relative to its folder.

    Raises:
        ValueError: a question names an image that is none of them, or several of them.
    """
    images = list(images)
    by_name = defaultdict(list)
    for image in images:
        for name in image.names:
            by_name[name].append(image)

    def found(name, question):
        named = by_name.get(name, [])
        if len({image.source for image in named}) != 1:
            raise ValueError(
                f"A question is about the image {name!r}, which is the name of {len(named)} of the {len(images)} images: "
                f"{question!r}."
            )
        return named

    asked = {image: defaultdict(dict) for image in images}
    for name, question, before in questions:
        if before is not None:
            before = (found(before, question)[0] if before in by_name else _named(before, path)).source
        for image in images if name is None else found(name, question):
            asked[image][before or ""][question] = None
    return [
        (replace(image, before=before), list(texts))
        for image, pairs in asked.items()
        for before, texts in pairs.items()
    ]
