"""The page in a real browser: opened, asked, moved and read by mouse and by keyboard, on wide and narrow screens.

Needs the extra "demo", playwright, and a Chromium: Debian's package, or the program that CHROMIUM names.
"""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason='pip install "uhr-bat[demo]"')
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt-get install chromium, or name it by CHROMIUM", allow_module_level=True)

import rasterio
from uhr_bat.common.loading import ROOT, WEIGHTS_NOTE
from uhr_bat.scenes import painting
from uhr_bat.serving import demo

pytestmark = pytest.mark.slow
sync_api.expect.set_options(timeout=20_000)
SIZES = {"desktop": (1400, 900), "tablet": (820, 1180), "phone": (390, 844)}
SCENE_SIZE = (2600, 2000)  # wider than what the map shows of an image at once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page is started: with a made-up scene, a GeoTIFF of it and a torn file."""
    folder = tmp_path_factory.mktemp("page")
    image = painting.example(SCENE_SIZE)
    image.save(folder / painting.DEFAULT_PATH)
    small = np.asarray(image.resize((520, 400))).transpose(2, 0, 1)
    profile = {"driver": "GTiff", "height": 400, "width": 520, "count": 3, "dtype": "uint8", "crs": "EPSG:32654"}
    with rasterio.open(
        folder / "scene.tif", "w", transform=rasterio.Affine(2, 0, 375000, 0, -2, 3908000), **profile
    ) as file:
        file.write(small)
    (folder / "torn.tif").write_bytes(b"II*\0 nothing")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = Path.cwd()
    os.chdir(folder)
    page = demo.serve(ROOT, port=port, wait=False)
    yield f"http://127.0.0.1:{port}/"
    page.close()
    os.chdir(before)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address, request):
    """The page on a screen of some size, "desktop" unless said. It must ask nobody else, and complain of nothing."""
    width, height = SIZES[getattr(request, "param", "desktop")]
    page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
    page.set_default_timeout(20_000)
    complaints, outside = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("response", lambda answer: complaints.append(answer.url) if answer.status >= 400 else None)
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else outside.append(asked.url),
    )
    page.goto(address)
    page.get_by_label("Question", exact=True).wait_for()
    yield page
    page.close()
    assert (complaints, outside) == ([], [])


def the_map(page):
    return page.frame_locator("#map iframe")


def outlines(page):
    return the_map(page).locator("path.token")


def open_scene(page):
    page.get_by_role("button", name="Made-up scene").click()
    page.get_by_text(re.compile("made_up_scene.jpg: 2,600 × 2,000 px")).wait_for()
    the_map(page).locator("svg image").first.wait_for()


def view(page):
    return the_map(page).locator("svg").get_attribute("viewBox")


def wait_for_tokens(page, number):
    page.get_by_text(re.compile(rf"Answered in \d+\.\d\d s from {number} of [\d,]+ visual tokens")).wait_for()
    sync_api.expect(outlines(page)).to_have_count(number)


def wait_for_a_pixel_for_a_pixel(page):
    """Until the part in sight has come at its full resolution: the steps of zooming before it ask for parts too."""
    page.wait_for_function(
        """() => {const inside = document.querySelector("#map iframe").contentDocument;
        const asked = new URL(inside.querySelector("#detail").getAttribute("href") || "", "http://a").searchParams;
        const [top, left, bottom, right] = (asked.get("box") || "").split(",").map(Number);
        const side = Math.max(bottom - top, right - left);
        return side < 2600 && Number(asked.get("side")) === side;}"""
    )


def has_focus(page):
    return page.evaluate(
        """() => {const one = document.activeElement, label = one.labels?.[0]?.innerText;
        return (one.getAttribute("aria-label") || label || one.title || one.innerText || "").trim().split("\\n")[0];}"""
    )


@pytest.mark.parametrize("page", SIZES, indirect=True)
def test_a_scene_is_opened_asked_and_looked_at_on_every_screen(page):
    open_scene(page)
    sync_api.expect(page.locator("#status")).to_contain_text(
        re.compile(r"Encoded in .* s, once|encoded before, in .* s")
    )
    sync_api.expect(outlines(page)).to_have_count(0)
    sync_api.expect(page.get_by_label("Question", exact=True)).to_have_value(demo.QUESTION)
    page.get_by_label("Question", exact=True).press("Enter")
    wait_for_tokens(page, 146)
    assert page.locator("#answer .text").inner_text() and WEIGHTS_NOTE in page.locator("#answer").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = page.locator("#map iframe").bounding_box()
    assert box["width"] >= 290 and box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]


def test_another_budget_changes_answer_and_drawing_and_leaves_the_view(page):
    open_scene(page)
    page.get_by_role("button", name="Ask").click()
    wait_for_tokens(page, 146)
    for _ in range(4):
        the_map(page).get_by_role("button", name="Zoom in").click()
    wait_for_a_pixel_for_a_pixel(page)
    the_map(page).get_by_label("64 px: 4").uncheck()
    page.wait_for_timeout(400)  # the view is remembered when it rests
    before = view(page)
    assert before != "0 0 2600 2000"
    slider = page.get_by_role("slider").first
    slider.focus()
    for _ in range(6):
        slider.press("ArrowLeft")
    wait_for_tokens(page, 140)
    assert "The image was not encoded again." in page.locator("#answer").inner_text()
    assert view(page) == before and not the_map(page).locator("#scales input").first.is_checked()


def test_what_was_kept_is_downloaded(page, tmp_path):
    open_scene(page)
    page.get_by_role("button", name="Ask").click()
    wait_for_tokens(page, 146)
    for name, file in (("GeoJSON of the kept tokens", "kept.geojson"), ("PNG", "kept.png")):
        with page.expect_download() as download:
            page.get_by_role("link", name=name).click()
        assert download.value.suggested_filename == file
        download.value.save_as(tmp_path / file)
    collection = json.loads((tmp_path / "kept.geojson").read_text())
    assert len(collection["features"]) == 146 and collection["question"] == demo.QUESTION
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_all_is_reached_in_order_and_done_by_keyboard(page):
    open_scene(page)
    page.get_by_role("button", name="Ask").click()
    wait_for_tokens(page, 146)
    page.get_by_label("path or address").focus()
    reached = []
    while len(reached) < 20 and (not reached or reached[-1] != "IFRAME"):
        page.keyboard.press("Tab")
        inside = page.evaluate("document.activeElement.tagName") == "IFRAME"
        reached.append("IFRAME" if inside else has_focus(page))
    wanted = ["Open", "Made-up scene", "How a raster is read", "Question", "Ask", "GeoJSON of the kept tokens"]
    assert [name for name in reached if name in wanted] == wanted and reached[-1] == "IFRAME"
    assert all(reached), reached  # nothing without a name
    # Inside the map: arrow keys move it.
    before = view(page)
    the_map(page).locator("#map").focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    assert view(page) != before


def test_a_raster_is_dropped_and_read_as_is_said(page, folder):
    page.get_by_role("button", name="How a raster is read").click()
    page.get_by_label("Bands").fill("3,2,1")
    page.locator("input[type=file]").set_input_files(folder / "scene.tif")
    page.get_by_text(re.compile("scene.tif: 520 × 400 px, EPSG:32654. Encoded in")).wait_for()
    page.get_by_label("Question", exact=True).fill("How many ships?")
    page.get_by_label("Question", exact=True).press("Enter")
    wait_for_tokens(page, 146)
    place = the_map(page).locator("#place")
    the_map(page).locator("svg").hover()
    assert "WGS 84 / UTM zone 54N" in place.inner_text()


def test_an_answer_stands_beside_its_own_image_whatever_is_opened_meanwhile(page, folder):
    answer, status = page.locator("#answer"), page.locator("#status")
    path, open_button = page.get_by_label("path or address"), page.get_by_role("button", name="Open", exact=True)
    open_scene(page)
    # Asked while another image is being opened: about that one.
    path.fill(str(folder / "scene.tif"))
    open_button.click()
    page.get_by_role("button", name="Ask").click()
    sync_api.expect(status).to_contain_text("scene.tif")
    sync_api.expect(answer).to_contain_text("About scene.tif. Answered in")
    # Opened while a question is being answered: nothing of its answer comes.
    page.get_by_label("Question", exact=True).fill("How many trees are there?")
    page.get_by_label("Question", exact=True).press("Enter")
    page.get_by_role("button", name="Made-up scene").click()
    sync_api.expect(status).to_contain_text("made_up_scene.jpg: 2,600")
    page.wait_for_timeout(3000)
    assert answer.inner_text() == ""
    sync_api.expect(outlines(page)).to_have_count(0)


def test_what_cannot_be_read_is_said_and_the_page_goes_on(page, folder):
    page.get_by_role("button", name="Ask").click()
    sync_api.expect(page.locator("#answer").get_by_role("alert")).to_contain_text("There is no image yet")
    alert, path = page.locator("#status").get_by_role("alert"), page.get_by_label("path or address")
    page.locator("input[type=file]").set_input_files(folder / "torn.tif")
    sync_api.expect(alert).to_contain_text("torn.tif: the image cannot be opened")
    page.get_by_role("button", name="How a raster is read").click()
    page.get_by_label("Value range").fill("much")
    path.fill(str(folder / "scene.tif"))
    page.get_by_role("button", name="Open", exact=True).click()
    sync_api.expect(alert).to_contain_text("Value range is written as")
    page.get_by_label("Value range").fill("")
    page.get_by_role("button", name="Open", exact=True).click()
    page.get_by_text("scene.tif: 520 × 400 px").wait_for()
    sync_api.expect(page.get_by_role("alert")).to_have_count(0)
    # A mistake leaves the image before.
    path.fill(str(folder / "none.tif"))
    path.press("Enter")
    sync_api.expect(alert).to_contain_text("none.tif: there is no such image file.")
    page.get_by_label("Question", exact=True).fill("How many ships?")
    page.get_by_label("Question", exact=True).press("Enter")
    wait_for_tokens(page, 146)
