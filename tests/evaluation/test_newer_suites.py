"""The suites whose forms were stated last: what is read, how it is scored, and what is refused before a model is loaded."""

import json
import os

import pytest
from benchmark_files import FORMS, HINT, geo_evidence, picture, rsvqa, write_lines
from datasets import Dataset
from PIL import Image
from uhr_bat.common.loading import ROOT
from uhr_bat.evaluation import recall
from uhr_bat.evaluation.suites import SUITES
from uhr_bat.image_processing_uhr_bat import UHRBatImageProcessor


def load(name, folder):
    return SUITES[name].load(str(FORMS[name](folder)))


def score(name, sample, text):
    return {scorer.name: scorer.score(sample, text) for scorer in SUITES[name].scorers}


def test_geo_evidence_is_asked_about_the_plain_picture_without_what_points_at_the_box(tmp_path):
    local, whole = load("geo-evidence", tmp_path)
    asked = SUITES["geo-evidence"].prompts["geo-evidence/letters-1"](local)
    assert asked.startswith("What colour is the roof?\nA. red\nB. blue\nAnswer with the letter") and HINT not in asked
    assert local.pictures[0].source == str(tmp_path / "images" / "a.png")
    assert (local.boxes, whole.boxes, whole.options) == (
        ((4.0, 5.0, 12.0, 9.0),),
        (),
        ("A. alpha", "B. beta", "C. gamma"),
    )
    assert (
        score("geo-evidence", whole, "A, B")
        == score("geo-evidence", whole, "(B) and (A)")
        == {"geo-evidence/letters-1": 1}
    )
    assert score("geo-evidence", whole, "B") == {"geo-evidence/letters-1": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {"bbox": [[4, 5, 12, 9]]},
        {"bbox": "[4, 5, 12, 9]"},
        {"bbox": None, "extra_info": {"bbox": [4, 5, 12, 9]}},
        {"bbox": None, "bboxes": [{"bbox": [4, 5, 12, 9], "label": "roof"}], "evidence": "evidence/a.png"},
        {"answer": ["B"]},
        {"answer": "blue"},
        {"problem": None, "question": "<image>What?", "options": ["red", "blue"]},
    ],
)
def test_boxes_and_answers_are_read_however_they_are_written(changes, tmp_path):
    local = SUITES["geo-evidence"].load(str(geo_evidence(tmp_path, **changes)))[0]
    assert (local.boxes, local.answer) == (((4.0, 5.0, 12.0, 9.0),), "B")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"bbox": [0.1, 0.2, 0.3, 0.4]}, "shares of the picture"),
        ({"bbox": [12, 5, 4, 9]}, "turned round"),
        ({"bbox": [4, 5, 12]}, "no box of four numbers"),
        ({"bbox": ["4", "5", "12", "9"]}, "no box of four numbers"),
        ({"bbox": {"left": 4}}, r"none of the fields \['bbox', 'box'\]: its fields are \['left'\]"),
        ({"bbox": [400, 500, 1200, 900]}, r"1 of 1 boxes leave their pictures.*\(400.0, .* in 30 x 40 px"),
        ({"bbox": 5}, "no box of four numbers"),
        ({"bbox": "no JSON"}, "record 0"),
        ({"images": ["images/a.png", "images/a.png"]}, "about 1 picture. Got 2"),
        ({"images": ["../../secret.png"]}, "does not lie below"),
        ({"images": ["/vsicurl/http://10.0.0.1/a.tif"]}, "is an address"),
        ({"images": ["http://10.0.0.1/a.png"]}, "is an address"),
        ({"images": None}, r"none of the fields \['images', 'image', 'plain'\]"),
        ({"problem": "<image>What?"}, "no line of an option"),
        ({"answer": "D"}, "'D' is no option"),
        ({"answer": None}, r"none of the fields \['answer'\]"),
        ({"problem": 5}, "no line of an option"),
    ],
)
def test_a_record_of_another_form_is_refused_with_its_number_and_what_is_wrong(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        SUITES["geo-evidence"].load(str(geo_evidence(tmp_path, **changes)))


@pytest.mark.slow
def test_recall_reads_the_evidence_as_that_of_tree_bench(tmp_path, capsys):
    arguments = ["geo-evidence", "--data", str(geo_evidence(tmp_path)), "--fractions", "1", "--methods", "uniform"]
    assert recall.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert result["about"]["samples"] == result["about"]["objects"] == 1 and result["rows"][0]["kept"][0] == 1
    geo_evidence(tmp_path, bbox=None, region=[4, 5, 12, 9])
    assert recall.main([*arguments, "--output", str(tmp_path / "other")]) == 2
    assert "Boxes are read from bbox, " in (said := capsys.readouterr().err) and "bbox, answer, problem, region" in said


def test_xhr_bench_and_ultra_vr_are_read_from_their_own_files(tmp_path):
    (colour,) = load("xhr-bench", tmp_path / "xhr")
    assert (colour.answer, colour.options) == ("B", ("A. red", "B. blue"))
    there, elsewhere = load("ultra-vr", tmp_path / "ultra")
    assert there.pictures[0].source.endswith("DOTA-v1.5/train/images/P1.png") and (there.task, there.section) == (
        "spatial",
        "RS",
    )
    assert elsewhere.pictures[0].source == str(tmp_path / "ultra" / "images" / "P1.png")


def test_rsvqa_joins_its_files_by_id_and_scores_numbers_by_the_ranges_of_its_loader(tmp_path):
    (tmp_path / "lr").mkdir(), (tmp_path / "hr").mkdir()
    road, count, urban = load("rsvqa-lr", tmp_path / "lr")
    assert [one.answer for one in (road, count, urban)] == ["yes", "37", "urban"] and urban.task == "rural_urban"
    assert [
        score("rsvqa-lr", count, text)["rsvqa-lr/ranges-1"] for text in ("40", "11", "10", "0", "between 10 and 100")
    ] == [1, 1, 0, 0, 1]
    assert (
        score("rsvqa-lr", count, "40")["rsvqa-lr/words-1"] == 0
        and score("rsvqa-lr", road, "Yes.")["rsvqa-lr/words-1"] == 1
    )
    _, count, area = load("rsvqa-hr", tmp_path / "hr")
    assert [score("rsvqa-hr", count, text)["rsvqa-hr/ranges-1"] for text in ("37", "40")] == [1, 0]
    assert [
        score("rsvqa-hr", area, text)["rsvqa-hr/ranges-1"] for text in ("2000m2", "1500 m\u00b2", "900m2", "1" * 5000)
    ] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "rows, said",
    [
        ({"answers": []}, r"the answer \[11\] to question 1 is none of the 0"),
        ({"answers": [{"id": 11, "answer": "a"}] * 2}, "1 of 2 ids stand there more than once, 11 first"),
        ({"answer": []}, "not of the form"),
        ([], "not of the form"),
    ],
)
def test_answers_that_do_not_fit_their_questions_are_refused(rows, said, tmp_path):
    folder = FORMS["rsvqa-lr"](tmp_path)
    (folder / "LR_split_test_answers.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=said):
        SUITES["rsvqa-lr"].load(str(folder))
    (folder / "LR_split_test_answers.json").unlink()
    with pytest.raises(FileNotFoundError, match="which has the answers"):
        SUITES["rsvqa-lr"].load(str(folder))


def test_a_picture_of_rsvqa_is_named_by_its_id_alone(tmp_path):
    path = rsvqa("LR", ("count", "How many?", "1"))(tmp_path) / "LR_split_test_questions.json"
    path.write_text(path.read_text().replace('"img_id": 7', '"img_id": "../../7"'))
    with pytest.raises(ValueError, match="does not lie below"):
        SUITES["rsvqa-lr"].load(str(tmp_path))


def test_earth_vqa_finds_pictures_in_the_folder_of_their_split_and_takes_no_test_without_answers(tmp_path):
    many, water = load("earth-vqa", tmp_path)
    assert (many.answer, many.task, water.answer) == ("2", "Basic Counting", "No")
    assert many.pictures[0].source == str(tmp_path / "Val" / "images_png" / "2522.png")
    (tmp_path / "Test_QA.json").write_text('{"5000.png": [{"Type": "a", "Question": "b?"}]}')
    with pytest.raises(ValueError, match="0 of 1 questions have an answer.*Val_QA.json"):
        SUITES["earth-vqa"].load(str(tmp_path))
    for text, said in (
        ('{"a": [], "a": []}', "2 keys are 1 different"),
        ("[]", "not of the form"),
        ('{"a": {}}', "not of the"),
    ):
        (tmp_path / "Test_QA.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            SUITES["earth-vqa"].load(str(tmp_path))


def test_cdvqa_shows_both_dates_and_names_what_may_be_answered(tmp_path):
    trees, largest, share = load("cdvqa", tmp_path)
    assert [one.source for one in trees.pictures] == [str(tmp_path / date / "02180.png") for date in ("im1", "im2")]
    assert trees.picture_keys == share.picture_keys and (largest.task, largest.answer) == (
        "largest_change",
        "NVG_surface",
    )
    assert SUITES["cdvqa"].prompts["cdvqa/choices-1"](trees).endswith("changed?\nAnswer with one of: yes, no.")
    for sample, right, wrong in (
        (largest, ("NVG_surface", "Non-vegetated ground surface."), ("trees",)),
        (share, ("30_to_40", "30 to 40 %", "between 30% and 40%", "30-40", "35 percent"), ("30", "0", "45 %", "350")),
    ):
        assert [score("cdvqa", sample, text)["cdvqa/classes-1"] for text in (*right, *wrong)] == [1] * len(right) + [
            0
        ] * len(wrong)
    assert score("cdvqa", share, "35 %")["cdvqa/words-1"] == 0
    questions, path = tmp_path / "Test_questions.json", tmp_path / "Test_images.json"
    written = questions.read_text()
    questions.write_text(written.replace('"img_id": 0', '"img_id": [0]'))
    with pytest.raises(ValueError, match="is not of the form of CDVQA"):
        SUITES["cdvqa"].load(str(tmp_path))
    questions.write_text(written)
    path.write_text(path.read_text().replace('"id": 2', '"id": 7'))
    with pytest.raises(ValueError, match="the picture 2 of question 2 is none of the 3 of Test_images.json"):
        SUITES["cdvqa"].load(str(tmp_path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="which has the images to Test_questions.json"):
        SUITES["cdvqa"].load(str(tmp_path))


def test_levir_cc_scores_a_sentence_by_all_of_its_pair(tmp_path):
    changed, unchanged = load("levir-cc", tmp_path)
    assert [one.source for one in changed.pictures] == [
        str(tmp_path / "images" / "test" / date / "test_000001.png") for date in "AB"
    ]
    assert (changed.task, unchanged.task) == ("changed", "unchanged") and len(changed.answer.split("\n")) == 3
    same = {"levir-cc/rouge-l-1": 1, "levir-cc/bleu-4-1": 1, "levir-cc/changed-1": 1}
    assert score("levir-cc", changed, "A road appears in the woods.") == pytest.approx(same)
    assert score("levir-cc", unchanged, "the scene is the same as before") == pytest.approx(same)
    # "a road" of 3 words, of 4 and of 6: precision 2/3, recall 2/4, with beta 1.2.
    found = score("levir-cc", changed, "a new road")
    assert found["levir-cc/rouge-l-1"] == pytest.approx(2.44 * (2 / 3) * (2 / 4) / (2 / 4 + 1.44 * 2 / 3))
    assert found["levir-cc/bleu-4-1"] < 0.2 and score("levir-cc", unchanged, "a new road")["levir-cc/changed-1"] == 0
    pair = '{"images": [{"filename": "a.png", "split": %s, "changeflag": %s, "sentences": [{"raw": "a road"}]}]}'
    for text, said in (
        ('{"images": [{"filename": "a.png"}]}', r"not of the form .*KeyError\('split'\)"),
        (pair % ("3", "1"), "is not of the form of LEVIR-CC"),
        (pair % ('"test"', "Infinity"), "the `changeflag` of the pair 'a.png' is 0 or 1. Got 'inf'"),
    ):
        (tmp_path / "LevirCCcaptions.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            SUITES["levir-cc"].load(str(tmp_path))


def test_a_downloaded_file_that_gdal_would_follow_is_no_picture(tmp_path):
    """A mosaic's XML under a picture's name, and a folder: what they name is not opened."""
    picture(tmp_path, "secret.png", size=(64, 64))
    band = f"<SourceFilename>{tmp_path}/secret.png</SourceFilename><SourceBand>1</SourceBand>"
    text = '<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.png").write_text(f"{text}{band}</SimpleSource></VRTRasterBand></VRTDataset>")
    record = {"images": ["images/a.png"], "problem": "What?\nA. a\nB. b", "answer": "A"}
    long = f"http://10.0.0.1/{'a' * 2000}.png"  # as long as base64
    records = [record | {"images": [name]} for name in ("images/a.png", "images", long)]
    suite = SUITES["geo-evidence"]
    file, folder, address = suite.load(str(write_lines(tmp_path / "data" / "train.jsonl", records)))
    image_processor = UHRBatImageProcessor.from_pretrained(ROOT)
    with pytest.raises(OSError, match="data/images/a.png: not an image"):
        image_processor.process_image(suite.open(file.pictures[0]))
    for sample, said in ((folder, "names a folder"), (address, "names an address")):
        with pytest.raises(ValueError, match=said):
            suite.open(sample.pictures[0])


def test_a_table_gives_names_and_files_as_lines_do(tmp_path):
    record = json.loads((geo_evidence(tmp_path / "lines") / "train.jsonl").read_text().splitlines()[0])
    for name, shown in (
        ("names", ["images/a.png"]),
        ("files", [{"bytes": picture(tmp_path, "b.png").read_bytes(), "path": None}]),
    ):
        picture(tmp_path / name / "images", "a.png")
        Dataset.from_list([record | {"images": shown}]).to_parquet(tmp_path / name / "train.parquet")
        (local,) = SUITES["geo-evidence"].load(str(tmp_path / name))
        assert local.boxes == ((4.0, 5.0, 12.0, 9.0),) and SUITES["geo-evidence"].open(local.pictures[0])


@pytest.mark.slow
def test_two_dates_of_a_scene_are_asked_about_together():
    suite = SUITES["scenes-dates"]
    samples = suite.load(limit=8)
    assert all(len(sample.pictures) == 2 for sample in samples) and len({sample.task for sample in samples}) > 3
    first, second = (suite.open(shown) for shown in samples[0].pictures)
    assert first.size == second.size and first.tobytes() != second.tobytes()
    with pytest.raises(ValueError, match="painted when they are asked about"):
        suite.load("scenes")


@pytest.mark.parametrize("suite", ["geo-evidence", "own"])
def test_a_record_of_the_hub_names_no_picture_of_this_machine(suite, tmp_path, monkeypatch):
    """An absolute path, one beside the working folder, and one as long as base64 is; what was downloaded with it is found."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *names: ["test"])
    monkeypatch.chdir(tmp_path)
    picture(tmp_path, "secret.png")
    folder = picture(tmp_path / "hub" / "datasets--owner--name", "a.png").parent
    record = {"problem": "What?\nA. a\nB. b", "question": "What?", "answer": "A"}

    def load(name):
        table = Dataset.from_list([record | ({"image": str(name)} if suite == "own" else {"images": [str(name)]})])
        monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: table)
        (sample,) = SUITES[suite].load("owner/name")
        return SUITES[suite].open(sample.pictures[0])

    for name in (tmp_path / "secret.png", "../../secret.png"):
        with pytest.raises(
            ValueError, match="record 0: it names the picture .* which does not lie below .*datasets--owner--name"
        ):
            load(name)
    assert Image.open(load(folder / "a.png")).size == (30, 40)
    for name in ("secret.png", f"{tmp_path}{'/.' * 600}/secret.png"):
        found = load(name)
        assert isinstance(found, str) and not os.path.isfile(found)
