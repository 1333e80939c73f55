"""A model with a pointer behind the server: its decoder is handed embeddings, and answers as `ask` does."""

import asyncio
import io
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from asking import data_uri, picture
from served import serve_app
from uhr_bat import ask
from uhr_bat.common import asking
from uhr_bat.common.loading import load_model
from uhr_bat.serving.app import Service, make_app
from uhr_bat.serving.cache import ContentCache
from uhr_bat.serving.decoding import Sampling, decode_from
from uhr_bat.serving.engine import Engine
from uhr_bat.serving.front import Front, ImageFile
from uhr_bat.serving.showing import Desk
from uhr_bat.serving.sources import SourceRules
from uhr_bat.serving.transformers_decoder import TransformersDecoder
from uhr_bat.training.tiny.pointing import start_pointer

SHIPS, TRUCKS = "How many ships are there?", "What colour is the truck at the road?"
NUM_TOKENS = 6
IMAGE = picture()


@pytest.fixture(scope="module")
def loaded():
    """UHR-BAT-Tiny, whose answers do not end by themselves, with a pointer that was not trained: it points to many tokens, and
    changes what is said."""
    processor, model = load_model()
    model.generation_config.eos_token_id = [1019]
    torch.manual_seed(0)
    start_pointer(model)
    pointer = model.model.pointer
    with torch.no_grad():
        for layer in (pointer.show, pointer.near_2, pointer.ask, pointer.mean):
            layer.bias[-1] = 3
        torch.nn.init.normal_(pointer.tell_2.weight, std=0.1)
    return processor, model


@pytest.fixture(scope="module")
def client(loaded):
    processor, model = loaded
    front = Front(processor, model, "pointing", ContentCache(2**30), workers=2)
    engine = Engine(front, TransformersDecoder(model, 4), max_requests=8)
    app = make_app(Service(engine, "pointing", SourceRules(2**20), 2**20), max_requests=8)
    with serve_app(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(client, *images, question=SHIPS, **fields):
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    fields = {"max_tokens": NUM_TOKENS} | fields
    return client.chat.completions.create(model="pointing", messages=messages, **fields)


def said(answer):
    return answer.choices[0].message.content


@pytest.fixture(scope="module")
def expected(loaded):
    return {question: ask(*loaded, IMAGE, question, max_new_tokens=NUM_TOKENS) for question in (SHIPS, TRUCKS)}


def test_the_pointer_changes_what_is_said(loaded, expected):
    model = loaded[1]
    pointer, model.model.pointer = model.model.pointer, None
    try:
        plain = [ask(*loaded, IMAGE, question, max_new_tokens=NUM_TOKENS) for question in expected]
    finally:
        model.model.pointer = pointer
    assert any(told.text != other.text for told, other in zip(expected.values(), plain))


@pytest.mark.parametrize("question", [SHIPS, TRUCKS])
def test_text_objects_and_confidence_are_those_of_ask(client, expected, question):
    right = expected[question]
    assert len(right.objects) > 5
    for _ in range(2):  # the second time from the cache
        answer = asked(client, IMAGE, question=question, logprobs=True, extra_body={"objects": True})
        assert said(answer) == right.text
        found = answer.objects["objects"]
        assert [tuple(one["box"]) for one in found] == [one.box for one in right.objects]
        assert [one["score"] for one in found] == pytest.approx([one.score for one in right.objects], abs=1e-4)
        assert [(one["level"], one["source"]) for one in found] == [(one.level, one.source) for one in right.objects]
        assert answer.usage.completion_tokens == NUM_TOKENS
        told = [one.logprob for one in answer.choices[0].logprobs.content]
        assert len(told) == NUM_TOKENS
        assert asking.confidence_of(told) == pytest.approx(right.confidence, abs=1e-3)


def test_several_at_once_in_parts_and_as_short_as_can_be(client, expected):
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda question: asked(client, IMAGE, question=question), [SHIPS, TRUCKS] * 4))
    assert [said(one) for one in answers] == [expected[SHIPS].text, expected[TRUCKS].text] * 4
    chunks = list(asked(client, IMAGE, stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, parts)) == expected[SHIPS].text and chunks[-1].choices[0].finish_reason == "length"
    short = asked(client, IMAGE, max_tokens=1)
    assert expected[SHIPS].text.startswith(said(short)) and said(short)
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (1, "length")


def test_draws_are_repeated_by_their_seed_and_come_from_the_changed_probabilities(client, expected):
    hot = [said(asked(client, IMAGE, temperature=2.0, seed=seed)) for seed in (1, 1, 2, 3, 4)]
    assert hot[0] == hot[1] and len(set(hot)) > 2
    assert said(asked(client, IMAGE, temperature=1.0, top_p=1e-6, seed=5)) == expected[SHIPS].text
    (first, *_) = asked(client, IMAGE, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert first.logprob == max(one.logprob for one in first.top_logprobs) and len(first.top_logprobs) == 3


@pytest.mark.parametrize("number", [0, 2])
def test_a_prompt_that_the_pointer_does_not_look_at_is_answered_by_the_decoder_alone(client, loaded, number):
    processor, model = loaded
    images = [picture(seed) for seed in range(number)]
    text = asking.prompt_text(processor, SHIPS, number)
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    ids = asking.generate(model, inputs, max_new_tokens=NUM_TOKENS)
    assert said(asked(client, *images)) == asking.answer_texts(processor, ids)[0]


def front_of(loaded):
    return Front(*loaded, "pointing", ContentCache(2**30), workers=1)


def source(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageFile.of_bytes(file.getvalue())


def test_a_prompt_is_read_by_the_model_only_where_a_pointer_looks_at_it(loaded):
    front, (processor, model) = front_of(loaded), loaded
    calls = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    pointer = model.model.pointer

    def selected(*images):
        text = asking.prompt_text(processor, SHIPS, len(images))
        return front.select(text, [front.encode(source(image)) for image in images])

    try:
        assert selected(IMAGE) is selected(IMAGE) and calls == [1]  # of its last token alone
        assert selected().first_logits is None and selected(picture(), picture(1)).first_logits is None
        model.model.pointer, front = None, front_of(loaded)
        assert selected(IMAGE).first_logits is None and calls == [1]
    finally:
        model.model.pointer = pointer
        hook.remove()


def test_the_page_answers_as_ask_does(loaded, expected):
    desk = Desk(front_of(loaded), NUM_TOKENS)
    name = desk.open(source(IMAGE))
    answer = desk.answers.get(desk.ask(name, SHIPS, desk.budget_range(name)[0]))
    assert answer.text == expected[SHIPS].text
    assert [one.box for one in answer.objects] == [one.box for one in expected[SHIPS].objects]


# What any decoder is handed, such as vLLM's


class Handed:
    """A decoder that keeps what it is handed, and says one token."""

    end_ids = frozenset({9})

    def __init__(self):
        self.calls = []

    async def decode(self, prompt, sampling):
        self.calls.append((prompt, sampling))
        yield [4]


def answered(logits, **sampling):
    decoder, embed = Handed(), torch.nn.Embedding(10, 3)
    prompt, sampling = torch.randn(5, 3), Sampling(**{"max_new_tokens": 4} | sampling)

    async def collect():
        return [one async for ids in decode_from(decoder, prompt, logits, embed, sampling) for one in ids]

    return asyncio.run(collect()), decoder.calls, torch.cat((prompt, embed.weight)).detach()


def test_the_decoder_goes_on_behind_the_first_token():
    tokens, ((prompt, sampling),), rows = answered(torch.arange(10.0).roll(7), seed=3)
    assert tokens == [6, 4] and sampling == Sampling(3, seed=3)
    assert torch.equal(prompt, rows[[0, 1, 2, 3, 4, 5 + 6]])
    _, ((_, drawn),), _ = answered(torch.zeros(9), temperature=1.0, seed=3)
    assert drawn.seed not in (None, 3)  # else the second token is drawn by the number that drew the first
    assert answered(torch.zeros(9), temperature=1.0)[1][0][1].seed is None


@pytest.mark.parametrize("case", [{"logits": torch.arange(10.0)}, {"logits": torch.zeros(9), "max_new_tokens": 1}])
def test_nothing_follows_an_end_or_the_last_token(case):
    tokens, calls, _ = answered(**case)
    assert len(tokens) == 1 and not calls


def test_an_answer_that_keeps_to_a_schema_is_left_to_the_decoder(loaded):
    front, decoder = front_of(loaded), Handed()
    engine = Engine(front, decoder, max_requests=1)
    selection = front.select(asking.prompt_text(loaded[0], SHIPS), [front.encode(source(IMAGE))])

    async def collect():
        schema = json.dumps({"type": "integer"})
        return [piece async for piece in engine.answer(selection, Sampling(4, schema=schema))]

    asyncio.run(collect())
    assert decoder.calls[0][0] is selection.embeds
