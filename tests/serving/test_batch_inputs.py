"""What a batch is made of: images and questions from files of every kind, and errors that name what is wrong in them."""

from dataclasses import replace

import pytest
from images import raises
from uhr_bat.serving.batch_inputs import BatchImage, plan, read_images, read_questions

A, B, C = BatchImage("/data/a.tif"), BatchImage("/data/b.tif", "S2B"), BatchImage("https://host/deep/c.tif", "S2C")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_is_searched_for_images_with_all_below_it(tmp_path):
    for name in ("b.PNG", "a.tif", "deep/er/c.jp2", "notes.txt", "a.tif.aux.xml"):
        write(tmp_path / name, "")
    found = [image.source for image in read_images(tmp_path)]
    assert found == [str(tmp_path / name) for name in ("a.tif", "b.PNG", "deep/er/c.jp2")]


def test_what_is_hidden_and_folders_that_are_named_as_images_are_no_images(tmp_path):
    for name in ("a.tif", "._a.tif", ".cache/b.tif", "scene.tif/c.png", "__MACOSX/._a.tif"):
        write(tmp_path / name, "")
    found = [image.source for image in read_images(tmp_path)]
    assert found == [str(tmp_path / name) for name in ("a.tif", "scene.tif/c.png")]


def test_a_missing_image_of_a_list_is_one_of_the_batch(tmp_path):
    write(tmp_path / "a.tif", "")
    found = [image.source for image in read_images(write(tmp_path / "list.txt", "a.tif\ngone.tif\n"))]
    assert found == [str(tmp_path / "a.tif"), str(tmp_path / "gone.tif")]


def test_a_question_about_an_image_is_one_about_all_its_items():
    items = [BatchImage("/data/a.tif", item) for item in ("first", "second")]
    assert plan(items, [("/data/a.tif", "How many?", None)]) == [(item, ["How many?"]) for item in items]
    assert plan(items, [("second", "How many?", None)]) == [(items[1], ["How many?"])]


def test_a_list_names_paths_beside_it_and_addresses_each_once(tmp_path):
    write(tmp_path / "in/a.tif", "")
    lines = f"# scenes\nin/a.tif\n\n{tmp_path}/in/a.tif\nhttps://host/c.tif\ns3://bucket/d.tif\n"
    found = [image.source for image in read_images(write(tmp_path / "list.txt", lines))]
    assert found == [str(tmp_path / "in/a.tif"), "https://host/c.tif", "s3://bucket/d.tif"]


def test_images_that_are_not_there_are_an_error(tmp_path):
    with raises(FileNotFoundError, f"{tmp_path / 'none'}: there is no such folder or file of images."):
        read_images(tmp_path / "none")
    with pytest.raises(ValueError, match="there is no image in it"):
        read_images(write(tmp_path / "list.txt", "# nothing\n"))


@pytest.mark.parametrize(
    "name, text",
    [
        ("q.txt", "How many?\n\n What colour? \n"),
        ("q.json", '["How many?", {"question": "What colour?"}]'),
        ("q.jsonl", '{"question": "How many?"}\n{"question": "What colour?", "image": ""}\n'),
        ("q.csv", "image,question\n,How many?\n,What colour?\n"),
    ],
)
def test_questions_of_every_kind_of_file(tmp_path, name, text):
    assert read_questions(write(tmp_path / name, text)) == [
        (None, "How many?", None),
        (None, "What colour?", None),
    ]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("q.xml", "", r"questions are \.txt, \.json, \.jsonl or \.csv"),
        ("q.txt", "\n", "there is no question in it"),
        ("q.csv", "image,text\na.tif,How many?\n", "row 1: there is no question in"),
        ("q.jsonl", '{"question": "How many?"}\n{"question": 3}\n', "row 2: there is no question in"),
        ("q.jsonl", '{"question": "How many?"}\n{"ques\n', "line 2: this is no JSON"),
        ("q.json", '[{"question": "New?", "before": ["a.tif"]}]', "row 1: 'before' is a path, a URL or a name. Got "),
    ],
)
def test_questions_that_are_none_are_an_error_that_says_where(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / name, text))


def test_a_question_is_about_all_images_or_the_one_that_it_names():
    questions = [("b.tif", "How many?"), (None, "What colour?"), ("S2C", "How many?"), ("/data/b.tif", "How many?")]
    assert plan([A, B, C], [(*one, None) for one in questions]) == [
        (A, ["What colour?"]),
        (B, ["How many?", "What colour?"]),
        (C, ["What colour?", "How many?"]),
    ]
    assert plan([A, B], [("a.tif", "How many?", None)]) == [(A, ["How many?"])]


@pytest.mark.parametrize("name, number", [("d.tif", 0), ("a.tif", 2)])
def test_a_question_about_no_image_or_several_is_an_error(name, number):
    with pytest.raises(ValueError, match=f"{name!r}, which is the name of {number} of the 3 images: 'How many"):
        plan([A, BatchImage("/other/a.tif"), B], [(name, "How many?", None)])


@pytest.mark.parametrize("name", ["list.txt", "questions.txt", "questions.csv"])
def test_a_file_in_another_encoding_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("question\nWie groß?\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}: it is no text in UTF-8"):
        read_images(path) if name == "list.txt" else read_questions(path)


def test_lines_of_a_list_end_where_lines_of_files_do(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa b/ü.tif\r\n\r\n/data/x\u2028y.tif\r\n".encode())
    assert [image.source for image in read_images(path)] == [str(tmp_path / "a b/ü.tif"), "/data/x\u2028y.tif"]


def test_an_earlier_image_is_one_of_the_images_by_its_name_or_a_file_beside_the_questions(tmp_path):
    path = write(tmp_path / "q.csv", "image,question,before\na.tif,New?,b.tif\na.tif,New?,old/a.tif\na.tif,New?,\n")
    pairs = [replace(A, before=before) for before in (B.source, str(tmp_path / "old/a.tif"), "")]
    assert plan([A, B], read_questions(path), path) == [(pair, ["New?"]) for pair in pairs]
    with pytest.raises(ValueError, match="'b.tif', which is the name of 2 of the 3 images"):
        plan([A, B, replace(B, source="/other/b.tif")], read_questions(path), path)
