"""From tokens to the text of an answer, and the decoder as a model folder of its own."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from small import small_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from uhr_bat.common.loading import ROOT
from uhr_bat.serving.decoding import Sampling, decoder_folder, end_ids
from uhr_bat.serving.engine import Engine
from uhr_bat.serving.front import Selection
from uhr_bat.serving.refusals import Refusal
from uhr_bat.serving.transformers_decoder import TransformersDecoder

END = 1022


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


class Said:
    """A decoder that says what it is told to, some tokens at a time."""

    end_ids, running, is_alive, closed = frozenset({END}), 0, True, False

    def __init__(self, ids, step):
        self.ids, self.step = ids, step

    async def decode(self, embeds, sampling):
        try:
            for start in range(0, len(self.ids), self.step):
                yield self.ids[start : start + self.step]
        finally:
            self.closed = True

    async def close(self):
        pass


def answer(tokenizer, decoder, stop=()):
    config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=100))
    front = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer), model=SimpleNamespace(config=config))
    engine = Engine(front, decoder, max_requests=1)

    async def collect():
        selection = Selection(torch.zeros(1, 1), None)
        return [piece async for piece in engine.answer(selection, Sampling(100), stop)]

    return asyncio.run(collect())


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize("text", ["two ships", " at  the pier ", "na\u00efve \U0001f680 5 \u20ac", ""])
def test_the_pieces_are_the_text(tokenizer, text, step):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = answer(tokenizer, Said([*ids, END], step))
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].finish_reason == "stop" and pieces[-1].num_tokens == len(ids) + 1
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_letter_that_is_cut_is_what_decode_makes_of_it(tokenizer):
    ids = tokenizer.encode("a \U0001f680", add_special_tokens=False)[:-1]
    pieces = answer(tokenizer, Said(ids, 1))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids) and pieces[-1].finish_reason == "length"


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    "stop, said", [(["pier"], "two ships at the "), (["p at", "s a"], "two ship"), (["t", "two"], ""), (["sea"], None)]
)
def test_nothing_of_a_word_that_stops_the_answer_is_said(tokenizer, stop, said, step):
    text = "two ships at the pier"
    decoder = Said(tokenizer.encode(text, add_special_tokens=False), step)
    pieces = answer(tokenizer, decoder, stop)
    assert "".join(piece.text for piece in pieces) == (text if said is None else said)
    assert pieces[-1].finish_reason == ("length" if said is None else "stop") and decoder.closed


def test_a_prompt_without_room_for_the_answer_is_refused():
    config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=100))
    engine = Engine(SimpleNamespace(model=SimpleNamespace(config=config)), Said([], 1), max_requests=1)
    selection = Selection(torch.zeros(90, 1), None)
    engine.check_room(selection, 10)
    with pytest.raises(Refusal, match="90 tokens with its images and the answer may have 11, .* holds 100"):
        engine.check_room(selection, 11)


# The decoder by itself


def test_the_decoder_alone_is_a_model_of_its_own_class_that_answers_the_same(tmp_path):
    model = small_model()
    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    folder = decoder_folder(model, tokenizer, "a" * 64, tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert type(alone).__name__ == "Qwen2ForCausalLM"
    embeds = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(*(one.generate(inputs_embeds=embeds, **options) for one in (alone, model)))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert decoder_folder(model, tokenizer, "a" * 64, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert decoder_folder(model, tokenizer, "b" * 64, tmp_path) != folder


def test_a_quantized_decoder_is_refused(tmp_path):
    model = small_model()
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantized weights cannot be written out"):
        decoder_folder(model, None, "a", tmp_path)


# transformers


@pytest.fixture(scope="module")
def model():
    model = small_model()
    model.generation_config.eos_token_id = 7
    return model


def decode(model, jobs, max_batch=4):
    """What each of several callers gets who come one after the other, a little apart."""

    async def one(decoder, embeds, sampling, delay):
        await asyncio.sleep(delay)
        return [token async for ids in decoder.decode(embeds, sampling) for token in ids]

    async def all_of_them():
        decoder = TransformersDecoder(model, max_batch)
        try:
            return await asyncio.gather(*(one(decoder, *job, 0.01 * idx) for idx, job in enumerate(jobs)))
        finally:
            await decoder.close()

    return asyncio.run(all_of_them())


def prompts(number):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5 + 3 * idx, 24, generator=generator) for idx in range(number)]


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_answers_of_a_batch_are_those_of_each_alone(model, max_batch):
    assert end_ids(model) == {7}
    jobs = [(embeds, Sampling(20 + 15 * idx)) for idx, embeds in enumerate(prompts(6))]
    expected = [
        model.generate(inputs_embeds=embeds[None], do_sample=False, max_new_tokens=sampling.max_new_tokens)[0].tolist()
        for embeds, sampling in jobs
    ]
    assert decode(model, jobs, max_batch) == expected
    assert len(set(map(len, expected))) > 1


def test_draws_do_not_depend_on_the_batch(model):
    jobs = [(embeds, Sampling(25, 1.0 + idx, 0.9, seed=idx)) for idx, embeds in enumerate(prompts(3))]
    assert decode(model, jobs) == [decode(model, [job])[0] for job in jobs]


async def ends(decoder, embeds, sampling, delay=0.0):
    """The tokens that a caller gets, or the error."""
    await asyncio.sleep(delay)
    try:
        return [token async for ids in decoder.decode(embeds, sampling) for token in ids]
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "wrong",
    [
        (torch.zeros(4, 23), Sampling(4)),  # of another width
        (torch.full((6, 24), torch.nan), Sampling(40, temperature=1.0)),  # nothing to draw from
    ],
    ids=["another width", "no numbers"],
)
def test_a_request_that_fails_ends_no_other(model, wrong):
    """Whether it comes when others are being decoded, or before them."""
    right = [(embeds, Sampling(60)) for embeds in prompts(2)]
    expected = decode(model, right)

    async def ask():
        decoder = TransformersDecoder(model, 4)
        try:
            jobs = [(*right[0], 0), (*wrong, 0.02), (*right[1], 0.04), (*wrong, 0.06)]
            return await asyncio.gather(*(ends(decoder, *job) for job in jobs))
        finally:
            await decoder.close()

    first, error, second, other_error = asyncio.run(ask())
    assert [first, second] == expected
    assert isinstance(error, RuntimeError) and isinstance(other_error, RuntimeError)


@pytest.mark.parametrize("temperature", [1e-300, 1e-9])
def test_a_temperature_of_almost_nothing_is_none(model, temperature):
    (embeds,) = prompts(1)
    greedy, cold = decode(model, [(embeds, Sampling(12)), (embeds, Sampling(12, temperature, 1e-300, seed=1))])
    assert cold == greedy
