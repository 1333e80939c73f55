"""`uhr-bat evidence-map`: a question to an image, and the files that it leaves."""

import json
import re
import sys

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from uhr_bat.common.loading import ROOT, WEIGHTS_NOTE
from uhr_bat.geo import __main__ as command
from uhr_bat.scenes import painting

CRS, TRANSFORM = rasterio.CRS.from_epsg(32654), rasterio.Affine(2.4, 0, 375141.6, 0, -2.4, 3908606.4)
QUESTION = "What colour is the plane at the runway?"
SIZE = (200, 160)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A made-up scene as a plain image and as a GeoTIFF."""
    folder = tmp_path_factory.mktemp("scene")
    image = painting.example(SIZE)
    image.save(folder / "scene.png")
    profile = {
        "driver": "GTiff",
        "height": SIZE[1],
        "width": SIZE[0],
        "count": 3,
        "dtype": "uint8",
        "photometric": "rgb",
    }
    with rasterio.open(folder / "scene.tif", "w", crs=CRS, transform=TRANSFORM, **profile) as raster:
        raster.write(np.asarray(image).transpose(2, 0, 1))
    return folder


@pytest.mark.slow
def test_a_raster_becomes_polygons_a_raster_and_a_page(scene, tmp_path, capsys):
    files = {name: tmp_path / f"new/kept.{ending}" for name, ending in
             (("geojson", "geojson"), ("geopackage", "gpkg"), ("raster", "tif"), ("page", "html"))}  # fmt: skip
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert command.main([str(scene / "scene.tif"), QUESTION, *options, "--budgets", "4,6,8,12"]) == 0
    printed = capsys.readouterr().out
    (answer,) = [line.removeprefix("Answer: ") for line in printed.splitlines() if line.startswith("Answer: ")]
    assert answer and WEIGHTS_NOTE in printed and all(f"{path}\n" in printed for path in files.values())
    assert "Coordinates" not in printed
    about = {"image": "scene.tif", "question": QUESTION, "answer": answer, "note": WEIGHTS_NOTE}
    assert about.items() <= json.loads(files["geojson"].read_text(encoding="utf-8")).items()

    polygons, package = gpd.read_file(files["geojson"]), gpd.read_file(files["geopackage"])
    assert polygons.crs.to_epsg() == 4326 and package.crs.to_epsg() == 32654
    assert polygons.groupby("scale").size().to_dict() == {64: 4, 128: 6, 256: 8, 384: 12}
    with rasterio.open(files["raster"]) as raster:
        assert (raster.crs, raster.transform, raster.shape) == (CRS, TRANSFORM, SIZE[::-1])
        assert about.items() <= raster.tags().items()
        # Where a kept token lies, the raster has its score.
        for row in package[package["kind"] == "kept"].itertuples():
            place = row.geometry.representative_point()
            ((*scores,),) = raster.sample([(place.x, place.y)])
            assert scores[[64, 128, 256, 384].index(row.scale)] == np.float32(row.score)
    page = files["page"].read_text(encoding="utf-8")
    assert QUESTION in page and "WGS 84 / UTM zone 54N" in page and page.count('<path class="token') == 30


@pytest.mark.slow
def test_a_plain_image_has_pixel_coordinates_and_says_so(scene, tmp_path, capsys):
    arguments = [str(scene / "scene.png"), QUESTION, "--geojson", str(tmp_path / "kept.geojson"), "--budgets", "20"]
    assert command.main([*arguments, "--page", str(tmp_path / "kept.html")]) == 0
    assert "Coordinates in the files are pixels of the image" in capsys.readouterr().out
    content = json.loads((tmp_path / "kept.geojson").read_text(encoding="utf-8"))
    assert content["coordinate_space"].startswith("pixels") and "crs" not in content
    assert len(content["features"]) == 20
    left, top, right, bottom = gpd.read_file(tmp_path / "kept.geojson").total_bounds
    assert 0 <= left < right <= SIZE[0] and 0 <= top < bottom <= SIZE[1] and bottom > 1


@pytest.mark.slow
def test_the_part_of_a_raster_that_is_read_keeps_its_place(scene, tmp_path):
    arguments = [str(scene / "scene.tif"), QUESTION, "--geopackage", str(tmp_path / "kept.gpkg"), "--budgets", "20"]
    assert command.main([*arguments, "--window", "40,60,100,140", "--bands", "3,2,1"]) == 0
    (left, top), (right, bottom) = TRANSFORM * (60, 40), TRANSFORM * (140, 100)
    west, south, east, north = gpd.read_file(tmp_path / "kept.gpkg").total_bounds
    assert left - 1e-6 <= west < east <= right + 1e-6 and bottom - 1e-6 <= south < north <= top + 1e-6


@pytest.mark.slow
def test_a_run_that_fails_leaves_every_output_as_it_was(scene, tmp_path, capsys, monkeypatch):
    gpd.GeoDataFrame({"a": [1]}, geometry=gpd.points_from_xy([0], [0])).to_file(tmp_path / "kept.gpkg", layer="parcels")
    for name in ("kept.geojson", "kept.tif", "kept.tif.ovr", "kept.html"):
        (tmp_path / name).write_text("old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(command, "write_page", full)
    options = ("--geojson", "kept.geojson", "--geopackage", "kept.gpkg", "--raster", "kept.tif", "--page", "kept.html")
    options = [part if part.startswith("--") else str(tmp_path / part) for part in options]
    assert command.main([str(scene / "scene.tif"), QUESTION, *options, "--budgets", "20"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_what_was_painted_over_since_is_what_changed(scene, tmp_path, capsys, monkeypatch):
    with rasterio.open(scene / "scene.tif") as raster:
        profile, pixels = raster.profile, raster.read()
    pixels[:, 40:56, 96:112] = np.array([250, 20, 250], np.uint8)[:, None, None]
    later, apart, changes = (str(tmp_path / name) for name in ("later.tif", "apart.tif", "changes.geojson"))
    for path, place in ((later, TRANSFORM), (apart, rasterio.Affine(2.4, 0, 475141.6, 0, -2.4, 3908606.4))):
        with rasterio.open(path, "w", **{**profile, "transform": place}) as raster:
            raster.write(pixels)
    before = ["--before", str(scene / "scene.tif")]
    assert command.main([later, QUESTION, *before, "--changes", changes, "--max-new-tokens", "2"]) == 0
    found = gpd.read_file(changes).to_crs(CRS)
    x, y = rasterio.transform.xy(TRANSFORM, 48, 104, offset="ul")
    assert found.geometry[0].contains(gpd.points_from_xy([x], [y])[0]) and found.area.sum() < 6 * (16 * 2.4) ** 2
    monkeypatch.delattr(command, "load_model")
    assert command.main([apart, QUESTION, *before, "--changes", changes]) == 2
    assert "show no common ground: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_documented_python_runs(scene, monkeypatch, capsys):
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/evidence_maps.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(scene)
    names = {}
    exec(compile(block, "evidence_maps.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    assert len(names["frame"]) == len(names["out"].pooler_output[0]) and names["frame"].crs.to_epsg() == 32654


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Nothing to write: give --geojson, --geopackage, --raster, --page or --changes a file."),
        (["--geojson", "kept.shp"], "kept.shp: the file of --geojson ends in .geojson or .json."),
        (["--raster", "kept"], "kept: the file of --raster ends in .tif or .tiff."),
        (["--page", "kept.html", "--model", "nowhere"], "nowhere: this is no model folder"),
        (["--geojson", "{scene}/x.GEOJSON", "--raster", "{scene}/scene.tif"], "would write over a file that is read"),
        (["--geopackage", "{scene}/scene.tif.gpkg", "--layer", "gpkg_a"], "no layer can be called 'gpkg_a'"),
        (["--geojson", "x.json", "--area", "./x.json"], "--geojson would write over a file that is read"),
        (["--geojson", "x.json", "--bands", "9"], "`bands` is one band or three, numbers from 1 to 3. Got [9]."),
        (
            ["--geojson", "x.json", "--window", "0,0,1,1,EPSG:0"],
            "the coordinate system 'EPSG:0' of the window is not known",
        ),
        (["--geojson", "x.json", "--max-tiles", "1"], "`max_tiles` is 1, but the 4 tiles of the anchor"),
        (["--geojson", "x.json", "--budgets", "4,8"], "budgets"),
        (["--changes", "x.json"], "--changes are those since an earlier image: give it as --before."),
        (
            ["--changes", "x.json", "--before", "{scene}/scene.png", "--max-tiles", "455"],
            "--changes are of all that both images show, whose tiles are 456: --max-tiles must be at least that. Got 455.",
        ),
        (["--changes", "x.gpkg", "--before", "{scene}/scene.png"], "the file of --changes ends in .geojson or .json"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(scene, capsys, monkeypatch, arguments, message):
    monkeypatch.delattr(command, "load_model")
    arguments = [part.format(scene=scene) for part in arguments]
    assert command.main([str(scene / "scene.tif"), QUESTION, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_crs_without_degrees_is_refused_before_the_model_is_asked(scene, tmp_path, capsys, monkeypatch):
    with rasterio.open(scene / "scene.tif") as raster:
        profile, pixels = raster.profile, raster.read()
    with rasterio.open(tmp_path / "site.tif", "w", **{**profile, "crs": 'LOCAL_CS["site",UNIT["metre",1]]'}) as raster:
        raster.write(pixels)
    monkeypatch.delattr(command, "load_model")
    assert command.main([str(tmp_path / "site.tif"), QUESTION, "--geojson", str(tmp_path / "kept.geojson")]) == 2
    assert "site, leads to no longitude and latitude. Write a .gpkg, which keeps the CRS." in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_installs_it(scene, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "geopandas", None)
    assert command.main([str(scene / "scene.png"), QUESTION, "--geojson", "kept.geojson"]) == 2
    assert 'pip install "uhr-bat[geo]"' in capsys.readouterr().err
