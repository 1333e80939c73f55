"""Models of other families behind the server, the batch and the page: what each answers is what `generate` gives."""

import asyncio
import copy
import json

import httpx
import pytest
import torch
from asking import data_uri
from hosts_tiny import FAMILIES
from images import random_image
from transformers import AutoModelForCausalLM
from uhr_bat.common.asking import answer_texts, prompt_text, user_prompt
from uhr_bat.common.models import told
from uhr_bat.serving import batch, serve, transformers_decoder
from uhr_bat.serving.cache import ContentCache
from uhr_bat.serving.chat import ChatRequest
from uhr_bat.serving.decoding import Sampling, decoder_folder
from uhr_bat.serving.front import Front, ImageFile
from uhr_bat.serving.refusals import Refusal
from uhr_bat.serving.showing import Desk
from uhr_bat.serving.transformers_decoder import TransformersDecoder
from uhr_bat.serving.vllm_decoder import check_alone

SERVED = ("qwen3_vl", "gemma3", "llava_onevision")  # places in two dimensions, images read both ways, order alone
ALONE = ("internvl", "llava", "llava_onevision", "smolvlm", "mistral3")
IMAGES = [random_image(60, 90, seed=seed) for seed in range(3)]


@pytest.fixture
def app(loaded, host_folder, monkeypatch):
    """name -> the application of `uhr-bat serve`, whose batches stop as soon as somebody waits."""
    monkeypatch.setattr(transformers_decoder, "SLICE", 2)

    def make(name):
        monkeypatch.setattr(serve, "load_model", lambda *args, **settings: loaded(name))
        return serve.build(serve.parser().parse_args([str(host_folder(name)), "--name", "host"]))

    return make


def request(*images, question="How many ships?", **fields):
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return {"model": "host", "messages": messages} | fields


def post(app, *bodies):
    """The responses to requests that come one after the other, a little apart."""

    async def one(client, body, delay):
        await asyncio.sleep(delay)
        return await client.post("/v1/chat/completions", json=body)

    async def all_of_them():
        options = {"transport": httpx.ASGITransport(app), "base_url": "http://localhost", "timeout": 60}
        async with httpx.AsyncClient(**options) as client:
            return await asyncio.gather(*(one(client, body, 0.05 * idx) for idx, body in enumerate(bodies)))

    return asyncio.run(all_of_them())


def expected(loaded, images, question, number, **options):
    """(answer without a server, log probabilities of its tokens, tokens of its prompt)."""
    processor, model = loaded
    text = user_prompt(processor, question, len(images))
    inputs = processor(text=text, images=list(images) or None, return_tensors="pt", **options)
    settings = {"do_sample": False, "max_new_tokens": number, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **settings)
    ids, length = output.sequences[0], inputs["input_ids"].shape[1]
    logprobs = [one[0].log_softmax(-1)[token].item() for one, token in zip(output.logits, ids[length:])]
    return processor.decode(ids[length:], skip_special_tokens=True).lstrip(), logprobs, length


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_answers_that_join_and_go_on_are_those_of_generate(name, app, loaded):
    cases = [
        (IMAGES[:1], "How many ships?", 9, {"budgets": 20}),
        (IMAGES[1:], "Do they differ?", 12, {"budgets": 12, "max_tiles": 6}),
        ((), "Hello", 10, {}),
        (IMAGES[2:], "Is there a car?", 5, {"budgets": 90_000}),  # more than there are
    ]
    fields = {"logprobs": True, "top_logprobs": 1, "evidence": True}
    bodies = [request(*images, question=text, max_tokens=n, **fields, **more) for images, text, n, more in cases]
    for (images, text, number, more), response in zip(cases, post(app(name), *bodies)):
        answer = response.json()
        said, logprobs, length = expected(loaded(name), images, text, number, **more)
        assert answer["choices"][0]["message"]["content"] == said and answer["usage"]["prompt_tokens"] == length
        told_of = [one["logprob"] for one in answer["choices"][0]["logprobs"]["content"]]
        assert told_of == pytest.approx(logprobs[: len(told_of)], abs=1e-4) and len(told_of) >= len(logprobs) - 1
        spent = sum(len(image["tokens"]) for image in answer["evidence"])
        assert (
            len(answer["evidence"]) == len(images) and (spent <= more.get("budgets", 0)) and bool(spent) == bool(images)
        )


@pytest.mark.slow
def test_a_conversation_with_an_earlier_image_streams_what_it_answers_at_once(app):
    body = request(IMAGES[0], max_tokens=6, budgets=9)
    later = {"role": "user", "content": [*request(IMAGES[1], question="And here?")["messages"][0]["content"]]}
    body["messages"] += [{"role": "assistant", "content": "Two."}, later]
    whole, stream = post(app("qwen3_vl"), body, body | {"stream": True})
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole.json()["choices"][0]["message"]["content"] and whole.json()["usage"]["prompt_tokens"] > 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_an_answer_that_spells_an_images_placeholder_goes_on_when_others_join(name, loaded, monkeypatch):
    processor, model = loaded(name)
    monkeypatch.setattr(transformers_decoder, "SLICE", 2)
    token, front = model.image_token_id, Front(processor, model, name, ContentCache(2**20), 1)

    def prefer(module, args, output):
        output[..., token] += 6  # said here and there

    def source(image):
        return ImageFile("image", image, str(hash(image.tobytes())))

    selections = [front.select(user_prompt(processor, "What?"), [front.encode(source(one))], 9) for one in IMAGES[:2]]

    async def decode(prompt, delay, decoder):
        await asyncio.sleep(delay)
        return [one async for ids in decoder.decode(prompt, Sampling(14)) for one in ids]

    async def answers(max_batch):
        decoder = TransformersDecoder(model, max_batch)
        try:
            return await asyncio.gather(
                *(decode(one.prompt, 0.05 * idx, decoder) for idx, one in enumerate(selections))
            )
        finally:
            await decoder.close()

    hook = model.get_output_embeddings().register_forward_hook(prefer)
    try:
        together, plain = asyncio.run(answers(4)), []
        for one in selections:
            ids = one.prompt.ids[None]
            prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            prompt |= model.visual_inputs(**prompt, compressed=one.prompt.compressed)
            plain.append(model.generate(**prompt, do_sample=False, max_new_tokens=14)[0, ids.shape[1] :].tolist())
    finally:
        hook.remove()
    assert together == plain and any(token in one for one in plain)


# Chat templates of others


SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
PARTS_ALONE = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
TEXTS_ALONE = "{% for m in messages %}[{{ m.role }}]{{ m.content + '' }}{% endfor %}"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize("template", [PARTS_ALONE, TEXTS_ALONE])
@pytest.mark.parametrize("parts", [False, True])
def test_messages_are_written_whichever_form_a_template_knows(template, parts, loaded):
    processor = copy.copy(loaded("llava")[0])
    processor.chat_template = template
    content = [{"type": "text", "text": "How many?"}] if parts else "How many?"
    asked = ChatRequest(model="host", messages=[SYSTEM[0], {"role": "user", "content": content}])
    assert asked.prompt(processor, 1000) == "[system]Be brief.[user]How many?"


def test_a_question_that_says_where_its_image_stands_is_written_by_a_template_that_knows_parts_alone(loaded):
    processor = copy.copy(loaded("llava")[0])
    processor.chat_template = PARTS_ALONE
    assert prompt_text(processor, "In <image>, how many?") == "[user]In <image>, how many?"


@pytest.mark.parametrize("fields", [{"budgets": "24GiB"}, {"budgets": "5s", "max_tiles": 3}])
def test_a_limit_is_refused_before_an_image_is_read(fields, app):
    body = request(**fields)
    body["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": "file:///nowhere.png"}})
    (response,) = post(app("llava"), body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "budgets"


@pytest.mark.parametrize(
    "template, words", [(NO_SYSTEM, "leaves out .* 'system'"), (REFUSES, "System role not supported")]
)
def test_a_role_that_a_template_does_not_know_is_refused_by_name(template, words, loaded):
    processor = copy.copy(loaded("llava")[0])
    processor.chat_template = template
    with pytest.raises(Refusal, match=words) as caught:
        ChatRequest(model="host", messages=SYSTEM).prompt(processor, 1000)
    assert caught.value.param == "messages" and "'system', 'user'" in str(caught.value)


# vLLM


@pytest.mark.parametrize(
    "name", ["internvl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("smolvlm", "mistral3"))]
)
@torch.no_grad()
def test_a_decoder_alone_that_is_handed_embeddings_is_the_host(name, loaded, host_folder, tmp_path):
    check_alone(host_folder(name))
    processor, model = loaded(name)
    alone = AutoModelForCausalLM.from_pretrained(decoder_folder(model, processor.tokenizer, "key", tmp_path)).eval()
    logits = []
    for embeds in (True, False):
        front = Front(processor, model, name, ContentCache(2**20), 1, embeds=embeds)
        made = front.select(user_prompt(processor, "What?"), [front.encode(ImageFile("image", IMAGES[0], "0"))], 9)
        if embeds:
            logits.append(alone(inputs_embeds=made.embeds[None]).logits)
            continue
        ids = made.prompt.ids[None]
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits.append(model.host(**prompt, **model.visual_inputs(**prompt, compressed=made.prompt.compressed)).logits)
    assert torch.equal(*logits)


def test_a_decoder_that_needs_more_than_embeddings_is_refused_to_vllm_by_name(host_folder):
    for name in FAMILIES.keys() - set(ALONE):
        with pytest.raises(ValueError, match=f"type '{name}' cannot be handed to vLLM .*--backend transformers"):
            check_alone(host_folder(name))


# Batch and page


@pytest.mark.slow
def test_a_batch_answers_as_generate_does(host_folder, loaded, tmp_path):
    IMAGES[0].save(tmp_path / "image.png")
    asked = {"budgets": 9, "max_new_tokens": 4, "reading": {"max_tiles": None}}
    changes = {"refinement": 32, **FAMILIES["qwen3_vl"]["settings"]}
    worker = batch.Worker({**told(host_folder("qwen3_vl"), changes), **asked}, batch_size=2, attempts=None)
    rows = [{"question": one} for one in ("How many ships?", "What colour is the plane?", "Is there a car?")]
    worker.answer_all(str(tmp_path / "image.png"), rows)
    for row in rows:
        text, *_ = expected(loaded("qwen3_vl"), IMAGES[:1], row["question"], 4, budgets=9)
        assert row["answer"] == text.strip() and row["visual_tokens"] == 9 and "error" not in row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_the_page_answers_as_generate_does_and_shows_what_was_kept(name, loaded):
    processor, model = loaded(name)
    desk = Desk(Front(processor, model, name, ContentCache(2**30), 1), max_new_tokens=4)
    opened = desk.open(ImageFile("image", IMAGES[0], "digest"))
    usual, most = desk.budget_range(opened)
    assert 0 < usual <= most < model.context_window
    answered = desk.ask(opened, "How many ships?", 11)
    answer = desk.answers.get(answered)
    inputs = processor(
        text=user_prompt(processor, "How many ships?"), images=IMAGES[0], budgets=11, return_tensors="pt"
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    assert answer.text == "".join(one if one.isprintable() else "\ufffd" for one in answer_texts(processor, ids)[0])
    assert answer.num_tokens == 11 == len(json.loads(desk.geojson(answered))["features"])
    assert b"PNG" in desk.kept_png(answered)[:8] and "How many ships?" in desk.page(answered, "{}")
