"""Made-up files of exactly the forms of the benchmarks, a few records each. None of their data is here."""

import base64
import io
import json

from images import random_image

SUBTASKS = {
    "Counting/Overall counting": "B",
    "Object properties/Object color": "C",
    "Land use classification/Overall Land use classification": "AC",
    "Complex reasoning/Route planning": "D",
}


def picture(folder, name, seed=0, size=(40, 30)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(*size, seed=seed).save(path)
    return path


def encoded(seed=0, size=(40, 30)) -> bytes:
    file = io.BytesIO()
    random_image(*size, seed=seed).save(file, format="PNG")
    return file.getvalue()


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def xlrs(folder):
    """Parquet as on the Hub: pictures in a list, as bytes; two questions about each of two images."""
    from datasets import Dataset, Features, Image, List, Value

    records = [
        {
            "index": index,
            "image": [{"bytes": encoded(index // 2), "path": None}],
            "question": f"Question {index}?",
            "multi-choice options": ["(A) red", "(B) blue", "(C) green", "(D) white"],
            "answer": answer,
            "category": category,
            "l2-category": category.split("/")[0].lower(),
        }
        for index, (category, answer) in enumerate(SUBTASKS.items())
    ]
    texts = {name: Value("string") for name in ("question", "answer", "category", "l2-category")}
    features = Features(
        {"index": Value("int64"), "image": List(Image()), "multi-choice options": List(Value("string")), **texts}
    )
    Dataset.from_list(records, features=features).to_parquet(folder / "train-00000.parquet")
    return folder


def mme_realworld(folder):
    """The benchmark's own JSON, with another subtask in it."""
    records = [
        {
            "Question_id": f"perception/remote_sensing/{category}/{number}",
            "Image": f"{number}.png",
            "Text": "What colour is the roof?",
            "Question Type": "Multiple Choice",
            "Answer choices": ["(A) red", "(B) blue", "(C) green", "(D) white", "(E) The image does not feature it."],
            "Ground truth": "B",
            "Category": category,
            "Subtask": subtask,
            "Task": "Perception",
        }
        for number, (category, subtask) in enumerate(
            [
                ("position", "Remote Sensing"),
                ("color", "Remote Sensing"),
                ("count", "Remote Sensing"),
                ("x", "Monitoring"),
            ]
        )
    ]
    for number in range(3):
        picture(folder / "remote_sensing", f"{number}.png", number)
    (folder / "MME_RealWorld.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def rshr(folder):
    records = [
        {"id": 1, "images": ["a.png"], "question": "What colour?", "options": ["red", "blue"], "answer": "B",
         "task": "Color Detection"},
        {"id": 2, "images": ["a.png", "b.png"], "question": "What next?",
         "options": {"A": "more", "B": "less", "C": "none"},
         "answer": ["A", "C"], "task": "Future Prediction"},
    ]  # fmt: skip
    picture(folder / "images", "a.png", 1), picture(folder / "images", "b.png", 2)
    (folder / "rshr_mcq.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def lrs_vqa(folder):
    """Names of images begin with LRS_VQA/, relative to the folder above."""
    suffix = "Answer the question using a single word or phrase."
    rows = [
        ("FAIR_1", "object category", "What is it?", "ship", [10.0, 5.0, 14.0, 9.0]),
        ("FAIR_2", "count", "How many?", "2", None),
        ("GLH-Bridge_1", "rural or urban", "Rural or urban?", "urban", [0.0, 0.0, 40.0, 30.0]),
        ("STAR_1", "object shape", "Which shape?", "tennis court", [1.0, 1.0, 9.0, 9.0]),
    ]
    records = []
    for name, category, question, answer, box in rows:
        record = {
            "question_id": name, "image": "LRS_VQA/image/a.png", "category": category, "text": f"{question} {suffix}",
            "ground_truth": answer, "image_size": [30, 40],
        }  # fmt: skip
        if box:
            record |= {"hbox": box, "rbox": [0.0] * 8, "abs_size": "small", "size_bin": 1}
        records.append(record)
    picture(folder / "LRS_VQA" / "image", "a.png")
    write_lines(folder / "LRS_VQA" / "Script" / "LRS_VQA_merged.jsonl", records)
    return folder / "LRS_VQA"


def hr_bench(folder):
    """TSV as in VLMEvalKit: base64 pictures, "None" an option like any other."""
    rows = ["index\tquestion\tA\tB\tC\tD\tanswer\tcategory\tcycle_category\timage"]
    image = base64.b64encode(encoded()).decode()
    for index, (category, cycle, answer) in enumerate(
        [("single", "0", "A"), ("single", "1", "B"), ("cross", "0", "D"), ("cross", "1", "C")]
    ):
        rows.append(f"{index}\tWhat is it? \tNone\t7\tcar\tbus\t{answer}\t{category}\t{cycle}\t{image}")
    (folder / "hr_bench_8k.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def tree_bench(folder):
    records = [
        {"index": 7, "image": "a.png", "question": "Which?", "options": ["(A) left", "(B) right"], "answer": "B",
         "category": "Perception/Attributes", "bboxes": [[0, 0, 10, 10], [20, 20, 30, 30]]},
    ]  # fmt: skip
    picture(folder, "a.png")
    write_lines(folder / "TreeBench.jsonl", records)
    return folder


def vrsbench(folder):
    records = [
        {"image_id": "P0003_0002.png", "question": "How many ships?", "ground_truth": "3", "question_id": 0,
         "type": "object quantity", "dataset": "VRSBench"},
    ]  # fmt: skip
    picture(folder / "Images_val", "P0003_0002.png")
    (folder / "VRSBench_EVAL_vqa.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def conversations(folder):
    talk = [("human", "<image>\nWhat is it?"), ("gpt", "A ship."), ("human", "Which? (A) one (B) two"), ("gpt", "B")]
    turns = [{"from": role, "value": text} for role, text in talk]
    records = [
        {"id": "one", "image": "a.png", "conversations": turns},
        {"id": "two", "image": "b.png", "conversations": turns[:2]},
        {"id": "text", "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]},
    ]
    for number, name in enumerate(("a.png", "b.png")):
        picture(folder / "images", name, number + 1, size=(160, 20))
    write_lines(folder / "talks.jsonl", records)
    return folder


def xhr(folder):
    """A list of records, whose pictures lie in `images`."""
    record = {
        "images": ["images/a.png"],
        "question": "What colour?",
        "options": {"A": "red", "B": "blue"},
        "answer": ["B"],
    }
    picture(folder / "images", "a.png")
    (folder / "dataset.json").write_text(json.dumps([record]), encoding="utf-8")
    return folder


HINT = "Only focus on the objects inside the red bounding box in the image to answer this question."


def geo_evidence(folder, **changes):
    """The manifest of the authors' training code, with two of its views; a local question and one about the whole."""
    behind = "\n\nAnswer with the option letters from the given choices, separated by commas."
    local = {
        "images": ["images/a.png"], "teacher_images": ["teacher_images/a.png"], "bbox": [4, 5, 12, 9], "answer": "B",
        "problem": f"<image>\nWhat colour is the roof?\n\n{HINT}\n\nA. red\nB. blue",
    }  # fmt: skip
    whole = {
        "images": ["images/a.png"], "teacher_images": ["teacher_images/a.png"], "answer": "B,A",
        "problem": f"<image> Which apply?\n\nA. alpha\nB. beta\nC. gamma{behind}",
    }  # fmt: skip
    picture(folder / "images", "a.png"), picture(folder / "bbox_images", "a.png", 1)
    write_lines(folder / "train.jsonl", [local | changes, whole])
    return folder


def ultra_vr(folder):
    """Records of two pictures: one that is there, one that is named as it lay elsewhere."""
    record = {
        "question": "Which?",
        "options": ["left", "right"],
        "answer": "B",
        "question_type": "spatial",
        "domain": "RS",
    }
    names = ("DOTA-v1.5/train/images/P1.png", "/mnt/authors/P1.png")
    picture(folder / "data" / "annotations" / "DOTA-v1.5" / "train" / "images", "P1.png")
    picture(folder / "images", "P1.png")
    write_lines(folder / "data" / "annotations" / "rs.jsonl", [{**record, "image_path": name} for name in names])
    return folder


def rsvqa(start, area):
    """Three files whose rows are joined by their ids; most rows are stubs."""

    def form(folder):
        asked = [("presence", "Is there a road?", "yes"), ("count", "How many buildings are there?", "37"), area]
        stub = {"id": 0, "active": False}
        questions = [
            {"id": n, "img_id": 7, "type": kind, "question": question, "answers_ids": [n + 10], "active": True}
            for n, (kind, question, _) in enumerate(asked, 1)
        ]
        answers = [
            {"id": n + 10, "question_id": n, "answer": answer, "active": True}
            for n, (_, _, answer) in enumerate(asked, 1)
        ]
        files = {"questions": [stub, *questions], "answers": [*answers[::-1], stub], "images": [stub]}
        for name, rows in files.items():
            (folder / f"{start}_split_test_{name}.json").write_text(json.dumps({name: rows}), encoding="utf-8")
        picture(folder / "Images", "7.tif")
        return folder

    return form


def earth_vqa(folder):
    """A file a split, by the names of its pictures; answers may be numbers, and the test has none."""
    asked = [("Basic Counting", "How many intersections are in this scene?", 2), ("Basic Judging", "Any water?", "No")]
    rows = [{"Type": kind, "Question": question, "Answer": answer} for kind, question, answer in asked]
    for split, name in (("Train", "0.png"), ("Val", "2522.png")):
        picture(folder / split / "images_png", name)
        (folder / f"{split}_QA.json").write_text(json.dumps({name: rows}), encoding="utf-8")
    return folder


def cdvqa(folder):
    """Three files a split as the authors publish them, and SECOND's folders: a picture has rows of its own for each type."""
    asked = [
        ("change_or_not", "Have the areas of trees changed?", "yes"),
        ("largest_change", "What is the largest change?", "NVG_surface"),
        ("change_ratio", "What is the percentage of changed areas?", "30_to_40"),
    ]
    rows = {
        "questions": [
            {"id": n, "date_added": 1.5, "img_id": n, "type": kind, "question": question, "answers_ids": [n], "active": True}
            for n, (kind, question, _) in enumerate(asked)
        ],
        "answers": [
            {"id": n, "date_added": 1.5, "question_id": n, "answer": answer, "active": True}
            for n, (_, _, answer) in enumerate(asked)
        ],
        "images": [
            {"id": n, "res_x": ".1524m", "res_y": ".1524m", "questions_ids": [n], "file_name": "02180.png", "active": True}
            for n in range(len(asked))
        ],
    }  # fmt: skip
    for name, found in rows.items():
        (folder / f"Test_{name}.json").write_text(json.dumps({name: found}), encoding="utf-8")
    picture(folder / "im1", "02180.png"), picture(folder / "im2", "02180.png", 1)
    return folder


def levir_cc(folder):
    """One file of all splits, the folders of its authors, two pairs of the test."""
    changed = ["a road is built .", "a road appears in the woods .", "the trees are replaced by a road ."]
    rows = [
        ("train", "train_000016.png", 1, changed),
        ("test", "test_000001.png", 1, changed),
        ("test", "test_000002.png", 0, ["there is no difference .", "the scene is the same as before ."]),
    ]
    images = [
        {
            "filepath": split, "filename": name, "imgid": number, "split": split, "changeflag": flag,
            "sentences": [
                {"tokens": text.split()[:-1], "raw": f" {text}", "imgid": number, "sentid": n}
                for n, text in enumerate(texts)
            ],
        }
        for number, (split, name, flag, texts) in enumerate(rows)
    ]  # fmt: skip
    for split, name, *_ in rows:
        for seed, date in enumerate("AB"):
            picture(folder / "images" / split / date, name, seed)
    (folder / "LevirCCcaptions.json").write_text(json.dumps({"images": images}), encoding="utf-8")
    return folder


FORMS = {
    "xlrs-bench-lite": xlrs,
    "mme-realworld-rs": mme_realworld,
    "rshr-bench": rshr,
    "lrs-vqa": lrs_vqa,
    "hr-bench": hr_bench,
    "tree-bench": tree_bench,
    "vrsbench-vqa": vrsbench,
    "conversations": conversations,
    "xhr-bench": xhr,
    "geo-evidence": geo_evidence,
    "ultra-vr": ultra_vr,
    "rsvqa-lr": rsvqa("LR", ("rural_urban", "Is it a rural or an urban area", "urban")),
    "rsvqa-hr": rsvqa("USGS", ("area", "What is the area covered by buildings?", "1234m2")),
    "earth-vqa": earth_vqa,
    "cdvqa": cdvqa,
    "levir-cc": levir_cc,
}
