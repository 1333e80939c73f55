"""The pages of the repository: the drawing names what there is, links lead somewhere, and the index has every page."""

import ast
import re
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from uhr_bat.common.loading import ROOT

FOLDERS = ("", "*/", "*/*/")
PAGES = sorted(
    page
    for folder in FOLDERS
    for page in ROOT.glob(f"{folder}*.md")
    if not any(part.startswith(".") or part in ("build", "dist", "shared") for part in page.relative_to(ROOT).parts)
)
SVG = "{http://www.w3.org/2000/svg}"


def text_of(element):
    return "".join(element.itertext()).strip()


def defined(path):
    """Functions, methods and classes of a file, and the names that stand at its top."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {node.name for node in nodes if hasattr(node, "name")}


def test_the_drawing_names_functions_classes_files_and_folders_that_are_there():
    drawing = ElementTree.parse(ROOT / "docs/data_flow.svg").getroot()
    boxes = [group for group in drawing.iter(f"{SVG}g") if group.get("class") in ("image", "question")]
    assert len(boxes) == 9
    for box in boxes:
        named = {kind: [text_of(one) for one in box if one.get("class") == kind] for kind in ("file", "name")}
        (file,) = named["file"]
        assert named["name"] and set(named["name"]) <= defined(ROOT / f"{file}_uhr_bat.py"), file
    folders = [text_of(one) for one in drawing.iter(f"{SVG}tspan") if "folder" in one.get("class", "")]
    assert folders and all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_the_structure_names_every_file_of_the_model_once_and_functions_where_they_are():
    page = (ROOT / "docs/structure.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(path.stem.removesuffix("_uhr_bat") for path in ROOT.glob("*_uhr_bat.py"))
    rows = re.findall(r"^\| [^|]+ \| `([\w.]+)` \| `(\w+\.py)` \|", page, re.M)
    assert len(rows) > 10
    for name, file in rows:
        assert name.split(".")[-1] in defined(ROOT / file), (name, file)
    folders = re.findall(r"^\| `(\w+)/`", page, re.M)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"build"} <= set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_the_index_has_every_page():
    index = ROOT / "docs/README.md"
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", index.read_text(encoding="utf-8"))
    listed = {(index.parent / link).resolve() for link in links}
    assert [str(page.relative_to(ROOT)) for page in PAGES if page.resolve() not in listed | {index.resolve()}] == []


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / unquote(name)).resolve() if name else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link
