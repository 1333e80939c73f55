"""What the tools share: loading and saving, the prompt, files, tables, extras."""

import sys
import time
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import uhr_bat
from uhr_bat.common.asking import answer_texts, expand_placeholder, printable, write_prompt
from uhr_bat.common.budgets import budgets
from uhr_bat.common.extras import require
from uhr_bat.common.files import whole_files, whole_folder
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.common.tables import interval, percent_interval, table


def test_tools_load_the_classes_of_the_package_and_nobody_is_asked_to_trust_it(capfd):
    processor, model = load_model()
    assert type(model) is uhr_bat.UHRBatForConditionalGeneration and type(model.config) is uhr_bat.UHRBatConfig
    assert type(processor) is uhr_bat.UHRBatProcessor
    assert type(processor.image_processor) is uhr_bat.UHRBatImageProcessor
    assert processor.default_budgets == model.config.budgets and processor.tokenizer.padding_side == "left"
    assert load_model(ROOT, torch.bfloat16, device_map=None)[1].dtype == torch.bfloat16
    printed = "".join(capfd.readouterr())
    assert "custom code" not in printed and "You are using a model of type" not in printed


def test_an_answer_ends_where_its_tokens_do_and_is_shown_without_what_does_not_print():
    processor, _ = load_model()
    answer = processor.tokenizer(" two\nships\n", return_tensors="pt")
    end = torch.tensor([[processor.tokenizer.eos_token_id]])
    assert answer_texts(processor, torch.cat((answer["input_ids"], end), 1)) == ["two\nships"]
    assert printable("a\x1b[31mb\n\u200b") == "a\ufffd[31mb\n\ufffd"


def test_a_placeholder_is_repeated_once_per_visual_token():
    assert expand_placeholder(torch.tensor([7, 8, 3, 9]), 3, 3).tolist() == [7, 8, 3, 3, 3, 9]
    processor, model = load_model()
    ids = write_prompt(processor, "How many ships?")["input_ids"][0]
    assert int((ids == model.config.image_token_id).sum()) == 1


def test_files_replace_those_of_a_folder_or_none_does(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(KeyboardInterrupt), whole_files(tmp_path) as built:
        (built / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "before"
    with whole_files(tmp_path) as built:
        (built / "a.txt").write_text("after")
    assert (tmp_path / "a.txt").read_text() == "after"


@pytest.mark.parametrize("kind, place", [(whole_files, ""), (whole_folder, "model")])
def test_what_a_killed_run_was_writing_goes_with_the_next_one_and_not_what_a_living_one_writes(kind, place, tmp_path):
    def write(at_work):
        with kind(tmp_path / place) as built:
            (built / "a.txt").write_text("half")
            at_work.set()
            time.sleep(60)

    at_work = get_context("fork").Event()
    run = get_context("fork").Process(target=write, args=(at_work,))
    run.start()
    assert at_work.wait(30)
    (left,) = tmp_path.iterdir()
    if kind is whole_files:
        with kind(tmp_path) as built:
            (built / "b.txt").write_text("whole")
    else:
        with pytest.raises(OSError, match="model: another run is writing it"), kind(tmp_path / place):
            pass
    assert (left / "a.txt").read_text() == "half"
    run.kill()
    run.join()
    assert left.is_dir()
    with kind(tmp_path / place) as built:
        assert not list(built.iterdir())
        (built / "c.txt").write_text("whole")
    assert not any(path.name.startswith(".") or path.suffix == ".incomplete" for path in tmp_path.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError), whole_folder(tmp_path / "model") as building:
        (building / "a.txt").write_text("half")
        raise OSError
    assert not any(tmp_path.iterdir())
    with whole_folder(tmp_path / "model") as building:
        (building / "a.txt").write_text("whole")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_interval_is_that_of_groups_and_not_of_values():
    same = np.repeat([0.0, 1.0] * 10, 50)
    mean, low, high = interval(same, np.repeat(np.arange(20), 50), np.random.default_rng(0))
    assert mean == 0.5 and low < 0.35 and high > 0.65


def test_budgets_and_tables_as_text():
    assert budgets("16,24,40") == [16, 24, 40] and budgets("146") == 146 and budgets("16:24", ":") == [16, 24]
    assert percent_interval((0.5, 0.25, 0.75)) == "50.0 [25.0, 75.0]"
    assert percent_interval((-0.05, -0.1, 0.01), signed=True) == "-5.0 [-10.0, +1.0]"
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    require("pictures", "json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'matplotlib.* pip install "uhr-bat\[pictures\]"'):
        require("pictures", "json", "matplotlib")
