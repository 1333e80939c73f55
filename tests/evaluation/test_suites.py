"""Every benchmark's form is read as it is, and asked in its own words."""

import base64
import json

import numpy as np
import pytest
from benchmark_files import FORMS, encoded, picture, write_lines, xlrs
from PIL import Image
from uhr_bat.common.loading import ROOT
from uhr_bat.evaluation import asked as digests
from uhr_bat.evaluation.suites import SUITES
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor


def load(name, folder):
    return SUITES[name].load(str(FORMS[name](folder)))


def asked(name, sample, prompt=0):
    return list(SUITES[name].prompts.values())[prompt](sample)


def test_every_suite_names_its_prompts_and_scores_once():
    for suite in SUITES.values():
        assert suite.prompts and suite.scorers and suite.title
        names = [*suite.prompts, *(scorer.name for scorer in suite.scorers)]
        assert all(name.split("-1")[0].count("/") == 1 for name in names)


@pytest.mark.parametrize("name", FORMS)
def test_every_picture_of_every_form_can_be_opened(name, tmp_path):
    suite, image_processor = SUITES[name], UHRBatImageProcessor.from_pretrained(ROOT)
    for sample in load(name, tmp_path):
        for shown in sample.pictures:
            image = image_processor.process_image(suite.open(shown))
            assert min(image.height, image.width) >= 16


def test_xlrs_bench_is_asked_as_lmms_eval_asks(tmp_path):
    one, _, several, route = load("xlrs-bench-lite", tmp_path)
    assert asked("xlrs-bench-lite", one) == (
        "Question 0?The choices are listed below:\n(A) red\n(B) blue\n(C) green\n(D) white\n\n"
        "Select the best answer for the multiple-choice question based on the image. Only respond with the letter "
        "corresponding to the correct answer (A, B, C, D).\nThe answer is:"
    )
    assert asked("xlrs-bench-lite", several).endswith("separated by spaces.The answer(s) is(are):")
    assert (one.section, route.section) == ("Perception", "Reasoning")
    assert one.task == "Overall counting" and one.answer == "B"


def test_equal_pictures_in_a_table_are_one_and_others_are_not(tmp_path):
    samples = load("xlrs-bench-lite", tmp_path)
    keys = [sample.picture_keys for sample in samples]
    assert keys[0] == keys[1] and keys[2] == keys[3] and keys[0] != keys[2]


def test_one_pixel_makes_another_picture(tmp_path):
    """Whatever its edges are: mosaics with black ones are alike at both ends of their files."""
    from datasets import Dataset

    pixels = np.zeros((1300, 1300, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.bmp")
    pixels[650, 650] = 255
    Image.fromarray(pixels).save(tmp_path / "other.bmp")
    names = [tmp_path / "one.bmp", tmp_path / "other.bmp"]
    records = [
        {"question": "q", "answer": "yes", "image": {"bytes": name.read_bytes(), "path": None}} for name in names
    ]
    Dataset.from_list(records).to_parquet(tmp_path / "q.parquet")
    one, other = SUITES["own"].load(str(tmp_path / "q.parquet"))
    assert one.picture_keys != other.picture_keys
    named = SUITES["own"].load(
        str(write_lines(tmp_path / "q.jsonl", [{**records[0], "image": name.name} for name in names]))
    )
    assert len({digests.asked(sample) for sample in named}) == 2


def test_mme_realworld_takes_its_remote_sensing_part_alone(tmp_path):
    samples = load("mme-realworld-rs", tmp_path)
    assert [sample.task for sample in samples] == ["position", "color", "count"]
    end = "(E) The image does not feature it.\nSelect the best answer to the above multiple-choice question based on "
    end += "the image. Respond with only the letter (A, B, C, D, or E) of the correct option."
    start = "What colour is the roof? The choices are listed below:"
    assert asked("mme-realworld-rs", samples[0]).startswith(f"{start}\n(A) red\n")
    assert asked("mme-realworld-rs", samples[0]).endswith(f"{end} \nThe best answer is:")
    assert asked("mme-realworld-rs", samples[0], 1).endswith(f"{end}\nThe best answer is: ")
    assert asked("mme-realworld-rs", samples[0], 2).startswith(f"{start} \n\n(A) red\n")
    assert asked("mme-realworld-rs", samples[0], 2).endswith(end)


def test_mme_realworld_of_lmms_eval_is_the_same_benchmark(tmp_path):
    record = {
        "index": 3, "question": "Where?", "multi-choice options": ["(A) here", "(B) there"], "answer": "A",
        "category": "Perception/Remote Sensing", "l2-category": "position", "image": str(picture(tmp_path, "a.png")),
    }  # fmt: skip
    write_lines(tmp_path / "data.jsonl", [record, {**record, "category": "Perception/Monitoring"}])
    (sample,) = SUITES["mme-realworld-rs-lite"].load(str(tmp_path))
    assert (sample.id, sample.task, sample.options) == ("3", "position", ("(A) here", "(B) there"))


def test_rshr_bench_hints_at_several_answers_only_where_it_is_asked_to(tmp_path):
    colour, future = load("rshr-bench", tmp_path)
    assert asked("rshr-bench", colour) == (
        "What colour?\nA. red\nB. blue\nSelect the best answer based on the image. Answer with the option letter only."
    )
    assert "multiple answers" not in asked("rshr-bench", future)
    assert "You should choose multiple answers." in asked("rshr-bench", future, 1)
    assert asked("rshr-bench", colour, 1) == asked("rshr-bench", colour)
    assert (colour.section, future.section, future.answer) == ("Perception", "Reasoning", "AC")
    assert len(future.pictures) == 2


def test_lrs_vqa_finds_images_beside_its_folder_and_keeps_the_boxes(tmp_path):
    samples = load("lrs-vqa", tmp_path)
    assert [sample.section for sample in samples] == ["FAIR", "FAIR", "GLH-Bridge", "STAR"]
    assert asked("lrs-vqa", samples[0]) == "What is it? Answer the question using a single word or phrase.\n"
    assert [len(sample.boxes) for sample in samples] == [1, 0, 1, 1]
    assert samples[0].boxes[0] == (10.0, 5.0, 14.0, 9.0)


def test_hr_bench_is_read_with_none_as_an_option(tmp_path):
    samples = load("hr-bench", tmp_path)
    assert asked("hr-bench", samples[0]) == (
        "What is it?\nA. None\nB. 7\nC. car\nD. bus\nAnswer the option letter directly."
    )
    assert [sample.section for sample in samples] == ["single", "single", "cross", "cross"]


def test_conversations_are_asked_turn_by_turn(tmp_path):
    samples = load("conversations", tmp_path)
    assert [sample.id for sample in samples] == ["one/0", "one/1", "two", "text"]
    assert [asked("conversations", sample) for sample in samples[:2]] == ["What is it?", "Which? (A) one (B) two"]
    assert samples[3].pictures == ()


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_conversations_are_read_from_any_file(suffix, tmp_path):
    records = FORMS["conversations"](tmp_path) / "talks.jsonl"
    records = [json.loads(line) for line in records.read_text().splitlines()][:2]
    path = tmp_path / "other" / f"talks.{suffix}"
    path.parent.mkdir()
    if suffix == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        from datasets import Dataset

        Dataset.from_list(records).to_parquet(path)
    samples = SUITES["conversations"].load(str(path))
    assert [(sample.id, sample.answer) for sample in samples] == [
        ("one/0", "A ship."),
        ("one/1", "B"),
        ("two", "A ship."),
    ]
    assert samples[0].pictures[0].source == str(tmp_path / "images" / "a.png")  # looked for above the file, too


def test_the_scenes_are_those_that_nothing_was_trained_on_and_show_their_objects():
    samples = SUITES["scenes"].load(None, 12)
    assert len(samples) == 12 and all(sample.id.startswith("20000") for sample in samples)
    (colour,) = (sample for sample in samples[:6] if sample.task == "colour")
    x0, y0, x1, y1 = colour.boxes[0]
    pixels = SUITES["scenes"].open(colour.pictures[0]).crop((round(x0), round(y0), round(x1), round(y1)))
    assert colour.answer == "white" and np.asarray(pixels).min(-1).max() > 180


def test_a_limit_takes_samples_evenly_and_one_of_zero_is_refused(tmp_path):
    folder = str(xlrs(tmp_path))
    assert [sample.id for sample in SUITES["xlrs-bench"].load(folder, 2)] == ["0", "2"]
    with pytest.raises(ValueError, match="at least 1. Got 0"):
        SUITES["xlrs-bench"].load(folder, 0)


def test_equal_ids_are_told_apart(tmp_path):
    record = {
        "image": "a.png",
        "id": 5,
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    }
    path = write_lines(tmp_path / "twice.jsonl", [record, record])
    assert [sample.id for sample in SUITES["conversations"].load(str(path))] == ["5", "5 (2)"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "holds no sample of XLRS-Bench"),
        ('{"index": 1}', "A record has none of the fields ['category']"),
        ("{", "line 1: this is no JSON"),
    ],
)
def test_what_is_no_benchmark_is_an_error_that_says_so(text, message, tmp_path):
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        SUITES["xlrs-bench"].load(str(tmp_path / "data.json"))
    assert message in str(error.value)


def test_data_that_is_nowhere_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder, and it is no id"):
        SUITES["xlrs-bench"].load("nowhere")
    with pytest.raises(FileNotFoundError, match="no file of this benchmark"):
        SUITES["xlrs-bench"].load(str(tmp_path))
    for name in ("earth-vqa", "rsvqa-lr", "cdvqa", "levir-cc", "pascal-voc"):  # those that are on no Hub
        with pytest.raises(FileNotFoundError, match="^my/data: there is no such file or folder, and "):
            SUITES[name].load("my/data")


# ---- Right answers, files, pictures ----------------------------------------------------------------------------------


def mme(answer="A", **more):
    options = ["(A) Red", "(B) Blue", "(C) Green", "(D) White"]
    return {
        "Question_id": "1", "Image": "a.png", "Text": "q", "Ground truth": answer, "Category": "Remote Sensing/c",
        "Subtask": "Remote Sensing", "Answer choices": options, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("(A)", "A"),
        ("b", "B"),
        ("B.", "B"),
        ("C. Green", "C"),
        ("White", "D"),
        ("(D) white", "D"),
        ("[c]", "C"),
    ],
)
def test_a_right_answer_is_read_in_any_form_of_an_option(answer, letter, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [mme(answer)])
    assert SUITES["mme-realworld-rs"].load(str(path))[0].answer == letter


@pytest.mark.parametrize("answer", ["E", "", "Yellow", "A. Blue", "AB"])
def test_a_right_answer_that_is_no_option_is_refused(answer, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [mme(answer)])
    with pytest.raises(ValueError, match="The right answer of sample '1': .* is no option: these are A. Red, B. Blue"):
        SUITES["mme-realworld-rs"].load(str(path))


def test_of_the_files_of_a_folder_the_benchmarks_own_version_is_read(tmp_path):
    for name, text in (("MME_RealWorld", "full"), ("MME_RealWorld_CN", "cn"), ("MME_RealWorld_Lite", "lite")):
        (tmp_path / f"{name}.json").write_text(json.dumps([mme(Text=text)]))
    assert [one.question for one in SUITES["mme-realworld-rs-lite"].load(str(tmp_path))] == ["lite"]
    assert [one.question for one in SUITES["mme-realworld-rs"].load(str(tmp_path))] == ["full"]
    (tmp_path / "MME_RealWorld_Lite.json").unlink()
    with pytest.raises(ValueError, match=r"holds MME_RealWorld.json, MME_RealWorld_CN.json, none of which is Lite"):
        SUITES["mme-realworld-rs-lite"].load(str(tmp_path))


def test_of_the_splits_of_a_folder_test_is_read_and_other_names_are_refused(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation"):
        write_lines(tmp_path / f"{name}.jsonl", [{"question": name, "answer": "yes", "image": "a.png"}])
    assert [one.question for one in SUITES["own"].load(str(tmp_path))] == ["validation"]
    (tmp_path / "validation.jsonl").unlink()
    assert [one.question[:8] for one in SUITES["own"].load(str(tmp_path))] == ["train-00"] * 2
    write_lines(tmp_path / "train.jsonl", [{}])
    with pytest.raises(ValueError, match="which are not one benchmark: give one of them as --data"):
        SUITES["own"].load(str(tmp_path))


def test_what_save_to_disk_wrote_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list([mme()]).save_to_disk(tmp_path / "one")
    splits = {name: Dataset.from_list([mme(Text=name)]) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert [one.question for one in SUITES["mme-realworld-rs"].load(str(tmp_path / "one"))] == ["q"]
    assert [one.question for one in SUITES["mme-realworld-rs"].load(str(tmp_path / "two"))] == ["test"]


def test_tables_of_vlmevalkit_share_pictures_by_index_and_keep_every_option(tmp_path):
    image = base64.b64encode(encoded()).decode()
    rows = [[0, "nan", "0", image], [1, "x", "y", "0"], [2, "x", "y", str([image, image])], [3, "x", "y", ""]]
    text = "index\tquestion\tA\tB\tanswer\tcategory\timage\n"
    text += "".join(f"{index}\tq\t{a}\t{b}\tA\tc\t{shown}\n" for index, a, b, shown in rows)
    (tmp_path / "data.tsv").write_text(text)
    samples = SUITES["hr-bench"].load(str(tmp_path / "data.tsv"))
    assert [len(one.pictures) for one in samples] == [1, 1, 2, 1]
    assert len({key for one in samples[:3] for key in one.picture_keys}) == 1
    assert samples[0].options == ("A. nan", "B. 0")
    assert all(
        SUITES["hr-bench"].open(shown) == f"data:;base64,{image}" for one in samples[:3] for shown in one.pictures
    )
    with pytest.raises(ValueError, match="the record names no picture"):
        SUITES["hr-bench"].open(samples[3].pictures[0])


def test_pictures_that_were_named_elsewhere_are_found(tmp_path):
    picture(tmp_path / "images", "caf\u00e9.png")
    names = ("images\\caf\u00e9.png", "images/cafe\u0301.png")
    path = write_lines(tmp_path / "q.jsonl", [{"question": "q", "answer": "a", "image": name} for name in names])
    assert {one.pictures[0].source for one in SUITES["own"].load(str(path))} == {
        str(tmp_path / "images" / "caf\u00e9.png")
    }


def test_a_number_behind_an_id_is_no_other_samples_id(tmp_path):
    records = [{"id": name, "question": "q", "answer": "a", "image": "a.png"} for name in ("1", "1", "1 (2)", "1")]
    path = write_lines(tmp_path / "q.jsonl", records)
    assert [one.id for one in SUITES["own"].load(str(path))] == ["1", "1 (3)", "1 (2)", "1 (4)"]


def test_a_suite_of_ones_own_needs_no_code(tmp_path):
    text = "index\tquestion\tA\tB\tanswer\timage\n5\tWhich?\tred\tblue\tBlue\ta.png\n6\tHow many?\t\t\ttwo\ta.png\n"
    (tmp_path / "mine.tsv").write_text(text)
    which, many = SUITES["own"].load(str(tmp_path))
    assert (which.id, which.answer, many.answer, many.options) == ("5", "B", "two", ())
    assert (
        asked("own", which)
        == "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )
    as_written = SUITES["own"].prompts["own/as-written-1"]
    assert [as_written(one) for one in (which, many)] == ["Which?\nA. red\nB. blue", "How many?"]
    assert [scorer.score(which, "The answer is b.") for scorer in SUITES["own"].scorers] == [1, 1]
    assert [scorer.score(many, "2") for scorer in SUITES["own"].scorers] == [0, 1]


def test_a_single_line_is_one_record(tmp_path):
    record = {"id": "one", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    for name in ("one.jsonl", "one.json"):
        path = write_lines(tmp_path / name, [record])
        assert [one.id for one in SUITES["conversations"].load(str(path))] == ["one"]
