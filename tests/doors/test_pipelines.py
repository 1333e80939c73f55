"""`pipeline(...)` on a copy of the root's files: the answers of the processor and the model, without their calls."""

import numpy as np
import pytest
import rasterio
import torch
import uhr_bat
from asking import GENERATION, PROMPT, chat, picture
from rasters import write_dates
from transformers import pipeline
from uhr_bat.common import asking as asking_tools

# Three kinds that UHR-BAT-Tiny was trained on: it answers each in its own way.
QUESTIONS = [
    "How many objects are at the pier?",
    "In which quadrant is the golf course?",
    "What colour is the ship at the quarry?",
]
# A copy, because older releases write into it.
NEW_TEXT = {"return_full_text": False, "generate_kwargs": dict(GENERATION)}


@pytest.fixture(scope="module")
def pipe(model_folder):
    return pipeline("image-text-to-text", model=str(model_folder), trust_remote_code=True)


@pytest.fixture(scope="module")
def images():
    return [picture(seed) for seed in range(len(QUESTIONS))]


@pytest.fixture
def paths(images, tmp_path):
    paths = [tmp_path / f"scene_{idx}.png" for idx in range(len(images))]
    for image, path in zip(images, paths):
        image.save(path)
    return [str(path) for path in paths]


def answer(pipe, image, prompt):
    """The text that the processor and the model give for a prompt."""
    inputs = pipe.processor(text=[prompt], images=[[image]], return_tensors="pt")
    ids = pipe.model.generate(**inputs, **GENERATION)
    return pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_pipeline_is_made_of_this_model_and_its_processor(pipe):
    assert type(pipe.model).__name__ == "UHRBatForConditionalGeneration"
    assert type(pipe.processor).__name__ == "UHRBatProcessor"


@pytest.mark.slow
def test_a_chat_with_an_image_inside(pipe, images, paths):
    messages = chat(images[0], question=QUESTIONS[0])
    expected = answer(pipe, images[0], pipe.processor.apply_chat_template(messages, add_generation_prompt=True))
    assert pipe(text=messages, **NEW_TEXT)[0]["generated_text"] == expected
    assert pipe(text=chat(paths[0], question=QUESTIONS[0]), **NEW_TEXT)[0]["generated_text"] == expected


def test_a_chat_comes_back_with_the_answer_as_its_last_turn(pipe, images):
    messages = chat(images[0], question=QUESTIONS[0])
    (output,) = pipe(text=messages, generate_kwargs=dict(GENERATION))
    *asked, reply = output["generated_text"]
    assert [turn["role"] for turn in asked] == ["user"]
    assert reply == {"role": "assistant", "content": pipe(text=messages, **NEW_TEXT)[0]["generated_text"]}


def test_a_function_of_the_users_own_decides_which_tokens_answer(pipe, images):
    asked = []

    def first_ones(importance, regions, tokens, budget):
        asked.append(budget)
        return torch.arange(len(tokens)).where(torch.arange(len(tokens)) < budget, -1)

    messages = chat(images[0], question=QUESTIONS[0])
    options = {"generate_kwargs": {**GENERATION, "rules": {"selector": first_ones}}, "return_full_text": False}
    text = pipe(text=messages, **options)[0]["generated_text"]
    assert asked == [4, 8, 40, 94]
    prompt = pipe.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = pipe.processor(text=[prompt], images=[[images[0]]], return_tensors="pt")
    ids = pipe.model.generate(**inputs, **GENERATION, rules={"selector": first_ones})
    assert text == pipe.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["image", "list", "path"])
def test_images_and_a_text(pipe, images, paths, form):
    given = {"image": images[0], "list": [images[0]], "path": paths[0]}[form]
    prompt = PROMPT.format(QUESTIONS[0])
    (output,) = pipe(images=given, text=prompt, **NEW_TEXT)
    assert output["generated_text"] == answer(pipe, images[0], prompt)


@pytest.mark.slow
def test_a_batch_of_images_and_texts_answers_as_one_by_one(pipe, images, paths):
    prompts = [PROMPT.format(question) for question in QUESTIONS]
    alone = [answer(pipe, image, prompt) for image, prompt in zip(images, prompts)]
    assert len(set(alone)) == len(alone)
    for given in (images, paths):
        outputs = pipe(images=given, text=prompts, batch_size=2, **NEW_TEXT)
        assert [output["generated_text"] for output in outputs] == alone


@pytest.mark.slow
def test_a_batch_of_chats_answers_as_one_by_one(pipe, images):
    chats = [chat(image, question=question) for image, question in zip(images, QUESTIONS)]
    lengths = {len(pipe.processor.tokenizer(question).input_ids) for question in QUESTIONS}
    assert len(lengths) > 1
    outputs = pipe(text=chats, batch_size=2, **NEW_TEXT)
    alone = [pipe(text=messages, **NEW_TEXT)[0]["generated_text"] for messages in chats]
    assert [output[0]["generated_text"] for output in outputs] == alone
    assert len(set(alone)) == len(alone)


def test_budgets_of_one_call_reach_the_processor(pipe, images):
    counted = []
    handle = pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs.get("token_counts")), with_kwargs=True
    )
    try:
        pipe(text=chat(images[0], question=QUESTIONS[0]), processor_kwargs={"budgets": [4, 8, 12, 16]}, **NEW_TEXT)
    finally:
        handle.remove()
    assert counted[0].tolist() == [[4, 8, 12, 16]]


def test_a_limit_of_tiles_reaches_the_tower(pipe, images):
    encoded = []
    tower = pipe.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    try:
        pipe(
            text=chat(images[0], question=QUESTIONS[0]),
            processor_kwargs={"max_tiles": 30, "native": True},
            **NEW_TEXT,
        )
    finally:
        handle.remove()
    assert 4 <= sum(encoded) <= 30


@pytest.mark.slow
def test_half_precision_answers(model_folder, images):
    pipe = pipeline("image-text-to-text", model=str(model_folder), trust_remote_code=True, dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16
    messages = chat(images[0], question=QUESTIONS[0])
    (output,) = pipe(text=messages, **NEW_TEXT)
    prompt = pipe.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert output["generated_text"] == answer(pipe, images[0], prompt)


def test_text_alone_is_for_the_text_pipeline(model_folder):
    pipe = pipeline("text-generation", model=str(model_folder), trust_remote_code=True)
    assert type(pipe.model).__name__ == "UHRBatForConditionalGeneration"
    messages = [{"role": "user", "content": "Hello"}]
    prompt = pipe.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = pipe.tokenizer(prompt, return_tensors="pt")
    ids = pipe.model.generate(**inputs, **GENERATION)
    expected = pipe.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    settings = {"return_full_text": False, **GENERATION}
    assert pipe(prompt, **settings)[0]["generated_text"] == expected
    assert pipe(messages, **settings)[0]["generated_text"] == expected
    batch = pipe([prompt, prompt], batch_size=2, **settings)
    assert [output[0]["generated_text"] for output in batch] == [expected] * 2


# Objects

BOX = '[{"box_2d": [450, 100, 550, 200], "label": "ship"}]'  # of a square of 160 px, with 70 px above the image


@pytest.fixture
def says_box(monkeypatch, pipe):
    """A model that writes boxes and points to nothing itself."""
    monkeypatch.setattr(type(pipe.model), "point", lambda self, ids, compressed: [None] * len(ids))
    monkeypatch.setattr(asking_tools, "answer_texts", lambda processor, ids: [BOX] * len(ids))


def test_a_result_has_its_objects_in_pixels_and_on_the_ground_where_it_is_asked_for_them(pipe, says_box, tmp_path):
    path = tmp_path / "scene.tif"
    pixels = np.asarray(picture()).transpose(2, 0, 1)
    profile = {"driver": "GTiff", "height": 20, "width": 160, "count": 3, "dtype": "uint8", "photometric": "rgb"}
    transform = rasterio.Affine(2, 0, 380000, 0, -2, 3950000)
    with rasterio.open(path, "w", crs="EPSG:32654", transform=transform, **profile) as raster:
        raster.write(pixels)
    messages = [
        {"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": QUESTIONS[0]}]}
    ]
    (plain,), (found,) = pipe(text=messages, **NEW_TEXT), pipe(text=messages, objects=True, **NEW_TEXT)
    objects = found.pop("objects")
    assert found == plain  # the text of the answer is the same, and so is what was asked
    assert objects["image_size"] == [20, 160] and objects["note"] == "" and objects["ground_error"] is None
    (ship,) = objects["objects"]
    assert ship["label"] == "ship" and ship["box"] == pytest.approx((16, 2, 32, 18)) and ship["point"] is None
    ((west, south), *_) = ship["ground"]["coordinates"][0]
    assert 139 < west < 140 and 35 < south < 36
    # A part of it has its own pixels; options of reading are as without objects.
    reading = {"processor_kwargs": {"window": [0, 80, 20, 160], "budgets": [1, 1, 1, 1]}}
    (part,) = pipe(text=messages, objects=True, **NEW_TEXT, **reading)
    assert part["objects"]["image_size"] == [20, 80]


@pytest.mark.slow
def test_a_batch_has_the_objects_of_each_of_its_images(pipe, says_box, images):
    given = [images[0], picture(1, (160, 160)), images[2]]
    outputs = pipe(images=given, text=[PROMPT.format(question) for question in QUESTIONS], objects=True, **NEW_TEXT)
    assert [one["objects"]["image_size"] for one in outputs] == [[20, 160], [160, 160], [20, 160]]
    assert [one["objects"]["objects"][0]["box"][1] for one in outputs] == pytest.approx([2, 72, 2])
    chats = [chat(image, question=question) for image, question in zip(given[:2], QUESTIONS)]
    outputs = pipe(text=chats, batch_size=2, objects=True, **NEW_TEXT)
    assert [one["objects"]["objects"][0]["box"][1] for (one,) in outputs] == pytest.approx([2, 72])


def test_two_dates_are_compared_as_ask_compares_them_and_objects_lie_in_the_later(pipe, tmp_path):
    earlier, later, apart = write_dates(tmp_path)
    options = {"max_tiles": 8, "native": True, "budgets": 12}
    expected = uhr_bat.ask(pipe.processor, pipe.model, later, QUESTIONS[0], before=earlier, max_new_tokens=6, **options)
    call = {"dates": True, "processor_kwargs": options, "return_full_text": False, "max_new_tokens": 6}
    prompt = asking_tools.prompt_text(pipe.processor, QUESTIONS[0], 2)
    (found,) = pipe(images=[earlier, later], text=prompt, objects=True, **call)
    assert found["generated_text"].strip() == expected.text and found["objects"]["image_size"] == [90, 140]
    assert pipe(text=chat(earlier, later, question=QUESTIONS[0]), **call)[0]["generated_text"].strip() == expected.text
    with pytest.raises(ValueError, match="earlier.tif and .*apart.tif lie apart"):
        pipe(images=[earlier, apart], text=prompt, **call)


def test_objects_of_several_images_or_of_none_are_refused_before_the_model(pipe, images):
    for given, number in (((images[0], images[1]), 2), ((), 0)):
        with pytest.raises(ValueError, match=f"`objects` lie in one image, .* Got {number} images of 1 prompts"):
            pipe(text=chat(*given, question=QUESTIONS[0]), objects=True, **NEW_TEXT)
