"""A batch goes on where it was stopped, asks again what failed, and writes its results whole; who works is made up here."""

import csv
import io
import json
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from rasters import write_dates
from uhr_bat import ask
from uhr_bat.common.loading import ROOT
from uhr_bat.scenes import painting
from uhr_bat.serving import batch
from uhr_bat.serving.batch import COLUMNS, lines_path, run, share_machines
from uhr_bat.serving.batch_inputs import BatchImage
from uhr_bat.serving.ports import take_port

SETTINGS = {"model": "/tiny", "budgets": [2, 4, 8, 16], "max_new_tokens": 4, "reading": {"bands": None}}
IMAGES = [BatchImage(f"/data/{name}.tif", item) for name, item in (("a", ""), ("b", "S2B"), ("c", ""))]
WORK = [(image, ["How many?", "What colour?"]) for image in IMAGES]


class Workers:
    """Stands for `batch.ask`: answers in reverse order, fails at images, and stops after some rows."""

    def __init__(self, monkeypatch):
        self.asked, self.failing, self.stop_after, self.objects = [], (), None, None
        monkeypatch.setattr(batch, "ask", self.ask)

    def ask(self, work, settings, **options):
        for number, (image, question) in enumerate((one, text) for one, texts in work[::-1] for text in texts):
            if number == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((image.source, question))
            row = dict.fromkeys(COLUMNS) | {"image": image.source, "item": image.item, "before": image.before}
            row["question"] = question
            failed = image.source in self.failing
            answer = {"answer": f"{len(self.asked)}", "visual_tokens": 30, "objects": self.objects}
            yield row | ({"error": "OSError: torn"} if failed else answer)


@pytest.fixture
def workers(monkeypatch):
    return Workers(monkeypatch)


def keys(rows):
    return [(row["image"], row["question"]) for row in rows]


EXPECTED = [(image.source, question) for image, questions in WORK for question in questions]


def test_results_are_in_the_order_of_the_work_and_say_what_they_were_asked_with(tmp_path, workers):
    rows = run(WORK, tmp_path / "new/results.parquet", SETTINGS)
    table = pq.read_table(tmp_path / "new/results.parquet")
    assert table.to_pylist() == rows and keys(rows) == EXPECTED and table.column_names == list(COLUMNS)
    assert [row["item"] for row in rows] == ["", "", "S2B", "S2B", "", ""]
    assert b'"budgets": [2, 4, 8, 16]' in table.schema.metadata[b"uhr_bat"]
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new/results.parquet"]


def test_two_runs_into_one_output_do_not_mix_their_lines(tmp_path, workers, monkeypatch):
    output = tmp_path / "results.jsonl"

    def ask_while_another_begins(work, settings, **options):
        with pytest.raises(ValueError, match="another run is writing it"):
            run(WORK, output, SETTINGS)
        yield from workers.ask(work, settings)

    monkeypatch.setattr(batch, "ask", ask_while_another_begins)
    assert keys(run(WORK, output, SETTINGS)) == EXPECTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.jsonl", "results.jsonl.settings.json"]


def test_a_stopped_run_goes_on_where_it_was(tmp_path, workers):
    output = tmp_path / "results.parquet"
    workers.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        run(WORK, output, SETTINGS)
    assert not output.exists()
    with open(lines_path(output), "a") as file:
        file.write('{"image": "/data/a.t')  # what a killed process leaves
    workers.stop_after = None
    rows = run(WORK, output, SETTINGS)
    assert keys(rows) == EXPECTED and sorted(workers.asked) == sorted(EXPECTED)  # nothing twice
    assert not lines_path(output).exists()
    assert run(WORK, output, SETTINGS) == rows and len(workers.asked) == len(EXPECTED)


def test_what_failed_is_a_row_and_is_asked_again_by_the_next_run(tmp_path, workers):
    output, workers.failing = tmp_path / "results.parquet", ("/data/b.tif",)
    failed = [row for row in run(WORK, output, SETTINGS) if row["error"] is not None]
    assert keys(failed) == EXPECTED[2:4] and {row["answer"] for row in failed} == {None}
    workers.failing, workers.asked = (), []
    assert all(row["error"] is None for row in run(WORK, output, SETTINGS))
    assert workers.asked == EXPECTED[2:4]


@pytest.mark.weights
def test_a_worker_looks_closer_where_it_is_told_to(tmp_path):
    painting.write(tmp_path / "scene.png", (700, 500))
    reading = {"bands": None, "max_tiles": 24, "native": True}
    settings = {"model": ROOT, "budgets": 40, "max_new_tokens": 2, "reading": reading}
    worker, rows = batch.Worker(settings, 2, None), [{"question": "How many ships?"} for _ in range(3)]
    (features,) = worker.model.encode_image(**worker.cut(tmp_path / "scene.png"))
    assert features.scales == [64, 128, 256, 512, 704] and features.pyramid.max_tiles == 24
    worker.answer_all(tmp_path / "scene.png", rows)
    assert [row["visual_tokens"] for row in rows] == [40] * 3 and len({row["answer"] for row in rows}) == 1
    earlier, later, apart = write_dates(tmp_path)
    worker.answer_all(later, rows, earlier)
    of_dates = {"before": earlier, "budgets": 40, "max_tiles": 24, "native": True, "max_new_tokens": 2}
    assert [row["answer"] for row in rows] == [
        ask(worker.processor, worker.model, later, "How many ships?", **of_dates).text
    ] * 3
    with pytest.raises(ValueError, match="earlier.tif and .*apart.tif lie apart"):
        worker.answer_all(apart, rows, earlier)


def test_a_question_about_two_dates_is_another_one_than_about_the_later_alone(tmp_path, workers):
    output = tmp_path / "results.jsonl"
    run(WORK[:1], output, SETTINGS)
    output.write_text(output.read_text().replace(', "before": ""', ""))  # as it was written before there were any
    rows = run([*WORK[:1], (replace(IMAGES[0], before="/data/old.tif"), ["How many?"])], output, SETTINGS)
    assert [(row["before"], row["question"]) for row in rows] == [
        ("", "How many?"),
        ("", "What colour?"),
        ("/data/old.tif", "How many?"),
    ]
    assert run(WORK[:1], output, SETTINGS)[:3] == rows and len(workers.asked) == 3


def test_new_questions_are_added_to_what_was_answered(tmp_path, workers):
    output = tmp_path / "results.parquet"
    first = run(WORK[:2], output, SETTINGS)
    workers.asked = []
    rows = run([(IMAGES[2], ["How many?"]), (IMAGES[0], ["What colour?", "Where?"])], output, SETTINGS)
    assert sorted(workers.asked) == [("/data/a.tif", "Where?"), ("/data/c.tif", "How many?")]
    assert [row for row in rows if row in first] and len(rows) == len(first) + 2


def test_answers_of_other_settings_are_not_mixed(tmp_path, workers):
    output = tmp_path / "results.parquet"
    run(WORK, output, SETTINGS)
    with pytest.raises(ValueError, match=r"budgets \[2, 4, 8, 16\], but 14 is asked for. Give another --output"):
        run(WORK, output, SETTINGS | {"budgets": 14})
    with pytest.raises(ValueError, match="a run with objects None, but True is asked for"):
        run(WORK, output, SETTINGS | {"objects": True})
    run(WORK, tmp_path / "placed.csv", SETTINGS | {"objects": True})
    with pytest.raises(ValueError, match="a run with objects True, but None is asked for"):
        run(WORK, tmp_path / "placed.csv", SETTINGS)


def test_a_run_that_was_killed_before_its_first_answer_goes_on(tmp_path, workers):
    output = tmp_path / "results.parquet"
    lines_path(output).write_text('{"mod')
    workers.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        run(WORK, output, SETTINGS)
    workers.stop_after = None
    assert keys(run(WORK, output, SETTINGS)) == EXPECTED and sorted(workers.asked) == sorted(EXPECTED)


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_results_are_csv_or_lines_of_json_too_and_go_on_as_well(tmp_path, workers, ending):
    output, workers.failing = tmp_path / f"results{ending}", ("/data/b.tif",)
    rows = run(WORK, output, SETTINGS)
    text = output.read_text()
    if ending == ".csv":
        written = list(csv.DictReader(io.StringIO(text)))
        assert list(written[0]) == list(COLUMNS) and written[2]["error"] == "OSError: torn"
    else:
        written = [json.loads(line) for line in text.splitlines()]
        assert written == rows
    assert keys(written) == EXPECTED and [row["answer"] or None for row in written] == [row["answer"] for row in rows]
    workers.failing, workers.asked = (), []
    again = run(WORK, output, SETTINGS)
    assert workers.asked == EXPECTED[2:4] and [again[idx] for idx in (0, 1, 4, 5)] == [
        rows[idx] for idx in (0, 1, 4, 5)
    ]
    with pytest.raises(ValueError, match="budgets .* but 14 is asked for"):
        run(WORK, output, SETTINGS | {"budgets": 14})


def test_an_answer_of_very_many_objects_does_not_keep_a_run_from_going_on(tmp_path, workers):
    csv.field_size_limit(2**17)  # as Python has it
    workers.objects = "1" * 2**18
    rows = [run(WORK, tmp_path / "results.csv", SETTINGS) for _ in range(2)][1]
    assert rows[0]["objects"] == workers.objects and len(workers.asked) == len(EXPECTED)


def test_items_that_share_an_image_have_a_row_each(tmp_path, workers):
    work = [(BatchImage("/data/a.tif", item), ["How many?"]) for item in ("first", "second")]
    for _ in range(2):
        rows = run(work, tmp_path / "results.parquet", SETTINGS)
        assert [row["item"] for row in rows] == ["first", "second"] and len(workers.asked) == 2


def test_nothing_is_left_where_nobody_answers(tmp_path, workers):
    workers.stop_after = 0
    with pytest.raises(KeyboardInterrupt):
        run(WORK, tmp_path / "results.parquet", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_nobody_answers_is_named_at_once():
    (nobody,) = take_port("127.0.0.1", 0)  # taken, and nobody listens
    with nobody:
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(OSError, match=f"--address {address}: nobody answers there within 5 s"):
            batch.check_address(address)
    for wrong in ("head", "head:port", ":6379", "head:99999"):
        with pytest.raises(ValueError, match=f"HOST:PORT of a Ray cluster, or auto. Got '{wrong}'"):
            batch.check_address(wrong)


def test_a_cluster_that_keeps_one_waiting_is_named(capsys, monkeypatch):
    monkeypatch.setattr(batch, "ANSWER_SECONDS", 0.05)
    with batch.telling_of_the_wait("head:6379"):
        time.sleep(0.3)
    assert "Waiting for Ray at head:6379, 0 s so far." in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output", "results.xlsx"], "results.xlsx: the file of --output ends in .parquet or .csv or .jsonl."),
        (["--output", "questions.csv"], "questions.csv: --output would write over a file that is read"),
        (["--output", "a.csv", "--batch-size", "0"], "--batch-size must be at least 1. Got 0."),
        (["--output", "a.csv", "--workers", "0"], "--workers must be at least 1. Got 0."),
        (["--output", "a.csv", "--max-new-tokens", "-1"], "--max-new-tokens must be at least 1. Got -1."),
        (["--output", "r.jsonl", "--objects", "r.jsonl.settings.json"], "--output and --objects would be one file"),
    ],
)
def test_options_of_no_batch_are_refused_before_it_begins(options, message, capsys):
    assert batch.main(["--images", "scenes", "--questions", "questions.csv", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "workers, gpus, resources, expected",
    [
        (None, None, {"CPU": 2.0}, (1, 2, 0)),
        (None, None, {"CPU": 64.0}, (16, 4, 0)),
        (2, None, {"CPU": 2.0}, (2, 1, 0)),
        (None, None, {"CPU": 64.0, "GPU": 8.0}, (8, 1, 1)),
        (None, 0.5, {"CPU": 64.0, "GPU": 8.0}, (16, 1, 0.5)),
        (3, 2, {"CPU": 64.0, "GPU": 8.0}, (3, 1, 2)),
        (4, 0, {"CPU": 64.0, "GPU": 8.0}, (4, 16, 0)),
    ],
)
def test_machines_are_shared_among_workers(workers, gpus, resources, expected):
    assert tuple(share_machines(workers, gpus, resources).values()) == expected


@pytest.mark.parametrize("workers, gpus", [(3, None), (0, None), (1, 1)])
def test_more_workers_than_there_is_room_for_are_refused(workers, gpus):
    with pytest.raises(ValueError, match=f"^{workers} workers .* do not fit 2 cores and 0 GPUs"):
        share_machines(workers, gpus, {"CPU": 2.0})
