"""How QGIS shows the importance raster: a style beside it, of the same name, which it takes by itself."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ..common.files import whole_files
from ..pictures.pages import ATTENTION_PERCENTILE

# Yellow is seen on land and on sea, and is none of the outlines' colours.
ATTENTION_COLOUR = "#ffd400"
# What a style of ours says of itself: one that QGIS has saved since does not.
MARK = "written by uhr-bat"


def style_path(raster: Path) -> Path | None:
    """The file of a raster's style; None where somebody's own is there, which stays."""
    path = Path(raster).with_suffix(".qml")
    return None if path.is_file() and MARK.encode() not in path.read_bytes() else path


def shown_range(importance) -> tuple[float, float]:
    """Least importance of an array, which nothing is seen of, and that from which on the colour is full; NaN is no data."""
    seen = importance[np.isfinite(importance)]
    low, high = (float(seen.min()), float(np.percentile(seen, ATTENTION_PERCENTILE))) if seen.size else (0.0, 1.0)
    return low, max(high, low + 1e-12)


def write_style(path: Path, importance, band: int):
    """A QGIS style (.qml), whole or not at all: the more opaque, the more the question looks there.

    Args:
        importance: float[H, W] of the band that is shown, NaN where it has no data.
        band: from 1.
    """
    low, high = (repr(edge) for edge in shown_range(importance))
    root = ElementTree.Element("qgis", version="3.22", styleCategories="Symbology")
    root.append(ElementTree.Comment(f" {MARK} "))
    pipe = ElementTree.SubElement(root, "pipe")
    renderer = ElementTree.SubElement(
        pipe, "rasterrenderer", type="singlebandpseudocolor", band=str(band), opacity="1", alphaBand="-1",
        classificationMin=low, classificationMax=high,
    )  # fmt: skip
    shader = ElementTree.SubElement(renderer, "rastershader")
    ramp = ElementTree.SubElement(
        shader, "colorrampshader", colorRampType="INTERPOLATED", classificationMode="1", clip="0",
        minimumValue=low, maximumValue=high,
    )  # fmt: skip
    for value, alpha in ((low, "0"), (high, "255")):
        ElementTree.SubElement(ramp, "item", value=value, label=value, color=ATTENTION_COLOUR, alpha=alpha)
    ElementTree.SubElement(pipe, "rasterresampler", maxOversampling="2")
    text = ElementTree.tostring(root, encoding="unicode")
    with whole_files(Path(path).parent) as built:
        (built / Path(path).name).write_text(f"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n{text}\n")
