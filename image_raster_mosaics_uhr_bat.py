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
from urllib.parse import urlparse
from urllib.request import url2pathname
from xml.sax.saxutils import escape

import numpy as np

from .image_raster_files_uhr_bat import GDAL_NAME, import_rasterio, open_dataset

# Names of GDAL's types.
TYPES = {
    "uint8": "Byte", "int8": "Int8", "uint16": "UInt16", "int16": "Int16", "uint32": "UInt32", "int32": "Int32",
    "float32": "Float32", "float64": "Float64",
}  # fmt: skip
# Parts of a pixel that a file may lie beside the grid of the first, or become so to its far edge: what corners are rounded by.
BESIDE_GRID = 0.05


def _name_of(path) -> str:
    """What GDAL calls a file of a list, wherever the mosaic is read from."""
    text = os.fspath(path)
    if text.startswith(("http://", "https://")):
        raise ValueError(
            f"{text}: what a server sends is not read as a part of a mosaic unless it is said so: pass '/vsicurl/{text}'."
        )
    text = url2pathname(urlparse(text).path) if text.startswith("file://") else text
    return text if not os.path.exists(text) and GDAL_NAME.match(text) else os.path.abspath(text)


def _facts(path):
    dataset = open_dataset(path, path)
    with dataset:
        step = dataset.transform
        if dataset.crs is None or step.b or step.d or step.a <= 0 or step.e >= 0:
            raise ValueError(
                f"{path}: a mosaic is made of rasters that have coordinates and stand north up, and this is none."
            )
        colours = [colour.name for colour in dataset.colorinterp]
        if dataset.count < 1 or "palette" in colours or not set(dataset.dtypes) <= set(TYPES):
            raise ValueError(
                f"{path}: a mosaic is made of bands of numbers, and these are {colours} of {dataset.dtypes}."
            )
        return {
            # rasterio's own addresses (zip://, s3://) mean nothing to GDAL, which has names for them.
            "path": dataset.files[0] if "://" in path and dataset.files else path, "height": dataset.height, "width": dataset.width, "place": step, "nodata": dataset.nodata,
            "overviews": dataset.overviews(1), "block": dataset.block_shapes[0],
            "coordinate system": dataset.crs, "types of bands": dataset.dtypes, "colours of bands": tuple(colours),
            "scales": dataset.scales, "offsets": dataset.offsets,
        }  # fmt: skip


def mosaic_vrt(paths: Sequence[str]) -> str:
    """The virtual raster (VRT) of files that have one coordinate system, one pixel's size and the same bands; where they
    overlap, the later one is on top.

    Raises:
        OSError: a file cannot be opened.
        ValueError: files that are no mosaic; names both, and what they differ in.
    """
    files = [_facts(_name_of(path)) for path in paths]
    first = files[0]
    step_x, step_y = first["place"].a, -first["place"].e
    places = []
    for other in files:
        steps = other["place"].a, -other["place"].e
        facts = [
            (fact, first[fact], other[fact]) for fact in ("coordinate system", "types of bands", "colours of bands")
        ]
        facts += [(fact, first[fact], other[fact]) for fact in ("scales", "offsets")]
        grown = max(
            abs(one / step - 1) * other[length]
            for one, step, length in zip(steps, (step_x, step_y), ("width", "height"))
        )
        if grown > BESIDE_GRID:
            facts.append(("pixel's size", (step_x, step_y), steps))
        place = (other["place"].c - first["place"].c) / step_x, (first["place"].f - other["place"].f) / step_y
        places.append(tuple(map(round, place)))
        if max(abs(edge - whole) for edge, whole in zip(place, places[-1])) > BESIDE_GRID:
            facts.append(
                ("upper left corners", (first["place"].c, first["place"].f), (other["place"].c, other["place"].f))
            )
        for fact, ours, theirs in facts:
            if ours != theirs:
                more = ", no whole number of pixels apart" if fact.startswith("upper") else ""
                raise ValueError(
                    f"{first['path']} and {other['path']} are no mosaic: their {fact} are {ours} and {theirs}{more}. "
                    f"Warp them to one grid first."
                )
    stated = {repr(file["nodata"]): file["path"] for file in files if file["nodata"] is not None}
    if len(stated) > 1:
        raise ValueError(
            f"{' and '.join(list(stated.values())[:2])} are no mosaic: their nodata are {' and '.join(list(stated)[:2])}. Write "
            f"them with one value."
        )
    first_column, first_row = min(column for column, _ in places), min(row for _, row in places)
    left, top = first["place"].c + first_column * step_x, first["place"].f - first_row * step_y
    places = [(column - first_column, row - first_row) for column, row in places]
    width = max(column + file["width"] for (column, _), file in zip(places, files))
    height = max(row + file["height"] for (_, row), file in zip(places, files))
    nodata = next((file["nodata"] for file in files if file["nodata"] is not None), None)

    def sources(band, masks=False):
        for (column, row), file in zip(places, files):
            size = f'xSize="{file["width"]}" ySize="{file["height"]}"'
            # A later file hides an earlier one only where it has pixels: of a mask where any band has.
            hidden = 0 if masks else file["nodata"]
            bands = range(1, len(file["types of bands"]) + 1) if masks and file["nodata"] is not None else [band]
            for number in bands:
                yield (
                    f"<ComplexSource><SourceFilename>{escape(file['path'])}</SourceFilename>"
                    f"<SourceBand>{'mask,' if masks else ''}{number}</SourceBand>"
                    f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="{column}" yOff="{row}" {size}/>'
                    + ("" if hidden is None else f"<NODATA>{hidden}</NODATA>")
                    + "</ComplexSource>"
                )

    blocks = f'blockXSize="{first["block"][1]}" blockYSize="{first["block"][0]}"'
    bands = "".join(
        f'<VRTRasterBand dataType="{TYPES[dtype]}" band="{number}" {blocks}><ColorInterp>{colour.capitalize()}</ColorInterp>'
        f"{'' if nodata is None else f'<NoDataValue>{nodata}</NoDataValue>'}"
        f"<Offset>{first['offsets'][number - 1]}</Offset><Scale>{first['scales'][number - 1]}</Scale>"
        f"{''.join(sources(number))}</VRTRasterBand>"
        for number, (dtype, colour) in enumerate(zip(first["types of bands"], first["colours of bands"]), 1)
    )
    mask = f'<MaskBand><VRTRasterBand dataType="Byte" {blocks}>{"".join(sources(1, masks=True))}</VRTRasterBand></MaskBand>'
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
        with memory.open(
            driver="GTiff", crs=crs, transform=rio.transform(), nodata=rio.nodata, BIGTIFF="IF_SAFER", **profile
        ) as file:
            file.write(values)
        return bytes(memory.getbuffer())
