"""The page's commands, one after the other, on 200 images with UHR-BAT-Tiny."""

import re

import pytest
from own_data import ask, paint_images, write_rows
from uhr_bat import cli
from uhr_bat.common.loading import ROOT
from uhr_bat.export import convert_checkpoint

PAGE = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
# A laptop has the time for three epochs; a test takes a few steps, and answers few questions.
SHORTER = "--max_steps 2 --per_device_train_batch_size 2 --eval_share 0.02 --eval_strategy no --disable_tqdm true"
SHORTER += " --save_strategy steps --save_steps 2"


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets"), pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    images = paint_images(tmp_path / "data", 200)
    rows = [{"image": path, "conversations": ask("<image>\nWhat colour is it?", f" {name}")} for path, name in images]
    write_rows(tmp_path / "data" / "train.json", rows)
    pushed = []
    monkeypatch.setattr(convert_checkpoint, "push", lambda folder, repository: pushed.append((folder, repository)))
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = [line for line in block.splitlines() if line.startswith("uhr-bat ")]
    assert len(commands) == 6
    for command in commands:
        arguments = re.findall(r'"[^"]*"|\S+', command.removeprefix("uhr-bat "))
        arguments = [one.strip('"') for one in arguments] + (SHORTER.split() if " train --" in command else [])
        assert cli.main(arguments) == 0, (command, capsys.readouterr().err[-2000:])
    assert pushed == [(tmp_path / "runs" / "pushed", "USER/NAME")]
    for name in ("merged", "release", "pushed"):
        assert (tmp_path / "runs" / name / "modeling_uhr_bat.py").is_file(), name


@pytest.mark.slow
def test_the_code_runs_as_it_stands(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = [{"image": path, "question": "What?", "answer": name} for path, name in paint_images(tmp_path / "data", 4)]
    write_rows(tmp_path / "data" / "train.json", rows)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["model"].lm_head.weight.grad is not None
