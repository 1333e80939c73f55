"""Files of what was kept: polygons as GeoJSON or GeoPackage, importance as a GeoTIFF."""

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..common.extras import require
from ..common.files import whole_files
from ..geometry_uhr_bat import pixel_tokens
from .georeference import PLAIN, Georeference, crs_name, has_degrees

GEOJSON, GEOPACKAGE = (".geojson", ".json"), ".gpkg"
LAYER = "evidence"
# Decimals of degrees in a GeoJSON: .1 mm on the ground, where GDAL's 7 are 1 cm, a part of a drone's pixel.
DEGREE_DECIMALS = 9
# Longest side of the importance raster: 7 cells to the side of the 7B model's finest token. Of a larger image every
# cell stands for several pixels, as a raster of 30,000 px a side would hold nothing that this one does not.
RASTER_SIDE = 2048


def check_vectors(path: Path, crs):
    """Raises `ValueError` for a file that `write_vectors` cannot write, before a model is asked.

    Args:
        path: ends in .geojson, .json or .gpkg.
        crs: of the frame, or None.
    """
    if path.suffix not in (*GEOJSON, GEOPACKAGE):
        raise ValueError(f"{path}: polygons are written as .geojson, .json or .gpkg.")
    if path.suffix in GEOJSON and crs is not None and not has_degrees(crs):
        raise ValueError(
            f"{path}: the image's CRS, {crs_name(crs)}, leads to no longitude and latitude. Write a .gpkg, which "
            "keeps the CRS."
        )


def write_vectors(frame, path: Path, about: dict[str, str], words: str = ""):
    """A frame as a GeoJSON or a GeoPackage, by the ending; whole or not at all.

    A GeoJSON is RFC 7946's: WGS 84, longitude first, outer rings counterclockwise, cut at the antimeridian. Without a
    CRS its coordinates are those of the frame, and its member `coordinate_space` says so. A GeoPackage keeps the frame's
    CRS; all its polygons are MultiPolygons.

    Args:
        frame: of `evidence_frame`.
        path: ends in .geojson, .json or .gpkg.
        about: name -> text, as question and answer: members beside the features, or the GeoPackage's metadata.
        words: what coordinates without a CRS mean.

    Raises:
        ValueError: what `check_vectors` refuses.
        ImportError: pyogrio is missing; says what to install.
    """
    require("geo", "pyogrio")
    import pyogrio

    path = Path(path)
    check_vectors(path, frame.crs)
    if frame.crs is None:
        about = {**about, "coordinate_space": words}
    if path.suffix in GEOJSON:
        options = {
            "driver": "GeoJSON",
            "RFC7946": "NO" if frame.crs is None else "YES",
            "COORDINATE_PRECISION": DEGREE_DECIMALS,
            "NATIVE_DATA": json.dumps({"type": "FeatureCollection", **about}),
            "NATIVE_MEDIA_TYPE": "application/vnd.geo+json",
        }
    else:  # a layer has one type of geometry
        options = {
            "driver": "GPKG",
            "dataset_metadata": about,
            "geometry_type": "MultiPolygon",
            "promote_to_multi": True,
        }
    with whole_files(path.parent) as built, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'crs' was not provided")  # `words` says it
        pyogrio.write_dataframe(frame, built / path.name, layer=LAYER, **options)


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
    """The importance of every scale as bands of a float32 GeoTIFF that covers the image exactly.

    It has the image's own grid, pixel for pixel, up to `RASTER_SIDE` pixels a side, else a coarser one of the same
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
    """
    require("geo", "rasterio")
    import rasterio
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
        "tiled": True, "blockxsize": 256, "blockysize": 256, "interleave": "band", "photometric": "minisblack",
        "compress": "deflate", "predictor": 3,
    }  # fmt: skip
    with whole_files(path.parent) as built, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a plain image
        with rasterio.open(built / path.name, "w", **profile) as raster:
            raster.update_tags(**about)
            raster.colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (len(scales) - 1)
            for band, (scale, importance, regions) in enumerate(
                zip(scales, compressed.importance[image_idx], compressed.regions[image_idx]), start=1
            ):
                grid = tuple(importance.shape)
                values = shown_importance(importance, regions).ravel()
                raster.write(values[pixel_tokens(image_size, grid, (height, width))], band)
                raster.set_band_description(band, f"importance at scale {scale} px, {grid[0]} x {grid[1]} tokens")


def shown_importance(importance, regions) -> np.ndarray:
    """float32[H, W], NaN for tokens that do not show the image, from float[H, W] and long[N] of a compression."""
    importance, regions = importance.detach().float().cpu().numpy(), regions.cpu().numpy()
    # A scale that spends nothing has no regions; the attention of a softmax is never 0 where it looks.
    shown = (regions.reshape(importance.shape) >= 0) | (importance > 0)
    return np.where(shown, importance, np.float32(np.nan))
