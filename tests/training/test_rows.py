"""Own data as people have it: forms of rows, files that are broken somewhere, shares, and images that are held out."""

import json
import logging
import re

import pytest
from own_data import ask, make_rows, paint_images, write_rows
from uhr_bat.common.loading import ROOT
from uhr_bat.training.collator import UHRBatDataCollator
from uhr_bat.training.data import load_samples
from uhr_bat.training.grouping import hold_out
from uhr_bat.training.scores import check_scores, score

datasets = pytest.importorskip("datasets")


def texts(samples):
    """[(role, its words)] of each sample, images as <image>."""
    return [
        [(turn["role"], "".join(part["text"] or "<image>" for part in turn["content"])) for turn in sample["messages"]]
        for sample in samples
    ]


def answers(samples):
    return [turns[-1][1] for turns in texts(samples)]


@pytest.fixture
def image(tmp_path):
    return paint_images(tmp_path, 1)[0][0]


@pytest.mark.parametrize("ending, separator", [(".csv", ","), (".tsv", "\t")])
def test_cells_are_text_as_they_stand_whatever_the_column_looks_like(tmp_path, processor, image, ending, separator):
    said = ["3", "007", "True", "None", "NA", "1e3", "3.0", "nan", "[1, 2, 3, 4]"]
    lines = [["image", "question", "answer"]] + [[image, "Which?", f'"{one}"'] for one in said]
    (tmp_path / f"data{ending}").write_text("\n".join(map(separator.join, lines)), encoding="utf-8")
    assert answers(load_samples(tmp_path / f"data{ending}", processor)) == said


def test_numbers_of_json_are_answers_by_their_digits(tmp_path, processor):
    (tmp_path / "data.jsonl").write_text(
        '{"question": "How many?", "answer": 3}\n{"question": 5, "answer": 2.50}\n{"question": "Is it?", "answer": true}\n'
    )
    samples = load_samples(tmp_path / "data.jsonl", processor, bad_samples="skip")
    assert texts(samples) == [[("user", "How many?"), ("assistant", "3")], [("user", "5"), ("assistant", "2.50")]]
    table = datasets.Dataset.from_dict({"question": ["How many?"] * 2, "answer": [3.0, 2.5]})
    table.to_parquet(tmp_path / "data.parquet")
    assert answers(load_samples(tmp_path / "data.parquet", processor)) == ["3", "2.5"]


def test_types_may_change_from_row_to_row_however_late(tmp_path, processor, image):
    rows = [{"id": idx, "image": None, "question": "Hello " + "far " * 20, "answer": "Hi"} for idx in range(300)]
    rows += [
        {"id": "a1", "image": image, "question": "What?", "answer": "red"},
        {"id": [1], "image": [image, image], "question": "What?", "answer": 2},
    ]
    samples = load_samples(write_rows(tmp_path / "data.jsonl", rows), processor)
    assert [len(one["images"]) for one in samples][-3:] == [0, 1, 2] and len(samples) == 302


FORMS = [
    ({"question": "What?", "answer": "red"}, ["What?", "red"]),
    ({"query": "What?", "response": "red", "history": [["Hi", "Yes"]]}, ["Hi", "Yes", "What?", "red"]),
    ({"instruction": "Name it.", "input": "The plane.", "output": "red"}, ["Name it.\nThe plane.", "red"]),
    ({"instruction": "Name it.", "input": "", "output": "red"}, ["Name it.", "red"]),
    ({"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]}, ["What?", "red"]),
    ({"conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]}, ["What?", "red"]),
    ({"system": "Be short.", "question": "What?", "answer": "red"}, ["Be short.", "What?", "red"]),
    ({"system": "Be short.", "conversations": ask("What?", "red")}, ["Be short.", "What?", "red"]),
]  # fmt: skip


@pytest.mark.parametrize("row, said", FORMS)
def test_rows_are_read_in_the_forms_of_other_tools(tmp_path, processor, row, said):
    path = write_rows(tmp_path / "data.json", [row])
    samples = load_samples(path, processor, sample_per="chat")
    assert [text for _, text in texts(samples)[0]] == said


def test_images_may_be_named_by_the_turns_that_show_them(tmp_path, processor, image):
    content = [{"type": "image", "path": image}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}
    samples = load_samples(write_rows(tmp_path / "data.json", [row]), processor)
    assert [one["path"] for one in samples[0]["images"]] == [str(tmp_path / image)]
    assert texts(samples) == [[("user", "<image>What?"), ("assistant", "red")]]
    with pytest.raises(ValueError, match="images in turns and in a column"):
        load_samples(write_rows(tmp_path / "data.json", [row | {"image": "other.png"}]), processor)


def test_the_pages_rows_are_read_as_they_stand(tmp_path, processor):
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "training" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "data.json").write_text(block, encoding="utf-8")
    (tmp_path / "images").mkdir()
    for name in ("harbour", "before", "after", "field"):
        (tmp_path / "images" / f"{name}.tif").touch()
    said = ["Three.", "A pier.", "Yes.", "Wheat."]
    assert answers(load_samples(tmp_path / "data.json", processor)) == said


BROKEN = {
    "cut off": ('[{"question": "a", "answer": "b"}, {"image": "a.png",', "row 2: line 1, column"),
    "no comma": ('[{"question": "a" "answer": "b"},\n {"question": "a", "answer": "b"}]', "row 1: line 1, column 19"),
    "without an end": ('[{"question": "a", "answer": "b"}', "the file ends before its list does"),
    "empty": ("", "1 of files without rows"),
    "empty list": ("[]", "1 of files without rows"),
    "no list": ('{"conversations": "hello"}', "whose `conversations` is no list"),
    "no rows": ('["a", 3]', "2 that are no objects"),
    "no turns": ('[{"conversations": ["q", "a"]}]', "a turn that is no object"),
    "an object of a list": ('{"data": [{"question": "a"}]}', "row 1: assistant"),
    "no UTF-8": ('[{"question": "\\ud800", "answer": "b"}]', "1 with text that is no UTF-8"),
    "an empty answer": (json.dumps([{"conversations": ask("a", "", "b", "c")}]), "turn 2, assistant"),
    "a role of another type": ('[{"conversations": [{"from": ["human"], "value": "a"}]}]', "['human'] is none of"),
    "an image of another type": ('[{"image": true, "question": "a", "answer": "b"}]', "no path and no file"),
    "images in two columns": ('[{"image": "a.png", "images": ["b.png"], "question": "a", "answer": "b"}]', "`images` differ"),
    "an image without a name": ('[{"image": {"url": "a.png"}, "question": "a", "answer": "b"}]', "no path and no file"),
    "a range that is none": ('[{"question": "a", "answer": "b", "value_range": [9, 1]}]', "`value_range` cannot be read"),
    "no number of tokens": ('[{"question": "a", "answer": "b", "budgets": [true, 3]}]', "`budgets` cannot be read"),
    "two systems": ('[{"system": "a", "messages": [{"role": "system", "content": "b"}]}]', "two system texts"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_and_left_out_and_the_rest_is_read(tmp_path, processor, caplog, name):
    text, told = BROKEN[name]
    (tmp_path / "broken.json").write_text(text, encoding="utf-8")
    good = write_rows(tmp_path / "good.json", [{"question": "What?", "answer": "red"}])
    with pytest.raises(ValueError) as refused:
        load_samples([tmp_path / "broken.json", good], processor)
    assert f"{tmp_path / 'broken.json'}, row " in str(refused.value) and told in str(refused.value)
    with caplog.at_level(logging.WARNING):
        samples = load_samples([tmp_path / "broken.json", good], processor, bad_samples="skip")
    assert answers(samples)[-1] == "red" and told in caplog.text
    assert len(samples) == 1 + (name in ("cut off", "no comma", "without an end"))


def test_a_line_that_is_no_json_or_a_cell_too_many_ends_no_other_row(tmp_path, processor):
    (tmp_path / "data.jsonl").write_bytes(
        b'{"question": "a", "answer": "1"}\nnothing\n\n{"question": "\xff", "answer": "2"}\n{"question": "a", "answer": "3"}\n'
    )
    (tmp_path / "data.csv").write_text('question,answer\na,4\na,5,6\na,"7\na,8\n')
    with pytest.raises(ValueError) as refused:
        load_samples([tmp_path / "data.jsonl", tmp_path / "data.csv"], processor)
    for told in ("4 of 8", "row 2: line 2: ", "row 3: '\\udcff'", "row 2: line 3: 3 and 2", "row 3: line 4: "):
        assert told in str(refused.value)
    samples = load_samples([tmp_path / "data.jsonl", tmp_path / "data.csv"], processor, bad_samples="skip")
    assert answers(samples) == ["1", "3", "4", "8"]


def test_files_are_known_by_their_ending_in_any_case_and_others_are_refused(tmp_path, processor):
    row = '{"question": "a", "answer": "b"}'
    texts = {"A.JSON": f"[{row}]", "A.JSONL": f"{row}\n", "a.ndjson": f"{row}\n", "A.Csv": "question,answer\na,b\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert answers(load_samples(tmp_path / name, processor)) == ["b"]
    (tmp_path / "a.txt").write_text(row)
    with pytest.raises(ValueError, match=r"a.txt: a file of training data ends in .json, .*parquet"):
        load_samples(tmp_path / "a.txt", processor)
    (tmp_path / "twice.csv").write_text("question,answer,answer\na,b,c\n")
    with pytest.raises(ValueError, match="two columns of a name\n.*twice.csv, row 1: line 1: answer"):
        load_samples(tmp_path / "twice.csv", processor)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.json").write_text("nothing")
    with pytest.raises(ValueError, match="folder: it cannot be read as a data set"):
        load_samples(tmp_path / "folder", processor)


def test_a_file_that_is_no_parquet_is_named_like_a_row(tmp_path, processor):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    good = write_rows(tmp_path / "good.json", [{"question": "What?", "answer": "red"}])
    with pytest.raises(ValueError, match="1 that are no parquet\n    .*broken.parquet, row 1: "):
        load_samples([tmp_path / "broken.parquet", good], processor)
    assert len(load_samples([tmp_path / "broken.parquet", good], processor, bad_samples="skip")) == 1


def test_a_file_that_changed_is_read_anew(tmp_path, processor):
    for said in ("red", "new"):
        path = write_rows(tmp_path / "data.json", [{"question": "What?", "answer": said}])
        assert answers(load_samples(path, processor)) == [said]


def test_a_share_takes_some_samples_at_random_or_all_of_them_more_often(tmp_path, processor):
    for name in "ab":
        rows = [{"question": name, "answer": str(idx)} for idx in range(8)]
        write_rows(tmp_path / f"{name}.json", rows)
    first = load_samples([f"{tmp_path}/a.json:0.5", f"{tmp_path}/b.json:1.5"], processor)
    of_a, of_b = ([turns[-1][1] for turns in texts(first) if turns[0][1] == name] for name in "ab")
    assert len(set(of_a)) == len(of_a) == 4 and sorted(set(of_b)) == sorted(map(str, range(8))) and len(of_b) == 12
    assert texts(first) == texts(load_samples([f"{tmp_path}/a.json:0.5", f"{tmp_path}/b.json:1.5"], processor))
    assert texts(first) != texts(load_samples([f"{tmp_path}/a.json:0.5", f"{tmp_path}/b.json:1.5"], processor, seed=1))
    for share in ("0", "-1", "1000"):
        with pytest.raises(ValueError, match=f"Got {share}"):
            load_samples(f"{tmp_path}/a.json:{share}", processor)


def test_folders_of_save_to_disk_are_data_sets(tmp_path, processor):
    table = datasets.Dataset.from_dict({"question": ["What?"], "answer": ["red"]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        assert answers(load_samples(tmp_path / name, processor)) == ["red"]
    with pytest.raises(ValueError, match="no split validation. There are: train"):
        load_samples(tmp_path / "several", processor, split="validation")


def test_a_row_says_how_its_image_is_read_and_what_it_may_spend(tmp_path, processor):
    np, rasterio = pytest.importorskip("numpy"), pytest.importorskip("rasterio")
    pixels = np.zeros((4, 40, 40), np.uint16)
    pixels[3, :20] = 1000
    options = {"driver": "GTiff", "width": 40, "height": 40, "count": 4, "dtype": "uint16"}
    with rasterio.open(tmp_path / "a.tif", "w", **options) as file:
        file.write(pixels)
    row = {"image": "a.tif", "question": "What?", "answer": "it", "value_range": [0, 1000], "bands": [4, 4, 4]}
    rows = [row | {"window": [0, 0, 20, 40]}, row | {"window": [20, 0, 40, 40], "budgets": [2, 3]}]
    samples = load_samples(write_rows(tmp_path / "data.json", rows), processor)
    batch = UHRBatDataCollator(processor)([*samples])
    bright, dark = (batch["pixel_values"][idx].max() for idx in (0, 1))
    assert bright > 1 > dark and batch["token_counts"].tolist() == [[4, 8], [2, 3]]
    for name, wrong in (("window", [1, 2]), ("bands", "abc"), ("budgets", 3), ("budgets", "many")):
        with pytest.raises(ValueError, match="row 1"):
            load_samples(write_rows(tmp_path / "data.json", [row | {name: wrong}]), processor)


def test_no_image_is_both_learnt_and_held_out(tmp_path, processor):
    rows = [row | {"id": turn} for row in make_rows(tmp_path, 12) for turn in range(2)]
    rows[1]["image"] = "images/../images/0.png"
    rows.append({"image": ["images/3.png", "images/4.png"], "question": "Which?", "answer": "None."})
    samples = load_samples(write_rows(tmp_path / "data.json", rows), processor)
    learnt, held = hold_out(samples["images"][:], 0.3, seed=0)
    shown = [{one["path"].replace("images/../", "") for idx in part for one in samples[idx]["images"]} for part in (learnt, held)]
    assert sorted(learnt + held) == list(range(25)) and not shown[0] & shown[1] and 4 <= len(held) <= 10
    assert hold_out(samples["images"][:], 0.3, seed=1)[1] != held
    with pytest.raises(ValueError, match="show the same ones"):
        hold_out(samples["images"][:2], 0.3, seed=0)


@pytest.mark.parametrize(
    "name, answer, expected, worth",
    [
        ("words", "The three ships.", "3 ships", 1), ("letter", "The answer is (b).", "B", 1), ("letter", "A", "B", 0),
        ("number", "There are three.", "3", 1), ("number", "none", "3", 0), ("number", "3", "red", None),
        ("iou", "[0, 0, 2, 2]", "[0, 0, 2, 1]", 0.5), ("iou", "there", "[0, 0, 2, 1]", 0),
    ],
)  # fmt: skip
def test_answers_are_scored_as_evaluation_does(name, answer, expected, worth):
    assert score(name, answer, expected) == worth


def test_a_score_that_compares_nothing_is_refused():
    with pytest.raises(ValueError, match="number scores none of the 1 held-out answers"):
        check_scores(["number"], ["red"])
