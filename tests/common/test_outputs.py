"""Outputs are checked before a command's work begins: nothing that is read is written over, and all can be written."""

import os
import re
import zipfile

import numpy as np
import pytest
import rasterio
from rasterio.shutil import copy
from uhr_bat import cli
from uhr_bat.common.files import whole_files, whole_outputs
from uhr_bat.common.loading import ROOT
from uhr_bat.common.outputs import MODEL_FILES, Output, check_outputs


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A GeoTIFF with overviews beside it, a link to it, a hard link, a zip with it, a VRT and a VRT of that."""
    folder = tmp_path_factory.mktemp("image")
    path = folder / "a b.tif"
    with rasterio.open(path, "w", driver="GTiff", width=64, height=64, count=3, dtype="uint8", photometric="RGB") as file:
        file.write(np.zeros((3, 64, 64), np.uint8))
    copy(path, folder / "once.vrt", driver="VRT")
    (folder / "twice.vrt").write_text((folder / "once.vrt").read_text().replace("a b.tif", "once.vrt"))
    (folder / "a b.tif.ovr").write_bytes(b"")
    (folder / "link.tif").symlink_to(path)
    os.link(path, folder / "hard.tif")
    with zipfile.ZipFile(folder / "c.zip", "w") as file:
        file.write(path, "a.tif")
    return path


@pytest.mark.parametrize(
    "source, output",
    [
        ("{0}/a b.tif", "a b.tif"),
        ("{0}/a b.tif", "../{1}/a b.tif"),
        ("{0}/a b.tif", "link.tif"),
        ("{0}/a b.tif", "hard.tif"),
        ("{0}/link.tif", "a b.tif"),
        ("file://{0}/a%20b.tif", "a b.tif"),
        ("{0}/a b.tif", "a b.tif.ovr"),
        ("{0}/once.vrt", "a b.tif"),
        ("{0}/twice.vrt", "hard.tif"),
        ("{0}/twice.vrt", "once.vrt"),
        ("GTIFF_DIR:1:{0}/a b.tif", "a b.tif"),
        ("vrt://{0}/a b.tif?bands=3,2,1", "link.tif"),
        ("/vsisubfile/0_9,{0}/a b.tif", "a b.tif"),
        ("/vsizip/{{{0}/c.zip}}/a.tif", "c.zip"),
        ("zip://{0}/c.zip!a.tif", "c.zip"),
        ("{0}", "a b.tif"),  # a mosaic of the folder
        ("{0}", "a b.tif.ovr"),
        (str(ROOT), str(ROOT / "config.json")),
    ],
)
def test_what_is_read_is_never_written_over_whatever_it_is_called(image, source, output):
    folder = image.parent
    path = folder / output.format(folder, folder.name)
    with pytest.raises(ValueError, match="--page would write over a file that is read"):
        check_outputs([source.format(folder)], Output("--page", path))
    with pytest.raises(ValueError, match="would write over a file that is read"):
        check_outputs([source.format(folder)], Output("--output", path.parent, names=(path.name,)))
    check_outputs([source.format(folder)], Output("--page", folder / "new.html"), Output("--output", folder / "o", names=("a b.tif",)))


@pytest.mark.parametrize(
    "output, message",
    [
        (Output("--page", "a.png", (".html", ".htm")), "a.png: the file of --page ends in .html or .htm."),
        (Output("--page", "folder.html", (".html",)), "folder.html: --page writes a file of this name, and this is a folder"),
        (Output("--page", "file/a.html"), "file/a.html: --page cannot be written, file is no folder"),
        (Output("--output", "file", names=()), "file: --output is a folder, and this is a file"),
        (Output("--output", ".", names=("folder.html",)), "folder.html: --output writes a file of this name"),
        (Output("--page", "kept.html"), "kept.html: --page would write over a file that is protected against writing"),
        (Output("--page", "/proc/none/a.html"), "/proc/none/a.html: --page cannot be written into /proc"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name_and_nothing_is_made(tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "kept.html").write_text("")
    (tmp_path / "kept.html").chmod(0o444)
    with pytest.raises((ValueError, PermissionError), match=message):
        check_outputs([], Output("--raster", "new/a.tif"), output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html", "kept.html"]


def test_endings_in_any_case_are_as_good_and_new_folders_are_made_later(tmp_path):
    check_outputs([], Output("--page", tmp_path / "new/er/A.HTML", (".html",)), Output("--output", tmp_path / "o", names=()))
    assert not list(tmp_path.iterdir())


def test_two_outputs_are_never_one_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="a.html: --page and --output would be one file"):
        check_outputs([], Output("--page", tmp_path / "a.html"), Output("--output", tmp_path / "link", names=("a.html",)))


def test_a_replaced_file_loses_what_was_kept_of_the_old_one(tmp_path):
    for name in ("a.tif", "a.tif.ovr", "a.tif.aux.xml", "a.tif.msk", "b.tif.ovr", "a.tif.txt"):
        (tmp_path / name).write_text("old")
    with whole_files(tmp_path) as built:
        (built / "a.tif").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "a.tif.txt", "b.tif.ovr"]
    assert (tmp_path / "a.tif").read_text() == "new"


def test_files_of_several_folders_are_all_replaced_or_none(tmp_path):
    paths = [tmp_path / "one/a.txt", tmp_path / "two/b.txt"]
    with pytest.raises(OSError, match="full"), whole_outputs(paths) as built:
        built[paths[0]].write_text("new")
        raise OSError("the disk is full")
    assert not any(path.exists() for path in paths)
    with whole_outputs(paths) as built:
        for path in paths:
            built[path].write_text("new")
    assert all(path.read_text() == "new" for path in paths)


# Whatever a command takes beside its outputs; BLOCKED stands for a folder that cannot be.
COMMANDS = {
    "ask": ["{image}", "q", "--objects", "{blocked}/a.geojson"],
    "detect": ["{image}", "ships", "--output", "{blocked}/a.geojson"],
    "pictures": ["{image}", "q", "--output", "{blocked}"],
    "evidence-map": ["{image}", "q", "--page", "{blocked}/a.html"],
    "regions": ["{image}", "--checkpoint", str(ROOT), "--output", "{blocked}"],
    "scene": ["--output", "{blocked}/a.png"],
    "evidence": ["--output", "{blocked}"],
    "evidence native": ["--output", "{blocked}"],
    "evidence points": ["--output", "{blocked}"],
    "evidence hosted": ["--output", "{blocked}"],
    "evaluate": ["scenes", "--output", "{blocked}"],
    "calibrate": ["--output", "{blocked}"],
    "evidence recall": ["scenes", "--output", "{blocked}"],
    "evidence ablations": ["table-8", "--output", "{blocked}"],
    "evidence partitions": ["--output", "{blocked}"],
    "export": ["--checkpoint", str(ROOT), "--output", "{blocked}"],
    "tiny build": ["--output", "{blocked}"],
    "export 7b-config": ["--output", "{blocked}"],
    "train": ["--train_data", "none.json", "--use_cpu", "true", "--output_dir", "{blocked}"],
    **{
        f"tiny {name}": ["--model", str(ROOT), "--output", "{blocked}", *more]
        for name, more in (
            ("vision", []), ("finetune", []), ("zoom", ["--pools", "pools"]), ("point", ["--encoded", "encoded"]), ("focus", []), ("dates", []), ("exchange", ["--tower", str(ROOT)])
        )
    },
    "tiny plain": ["--form", "gemma3", "--pictures", "pictures", "--output", "{blocked}"],
    "batch": ["--images", "{image}", "--questions", "{image}", "--output", "{blocked}/a.parquet"],
    "bench": ["--output", "{blocked}"],
    "bench serve": ["--output", "{blocked}"],
    "bench gpu": ["--quick", "--device", "cpu", "--output", "{blocked}"],
}  # fmt: skip


def test_every_command_that_writes_is_here():
    modules = {verb: module for verb, (module, _) in cli.VERBS.items() if module}
    files = {verb: ROOT.joinpath(*module.split(".")).with_suffix(".py") for verb, module in modules.items()}
    option = re.compile(r'"--(output|page|raster|objects)"|output_dir|make_parser|scenes_parser')
    assert {verb for verb, file in files.items() if option.search(file.read_text(encoding="utf-8"))} == set(COMMANDS)


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_command_refuses_an_output_that_cannot_be_before_it_does_anything(image, verb, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [part.format(image=image, blocked=image / "x") for part in COMMANDS[verb]]
    try:
        code = cli.main([*verb.split(), *arguments])
    except SystemExit as stopped:  # export's way
        code, message = 2, str(stopped)
    else:
        message = capsys.readouterr().err
    assert code == 2 and "cannot be written, " in message and "is no folder" in message
    assert not list(tmp_path.iterdir())


def test_a_model_is_never_written_over_the_one_that_it_is_made_from(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors: --output would write over a file that is read"):
        check_outputs([tmp_path], Output("--output", tmp_path, names=MODEL_FILES))


def test_answers_of_another_program_never_touch_a_run(tmp_path, capsys):
    for name in ("settings.json", "figures.json"):
        (tmp_path / name).write_text("{}")
    answers = tmp_path / "said.json"
    answers.write_text("[]")
    assert cli.main(["evaluate", "scenes", "--predictions", str(answers), "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} holds a run, whose figures --predictions would replace" in capsys.readouterr().err
    assert (tmp_path / "figures.json").read_text() == "{}"
