"""Questions about the same image: in one run of the order, encoded once, and learnt from as if each had brought its own."""

import json

import pytest
import torch
from own_data import ask, make_rows, paint_images, write_rows
from uhr_bat.common.loading import load_model
from uhr_bat.training import sft
from uhr_bat.training.collator import UHRBatDataCollator
from uhr_bat.training.data import load_samples
from uhr_bat.training.grouping import EncodedImages, GroupedByImage
from uhr_bat.training.options import read_options
from uhr_bat.training.trainer import UHRBatTrainer

QUESTIONS = ("What colour?", "Which colour is it?", "And the colour?")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three questions about each of four images, in turns, and one without an image."""
    folder = tmp_path_factory.mktemp("own")
    rows = [
        {"image": row["image"], "question": question, "answer": row["conversations"][1]["value"]}
        for question in QUESTIONS
        for row in make_rows(folder, 4)
    ]
    return write_rows(
        folder / "train.json", [*rows, {"image": None, "question": "What is a pier?", "answer": "A place."}]
    )


def test_an_order_is_random_whole_and_keeps_images_together(data, small_folder):
    processor, _ = load_model(small_folder, device_map=None)
    images = load_samples(data, processor)["images"]
    sampler = GroupedByImage(images, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second and sorted(first) == sorted(second) == list(range(13)) and len(sampler) == 13
    for order in (first, second):
        named = [json.dumps(images[idx]) for idx in order]
        assert sum(one != other for one, other in zip(named, named[1:])) == 4  # five runs


def test_the_questions_of_a_conversation_follow_one_another(tmp_path, processor):
    turns = ask("<image>\nWhat?", "Red.", "And where?", "Here.")
    rows = [{"image": path, "conversations": turns} for path, _ in paint_images(tmp_path, 4)]
    samples = load_samples(write_rows(tmp_path / "data.json", rows), processor)
    order = list(GroupedByImage(samples["images"], seed=1))
    assert len(samples) == 8 and [idx // 2 for idx in order[::2]] == [idx // 2 for idx in order[1::2]]


VISUAL = ["vision_tower", "multi_modal_projector", "scale_embedding"]


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


# Four questions a batch, three about each image: two images in each of the three batches.
@pytest.mark.parametrize("frozen, number", [([], 6), (VISUAL, 4)])
def test_an_image_is_encoded_once_and_what_is_learnt_is_the_same(data, small_folder, frozen, number):
    processor, model = load_model(small_folder, device_map=None)
    for part in frozen:
        getattr(model.model, part).requires_grad_(False)
    samples, collator = load_samples(data, processor), UHRBatDataCollator(processor)
    order = [idx for idx in GroupedByImage(samples["images"], seed=0) if samples[idx]["images"]]
    encoded, features = EncodedImages(model.train().model), []
    for first in range(0, 12, 4):
        batch = collator([samples[idx] for idx in order[first : first + 4]])
        shared = encoded(batch)
        features += shared["image_features"]
        assert "pixel_values" not in shared and len(features) == first + 4
        expected = gradients(model, batch)
        found = gradients(model, shared)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert len({id(one) for one in features}) == number


@pytest.mark.slow
def test_a_run_by_image_learns_and_reads_an_image_once_a_batch(data, small_folder, tmp_path, monkeypatch):
    read = []
    cut = UHRBatDataCollator.cut
    monkeypatch.setattr(UHRBatDataCollator, "cut", lambda self, images: read.append(images) or cut(self, images))
    arguments = [
        "--model_name_or_path", str(small_folder), "--train_data", str(data), "--output_dir", str(tmp_path / "out"),
        "--num_train_epochs", "4", "--per_device_train_batch_size", "13", "--use_cpu", "true", "--report_to", "none",
        "--disable_tqdm", "true", "--learning_rate", "1e-2", "--logging_steps", "1", "--group_by_image", "true",
    ]  # fmt: skip
    trainer = sft.train(*read_options(arguments))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert len(read) == 4 * 4  # four images an epoch


def test_it_is_refused_where_processes_would_wait_for_each_other(data, small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(UHRBatTrainer, "shares_weights", True)
    arguments = [
        "--model_name_or_path", str(small_folder), "--train_data", str(data), "--output_dir", str(tmp_path / "out"),
        "--use_cpu", "true", "--group_by_image", "true",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="group_by_image"):
        sft.train(*read_options(arguments))
