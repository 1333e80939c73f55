"""Where on the ground an image lies."""

import os
import warnings
from typing import Any, NamedTuple

from ..common.extras import require
from ..common.images import local_path
from ..image_pictures_uhr_bat import PICTURE_FORMATS
from ..image_raster_files_uhr_bat import upright_by
from ..image_raster_windows_uhr_bat import upright_transform
from ..image_reading_uhr_bat import kind_of


class Georeference(NamedTuple):
    """Coordinates of an image's pixels.

    Attributes:
        transform: `affine.Affine` from (column, row) in pixels, (0, 0) the upper left corner, to (x, y). None: a plain
            image, whose coordinates are its pixels.
        crs: coordinate reference system of (x, y), as rasterio has it. None: the file does not say.
    """

    transform: Any = None
    crs: Any = None

    @classmethod
    def of(cls, image, path: str | None = None) -> "Georeference":
        """Of an opened image: a raster knows the place of the part that is read; beside a picture its file, at `path`, may
        name it. None of anything else."""
        if kind_of(image) == "raster":
            return cls(image.transform, image.crs)
        return PLAIN if path is None else read_georeference(path)

    @property
    def words(self) -> str:
        """What coordinates without a known CRS mean, for whoever reads a file of them."""
        if self.transform is None:
            return "pixels of the image: x = column, y = row, from the upper left corner, rows downwards"
        return "those of the image's transform; its CRS is not stated"


PLAIN = Georeference()  # an image without coordinates


def crs_name(crs) -> str:
    """As EPSG calls it: "WGS 84 / UTM zone 54N"."""
    import pyproj

    return pyproj.CRS.from_user_input(crs).name


def has_degrees(crs) -> bool:
    """Whether longitude and latitude follow from a CRS: not from that of a building site, or of another planet."""
    import pyproj

    try:
        pyproj.Transformer.from_crs(crs, "EPSG:4326")
    except pyproj.exceptions.ProjError:
        return False
    return True


def read_georeference(path: str) -> Georeference:
    """The transform and CRS that a picture or a raster states, of its pixels as they stand upright by their orientation in
    EXIF; none of a plain image, or of one that GDAL does not read.

    Raises:
        ImportError: rasterio is missing; says what to install.
    """
    require("geo", "rasterio")
    if str(path).startswith(("http://", "https://", "data:")):  # what a server sends is no name for GDAL to open
        return PLAIN
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(path) as raster:
                transform, crs, size = raster.transform, raster.crs, raster.shape
                upright = upright_by(_orientation(raster, path))
        except RasterioIOError:  # the image itself was read: a format that GDAL was built without
            return PLAIN
    if crs is None and transform.is_identity:
        return PLAIN
    transposed = upright[0]
    return Georeference(upright_transform(transform, upright, size[::-1] if transposed else size), crs)


def _orientation(raster, path) -> int:
    """EXIF's, 1 to 8, of a picture that Pillow turns by it: GDAL's word for it, or Pillow's, of what GDAL reads none of."""
    from PIL import Image

    stated = raster.tags().get("EXIF_Orientation")
    if stated is None:
        try:
            with (
                warnings.catch_warnings(),
                Image.open(local_path(os.fspath(path)), formats=tuple(PICTURE_FORMATS)) as image,
            ):
                warnings.simplefilter("ignore")  # of its size, which was checked when it was read
                stated = image.getexif().get(274)
        except Exception:  # no picture of Pillow's
            stated = None
    return int(stated) if str(stated) in "12345678" else 1
