# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT raster mosaics: several files of one grid as one raster, and arrays that know their place.

GDAL's virtual format joins files without reading them: their overviews serve the mosaic, and what none of them covers is no
part of it. Sizes are (height, width).
"""

import os
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from .image_raster_files_uhr_bat import import_rasterio, open_dataset

# Names of GDAL's types.
TYPES = {
    "uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32", "int32": "Int32",
    "float32": "Float32", "float64": "Float64",
}  # fmt: skip


def _facts(path):
    dataset = open_dataset(path, path)
    with dataset:
        step = dataset.transform
        if dataset.crs is None or step.b or step.d or step.a <= 0 or step.e >= 0:
            raise ValueError(f"{path}: a mosaic is made of rasters that have coordinates and stand north up, and this is none.")
        colours = [colour.name for colour in dataset.colorinterp]
        if dataset.count < 1 or "palette" in colours or not set(dataset.dtypes) <= set(TYPES):
            raise ValueError(f"{path}: a mosaic is made of bands of numbers, and these are {colours} of {dataset.dtypes}.")
        return {
            "path": path, "height": dataset.height, "width": dataset.width, "place": step, "nodata": dataset.nodata,
            "overviews": dataset.overviews(1), "block": dataset.block_shapes[0],
            "coordinate system": dataset.crs, "types of bands": dataset.dtypes, "colours of bands": tuple(colours),
            "pixel's size": (round(step.a, 9), round(-step.e, 9)), "scales": dataset.scales, "offsets": dataset.offsets,
        }  # fmt: skip


def mosaic_vrt(paths: Sequence[str]) -> str:
    """The virtual raster (VRT) of files that have one coordinate system, one pixel's size and the same bands; where they
    overlap, the later one is on top.

    Raises:
        OSError: a file cannot be opened.
        ValueError: files that are no mosaic; names both, and what they differ in.
    """
    files = [_facts(os.path.abspath(path)) for path in paths]
    first = files[0]
    for other in files[1:]:
        for fact in ("coordinate system", "pixel's size", "types of bands", "colours of bands", "scales", "offsets"):
            if other[fact] != first[fact]:
                raise ValueError(
                    f"{first['path']} and {other['path']} are no mosaic: their {fact} are {first[fact]} and {other[fact]}. "
                    f"Warp them to one grid first."
                )
    left, top = min(file["place"].c for file in files), max(file["place"].f for file in files)
    step_x, step_y = first["place"].a, -first["place"].e
    places = [((file["place"].c - left) / step_x, (top - file["place"].f) / step_y) for file in files]
    width = round(max(column + file["width"] for (column, _), file in zip(places, files)))
    height = round(max(row + file["height"] for (_, row), file in zip(places, files)))

    def sources(band):
        for (column, row), file in zip(places, files):
            size = f'xSize="{file["width"]}" ySize="{file["height"]}"'
            # A later file hides an earlier one only where it has pixels.
            nodata = 0 if str(band).startswith("mask") else file["nodata"]
            yield (
                f"<ComplexSource><SourceFilename>{escape(file['path'])}</SourceFilename><SourceBand>{band}</SourceBand>"
                f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="{column:.9g}" yOff="{row:.9g}" {size}/>'
                + ("" if nodata is None else f"<NODATA>{nodata}</NODATA>")
                + "</ComplexSource>"
            )

    blocks = f'blockXSize="{first["block"][1]}" blockYSize="{first["block"][0]}"'
    bands = "".join(
        f'<VRTRasterBand dataType="{TYPES[dtype]}" band="{number}" {blocks}><ColorInterp>{colour.capitalize()}</ColorInterp>'
        f"<Offset>{first['offsets'][number - 1]}</Offset><Scale>{first['scales'][number - 1]}</Scale>"
        f"{''.join(sources(number))}</VRTRasterBand>"
        for number, (dtype, colour) in enumerate(zip(first["types of bands"], first["colours of bands"]), 1)
    )
    mask = f'<MaskBand><VRTRasterBand dataType="Byte" {blocks}>{"".join(sources("mask,1"))}</VRTRasterBand></MaskBand>'
    shared = sorted(set.intersection(*(set(file["overviews"]) for file in files)))
    overviews = f'<OverviewList resampling="average">{" ".join(map(str, shared))}</OverviewList>' if shared else ""
    return (
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>{escape(first["coordinate system"].to_wkt())}</SRS>'
        f"<GeoTransform>{left!r}, {step_x!r}, 0, {top!r}, 0, {-step_y!r}</GeoTransform>{bands}{mask}{overviews}</VRTDataset>"
    )


def is_placed_array(source: Any) -> bool:
    """Whether it is an array of xarray with rioxarray's accessor, which need not be installed to ask."""
    return hasattr(source, "rio") and hasattr(source, "dims") and hasattr(source, "values")


def placed_bytes(array: Any) -> bytes:
    """A GeoTIFF of an array of xarray, [band, y, x] or [y, x] in any order. Raises `ValueError` for other dimensions."""
    rio, values = array.rio, np.asarray(array.values)
    others = [dim for dim in array.dims if dim not in (rio.x_dim, rio.y_dim)]
    if len(others) > 1:
        raise ValueError(f"An array of an image has y, x and perhaps bands. Got the dimensions {tuple(array.dims)}.")
    values = values.transpose([list(array.dims).index(dim) for dim in (*others, rio.y_dim, rio.x_dim)])
    values = values if others else values[None]
    values = values.astype(np.uint8) * np.uint8(255) if values.dtype == bool else values
    profile = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    crs = None if rio.crs is None else rio.crs.to_wkt()
    with import_rasterio().MemoryFile() as memory:
        with memory.open(driver="GTiff", crs=crs, transform=rio.transform(), nodata=rio.nodata, BIGTIFF="IF_SAFER", **profile) as file:
            file.write(values)
        return bytes(memory.getbuffer())


__all__ = ["is_placed_array", "mosaic_vrt", "placed_bytes"]
