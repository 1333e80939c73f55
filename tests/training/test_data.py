"""Own data: which rows are read, and which are named before the first step."""

import io
import logging

import pytest
import torch
from own_data import ask, make_rows, paint_images, write_rows
from PIL import Image
from uhr_bat.regions.cache import to_tiles, write_whole
from uhr_bat.training.data import load_samples, split_text

datasets = pytest.importorskip("datasets")


def written(samples):
    """Each sample as one text, with its images in their places."""
    return [
        [(turn["role"], [part["text"] or "IMAGE" for part in turn["content"]]) for turn in sample["messages"]]
        for sample in samples
    ]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("<image>\nHow many?", ["IMAGE", "How many?"]),
        ("How many?\n<image>", ["How many?", "IMAGE"]),
        ("<image>\n<image>\nWhich?", ["IMAGE", "IMAGE", "Which?"]),
        ("  no image\n", ["  no image\n"]),
    ],
)
def test_placeholders_become_parts_of_a_message(text, parts):
    assert [part["text"] or "IMAGE" for part in split_text(text)] == parts


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_conversations_of_one_image_several_or_none_are_read_from_one_file(tmp_path, processor, suffix):
    paint_images(tmp_path, 2)
    rows = [
        {"image": ["images/0.png"], "conversations": ask("<image>\nWhat?", "Red.", "And?", "No more.")},
        {"image": ["images/0.png", "images/1.png"], "conversations": ask("<image>\n<image>\nWhich?", "The first.")},
        {"image": None, "conversations": ask("Hello", "Good day.")},
    ]
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    else:
        rows[0]["image"] = "images/0.png"  # and a list in the next row
        del rows[2]["image"]
        write_rows(tmp_path / f"data{suffix}", rows)
    samples = load_samples(tmp_path / f"data{suffix}", processor)
    first = [("user", ["IMAGE", "What?"]), ("assistant", ["Red."])]
    assert written(samples) == [
        first,
        [*first, ("user", ["And?"]), ("assistant", ["No more."])],
        [("user", ["IMAGE", "IMAGE", "Which?"]), ("assistant", ["The first."])],
        [("user", ["Hello"]), ("assistant", ["Good day."])],
    ]
    paths = [[image["path"] for image in sample["images"]] for sample in samples]
    assert paths == [[str(tmp_path / f"images/{one}.png") for one in ones] for ones in ([0], [0], [0, 1], [])]
    assert samples[1]["name"].endswith("row 1, answer 2") and samples[2]["name"].endswith("row 2")


def test_plain_questions_get_their_image_first(tmp_path, processor):
    (path, _), *_ = paint_images(tmp_path, 1)
    write_rows(tmp_path / "data.json", [{"image": path, "question": "What colour?", "answer": "red"}])
    samples = load_samples(tmp_path / "data.json", processor)
    assert written(samples) == [[("user", ["IMAGE", "What colour?"]), ("assistant", ["red"])]]


def test_images_in_the_table_are_taken_as_files_and_not_decoded(tmp_path, processor):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}], "question": ["What?"], "answer": ["black"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    samples = load_samples(str(tmp_path / "hub"), processor)  # as the id of a data set
    assert samples[0]["images"][0]["bytes"] == file.getvalue()


def test_every_bad_sample_is_counted_and_the_first_are_named(tmp_path, processor, caplog):
    rows = make_rows(tmp_path, 8)
    for idx in range(6):
        rows[idx]["image"] = f"images/gone_{idx}.png"
    bad = [
        {"image": "images/6.png", "conversations": ask("What?", "Red.")},
        {"image": "images/6.png", "conversations": ask("<image>\n" + "far " * 5000, "Red.")},
        {"image": "images/6.png", "conversations": ask("<image>\nWhat?", " ")},
        {"image": "images/6.png", "conversations": ask("<image>\nWhat?", "<image>")},
        {"image": "images/6.png", "conversations": [{"from": "bird", "value": "<image>\ncheep"}]},
    ]
    path = write_rows(tmp_path / "data.json", rows + bad)
    with pytest.raises(ValueError) as refused:
        load_samples(path, processor)
    text = str(refused.value)
    assert "11 of 13 samples cannot be trained on" in text and "6 whose image is missing" in text
    assert f"{path}, row 1: {tmp_path / 'images/gone_0.png'}: there is no such file" in text
    assert f"{path}, row 5" in text and f"{path}, row 6:" not in text  # five of a kind are named
    assert "0 and 1" in text and "over 4096" in text and "without an answer at the end" in text and "'bird'" in text
    with caplog.at_level(logging.WARNING):
        samples = load_samples(path, processor, bad_samples="skip")
    assert [sample["name"] for sample in samples] == [f"{path}, row 7", f"{path}, row 8"]


def test_an_image_that_was_missing_is_found_when_it_is_there(tmp_path, processor):
    rows = make_rows(tmp_path, 1)
    (tmp_path / "images/0.png").rename(tmp_path / "elsewhere.png")
    path = write_rows(tmp_path / "data.json", rows)
    with pytest.raises(ValueError, match="1 whose image is missing"):
        load_samples(path, processor)
    (tmp_path / "elsewhere.png").rename(tmp_path / "images/0.png")
    assert len(load_samples(path, processor)) == 1


def test_the_length_is_that_of_text_and_visual_tokens(tmp_path, processor):
    path = write_rows(tmp_path / "data.json", make_rows(tmp_path, 1))
    (length,) = load_samples(path, processor)["length"]
    assert load_samples(path, processor, budgets=[6, 12])["length"] == [length + 6]
    assert load_samples(path, processor, max_length=length)["length"] == [length]
    with pytest.raises(ValueError, match=f"{length} tokens with 12 visual ones, over {length - 1}"):
        load_samples(path, processor, max_length=length - 1)


def test_label_maps_are_found_by_the_name_of_their_image(tmp_path, processor):
    rows = make_rows(tmp_path, 2)
    path = write_rows(tmp_path / "data.json", rows)
    labels = {scale: torch.zeros(scale // 8, scale // 8, dtype=torch.long) for scale in (32, 64)}
    write_whole(to_tiles(labels, 4), tmp_path / "masks" / "0.pt")
    with pytest.raises(ValueError, match="1 whose label map is missing"):
        load_samples(path, processor, regions=tmp_path / "masks")
    write_whole(to_tiles(labels, 4), tmp_path / "masks" / "1.pt")
    samples = load_samples(path, processor, regions=tmp_path / "masks")
    assert [sample["regions"] for sample in samples] == [[str(tmp_path / f"masks/{idx}.pt")] for idx in range(2)]
    (tmp_path / "other").mkdir()
    (tmp_path / "images/1.png").rename(tmp_path / "other/0.png")
    rows[1]["image"] = "other/0.png"
    with pytest.raises(ValueError, match="would be the label map of .*images/0.png and of .*other/0.png"):
        load_samples(write_rows(path, rows), processor, regions=tmp_path / "masks")
