"""UHR-BAT-SFT-10K: its table and pictures, as the release's own converter reads them."""

import json

import pytest
import torch
from own_data import ask, paint_images, write_rows
from uhr_bat.training import sft
from uhr_bat.training.data import load_samples
from uhr_bat.training.options import read_options

datasets = pytest.importorskip("datasets")


def write_table(folder, rows):
    """train/metadata.parquet beside train/images, with every column of the form in every row."""
    columns = ("id", "image_paths", "file_name", "conversations", "prompt", "question", "answer", "source_dataset")
    paint_images(folder / "train", 2)
    table = {name: [row.get(name) for row in rows] for name in columns}
    datasets.Dataset.from_dict(table).to_parquet(folder / "train" / "metadata.parquet")
    return folder


def talk(*texts):
    return json.dumps(ask(*texts))


def seen(samples):
    return [
        ([image["path"].rsplit("/", 1)[1] for image in sample["images"]], sample["messages"][-1]["content"][0]["text"])
        for sample in samples
    ]


def test_the_released_table_is_read_as_a_file_and_as_its_folder(tmp_path, processor):
    rows = [
        {
            "id": "1",
            "image_paths": '["images/0.png"]',
            "conversations": talk("<image>\nWhat?", "Red.", "And?", "Blue."),
        },
        {"id": "2", "image_paths": "1.png", "prompt": "Which colour?", "question": "?", "answer": "blue"},
        {
            "id": "3",
            "image_paths": "[]",
            "file_name": ".\\images\\0.png",
            "conversations": "[]",
            "question": "What?",
            "answer": "red",
        },
        {
            "id": "4",
            "image_paths": '["images/0.png", "images/1.png"]',
            "conversations": talk("<image>\n<image>\nWhich?", "One."),
        },
    ]
    folder = write_table(tmp_path / "data", rows)
    samples = load_samples(str(folder), processor)
    one, two = ["0.png"], ["1.png"]
    assert seen(samples) == [(one, "Red."), (one, "Blue."), (two, "blue"), (one, "red"), (one + two, "One.")]
    assert samples[2]["messages"][0]["content"][-1]["text"] == "Which colour?"  # `prompt` before `question`, as there
    table = str(folder / "train" / "metadata.parquet")
    assert seen(load_samples(table, processor, image_folder=folder / "train" / "images")) == seen(samples)


@pytest.mark.slow
def test_the_released_table_trains(tmp_path, small_folder):
    rows = [{"image_paths": f'["images/{n}.png"]', "conversations": talk("<image>\nWhat?", "Red.")} for n in range(2)]
    data, out = write_table(tmp_path / "data", rows), tmp_path / "out"
    arguments = ["--model_name_or_path", str(small_folder), "--train_data", str(data), "--output_dir", str(out)]
    arguments += ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    arguments += ["--learning_rate", "1e-2", "--logging_steps", "1", "--save_strategy", "no"]
    trainer = sft.train(*read_options(arguments))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2 and all(map(torch.isfinite, map(torch.tensor, losses)))


def test_rows_of_the_released_form_that_lead_elsewhere_or_nowhere_are_named(tmp_path, processor):
    kinds = {
        "../../secret.png": "lies outside of the data",
        "/etc/passwd": "lies outside of the data",
        "http://10.0.0.1/a.png": "lies outside of the data",
        "/vsicurl/http://10.0.0.1/a.tif": "lies outside of the data",
        '[{"path": "http://10.0.0.1/a.png"}]': "turn that is no text",
        "images/gone.png": "image is missing",
        "": "without an image",
    }
    rows = [{"image_paths": path, "question": "What?", "answer": "red"} for path in kinds]
    rows += [
        {"image_paths": "images/0.png", "question": "What?"},
        {"image_paths": "images/0.png", "conversations": "[{"},
    ]
    with pytest.raises(ValueError) as error:
        load_samples(str(write_table(tmp_path, rows)), processor)
    said = str(error.value)
    assert said.startswith("9 of 9 samples") and all(kind in said for kind in kinds.values())
    assert "4 whose image lies outside of the data" in said and "without an answer at the end" in said
    assert "whose `conversations` is no list" in said


def test_rows_of_other_forms_may_have_columns_of_these_names(tmp_path, processor):
    (path, _), *_ = paint_images(tmp_path, 1)
    part = [{"type": "image", "path": path}, {"type": "text", "text": "What?"}]
    rows = [
        {"image": path, "file_name": "/mnt/scan.tif", "question": "What?", "answer": "red", "prompt": "Say it."},
        {"file_name": None, "messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "red"}]},
        {"question": "What?", "answer": "red", "prompt": "Say it."},
    ]
    samples = load_samples(write_rows(tmp_path / "data.json", rows[1:]), processor)
    assert seen(samples) == [(["0.png"], "red"), ([], "red")]
    assert samples[1]["messages"][0]["content"][-1]["text"] == "What?"
    assert seen(load_samples(write_rows(tmp_path / "one.json", rows[:1]), processor)) == [(["0.png"], "red")]


def test_no_column_of_a_table_is_decoded_whatever_its_file_says_it_is(tmp_path, processor):
    table = datasets.Dataset.from_dict(
        {"question": ["What?"], "answer": ["red"], "more": [{"bytes": b"none", "path": None}]}
    )
    table.cast_column("more", datasets.Image()).to_parquet(tmp_path / "data.parquet")
    assert seen(load_samples(str(tmp_path / "data.parquet"), processor)) == [([], "red")]
