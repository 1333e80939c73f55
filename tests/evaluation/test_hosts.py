"""UHR-BAT under lmms-eval and VLMEvalKit: the classes against stand-ins of theirs, and lmms-eval's own command line."""

import importlib
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from images import random_image
from small import count_tiles
from uhr_bat.common.asking import answers, encode, prompt_text
from uhr_bat.common.loading import load_model

BUDGETS = [2, 3, 5, 6]
QUESTIONS = ("How many ships?", "What colour is the plane at the runway?", "Where is the pier?", "Is there a car?")
DOCUMENTS = [
    {"image": random_image(160, 20, seed=number // 2), "question": text} for number, text in enumerate(QUESTIONS)
]


class StandIn:
    """What `lmms_eval.api.model.lmms` sets up."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: None)


def module(name, **content):
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


@pytest.fixture(scope="module")
def lmms_eval_model():
    """The module with a stand-in of lmms-eval's base class."""
    names = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": StandIn},
        "lmms_eval.api.instance": {"GenerationResult": type("GenerationResult", (), {})},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in names.items():
            patch.setitem(sys.modules, name, module(name, **content))
        patch.delitem(sys.modules, "uhr_bat.evaluation.lmms_eval_model", raising=False)
        yield importlib.import_module("uhr_bat.evaluation.lmms_eval_model")


def make(lmms_eval_model, **arguments):
    made = lmms_eval_model.UHRBat(**{"budgets": "2:3:5:6", "selector": "preserve_and_merge", **arguments})
    made.task_dict = {"task": {"test": DOCUMENTS}}
    return made


def requests(second):
    """As lmms-eval builds them: (context, settings or target, doc_to_visual, doc_id, task, split)."""
    show = lambda document: [document["image"]]  # noqa: E731
    return [
        SimpleNamespace(args=(text, second(number), show, number, "task", "test"))
        for number, text in enumerate(QUESTIONS)
    ]


def alone(processor, model, question, image, **options):
    features = encode(model, processor.image_processor(image, return_tensors="pt"))
    return answers(model, processor, [question], [features], budgets=BUDGETS, **options)[0]


@pytest.mark.slow
def test_lmms_eval_gets_the_same_answers_from_batches_as_one_by_one(lmms_eval_model):
    settings = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": []}
    batched = make(lmms_eval_model, batch_size=3)
    tiles = []
    batched.model.model.vision_tower.register_forward_pre_hook(lambda module, args: tiles.append(len(args[0])))
    found = batched.generate_until(requests(lambda number: dict(settings)))
    once = sum(tiles)
    processor, model = load_model(selector="preserve_and_merge")
    single = [alone(processor, model, one["question"], one["image"], max_new_tokens=4)[0] for one in DOCUMENTS]
    assert found == single and all(single)
    assert sum(tiles) == once and once <= 2 * (4 + 16 + 64 + 144)  # two images, each of two questions
    cut = batched.generate_until(requests(lambda number: settings | {"until": [single[0][-1]]}))
    assert cut[0] == single[0].split(single[0][-1])[0]


@pytest.mark.slow
def test_lmms_eval_gets_the_mean_loss_of_a_continuation_and_whether_it_is_the_likeliest(lmms_eval_model):
    batched = make(lmms_eval_model, batch_size=4)
    processor, model = batched.processor, batched.model
    targets = ["white", "red", "upper left", "no way"]
    found = batched.loglikelihood(requests(lambda number: targets[number] if number else (lambda document: "white")))
    assert [pair.text for pair in found] == found
    for number, (loss, likeliest) in enumerate(found):
        document = DOCUMENTS[number]
        cut = processor.image_processor(document["image"], return_tensors="pt")
        text = prompt_text(processor, document["question"])
        ending = processor.tokenizer(targets[number], add_special_tokens=False)["input_ids"]
        inputs = processor(text=[text], image_features=encode(model, cut), budgets=BUDGETS, return_tensors="pt")
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([ending])), 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        labels = torch.where(torch.arange(inputs["input_ids"].shape[1]) < prompt, -100, inputs["input_ids"])
        with torch.no_grad():
            output = model(**inputs, labels=labels, rules=batched.rules)
        assert loss == pytest.approx(output.loss.item(), abs=1e-4)
        assert likeliest == (output.logits[0, prompt - 1 : -1].argmax(-1).tolist() == ending)
    likeliest = processor.tokenizer.decode(output.logits[0, prompt - 1].argmax())
    features = [encode(model, processor.image_processor(document["image"], return_tensors="pt"))]
    assert batched.losses([document["question"]], [likeliest], features)[0][1]


@pytest.mark.slow
def test_lmms_eval_looks_closer_where_the_question_looks(lmms_eval_model):
    settings = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": []}
    closer = make(lmms_eval_model, batch_size=2, budgets=14, max_tiles="24", native="True")
    tiles = count_tiles(closer.model)
    found = closer.generate_until(requests(lambda number: dict(settings)))
    assert max(tiles) <= 24
    processor, model = load_model(selector="preserve_and_merge")
    for document, text in zip(DOCUMENTS, found):
        features = encode(model, processor.image_processor(document["image"], max_tiles=24, native=True))
        said = answers(model, processor, [document["question"]], [features], budgets=14, max_tiles=24, max_new_tokens=4)
        assert said[0][0] == text
    assert all(loss > 0 for loss, _ in closer.loglikelihood(requests(lambda number: "white")))
    for wrong, message in (
        ({"native": True}, "give max_tiles with it"),
        ({"max_tiles": 0}, "must be at least 1. Got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(lmms_eval_model, budgets=14, **wrong)


def test_lmms_eval_is_told_of_arguments_that_there_are_not(lmms_eval_model):
    with pytest.raises(ValueError, match="no model argument budget. It has: pretrained, budgets, selector"):
        make(lmms_eval_model, budget=3)


@pytest.mark.slow
def test_vlmevalkit_asks_with_images_and_text_in_any_order(monkeypatch, tmp_path):
    class BaseModel:
        """What the released interface promises a model."""

        INTERLEAVE, allowed_types = False, ("text", "image")

        def generate(self, message, dataset=None):
            assert all(part["type"] in self.allowed_types for part in message)
            return self.generate_inner(message, dataset)

    for name, content in {"vlmeval": {}, "vlmeval.vlm": {}, "vlmeval.vlm.base": {"BaseModel": BaseModel}}.items():
        monkeypatch.setitem(sys.modules, name, module(name, **content))
    monkeypatch.delitem(sys.modules, "uhr_bat.evaluation.vlmevalkit_model", raising=False)
    kit = importlib.import_module("uhr_bat.evaluation.vlmevalkit_model")
    model = kit.UHRBat(budgets=BUDGETS, selector="preserve_and_merge", max_new_tokens=4)
    path = tmp_path / "a.png"
    DOCUMENTS[0]["image"].save(path)
    image, text = {"type": "image", "value": str(path)}, {"type": "text", "value": QUESTIONS[0]}
    expected = alone(model.processor, model.model, QUESTIONS[0], DOCUMENTS[0]["image"], max_new_tokens=4)[0]
    assert model.generate([image, text], "XLRS-Bench-lite") == expected
    between = f"Here:\n<image>\n{QUESTIONS[0]}"
    features = model.features_of([str(path)])
    placed = answers(model.model, model.processor, [between], [features], budgets=BUDGETS, max_new_tokens=4)[0][0]
    assert model.generate([{"type": "text", "value": "Here:"}, image, text]) == placed
    assert isinstance(model.generate([text]), str)
    assert isinstance(model.generate([image, image, text]), str)
    closer = kit.UHRBat(selector="preserve_and_merge", max_tiles=24, native=True, max_new_tokens=4)
    tiles = count_tiles(closer.model)
    assert isinstance(closer.generate([image, text]), str) and max(tiles) <= 24
    assert closer.budgets == sum(closer.processor.default_budgets)


# ---- lmms-eval itself ------------------------------------------------------------------------------------------------

TASK = """task: made_up{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output}
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
{rest}
metadata:
  - version: 0.0
"""
GENERATE = """generation_kwargs:
  max_new_tokens: 4
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true"""
CHOOSE = """doc_to_choice: ["white", "yes", "upper left"]
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true"""


@pytest.mark.slow
def test_lmms_evals_own_command_line_runs_its_tasks_on_the_model(tmp_path):
    pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval 0.7.3 is not installed")
    info, tasks = tmp_path / "uhr_bat-0.1.0.dist-info", tmp_path / "tasks"
    info.mkdir(), tasks.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: uhr-bat\nVersion: 0.1.0\n")
    entry = "[lmms_eval.models]\nuhr_bat = uhr_bat.evaluation.lmms_eval_plugin:manifest\n"
    (info / "entry_points.txt").write_text(entry)
    processor, model = load_model(selector="preserve_and_merge")
    records = []
    for number, document in enumerate(DOCUMENTS):
        path = tmp_path / f"{number}.png"
        document["image"].save(path)
        said = alone(processor, model, document["question"], document["image"], max_new_tokens=4)[0]
        records.append({"question": document["question"], "image": str(path), "answer": said if number else "wrong"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tasks / "utils.py").write_text(
        "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n"
    )
    (tasks / "made_up.yaml").write_text(TASK.format(kind="", data=data, output="generate_until", rest=GENERATE))
    (tasks / "choice.yaml").write_text(TASK.format(kind="_choice", data=data, output="multiple_choice", rest=CHOOSE))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [
        sys.executable, "-m", "lmms_eval", "eval", "--model", "uhr_bat",
        "--model_args", "budgets=2:3:5:6,selector=preserve_and_merge", "--tasks", "made_up,made_up_choice",
        "--include_path", str(tasks), "--batch_size", "3", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    written = [*(tmp_path / "out").rglob("*results.json")]
    assert done.returncode == 0 and written, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(written[0].read_text())["results"]
    assert results["made_up"]["exact_match,none"] == 0.75  # one of four was made wrong
    assert "acc,none" in results["made_up_choice"]
