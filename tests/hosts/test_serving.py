"""Models of other families behind the server, the batch and the page: what each answers is what `generate` gives."""

import asyncio
import base64
import copy
import json

import httpx
import numpy as np
import pytest
import rasterio
import torch
from asking import data_uri
from hosts_tiny import FAMILIES
from images import random_image
from transformers import AutoModelForCausalLM
from uhr_bat.common import asking
from uhr_bat.common.asking import answer_texts, printable, prompt_text, user_prompt
from uhr_bat.common.models import told
from uhr_bat.serving import batch, demo, serve, transformers_decoder
from uhr_bat.serving.cache import ContentCache
from uhr_bat.serving.chat import ChatRequest
from uhr_bat.serving.decoding import Sampling, decoder_folder
from uhr_bat.serving.engine import Engine, Piece
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
    urls = [image if isinstance(image, str) else data_uri(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
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
    assert answer.text == printable(answer_texts(processor, ids)[0])
    assert answer.num_tokens == 11 == len(json.loads(desk.geojson(answered))["features"])
    assert b"PNG" in desk.kept_png(answered)[:8] and "How many ships?" in desk.page(answered, "{}")


@pytest.mark.slow
def test_the_page_outlines_the_objects_of_an_answer_and_has_them_as_geojson(loaded, monkeypatch):
    monkeypatch.setattr(asking, "answer_texts", lambda processor, ids: [BOXES])
    desk = Desk(Front(*loaded("qwen3_vl"), "qwen3_vl", ContentCache(2**30), 1), max_new_tokens=1)
    answered = desk.ask(desk.open(ImageFile("image", random_image(100, 200), "digest")), "Where?", 8)
    page = desk.page(answered, "{}")
    assert 'd="M20.00,10.00H30.00V50.00H20.00Z"><title>ship</title>' in page and 'd="M100.00,50.00h0"' in page
    assert [one["properties"]["label"] for one in json.loads(desk.objects_geojson(answered))["features"]] == [
        "ship",
        "",
    ]
    told = demo.tell_answer(answered, desk.answers.get(answered), "")
    assert "GeoJSON of the objects (2)" in told and "x ends at 1 and begins at 9" in told


@pytest.fixture
def open_raster():
    """A GeoTIFF of 100 x 200 px (height, width) as a data: URL."""
    profile = {"driver": "GTiff", "width": 200, "height": 100, "count": 3, "dtype": "uint8", "crs": "EPSG:32654"}
    with rasterio.MemoryFile() as file:
        with file.open(**profile, transform=rasterio.Affine(2, 0, 380000, 0, -2, 3950000)) as raster:
            raster.write(np.asarray(random_image(100, 200)).transpose(2, 0, 1))
        return "data:image/tiff;base64," + base64.b64encode(file.read()).decode()


BOXES = '[{"bbox_2d": [100, 300, 150, 500], "label": "ship"}, {"bbox_2d": [9, 9, 1, 1]}, {"point_2d": [500, 500]}]'


@pytest.mark.slow
def test_an_answer_has_its_objects_in_pixels_and_on_the_ground(app, open_raster, monkeypatch):
    async def answer(self, selection, sampling, stop=()):
        for start in range(0, len(BOXES), 20):
            yield Piece(BOXES[start : start + 20], [], start + 1)
        yield Piece("", [], len(BOXES), "stop")

    monkeypatch.setattr(Engine, "answer", answer)
    served = app("qwen3_vl")
    plain, streamed, several, scene = post(
        served,
        request(random_image(100, 200), objects=True, budgets=8),
        request(random_image(100, 200), objects=True, budgets=8, stream=True),
        request(*IMAGES[:2], objects=True),
        request(open_raster, objects=True, budgets=8),
    )
    found = plain.json()["objects"]
    assert found["image_size"] == [100, 200] and found["note"] == "" and found["ground_error"] is None
    ship, point = found["objects"]
    assert ship == {
        "label": "ship", "box": pytest.approx([20, 10, 30, 50]), "point": None, "score": None, "level": None,
        "source": "bbox_2d", "ground": None,
    }  # fmt: skip
    assert point["point"] == [100, 50] and found["refused"][0]["why"] == "x ends at 1 and begins at 9"
    last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")][-1]
    assert last["objects"] == found
    assert several.status_code == 400 and several.json()["error"]["param"] == "objects"
    ship, point = scene.json()["objects"]["objects"]
    assert ship["ground"]["type"] == "Polygon" and point["ground"]["type"] == "Point"
    assert 139 < point["ground"]["coordinates"][0] < 140 and 35 < point["ground"]["coordinates"][1] < 36
