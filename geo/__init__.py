"""What a question kept of an image as GIS software reads it: polygons, a raster, and a page with a map.

`evidence_frame` (a GeoDataFrame), `write_vectors` (GeoJSON, GeoPackage), `write_raster` (GeoTIFF), `write_style` (QGIS) and
`write_page` (HTML) are drawn from the result of `model.compress(...)` alone, as the pictures are. `uhr-bat evidence-map` does all of
it, and writes what changed since an earlier image (`changes_frame`). `objects_frame` and `write_objects` (CSV, too) are of the objects that an answer points to.
"""

from .changes import changes_frame
from .frames import evidence_frame, visual_tokens
from .georeference import Georeference, read_georeference
from .ground import object_members, on_ground
from .objects import Answered, check_objects, objects_frame, write_joined, write_objects
from .pages import Served, overview_jpeg, page_html, write_page
from .styles import write_style
from .writing import check_vectors, geojson_bytes, write_raster, write_vectors

__all__ = [
    "Answered",
    "Georeference",
    "Served",
    "changes_frame",
    "check_objects",
    "check_vectors",
    "evidence_frame",
    "geojson_bytes",
    "object_members",
    "objects_frame",
    "on_ground",
    "overview_jpeg",
    "page_html",
    "read_georeference",
    "visual_tokens",
    "write_joined",
    "write_objects",
    "write_page",
    "write_raster",
    "write_style",
    "write_vectors",
]
