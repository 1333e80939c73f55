"""`docs/gpu_day.md`: its figures are those of the planner, and its commands are understood."""

import re
import shlex

import pytest
from uhr_bat import cli
from uhr_bat.common.loading import ROOT

PAGE = (ROOT / "docs" / "gpu_day.md").read_text(encoding="utf-8")
ROWS = re.findall(r"\| `(--.+?)` \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.M)
COMMANDS = [line.split(" #")[0].strip() for line in re.findall(r"^(uhr-bat .+)$", PAGE, re.M)]
COMMANDS += re.findall(r"`(uhr-bat [^`]+--model[^`]+)`", PAGE)


@pytest.mark.slow
def test_the_figures_are_those_of_the_planner(capsys):
    assert len(ROWS) == 8
    for options, tokens, flops, peak in ROWS:
        arguments = ["plan", str(ROOT / "export/uhr_bat_7b"), "--image-size", "8500x8500", "--device", "cuda"]
        assert cli.main(arguments + shlex.split(options)) == 0
        printed = capsys.readouterr().out
        assert f": {tokens} of 131,328 visual tokens" in printed, options
        assert re.search(rf"^ *all +{flops} +\? +{peak} GiB$", printed, re.M), printed


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("uhr-bat bench")])
def test_a_command_gets_as_far_as_what_is_not_here(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        assert cli.main(shlex.split(command.removeprefix("uhr-bat "))) == 2
        said = capsys.readouterr().err
    except SystemExit as ended:  # with a text, or with a number where an argument is not understood
        said = str(ended.code)
    assert "usage:" not in said and re.search("XLRS|MME|RSHR|LRS|IMAGE|MODEL|uhr_bat_7b|RL-MIND", said), said
