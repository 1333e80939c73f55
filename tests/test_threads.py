"""One model shared by threads gives each of them what it gives alone. Runs on every supported release."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch
from small import IMAGE, prompt, random_pixels, small_model
from transformers import TextIteratorStreamer


pytestmark = pytest.mark.slow

NUM_THREADS = 4
QUESTIONS = [torch.tensor([[5, IMAGE, 6 + number, 7, 20 + number]]) for number in range(NUM_THREADS)]
EXPANDED = [prompt(5, "image", 6 + number, 7, 20 + number) for number in range(NUM_THREADS)]
PIXELS = [random_pixels(seed=number) for number in range(NUM_THREADS)]


def encode(model, number):
    (features,) = model.encode_image(PIXELS[number])
    return [features.anchor_tokens, *features.tokens]


def weigh(model, number):
    (features,) = model.encode_image(PIXELS[number])
    return [model.estimate_importance(QUESTIONS[number][0], features.anchor_tokens)]


def compress(model, number):
    out = model.compress(input_ids=QUESTIONS[number], pixel_values=PIXELS[number])
    return [*out.pooler_output, *out.importance[0], *out.slots[0]]


def score(model, number):
    return [model(input_ids=EXPANDED[number], pixel_values=PIXELS[number]).logits]


def generate(model, number):
    settings = {"do_sample": False, "max_new_tokens": 5, "num_beams": 1 + number % 2}
    return [model.generate(input_ids=QUESTIONS[number], pixel_values=PIXELS[number], **settings)]


def stream(model, number):
    class Ids:
        def decode(self, ids, **kwargs):
            return "".join(f"{int(token)} " for token in ids)

    streamer = TextIteratorStreamer(Ids(), skip_prompt=True, timeout=60)
    settings = {"do_sample": False, "max_new_tokens": 5, "streamer": streamer}
    Thread(
        target=model.generate, kwargs={"inputs": QUESTIONS[number], "pixel_values": PIXELS[number], **settings}
    ).start()
    return [torch.tensor([int(token) for token in "".join(streamer).split()])]


@pytest.mark.parametrize("call", [encode, weigh, compress, score, generate, stream])
@torch.no_grad()
def test_threads_on_one_model_get_what_each_gets_alone(call):
    model = small_model()
    alone = [call(model, number) for number in range(NUM_THREADS)]
    barrier = Barrier(NUM_THREADS)

    def run(number):
        barrier.wait(60)
        with torch.no_grad():  # which is a thread's own
            return [call(model, number) for _ in range(4)]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for number, runs in enumerate(pool.map(run, range(NUM_THREADS))):
            for tensors in runs:
                assert all(map(torch.equal, tensors, alone[number]))


@torch.no_grad()
def test_threads_ask_one_encoded_image_as_one_by_one():
    model = small_model()
    features = model.encode_image(PIXELS[0])
    settings = {"do_sample": False, "max_new_tokens": 5}
    alone = [model.generate(ids, image_features=model.encode_image(PIXELS[0]), **settings) for ids in QUESTIONS]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        together = list(pool.map(lambda ids: model.generate(ids, image_features=features, **settings), QUESTIONS * 3))
    assert all(map(torch.equal, together, alone * 3))
