"""`docs/first_hour.md`: a newcomer runs its blocks one after the other in an empty folder."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from uhr_bat import cli
from uhr_bat.common.loading import ROOT

PAGE = (ROOT / "docs" / "first_hour.md").read_text(encoding="utf-8")
# What is named before a block, its language, the block.
BLOCKS = re.findall(r"(?:`([\w.]+)`:\n\n)?```(\w*)\n(.*?)```", PAGE, re.DOTALL)


def run(line):
    """A line of a shell, in this process."""
    from rasterio.rio.main import main_group as rio

    program, *arguments = shlex.split(line, comments=True)
    if program == "uhr-bat":
        assert cli.main(arguments) == 0, line
    elif program == "rio":
        rio.main(arguments, standalone_mode=False)
    elif program == "pip":  # this environment has it all
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set("".join(re.findall(r"\.\[(.*)\]", line)).split(",")) - {""} <= set(extras)
    else:
        assert line == "python -m venv .venv && . .venv/bin/activate"


@pytest.mark.slow
def test_the_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets"), pytest.importorskip("matplotlib"), pytest.importorskip("geopandas")
    from uhr_bat.serving import demo

    pages = []  # the page itself would wait for users
    monkeypatch.setattr(demo, "serve", lambda folder, *options, **named: pages.append(folder))
    monkeypatch.chdir(tmp_path)
    names, printed = {}, ""
    for name, language, block in BLOCKS:
        if language == "bash":
            capsys.readouterr()
            for line in block.replace("\\\n", " ").splitlines():
                run(line)
            printed = capsys.readouterr().out
        elif language == "python":
            exec(compile(block, "first_hour.md", "exec"), names)
            assert capsys.readouterr().out == "white 146\n"
        elif language == "json":
            Path(name).write_text(block, encoding="utf-8")
        else:
            assert block in printed
    assert len(BLOCKS) == 10 and pages == [ROOT]
    answers = [json.loads(line) for line in Path("runs/score/predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in Path("test.jsonl").read_text().splitlines()]
    said = [one["answer"] for one in answers if one["view"] == "image"]
    assert [one["answer"].strip() for one in rows] == [answer.strip() for answer in said]
    made = {"kept.geojson", "attention.tif", "kept.html", "runs/mine/model.safetensors", "runs/score/figures.md"}
    assert all(Path(path).stat().st_size for path in made)
    # The picture of the page is this one, up to what other weights would keep.
    shown, drawn = (Image.open(path) for path in (ROOT / "docs/first_hour.jpg", "kept.jpg"))
    assert np.abs(np.asarray(shown, float) - np.asarray(drawn, float)).mean() < 16
