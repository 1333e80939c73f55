"""One HTML file that shows what was kept on the image: it opens offline, in any browser, and asks for nothing.

The image, the importance of every scale and the outlines of the kept tokens are one SVG in pixels of the image, which
the template (`page.html.jinja`) surrounds with the question, the answer and a list of the tokens.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..common.files import whole_files
from ..common.objects import ImageObject
from ..geometry_uhr_bat import letterbox
from ..pictures.drawing import PALETTE, parse_colour, screen_image
from .degrees import in_degrees
from .frames import KEPT
from .georeference import PLAIN, Georeference, crs_name, has_degrees
from .styles import ATTENTION_COLOUR, shown_range
from .writing import shown_importance

# Longest side in pixels of the image in the page, about 1 MB of it.
PAGE_SIDE = 2048
JPEG_QUALITY = 82


class Served(NamedTuple):
    """What a server has of the image beside its page.

    Attributes:
        overview: URL of the whole image, `PAGE_SIDE` pixels at most.
        overview_width: its width in pixels.
        detail: URL of a part of the image, to which the page adds `?box=top,left,bottom,right&side=pixels`.
    """

    overview: str
    overview_width: int
    detail: str


def write_page(path: Path, *args, **kwargs):
    """The page of `page_html` as a file, whole or not at all."""
    html = page_html(*args, **kwargs)
    with whole_files(Path(path).parent) as built:
        (built / Path(path).name).write_text(html, encoding="utf-8")


def page_html(
    compressed,
    frame,
    image,
    scales: Sequence[int],
    about: dict[str, str],
    georeference: Georeference = PLAIN,
    *,
    image_idx: int = 0,
    served: Served | None = None,
    objects: Sequence[ImageObject] = (),
) -> str:
    """The page.

    Args:
        compressed: what `model.compress` returned; None for the image alone, before any question.
        frame: of `evidence_frame` in pixels of the image, without a transform; None for the image alone.
        image: that the model saw, as `processor.image_processor.fetch_images` returns it.
        scales: sides of the views in pixels, `compressed.scales[image_idx]`.
        about: texts, shown as they are: `question`, `answer`, `image` (its name), and perhaps `note`, which stands
            below the answer.
        georeference: of the image, for the coordinates of places.
        image_idx: which image of the batch.
        served: where the page is a part of another one that says question and answer, and a server has the image: it is
            then shown at its full resolution. None for a page that holds everything.
        objects: that the answer points to, outlined and named.

    Raises:
        ValueError: the result comes from a `dynamic_pyramid`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if compressed is not None:
        compressed.check_letterbox()
    side, top, left = letterbox((image.height, image.width))
    maps = [] if compressed is None else zip(scales, compressed.importance[image_idx], compressed.regions[image_idx])
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        about=about,
        width=image.width,
        height=image.height,
        square=(-left, -top, side),
        picture=served.overview if served else _data_uri(overview_jpeg(image), "jpeg"),
        attention=[(scale, _data_uri(_png(_heat(shown_importance(*values))), "png")) for scale, *values in maps],
        colours={} if compressed is None else {scale: PALETTE[idx % len(PALETTE)] for idx, scale in enumerate(scales)},
        tokens=[] if frame is None else _tokens(frame, georeference),
        transform=None if georeference.transform is None else tuple(georeference.transform)[:6],
        crs=georeference.words if georeference.crs is None else crs_name(georeference.crs),
        served=served,
        objects=[_object(one) for one in objects],
    )


def _object(one) -> dict:
    """What the page says of an object, and the `d` of its path: a box, or a point, which is drawn as a line of no length."""
    left, top, right, bottom = (f"{edge:.2f}" for edge in one.edges)
    score = "" if one.score is None else f", {100 * one.score:.0f} %"
    path = f"M{left},{top}h0" if one.box is None else f"M{left},{top}H{right}V{bottom}H{left}Z"
    return {"path": path, "words": (one.label or "object") + score, "is_point": one.box is None}


def overview_jpeg(image, longest: int = PAGE_SIDE, box=None) -> bytes:
    """A JPEG of an image, or of a box (top, left, bottom, right) of it, with the longer side at most `longest` pixels."""
    file = io.BytesIO()
    screen_image(image, longest, box).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _heat(importance) -> Image.Image:
    """RGBA [H, W] of importance float[H, W]: the more opaque, the more the question looks there."""
    low, high = shown_range(importance)
    strength = ((np.nan_to_num(importance, nan=low) - low) / (high - low)).clip(0, 1)
    pixels = np.empty((*strength.shape, 4), np.uint8)
    pixels[..., :3] = parse_colour(ATTENTION_COLOUR)
    pixels[..., 3] = np.rint(255 * strength)
    return Image.fromarray(pixels)


def _png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _tokens(frame, georeference) -> list[dict]:
    """What the page says of every token, the best first."""
    kept = frame["kind"] == KEPT
    # The centre of several tokens may lie in none of them.
    points = frame.centroid.where(kept, frame.representative_point())
    rows = frame.drop(columns="geometry").assign(
        path=frame.geometry.map(_path),
        place=_places(points, georeference),
        times=frame["score"] / frame["score"].mean(),
        kept=kept,
    )
    return rows.sort_values("rank").to_dict("records")


def _places(points, georeference) -> list[str]:
    """Points in pixels, a GeoSeries, in words: degrees, or what is nearest to them."""
    words = "column {:.0f}, row {:.0f}"
    if georeference.transform is not None:
        words = "x {:.2f}, y {:.2f}"
        points = points.affine_transform(georeference.transform.to_shapely())
    if georeference.crs is not None and has_degrees(georeference.crs):
        words = "longitude {:.6f}, latitude {:.6f}"
        points = in_degrees(points, georeference.crs)
    return ["letterbox" if point.is_empty else words.format(point.x, point.y) for point in points]


def _path(outline) -> str:
    """The `d` of an SVG path: every ring of a polygon or of several, to a tenth of a pixel."""
    import shapely

    rings = shapely.get_rings(shapely.get_parts(outline))
    points = (" ".join(f"{x:.1f},{y:.1f}" for x, y in shapely.get_coordinates(ring)[:-1]) for ring in rings)
    return "".join(f"M{ring}Z" for ring in points)
