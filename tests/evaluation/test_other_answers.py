"""Answers of other programs: which field is the model's, whose question it answers, and what is refused."""

import csv
import json

import pytest
from benchmark_files import write_lines
from uhr_bat.evaluation import compare_runs, evaluate
from uhr_bat.evaluation.other_answers import other_answers
from uhr_bat.evaluation.running import IMAGE
from uhr_bat.evaluation.suites import SUITES

QUESTIONS = ("What colour is the ship?", "What colour is the pier?", "Where is the car?")
OPTIONS = ["(A) red", "(B) blue", "(C) green", "(D) white"]
RIGHT = "ABC"


@pytest.fixture
def data(tmp_path):
    records = [
        {
            "index": 10 + n,
            "image": "a.png",
            "question": text,
            "multi-choice options": OPTIONS,
            "answer": answer,
            "category": "c",
        }
        for n, (text, answer) in enumerate(zip(QUESTIONS, RIGHT))
    ]
    return write_lines(tmp_path / "data.jsonl", records)


@pytest.fixture
def samples(data):
    return SUITES["xlrs-bench"].load(str(data))


def said(path, samples):
    return [other_answers(path, samples)[sample.id, IMAGE]["answer"] for sample in samples]


def kit_records(predictions):
    """As VLMEvalKit (0.2) writes a benchmark's table with the model's answers, its pictures left away."""
    return [
        {"index": 10 + n, "question": text, "A": "red", "B": "blue", "C": "green", "D": "white", "answer": answer, "category": "c",
         "prediction": prediction}
        for n, (text, answer, prediction) in enumerate(zip(QUESTIONS, RIGHT, predictions))
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["tsv", "csv", "xlsx", "json"])
def test_in_vlmevalkits_tables_the_answer_is_the_prediction_and_never_the_right_one(suffix, samples, tmp_path):
    records, path = kit_records(["C", "None", ""]), tmp_path / f"model_XLRS.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(records))
    elif suffix == "xlsx":
        pytest.importorskip("openpyxl")
        import pandas

        pandas.DataFrame(records).to_excel(path, index=False)
    else:
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, records[0], delimiter="\t" if suffix == "tsv" else ",", quoting=csv.QUOTE_ALL)
            table.writeheader()
            table.writerows(records)
    found = said(path, samples)
    assert found[:2] == ["C", "None"] and not found[2]


def lmms_line(row, target, answer, **more):
    """As lmms-eval 0.7.3's own tracker writes a sample, by row; the text before its filter stands in `resps`."""
    return {
        "doc_id": row, "target": target, "filtered_resps": answer, "token_counts": [None], "doc_hash": "h",
        "xlrs_micro_score": {"question_id": 10 + row, "pred_answer": "B"},
        "input": f"{QUESTIONS[row]}The choices are listed below:\n(A) red", **more,
    }  # fmt: skip


def test_lmms_evals_samples_are_told_by_their_row_and_answer_by_what_was_filtered(samples, tmp_path):
    lines = [
        lmms_line(2, "C", "D", resps=["<think>C</think>D"]),
        lmms_line(0, "A", "The answer is (B)"),
        lmms_line(1, "B", ["A"]),
    ]
    assert said(write_lines(tmp_path / "samples.jsonl", lines), samples) == ["The answer is (B)", "A", "D"]
    raw = [
        {name: value for name, value in line.items() if name != "filtered_resps"} | {"resps": [["B"]]} for line in lines
    ]
    assert said(write_lines(tmp_path / "raw.jsonl", raw), samples) == ["B", "B", "B"]
    assert said(write_lines(tmp_path / "one.jsonl", lines[:1]), samples) == [None, None, "D"]


def test_of_a_part_of_the_samples_answers_to_the_others_are_left(data, samples, tmp_path):
    path = write_lines(tmp_path / "s.jsonl", [lmms_line(row, RIGHT[row], "A") for row in range(3)])
    (chosen,) = SUITES["xlrs-bench"].load(str(data), 1)
    assert list(other_answers(path, [chosen], samples)) == [(chosen.id, IMAGE)]


@pytest.mark.parametrize(
    "records, message",
    [
        ([{"index": 10, "foo": "A"}], "has no field of the model's answers"),
        ([{"index": 10, "question": QUESTIONS[0], "answer": "A"}], "the field answer is the right one"),
        ([{"index": 10, "A": "red", "B": "blue", "answer": "A"}], "the field answer is the right one"),
        ([{"id": 10, "answer": "A", "prediction": "B"}, {"id": 11, "answer": "B"}], "has none of the fields"),
        ([{"id": 10, "answer": "A"}, {"id": "10", "answer": "B"}], "answers '10' twice"),
        ([{"id": 3, "answer": "A"}], "1 samples that the suite does not have, as '3'"),
        ([{"id": 10, "prediction": "A", "question": QUESTIONS[1]}], "answers another question than '10'"),
        ([{"id": 10, "prediction": "A", "answer": "D"}], "its answer is 'D', that of the data 'A'"),
        ([lmms_line(0, "B", "A")], "its target is 'B', that of the data 'A'"),
        ([lmms_line(0, "A", [["0.5", "True"], ["0.7", "False"]])], "filtered_resps holds 2 values"),
        ([{"prediction": "A"}], "A record has none of the fields"),
        (["A"], "holds no records of answers"),
        ([{"id": 10, "answer": "A", "my_model": "D"}], "beside my_model it is not told whether the field answer"),
        ([{"id": 10, "answer": "A", "Prediction": "D"}], "beside Prediction it is not told whether the field answer"),
        ([{"id": 10, "instruction": QUESTIONS[0], "output": "A"}], "has no field of the model's answers"),
        (
            [{"id": 10, "prediction": "A", "A": "white", "B": "blue", "C": "green", "D": "red"}],
            "options in another order",
        ),
        ([{"id": 10, "prediction": "A", "options": ["white", "green", "blue", "red"]}], "options in another order"),
        ([lmms_line(0, "A", "B", doc={"question": QUESTIONS[1]})], "answers another question than '10'"),
    ],
)
def test_what_cannot_be_the_models_answers_to_these_questions_is_refused(records, message, samples, tmp_path):
    with pytest.raises(ValueError) as error:
        other_answers(write_lines(tmp_path / "said.jsonl", records), samples)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "records, answers",
    [
        ([{"id": 10, "answer": "B", "ground_truth": "A"}], ["B", None, None]),
        ([{"id": 10, "answer": "A", "output": None}], [None, None, None]),
        ([{"question_id": 10, "prompt": QUESTIONS[0], "text": "C", "model_id": "m"}], ["C", None, None]),
        ([{"id": 10, "prediction": "Failed to obtain answer via API."}], [None, None, None]),
        ([{"id": 10, "view": IMAGE, "prompt": "xlrs/1", "answer": "B", "error": None}, {"id": 10, "view": "text only", "answer": "C"}], ["B", None, None]),
        ([{"id": 10, "answer": 3}], ["3", None, None]),
        ([{"id": " 10.0 ", "answer": "A", "model_response": ["D"]}], ["D", None, None]),
        ([{"id": 10, "prediction": []}, {"id": 11, "prediction": "\ud800"}], [None, "?", None]),
    ],
)  # fmt: skip
def test_the_field_of_the_answer_is_told_by_those_beside_it(records, answers, samples, tmp_path):
    assert said(write_lines(tmp_path / "said.jsonl", records), samples) == answers


def test_a_line_of_a_table_with_a_comma_too_many_is_refused(samples, tmp_path):
    (tmp_path / "said.csv").write_text("index,prediction\n10,B, because A is wrong\n")
    with pytest.raises(ValueError, match="no table that can be read"):
        other_answers(tmp_path / "said.csv", samples)


def test_a_pickle_is_refused_with_what_to_write_instead(samples, tmp_path):
    (tmp_path / "said.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="a pickle runs what is in it.*PRED_FORMAT=tsv"):
        other_answers(tmp_path / "said.pkl", samples)


def test_a_file_that_answers_nothing_is_no_score(data, tmp_path, capsys):
    path = write_lines(tmp_path / "said.jsonl", [{"id": 10, "prediction": None}])
    arguments = ["xlrs-bench", "--data", str(data), "--predictions", str(path), "--output", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 2
    assert "No sample of 3 was answered" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_answers_of_two_programs_are_compared(data, tmp_path, capsys):
    paths = [
        str(write_lines(tmp_path / f"{name}.jsonl", kit_records(letters)))
        for name, letters in (("one", "ABC"), ("two", "ABD"))
    ]
    assert (
        compare_runs.main([*paths, "--suite", "xlrs-bench", "--data", str(data), "--scorers", "xlrs-bench/letters-2"])
        == 0
    )
    assert "| 100.0 [100.0, 100.0] | 66.7 [" in capsys.readouterr().out
    assert compare_runs.main(paths) == 2
    assert "give --suite and --data" in capsys.readouterr().err
