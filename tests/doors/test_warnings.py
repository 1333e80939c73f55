"""What the library is about to take away: no call of ours may rest on it. Run with the newest release, this says what
will break, and when."""

import logging
import warnings

import pytest
import torch
import transformers
from asking import PROMPT, load, picture
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline
from transformers.modeling_outputs import BaseModelOutputWithPast


pytestmark = pytest.mark.slow

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@pytest.fixture(autouse=True)
def nothing_is_deprecated():
    """A FutureWarning raises, and so does what the library logs of the kind."""
    messages = []

    class Listener(logging.Handler):
        def emit(self, record):
            if "deprecated" in record.getMessage():
                messages.append(record.getMessage())

    logger, listener = transformers.utils.logging.get_logger("transformers"), Listener()
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            yield
    finally:
        logger.removeHandler(listener)
    assert not messages


@pytest.fixture
def processor(model_folder):
    return AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)


@pytest.fixture
def model(model_folder):
    return load(AutoModelForImageTextToText, model_folder)


def inputs_of(processor, question="How many ships are there?", **settings):
    return processor(text=[PROMPT.format(question)], images=[[picture()]], return_tensors="pt", **settings)


def test_a_question_is_answered(model, processor):
    inputs = inputs_of(processor, budgets=[1, 2, 3, 4])
    for settings in ({}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}):
        model.generate(**inputs, max_new_tokens=2, **settings)


def test_a_pipeline_answers(model_folder):
    pipe = pipeline("image-text-to-text", model=str(model_folder), trust_remote_code=True)
    pipe(images=picture(), text=PROMPT.format("How many?"), generate_kwargs={"max_new_tokens": 2})


def test_images_are_encoded_once_and_asked_about(model, processor):
    features = model.encode_image(**processor.image_processor(picture(), return_tensors="pt"))
    for question in ("How many?", "Where?"):
        inputs = processor(text=PROMPT.format(question), image_features=features, return_tensors="pt")
        model.generate(**inputs, max_new_tokens=2)


def test_a_conversation_goes_on(model, processor):
    inputs = inputs_of(processor)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    turn = processor.tokenizer("And planes?", return_tensors="pt").input_ids
    ids = torch.cat((first.sequences, turn), dim=1)
    model.generate(input_ids=ids, **{CACHE: getattr(first, CACHE)}, max_new_tokens=2)


def test_a_step_of_training_and_its_evaluation(model, processor, tmp_path):
    def collate(rows):
        inputs = inputs_of(processor)
        return {**inputs, "labels": inputs["input_ids"].clone()}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=[0], eval_dataset=[0], data_collator=collate)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
