"""Small rasters that tests make."""

import numpy as np
import pytest

rasterio = pytest.importorskip("rasterio")


def random_bands(num_bands=3, height=45, width=70, dtype=np.uint8, seed=0):
    """dtype[C, h, w] over the whole range of an integer type."""
    top = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, top, (num_bands, height, width), dtype=dtype)


def write_raster(path, bands, driver="GTiff", mask=None, colours=None, **profile):
    """A raster of bands [C, h, w]; its path as text."""
    num_bands, height, width = bands.shape
    if profile.pop("tiles", False):
        profile |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
    size = {"width": width, "height": height, "count": num_bands, "dtype": bands.dtype}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(path, "w", driver=driver, **size, **profile) as file:
            file.write(bands)
            if mask is not None:
                file.write_mask(mask)
            if colours is not None:
                file.colorinterp = [rasterio.enums.ColorInterp[colour] for colour in colours]
    return str(path)


def rgb_of(bands):
    """uint8[h, w, 3] of the first three of uint8 bands."""
    return np.moveaxis(bands[:3], 0, -1)


def write_dates(folder):
    """Paths of a place at an earlier and a later date, the later one finer, and of another place 100 km away."""
    paths = []
    for name, west, factor in (("earlier", 375000, 1), ("later", 375000, 2), ("apart", 475000, 1)):
        bands = random_bands(height=45, width=70).repeat(factor, 1).repeat(factor, 2)
        if name == "later":
            bands[:, 20:44, 60:90] = np.array([250, 20, 250], np.uint8)[:, None, None]
        place = rasterio.Affine(2 / factor, 0, west, 0, -2 / factor, 3908000)
        paths.append(write_raster(folder / f"{name}.tif", bands, crs="EPSG:32654", transform=place))
    return paths
