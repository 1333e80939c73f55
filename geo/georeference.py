"""Where on the ground an image lies."""

import warnings
from typing import Any, NamedTuple

from ..common.extras import require


class Georeference(NamedTuple):
    """Coordinates of an image's pixels.

    Attributes:
        transform: `affine.Affine` from (column, row) in pixels, (0, 0) the upper left corner, to (x, y). None: a plain
            image, whose coordinates are its pixels.
        crs: coordinate reference system of (x, y), as rasterio has it. None: the file does not say.
    """

    transform: Any = None
    crs: Any = None

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
    """The transform and CRS that a raster states; none of a plain image, or of one that GDAL does not read.

    Raises:
        ImportError: rasterio is missing; says what to install.
    """
    require("geo", "rasterio")
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioIOError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(path) as raster:
                transform, crs = raster.transform, raster.crs
        except RasterioIOError:  # the image itself was read: a format that GDAL was built without
            return PLAIN
    if crs is None and transform.is_identity:
        return PLAIN
    return Georeference(transform, crs)
