"""The page: it holds the question, the answer, the image and every token, and asks for nothing from outside."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import rasterio
from affine import Affine
from made_up import ABOUT, GRIDS, ROTATED, SCALES, compression
from PIL import Image
from uhr_bat.geo import Georeference, Served, evidence_frame, page_html, write_page
from uhr_bat.geo.pages import PAGE_SIDE

PLAIN = Georeference()
UTM = Georeference(Affine(*ROTATED), rasterio.CRS.from_epsg(32654))


class Page(HTMLParser):
    """Attributes of every element by tag, and all text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.html, self.elements, self.text, self.inside = path.read_text(encoding="utf-8"), {}, "", ""
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.elements.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data

    def picture(self, number):
        """The number-th image of the SVG, decoded."""
        return Image.open(io.BytesIO(base64.b64decode(self.elements["image"][number]["href"].partition(",")[2])))


def page_of(tmp_path, image, georeference=PLAIN, about=ABOUT, slots=None, regions=None):
    size = image.height, image.width
    result = compression(size, slots, regions)
    frame = evidence_frame(result, size, SCALES)
    write_page(tmp_path / "page.html", result, frame, image, SCALES, about, georeference)
    return result, frame, Page(tmp_path / "page.html")


def test_the_page_asks_for_nothing_and_shows_texts_as_they_are(tmp_path):
    about = {"image": "a&b.tif", "question": "</script><script>alert(1)</script>", "answer": "<img src=x> {{ 7 * 7 }}"}
    _, _, page = page_of(tmp_path, Image.new("RGB", (70, 45), (10, 20, 30)), UTM, about)
    assert len(page.elements["script"]) == 1 and "img" not in page.elements and "link" not in page.elements
    sources = [
        element[name]
        for tag in page.elements.values()
        for element in tag
        for name in ("src", "href")
        if name in element
    ]
    assert len(sources) == 1 + len(SCALES) and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://(?!www\.w3\.org)", page.html)
    for text in about.values():
        assert text in page.text


@pytest.mark.parametrize("size", [(70, 45), (45, 70), (9, 5_000)])
def test_the_image_is_shown_without_its_letterbox_and_never_enlarged(tmp_path, size):
    height, width = size
    image = Image.new("RGB", (width, height), (200, 40, 40))
    image.paste((40, 40, 200), (0, 0, max(1, width // 2), height))
    _, _, page = page_of(tmp_path, image)
    picture = page.picture(0)
    factor = min(1, PAGE_SIDE / max(size))
    assert picture.size == (round(width * factor), round(height * factor))
    pixels = np.asarray(picture).astype(int)
    assert np.abs(pixels[:, : picture.width // 3] - (40, 40, 200)).max() < 20
    assert np.abs(pixels[:, -picture.width // 3 :] - (200, 40, 40)).max() < 20
    # On the SVG it lies on its own pixels, and the maps of importance on the square around it.
    first, *maps = page.elements["image"]
    assert (first["width"], first["height"]) == (str(width), str(height))
    side = max(size)
    for heat in maps:
        assert [float(heat[name]) for name in ("x", "y")] == [-((side - width) // 2), -((side - height) // 2)]
        assert heat["width"] == heat["height"] == str(side)


def test_importance_is_as_opaque_as_it_is_great_and_nothing_on_the_letterbox(tmp_path):
    result, _, page = page_of(tmp_path, Image.new("RGB", (70, 45)))
    for scale_idx, (grid, importance) in enumerate(zip(GRIDS, result.importance[0])):
        heat = np.asarray(page.picture(1 + scale_idx))
        assert heat.shape == (*grid, 4)
        importance, opacity = importance.numpy().ravel(), heat[..., 3].ravel()
        assert opacity[importance == 0].max(initial=0) == 0 and opacity[importance.argmax()] == 255
        order = importance.argsort()
        assert (np.diff(opacity[order].astype(int)) >= 0).all()


def outline(path):
    """{rings} of an SVG path, each a tuple of (x, y)."""
    rings = re.findall(r"M([^Z]*)Z", path)
    assert "".join(f"M{ring}Z" for ring in rings) == path
    return [[tuple(map(float, point.split(","))) for point in ring.split()] for ring in rings]


def test_every_token_is_outlined_in_the_image_and_listed_by_rank(tmp_path):
    slots = [[0, 0, 1, -1], [-1] * 16, [1] + [-1] * 33 + [0, 1]]
    _, frame, page = page_of(
        tmp_path, Image.new("RGB", (24, 24)), UTM, slots=slots, regions=[[0] * 4, [-1] * 16, [0] * 36]
    )
    outlines = {int(path["data-rank"]): path for path in page.elements["path"] if "data-rank" in path}
    rows = [int(row["data-rank"]) for row in page.elements["tr"] if "data-rank" in row]
    assert rows == [1, 2, 3, 4] and set(outlines) == set(rows)
    for row in frame.itertuples():
        rings = outline(outlines[row.rank]["d"])
        expected = [
            ring for part in getattr(row.geometry, "geoms", [row.geometry]) for ring in [part.exterior, *part.interiors]
        ]
        assert [sorted(ring) for ring in rings] == [
            sorted(map(tuple, np.round(ring.coords[:-1], 1))) for ring in expected
        ]
        assert row.kind in outlines[row.rank]["class"].split()
    assert "merged: 2 of them" in re.sub(r"\s+", " ", page.text)


@pytest.mark.parametrize(
    "georeference, words",
    [
        (PLAIN, "column 6, row 6"),
        (Georeference(Affine(2, 0, 100, 0, -2, 50)), "x 112.00, y 38.00"),
        (
            Georeference(Affine(2, 0, 500000, 0, -2, 0), rasterio.CRS.from_epsg(32654)),
            "longitude 141.000108, latitude -0.000109",
        ),
        (
            Georeference(Affine(0.5, 0, 180, 0, -0.5, 50), rasterio.CRS.from_epsg(4326)),
            "longitude -177.000000, latitude 47.000000",
        ),
        (
            Georeference(Affine(2, 0, 100, 0, -2, 50), rasterio.CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]')),
            "x 112.00, y 38.00",
        ),
    ],
)
def test_a_token_is_placed_in_degrees_or_in_what_the_image_has(tmp_path, georeference, words):
    slots = [[0, -1, -1, -1], [-1] * 16, [-1] * 36]
    _, _, page = page_of(
        tmp_path, Image.new("RGB", (24, 24)), georeference, slots=slots, regions=[[0] * 4, [-1] * 16, [-1] * 36]
    )
    assert [row["data-place"] for row in page.elements["tr"] if "data-rank" in row] == [words]


# Within another page


def elements(html, tmp_path):
    (tmp_path / "served.html").write_text(html, encoding="utf-8")
    return Page(tmp_path / "served.html")


def test_a_served_page_names_where_its_image_is_and_leaves_the_answer_to_the_page_around_it(tmp_path):
    image = Image.new("RGB", (70, 45))
    result, frame, alone = page_of(tmp_path, image)
    served = Served("/a/overview.jpg", 70, "/a/detail.jpg")
    page = elements(page_html(result, frame, image, SCALES, ABOUT, served=served), tmp_path)
    overview, detail, *heats = page.elements["image"]
    assert overview["href"] == "/a/overview.jpg" and "href" not in detail
    assert [heat["href"] for heat in heats] == [heat["href"] for heat in alone.elements["image"][1:]]
    assert "/a/detail.jpg?box=" in page.html and "detail" not in alone.html
    assert "header" in alone.elements and "header" not in page.elements
    assert [path.get("d") for path in page.elements["path"]] == [path.get("d") for path in alone.elements["path"]]


def test_before_any_question_a_served_page_shows_the_image_alone(tmp_path):
    served = Served("/a/overview.jpg", 70, "/a/detail.jpg")
    html = page_html(None, None, Image.new("RGB", (70, 45)), SCALES, {"image": "a.tif"}, served=served)
    page = elements(html, tmp_path)
    assert len(page.elements["image"]) == 2 and "tr" not in page.elements and "input" not in page.elements
    assert not [path for path in page.elements["path"] if "data-rank" in path]
