"""Runs: one line an answer, whatever happens to the process or to an image."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import uhr_bat
from benchmark_files import FORMS, conversations, picture, write_lines, xlrs
from copies import run_copies, start_copies
from small import count_tiles
from uhr_bat.common.digests import folder_digest
from uhr_bat.common.loading import ROOT, load_model
from uhr_bat.common.runs import alone
from uhr_bat.evaluation import compare_runs, evaluate, running
from uhr_bat.evaluation.running import BLANK, IMAGE, TEXT, VIEWS, Settings, read_predictions, run, versions
from uhr_bat.evaluation.suites import SUITES

SUITE = SUITES["conversations"]
SETTINGS = Settings(
    suite="conversations", data="", model="", prompt="conversations/as-written-1", budgets=[2, 3, 4, 5],
    selector="preserve_and_merge", seed=3, max_new_tokens=2, limit=None, versions=versions(),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return load_model()


@pytest.fixture
def samples(tmp_path):
    return SUITE.load(str(conversations(tmp_path)))


def ask(tiny, samples, folder, settings=SETTINGS, **options):
    processor, model = tiny
    return run(model, processor, SUITE, samples, settings, folder, workers=0, **options)


@pytest.mark.slow
def test_every_question_is_answered_with_its_image_a_blank_one_and_none(tiny, samples, tmp_path):
    tiles = count_tiles(tiny[1])
    lines = ask(tiny, samples, tmp_path / "run")
    # Two images once each, the two rows of tiles in their middle, and the blank one as four tiles of one colour.
    assert sum(tiles) == 2 * 2 * (2 + 4 + 8 + 12) + 4
    written = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["view"]) for line in written] == [(one.id, view) for one in samples for view in VIEWS]
    assert {(line["id"], line["view"]): line for line in written} == lines
    for line in written:
        spent = 0 if line["view"] == TEXT or line["id"] == "text" else 14
        assert (line["visual_tokens"], line["error"], line["seed"]) == (spent, None, 3)
        assert (
            line["budgets"] == [2, 3, 4, 5] and line["selector"] and {"torch", "transformers"} <= set(line["versions"])
        )


@pytest.mark.slow
def test_images_are_encoded_where_the_question_looks(tiny, samples, tmp_path):
    settings = replace(SETTINGS, budgets=14, max_tiles=24, native=True)
    tiles = count_tiles(tiny[1])
    lines = ask(tiny, samples, tmp_path / "run", settings)
    assert max(tiles) <= 24 and all(line["error"] is None for line in lines.values())
    assert {(line["max_tiles"], line["native"]) for line in lines.values()} == {(24, True)}
    two = [line["visual_tokens"] for (name, view), line in lines.items() if view == IMAGE and name != "text"]
    assert set(two) == {14}
    with pytest.raises(ValueError, match="max_tiles 24, but None is asked for"):
        ask(tiny, samples, tmp_path / "run", replace(settings, max_tiles=None))


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(tiny, samples, tmp_path, monkeypatch):
    whole = ask(tiny, samples, tmp_path / "whole")
    answer, asked = running.answers, []

    def stop_at_fifth(*args, **kwargs):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(args)
        return answer(*args, **kwargs)

    monkeypatch.setattr(running, "answers", stop_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        ask(tiny, samples, tmp_path / "stopped")
    path = tmp_path / "stopped" / "predictions-0.jsonl"
    with open(path, "a") as file:
        file.write('{"id": "two", "view": "image", "answ')  # what a killed process leaves
    asked.clear()
    monkeypatch.setattr(running, "answers", lambda *args, **kwargs: asked.append(args) or answer(*args, **kwargs))
    assert ask(tiny, samples, tmp_path / "stopped") == whole and len(asked) == len(whole) - 5
    one, other = (tmp_path / name / "predictions.jsonl" for name in ("whole", "stopped"))
    assert one.read_bytes() == other.read_bytes() and not path.exists()
    asked.clear()
    ask(tiny, samples, tmp_path / "stopped")
    assert asked == []


@pytest.mark.slow
def test_an_image_that_fails_is_a_line_and_no_stop(tiny, samples, tmp_path):
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    lines = ask(tiny, samples, tmp_path / "run")
    failed = {key for key, line in lines.items() if line["error"]}
    assert failed == {("one/0", IMAGE), ("one/1", IMAGE)}
    assert "a.png: not an image" in lines["one/0", IMAGE]["error"] and lines["one/0", IMAGE]["answer"] is None
    assert lines["two", IMAGE]["answer"] is not None and lines["one/0", BLANK]["answer"] is not None
    shutil.copy(tmp_path / "images" / "b.png", tmp_path / "images" / "a.png")
    assert ask(tiny, samples, tmp_path / "run")["one/0", IMAGE]["error"]
    assert ask(tiny, samples, tmp_path / "run", retry=True)["one/0", IMAGE]["error"] is None


def test_a_line_that_was_torn_anywhere_is_left_out_and_what_is_no_line_is_refused(tmp_path):
    whole = json.dumps({"id": "1", "view": IMAGE, "answer": "\u00e9", "error": None}, ensure_ascii=False).encode()
    for length in range(1, len(whole)):
        (tmp_path / "predictions.jsonl").write_bytes(whole + b"\n" + whole[:length])
        assert list(read_predictions(tmp_path)) == [("1", IMAGE)]
    for line in ("7", "null", '{"id": "1"}'):
        (tmp_path / "predictions.jsonl").write_text(line)
        with pytest.raises(ValueError, match="is no line of a run"):
            read_predictions(tmp_path)


def test_another_run_in_the_folder_is_refused_with_what_differs(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({**SETTINGS.__dict__, "budgets": 14}))
    with pytest.raises(ValueError, match=r"holds a run with budgets 14, but \[2, 3, 4, 5\] is asked for"):
        running.check_settings(tmp_path, SETTINGS)


def test_of_a_sample_that_was_asked_again_the_answer_counts(tmp_path):
    lines = [{"id": "1", "view": IMAGE, "answer": None, "error": error} for error in ("OSError", None)]
    write_lines(tmp_path / "predictions-0.jsonl", lines)
    assert read_predictions(tmp_path)["1", IMAGE]["error"] is None


# ---- What was asked --------------------------------------------------------------------------------------------------


def own_in(folder):
    """A suite of one question, and how it is asked: a function of the options and the name of the run."""
    picture(folder, "a.png", size=(160, 20))
    write_lines(folder / "q.jsonl", [{"question": "Is there a car?", "answer": "yes", "image": "a.png"}])

    def ask(*options, name="run"):
        command = ["own", "--data", str(folder / "q.jsonl"), "--workers", "0", "--max-new-tokens", "1", *options]
        return evaluate.main([*command, "--output", str(folder / name)])

    return ask


@pytest.fixture
def own(tmp_path):
    return own_in(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a suite of one question that was asked already: its data may be changed, its run must not."""
    folder = tmp_path_factory.mktemp("finished")
    assert own_in(folder)() == 0
    return folder


def other_question(folder):
    write_lines(folder / "q.jsonl", [{"question": "Is there a pier?", "answer": "yes", "image": "a.png"}])


def other_answer(folder):
    write_lines(folder / "q.jsonl", [{"question": "Is there a car?", "answer": "no", "image": "a.png"}])


def other_id(folder):
    write_lines(folder / "q.jsonl", [{"id": 7, "question": "Is there a car?", "answer": "yes", "image": "a.png"}])


def other_picture(folder):
    picture(folder, "a.png", seed=1, size=(160, 20))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        (other_question, "its answer to '0' is one to another question"), (other_answer, "to another question"),
        (other_picture, "about another picture"), (other_id, "answers to 1 samples that the data no longer has, as '0'"),
    ],
)  # fmt: skip
def test_a_run_does_not_go_on_with_answers_to_something_else(change, message, finished, capsys):
    ask, before = own_in(finished), {path: path.read_bytes() for path in (finished / "run").iterdir()}
    change(finished)
    assert ask() == 2 and message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (finished / "run").iterdir()} == before
    if change is other_picture:
        assert ask(name="other") == 0
        assert compare_runs.main([str(finished / "run"), str(finished / "other")]) == 2
        assert "on other samples" in capsys.readouterr().err


def test_a_run_of_other_weights_or_options_is_refused_before_a_model_is_loaded(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    model = tmp_path / "model"
    model.mkdir()
    for path in ROOT.glob("*"):
        if path.suffix in (".json", ".jinja", ".safetensors"):
            shutil.copy(path, model)
    settings = replace(
        SETTINGS, suite="own", data=str(tmp_path / "q.jsonl"), model=str(model), prompt="own/short-1", seed=0
    )
    settings = replace(settings, budgets=14, selector="distinct", max_new_tokens=1, weights=folder_digest(model))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings.__dict__))
    options = ["--model", str(model), "--budgets", "14", "--selector", "distinct"]
    with pytest.raises(pytest.fail.Exception):
        own(*options)
    assert own(*options, "--value-range", "0,100") == 2 and "a run with image None" in capsys.readouterr().err
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert own(*options) == 2 and "holds a run with weights" in capsys.readouterr().err


@pytest.mark.slow
def test_where_every_sample_fails_there_is_no_score(own, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert own() == 2
    assert "No sample of 1 was answered. The first failure: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "figures.json").exists()


@pytest.mark.slow
def test_batches_answer_as_single_questions_and_the_same_wherever_a_run_was_stopped(tiny, samples, tmp_path):
    single, settings = ask(tiny, samples, tmp_path / "single"), replace(SETTINGS, batch_size=3)
    batched = ask(tiny, samples, tmp_path / "batched", settings)
    said = {key: line["answer"] for key, line in batched.items()}
    assert said == {key: line["answer"] for key, line in single.items()}
    lines = (tmp_path / "batched" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "predictions-0.jsonl").write_text("".join(lines[::2]))
    ask(tiny, samples, tmp_path / "part", settings)
    assert (tmp_path / "part" / "predictions.jsonl").read_text() == "".join(lines)


@pytest.mark.slow
def test_rasters_of_a_suite_are_read_as_the_options_say(own, tmp_path, capsys):
    rasterio = pytest.importorskip("rasterio")
    pixels = np.arange(4 * 20 * 160, dtype=np.uint16).reshape(4, 20, 160)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", width=160, height=20, count=4, dtype="uint16") as file:
        file.write(pixels)
    write_lines(tmp_path / "q.jsonl", [{"question": "Is there a car?", "answer": "yes", "image": "a.tif"}])
    assert own("--bands", "4,3,9", "--value-range", "0,5000") == 2
    assert "band" in capsys.readouterr().err
    assert own("--bands", "4,3,2", "--value-range", "0,5000", name="right") == 0
    line = json.loads((tmp_path / "right" / "predictions.jsonl").read_text().splitlines()[0])
    assert line["image_options"] == {"bands": [4, 3, 2], "value_range": [0, 5000]}
    assert own("--max-pixels", "100", name="small") == 2


# ---- The command -----------------------------------------------------------------------------------------------------


def test_answers_of_another_program_are_scored_without_a_model(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    xlrs(folder)
    answers = [
        {"id": "0", "answer": "The answer is (B)"},
        {"index": 1, "prediction": "B. Blue"},
        {"id": 2, "answer": "a c"},
    ]
    path = write_lines(tmp_path / "answers.jsonl", answers)
    arguments = [
        "xlrs-bench-lite",
        "--data",
        str(folder),
        "--output",
        str(tmp_path / "out"),
        "--predictions",
        str(path),
    ]
    assert evaluate.main(arguments) == 0
    result = json.loads((tmp_path / "out" / "figures.json").read_text())
    micro = {row["scorer"]: row["micro"][0] for row in result["scores"] if row["section"] == "all"}
    assert micro == {
        "xlrs-bench/letters-2": 0.5,
        "xlrs-bench/letters-1": 0.5,
        "xlrs-bench/lmms-eval-1 (as published)": 0.25,
        "xlrs-bench/uhr-bat-release (as published)": 0.5,
    }
    assert result["errors"] == [{"id": "3", "view": IMAGE, "error": "no answer in the file"}]
    assert "1 answers failed." in capsys.readouterr().out
    write_lines(path, [{"id": "9", "answer": "A"}])
    assert evaluate.main(arguments) == 2
    assert "answers 1 samples that the suite does not have, as '9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["xlrs-bench"], "xlrs-bench needs --data"),
        (["scenes", "--prompt", "mine"], "scenes has no prompt 'mine'. It has: scenes/plain-1"),
        (["scenes", "--scorers", "mine"], "scenes has no score 'mine'"),
        (["scenes", "--limit", "1", "--model", "nowhere"], "nowhere: this is no model folder"),
        (["scenes", "--data", "x"], "there is no --data to give"),
        (["scenes", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1. Got 0."),
        (["scenes", "--limit", "1", "--budgets", "0"], "must be at least 1 token per image"),
        (["scenes", "--limit", "1", "--selector", "foo"], "There is no selector 'foo'. There are: preserve_and_merge"),
        (["scenes", "--batch-size", "0"], "--batch-size must be at least 1. Got 0."),
        (["scenes", "--limit", "1", "--native"], "give max_tiles with it"),
    ],
)
def test_evaluate_says_what_is_wrong(arguments, message, tmp_path, capsys):
    assert evaluate.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_wordnet_is_asked_for_before_a_model_runs(tmp_path, capsys, monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert evaluate.main(["lrs-vqa", "--data", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "python -m nltk.downloader wordnet" in said and "--scorers lrs-vqa/exact-1" in said


@pytest.mark.slow
def test_two_runs_into_one_folder_do_not_mix_their_lines(tmp_path, capsys):
    with alone(tmp_path / "predictions-0.jsonl"):
        assert evaluate.main(["scenes", "--limit", "1", "--output", str(tmp_path)]) == 2
    assert "another run is writing it" in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_one_process_and_two_that_go_on_for_a_killed_one_write_the_same_lines(tmp_path):
    questions = ("Is there a car?", "How many ships?", "Where is the pier?")
    records = [
        {"question": question, "answer": "yes", "image": picture(tmp_path, f"{number}.png", number, (160, 20)).name}
        for number in range(3)
        for question in questions
    ]
    data, single, other = write_lines(tmp_path / "q.jsonl", records), tmp_path / "single", tmp_path / "other"
    # The selector and budgets are named, so that the shipped defaults may change.
    options = ["own", "--data", str(data), "--selector", "preserve_and_merge", "--budgets", "2,3,4,5", "--workers", "0"]
    options += ["--max-new-tokens", "4"]
    assert evaluate.main([*options, "--output", str(single)]) == 0
    whole = (single / "predictions.jsonl").read_bytes()

    (process,), lines = (
        start_copies(1, evaluate.main, [*options, "--output", str(other)]),
        other / "predictions-0.jsonl",
    )
    while process.is_alive() and not (lines.exists() and lines.read_bytes().count(b"\n")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert 0 < lines.read_bytes().count(b"\n") < len(whole.splitlines())
    assert not (other / "predictions.jsonl").exists()
    run_copies(2, evaluate.main, [*options, "--output", str(other)])
    assert (other / "predictions.jsonl").read_bytes() == whole
    assert (other / "figures.json").read_text() == (single / "figures.json").read_text()
    text = compare_runs.compare([single, other])
    assert "| own/tolerant-1 | all | macro | 9 |" in text and "+0.0 [+0.0, +0.0]" in text


def test_runs_of_two_suites_are_not_compared(tmp_path, capsys):
    for name in ("scenes", "lrs-vqa"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps({"suite": name}))
    assert compare_runs.main([str(tmp_path / "scenes"), str(tmp_path / "lrs-vqa")]) == 2
    assert "they cannot be paired" in capsys.readouterr().err
    assert compare_runs.main([str(tmp_path), str(ROOT)]) == 2
    assert "this is no run of `uhr-bat evaluate`" in capsys.readouterr().err


@pytest.mark.slow
def test_two_dates_are_compared_as_ask_compares_them(tiny, tmp_path, monkeypatch):
    processor, model = tiny
    suite, compress, registered = SUITES["levir-cc"], model.compress, []

    def compressed(**inputs):
        registered.append(inputs.get("registration"))
        return compress(**inputs)

    monkeypatch.setattr(model, "compress", compressed)
    sample, other = suite.load(str(FORMS["levir-cc"](tmp_path)))
    prompt, asking = suite.prompts["levir-cc/sentence-1"](sample), {"max_new_tokens": 3, "budgets": [2, 3, 4, 5]}
    earlier, later = (picture.source for picture in sample.pictures)
    expected = uhr_bat.ask(processor, model, later, prompt, before=earlier, **asking)
    settings = replace(SETTINGS, suite="levir-cc", prompt="levir-cc/sentence-1", dates=True, **asking)
    other = replace(other, pictures=other.pictures[:1])
    lines = run(model, processor, suite, [sample, other], settings, tmp_path / "run", workers=0)
    line = lines[sample.id, IMAGE]
    assert (line["answer"], line["visual_tokens"], line["dates"]) == (expected.text, expected.num_tokens, True)
    assert registered[0] and registered == [registered[0]] * 2 + [None] * 2  # blank images are no dates
    assert "Got 1" in lines[other.id, IMAGE]["error"]
