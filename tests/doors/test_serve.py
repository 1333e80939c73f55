"""`transformers serve` on a copy of the root's files, asked over loopback as an OpenAI server is."""

import json
from importlib.util import find_spec
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import transformers
from asking import GENERATION, data_uri, picture
from packaging.version import Version
from transformers import AutoModelForMultimodalLM, AutoProcessor
from uhr_bat.benchmarks import servers


# The command line of older releases imports requests, which 5.23 does without.
NEEDED = [
    "fastapi",
    "httpx",
    "uvicorn",
    "openai",
    *["requests"] * (Version(transformers.__version__) < Version("5.18")),
]
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"`transformers serve` needs {', '.join(MISSING)}"),
]

QUESTION = "How many ships are there?"
# Straight to loopback, whatever proxy the machine has.
OPENER = build_opener(ProxyHandler({}))


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    """Address of a server that has loaded the model. It is stopped in any case."""
    folder = tmp_path_factory.mktemp("serve")
    command = ["-m", "transformers.cli.transformers", "serve", str(model_folder)]
    options = ["--trust-remote-code", "--host", "127.0.0.1", "--device", "cpu"]
    homes = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    with servers.server([*command, *options], folder / "log", cwd=folder, **homes) as (address, _):
        yield address


@pytest.fixture(scope="module")
def local(model_folder):
    """The same model and its processor in this process."""
    model = AutoModelForMultimodalLM.from_pretrained(model_folder, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)


def ask(server, model_folder, *parts, **fields):
    """The open response to one question."""
    body = {
        "model": str(model_folder),
        "messages": [{"role": "user", "content": list(parts)}],
        "generation_config": json.dumps(GENERATION),
        **fields,
    }
    headers = {"Content-Type": "application/json"}
    request = Request(f"{server}/v1/chat/completions", json.dumps(body).encode(), headers)
    return OPENER.open(request, timeout=120)


def text(words):
    return {"type": "text", "text": words}


def image_url(image):
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def answer(local, *parts):
    """(text, tokens of the prompt, tokens of the answer) without the server."""
    model, processor = local
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": list(parts)}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, **GENERATION)[0, length:]
    return processor.decode(ids, skip_special_tokens=True), length, len(ids)


@pytest.mark.parametrize("order", ["image first", "text first"])
def test_a_base64_image_is_answered_as_without_the_server(server, model_folder, local, order):
    parts = [image_url(picture()), text(QUESTION)]
    with ask(server, model_folder, *(parts if order == "image first" else parts[::-1])) as response:
        reply = json.load(response)
    expected, prompt_tokens, completion_tokens = answer(local, {"type": "image", "image": picture()}, text(QUESTION))
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert reply["usage"]["prompt_tokens"] == prompt_tokens
    assert reply["usage"]["completion_tokens"] == completion_tokens


def test_a_stream_holds_the_whole_answer_in_parts(server, model_folder, local):
    with ask(server, model_folder, image_url(picture(1)), text(QUESTION), stream=True) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line.decode().strip() for line in response]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    parts = [event["choices"][0]["delta"].get("content") for event in events]
    expected, _, _ = answer(local, {"type": "image", "image": picture(1)}, text(QUESTION))
    assert "".join(filter(None, parts)) == expected
    assert len(list(filter(None, parts))) > 1
    assert events[-1]["choices"][0]["finish_reason"] in ("length", "stop")


def test_text_alone_is_answered(server, model_folder, local):
    with ask(server, model_folder, text("Hello")) as response:
        reply = json.load(response)
    assert reply["choices"][0]["message"]["content"] == answer(local, text("Hello"))[0]
