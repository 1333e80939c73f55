"""Files of what was kept: polygons as GeoJSON or GeoPackage, importance as a cloud-optimised GeoTIFF."""

import json
import sqlite3
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from ..common.extras import require
from ..common.files import edited_alone, journals, whole_files
from ..geometry_uhr_bat import pixel_tokens
from .degrees import in_degrees
from .frames import COLUMNS
from .georeference import PLAIN, Georeference, crs_name, has_degrees

GEOJSON, GEOPACKAGE = (".geojson", ".json"), ".gpkg"
LAYER = "evidence"
# Decimals of degrees in a GeoJSON: .1 mm on the ground, where GDAL's 7 are 1 cm, a part of a drone's pixel.
DEGREE_DECIMALS = 9
# Longest side of the importance raster: 7 cells to the side of the 7B model's finest token. Of a larger image every
# cell stands for several pixels, as a raster of 30,000 px a side would hold nothing that this one does not.
RASTER_SIDE = 2048
# Sides of its blocks, and of its last overview at most.
BLOCK = 256


def check_vectors(path: Path, crs, layer: str = LAYER, columns: Sequence[str] = COLUMNS):
    """Raises `ValueError` for a file that `write_vectors` cannot write, before a model is asked.

    Args:
        path: ends in .geojson, .json or .gpkg.
        crs: of the frame, or None.
        layer, columns: of a GeoPackage, see `check_layer`.
    """
    ending = path.suffix.lower()
    if ending not in (*GEOJSON, GEOPACKAGE):
        raise ValueError(f"{path}: polygons are written as .geojson, .json or .gpkg.")
    if ending == GEOPACKAGE:
        check_layer(path, layer, columns)
    if ending in GEOJSON and crs is not None and not has_degrees(crs):
        raise ValueError(
            f"{path}: the image's CRS, {crs_name(crs)}, leads to no longitude and latitude. Write a .gpkg, which "
            "keeps the CRS."
        )


def check_layer(path: Path, layer: str, columns: Sequence[str] = COLUMNS):
    """Raises `ValueError` where a GeoPackage that is there cannot take a layer, or has one of that name without the columns that
    ours has."""
    if not layer or layer.lower().startswith(("gpkg_", "sqlite_", "rtree_")) or not layer.isprintable():
        raise ValueError(f"{path}: no layer can be called {layer!r}.")
    if not path.exists():
        return
    if found := journals(path):
        raise ValueError(
            f"{path}: another program has it open and may write to it ({found[0].name} is there). Close it there first."
        )
    try:  # immutable: SQLite makes no file beside it
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as file:
            names = [name for (name,) in file.execute("SELECT name FROM sqlite_master")]
            if "gpkg_contents" not in names:
                raise ValueError(f"{path}: this is no GeoPackage. Give another name.")
            found = [name for name in names if name.lower() == layer.lower()]
            there = {row[1] for name in found for row in file.execute("SELECT * FROM pragma_table_info(?)", (name,))}
    except sqlite3.Error as error:
        raise ValueError(f"{path}: this is no GeoPackage that can be added to ({error}). Give another name.") from error
    if found and not set(columns) <= there:
        raise ValueError(
            f"{path}: it has a layer {found[0]} of other columns, which stays. Give another layer or another file."
        )


def write_vectors(
    frame, path: Path, about: dict[str, str], words: str = "", layer: str = LAYER, onto: Path | None = None
):
    """A frame as a GeoJSON or a GeoPackage, by the ending; whole or not at all.

    A GeoJSON is RFC 7946's: WGS 84, longitude first, outer rings counterclockwise, cut at the antimeridian. Without a
    CRS its coordinates are those of the frame, and its member `coordinate_space` says so. A GeoPackage keeps the frame's
    CRS; all its polygons are MultiPolygons, unless there are points among them. Of one that is there all other layers stay.

    Args:
        frame: of `evidence_frame` or `objects_frame`.
        path: ends in .geojson, .json or .gpkg.
        about: name -> text, as question and answer: members beside the features, or metadata of the layer, and of a new
            GeoPackage, too.
        words: what coordinates without a CRS mean.
        layer: of a GeoPackage, added or replaced.
        onto: the GeoPackage whose other layers stay, which the caller edits (`edited_alone`); None for the one at `path`.

    Raises:
        ValueError: what `check_vectors` refuses.
        ImportError: pyogrio is missing; says what to install.
    """
    require("geo", "pyogrio")
    path = Path(path)
    if onto is None and path.suffix.lower() == GEOPACKAGE:
        with edited_alone(path) as check:
            _write_vectors(frame, path, about, words, layer, path, check)
    else:
        _write_vectors(frame, path, about, words, layer, path if onto is None else Path(onto), lambda: None)


def _write_vectors(frame, path, about, words, layer, onto, check):
    import pyogrio

    check_vectors(onto, frame.crs, layer, frame.columns.drop("geometry"))
    if frame.crs is None:
        about = {**about, "coordinate_space": words}
    if path.suffix.lower() in GEOJSON:
        if frame.crs is not None:
            frame = type(frame)(frame.drop(columns="geometry"), geometry=in_degrees(frame.geometry, frame.crs))
        options = {
            "driver": "GeoJSON",
            "COORDINATE_PRECISION": DEGREE_DECIMALS,
            "NATIVE_DATA": json.dumps({"type": "FeatureCollection", **about}),
            "NATIVE_MEDIA_TYPE": "application/vnd.geo+json",
        }
    else:  # a layer has one type of geometry
        points = {"Point"} & set(frame.geom_type)
        kind = {"geometry_type": "Unknown"} if points else {"geometry_type": "MultiPolygon", "promote_to_multi": True}
        options = {"driver": "GPKG", "layer_metadata": about, **kind}
        if not onto.exists():
            options["dataset_metadata"] = about
    with whole_files(path.parent) as built, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'crs' was not provided")  # `words` says it
        if path.suffix.lower() == GEOPACKAGE and onto.exists():
            # SQLite's own copy is one of a moment.
            with closing(sqlite3.connect(onto)) as old, closing(sqlite3.connect(built / path.name)) as new:
                old.backup(new)
        pyogrio.write_dataframe(frame, built / path.name, layer=layer, **options)
        check()


def geojson_bytes(frame, about: dict[str, str], words: str = "") -> bytes:
    """The file that `write_vectors` makes of a frame as GeoJSON, which raises the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "evidence.geojson")
        write_vectors(frame, path, about, words)
        return path.read_bytes()


def write_raster(
    path: Path,
    compressed,
    image_size: tuple[int, int],
    scales: Sequence[int],
    about: dict[str, str],
    georeference: Georeference = PLAIN,
    *,
    image_idx: int = 0,
):
    """The importance of every scale as bands of a float32 GeoTIFF that covers the image exactly, cloud-optimised.

    Its overviews have the means of its cells. It has the image's own grid, pixel for pixel, up to `RASTER_SIDE` pixels a side, else a coarser one of the same
    extent. A cell has the value of the token that shows its centre (`pixel_tokens`), and no data (NaN) where no token
    shows the image there.

    Args:
        path: written whole or not at all.
        compressed: what `model.compress` returned.
        image_size: (height, width) in pixels of the image that the model saw.
        scales: sides of the views in pixels, `compressed.scales[image_idx]`.
        about: name -> text, as question and answer: tags of the file.
        georeference: of the image.
        image_idx: which image of the batch.

    Raises:
        ImportError: rasterio is missing; says what to install.
        ValueError: the result comes from a `dynamic_pyramid`.
    """
    compressed.check_letterbox()
    require("geo", "rasterio")
    import rasterio
    import rasterio.shutil
    from affine import Affine
    from rasterio.enums import ColorInterp
    from rasterio.errors import NotGeoreferencedWarning

    path, (h, w) = Path(path), image_size
    factor = -(-max(h, w) // RASTER_SIDE)
    height, width = -(-h // factor), -(-w // factor)
    a, b, c, d, e, f = tuple(Affine.identity() if georeference.transform is None else georeference.transform)[:6]
    profile = {
        "driver": "GTiff", "dtype": "float32", "count": len(scales), "height": height, "width": width, "nodata": np.nan,
        "transform": Affine(a * w / width, b * h / height, c, d * w / width, e * h / height, f), "crs": georeference.crs,
        "interleave": "band", "photometric": "minisblack",
    }  # fmt: skip
    optimised = {
        "driver": "COG", "compress": "deflate", "predictor": "yes", "blocksize": BLOCK, "overview_resampling": "average",
    }  # fmt: skip
    with whole_files(path.parent) as built, rasterio.MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a plain image
        with memory.open(**profile) as raster:
            raster.update_tags(**about)
            raster.colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (len(scales) - 1)
            for band, (scale, importance, regions) in enumerate(
                zip(scales, compressed.importance[image_idx], compressed.regions[image_idx]), start=1
            ):
                grid = tuple(importance.shape)
                values = shown_importance(importance, regions).ravel()
                raster.write(values[pixel_tokens(image_size, grid, (height, width))], band)
                raster.set_band_description(band, f"importance at scale {scale} px, {grid[0]} x {grid[1]} tokens")
        rasterio.shutil.copy(memory.name, built / path.name, **optimised)


def shown_importance(importance, regions) -> np.ndarray:
    """float32[H, W], NaN for tokens that do not show the image, from float[H, W] and long[N] of a compression."""
    importance, regions = importance.detach().float().cpu().numpy(), regions.cpu().numpy()
    # A scale that spends nothing has no regions; the attention of a softmax is never 0 where it looks.
    shown = (regions.reshape(importance.shape) >= 0) | (importance > 0)
    return np.where(shown, importance, np.float32(np.nan))
