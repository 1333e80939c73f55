"""Options of a command that say how its image is read."""

from argparse import ArgumentParser, Namespace
from urllib.parse import urlparse
from urllib.request import url2pathname

# Those of them that are the image processor's, by its names.
OPTIONS = ("bands", "value_range", "window", "nodata", "area", "max_image_pixels")


def band(text: str) -> int | str:
    """A number or a name."""
    return int(text) if text.isdigit() else text


def bands(text: str) -> list[int | str]:
    """[4, 3, 2] from "4,3,2", ["red", "nir", "blue"] from "red,nir,blue"."""
    return [band(part) for part in text.split(",")]


def value_range(text: str) -> str | list:
    """percentile as it is, [0.0, 2047.0] from "0,2047", or a pair for each band from six numbers."""
    if text in ("dtype", "percentile"):
        return text
    numbers = [float(part) for part in text.split(",")]
    if len(numbers) == 2:
        return numbers
    if len(numbers) != 6:
        raise ValueError(text)
    return [numbers[start : start + 2] for start in (0, 2, 4)]


def nodata(text: str) -> float | tuple[float, float]:
    """0.0 from "0", (0.0, 15.0) from "0,15"."""
    value, *tolerance = map(float, text.split(","))
    if len(tolerance) > 1:
        raise ValueError(text)
    return (value, *tolerance) if tolerance else value


def window(text: str) -> list:
    """[0, 0, 512, 512] from "0,0,512,512", [139.7, 35.6, 139.8, 35.7, "EPSG:4326"] from the same with a system."""
    *numbers, last = text.split(",", 4)  # WKT has commas of its own
    if len(numbers) == 4:
        return [*map(float, numbers), last]
    if len(numbers) != 3:
        raise ValueError(text)
    return [*map(int, numbers), int(last)]


def tiles(text: str) -> tuple[int, bool]:
    """(60, False) from "60", (128, True) from "128 native"."""
    number, *native = text.split()
    if native not in ([], ["native"]):
        raise ValueError(text)
    return int(number), bool(native)


def add_image_arguments(parser: ArgumentParser):
    """The options of a raster, and the limit of any image."""
    group = parser.add_argument_group("how the image is read")
    group.add_argument(
        "--bands",
        type=bands,
        metavar="B",
        help="three bands or one for grey, as 4,3,2 or red,nir,blue (default: the file's)",
    )
    group.add_argument(
        "--value-range", type=value_range, metavar="R",
        help="what becomes black and white: 0,2047 or a pair for each band, dtype or percentile (default: dtype)",
    )  # fmt: skip
    group.add_argument(
        "--window", type=window, metavar="W",
        help="a part: top,left,bottom,right in pixels, or west,south,east,north,EPSG:4326 (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--nodata", type=nodata, metavar="V[,T]",
        help="a value that is no part of the image, as 0, or with a tolerance beside the border, as 0,15, for collars in JPEG",
    )  # fmt: skip
    group.add_argument(
        "--area", metavar="FILE", help="polygons, GeoJSON or GeoPackage: what lies outside is no part of the image"
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        dest="max_image_pixels",
        metavar="N",
        help="pixels of the largest image (default: 1e9)",
    )


def add_tile_arguments(parser: ArgumentParser):
    """The options of looking closer where the question looks."""
    group = parser.add_argument_group("how much of the image is encoded")
    group.add_argument(
        "--max-tiles", type=int, metavar="N",
        help="tiles that go through the vision tower, those where the question looks (default: all of every scale)",
    )  # fmt: skip
    group.add_argument(
        "--native", action="store_true", help="with --max-tiles: down to the image's own resolution, level by level"
    )


def tile_options(args: Namespace) -> dict:
    """What `add_tile_arguments` read, as the processor takes it."""
    return {"max_tiles": args.max_tiles, "native": args.native or None}


def image_options(args: Namespace) -> dict:
    """What `add_image_arguments` read, as `open_image` takes it."""
    return {name: getattr(args, name) for name in OPTIONS}


def local_path(text: str) -> str:
    """The path of a `file://` URL; anything else as it is."""
    return url2pathname(urlparse(text).path) if text.startswith("file:") else text


def is_file_name(text: str) -> bool:
    """Whether it names a file of this machine, and no URL or name of GDAL's."""
    from ..image_raster_files_uhr_bat import GDAL_NAME

    return GDAL_NAME.match(text) is None
