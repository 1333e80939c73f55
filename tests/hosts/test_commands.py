"""The commands with a model of another family: what they print and write."""

import json

import pytest
from images import random_image
from uhr_bat.examples import ask
from uhr_bat.geo import __main__ as evidence_map


@pytest.mark.slow
def test_a_host_is_asked_and_its_kept_tokens_are_mapped(host_folder, tmp_path, capsys):
    random_image(150, 200).save(tmp_path / "image.png")
    options = ["--model", str(host_folder("gemma3")), "--budgets", "20", "--max-new-tokens", "2"]
    arguments = [str(tmp_path / "image.png"), "How many ships?", *options]
    assert ask.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert next(row for row in rows if row[:1] == ["all"])[-2:] == ["20", "20"] and "Answer: " in printed
    assert evidence_map.main([*arguments, "--geojson", str(tmp_path / "kept.geojson")]) == 0
    assert len(json.loads((tmp_path / "kept.geojson").read_text())["features"]) == 20
