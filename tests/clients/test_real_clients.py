"""The server as the packages that people use call it: plain, in parts, in a conversation with images, in a form."""

import json
import os

import pytest
from asking import data_uri, picture

pytest.importorskip("langchain_openai", reason="`python run.py test` has an environment for it")

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a list of prices
NAME, QUESTION = "uhr-bat-tiny", "How many ships are there?"
SHIP = {
    "title": "Ship",
    "description": "A ship.",
    "type": "object",
    "properties": {"kind": {"enum": ["tanker", "ferry"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    from uhr_bat.benchmarks.servers import server

    command = ["-m", "uhr_bat", "serve", "--api-key", "secret"]
    with server(command, tmp_path_factory.mktemp("log") / "log") as (address, _):
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def said(address):
    """What a client of OpenAI's is answered to a question about an image, and to one more about another."""
    import openai

    with openai.OpenAI(base_url=address, api_key="secret", max_retries=0) as client:

        def ask(messages):
            answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8)
            return answer.choices[0].message.content

        first = ask(turns()[:1])
        return first, ask(turns(first))


def parts(image):
    return [
        {"type": "image_url", "image_url": {"url": data_uri(image)}},
        {"type": "text", "text": QUESTION},
    ]


def turns(answer="two"):
    """A conversation whose earlier turn has an image too."""
    return [
        {"role": "user", "content": parts(picture(1))},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": parts(picture(2))},
    ]


def is_ship(value):
    value = json.loads(value) if isinstance(value, str) else value
    return value.keys() == {"kind", "count"} and value["kind"] in ("tanker", "ferry") and 1 <= value["count"] <= 9


# LangChain


@pytest.fixture
def langchain(address):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=NAME, base_url=address, api_key="secret", temperature=0, frequency_penalty=0, presence_penalty=0,
        max_tokens=8, max_retries=0, n=1,
    )  # fmt: skip


def test_langchain_asks(langchain, said):
    from langchain_core.messages import AIMessage, HumanMessage

    first = HumanMessage(parts(picture(1)), name="Ann")
    assert langchain.invoke([first]).content == said[0]
    assert "".join(part.content for part in langchain.stream([first])) == said[0]
    answer = langchain.invoke([first, AIMessage(said[0]), HumanMessage(parts(picture(2)))])
    assert answer.content == said[1] and answer.usage_metadata["output_tokens"] >= 1


def test_langchain_gets_a_form(langchain):
    pytest.importorskip("llguidance")
    from langchain_core.messages import HumanMessage

    form = langchain.model_copy(update={"max_tokens": 60})
    answer = form.with_structured_output(SHIP, method="json_schema").invoke([HumanMessage(parts(picture(1)))])
    assert is_ship(answer)


# LiteLLM


def test_litellm_asks(address, said):
    import litellm

    def ask(messages, **fields):
        return litellm.completion(
            model=f"openai/{NAME}", api_base=address, api_key="secret", messages=messages, max_tokens=8,
            frequency_penalty=0, num_retries=0, **fields,
        )  # fmt: skip

    first = ask(turns()[:1])
    assert first.choices[0].message.content == said[0]
    streamed = ask(turns()[:1], stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == said[0]
    # What came back goes into the next turn as it is.
    messages = [turns()[0], first.choices[0].message.model_dump(), turns()[2]]
    assert ask(messages).choices[0].message.content == said[1]


def test_litellm_gets_a_form(address):
    pytest.importorskip("llguidance")
    import litellm

    answer = litellm.completion(
        model=f"openai/{NAME}", api_base=address, api_key="secret", messages=turns()[:1], max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "ship", "schema": SHIP, "strict": True}},
    )  # fmt: skip
    assert is_ship(answer.choices[0].message.content)


# OpenAI's own


def test_openais_client_goes_on_with_what_came_back(address, said):
    import openai

    with openai.OpenAI(base_url=address, api_key="secret", max_retries=0) as client:

        def ask(messages):
            return client.chat.completions.create(model=NAME, messages=messages, max_tokens=8).choices[0].message

        answer = ask(turns()[:1])
        assert ask([turns()[0], answer.model_dump(), turns()[2]]).content == said[1]
        assert ask([turns()[0], answer, turns()[2]]).content == said[1]
        parts = client.chat.completions.create(model=NAME, messages=turns()[:1], max_tokens=8, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == said[0]


def test_openais_client_gets_a_form(address):
    pytest.importorskip("llguidance")
    from typing import Literal

    import openai
    from pydantic import BaseModel

    class Ship(BaseModel):
        kind: Literal["tanker", "ferry"]
        is_moving: bool

    with openai.OpenAI(base_url=address, api_key="secret", max_retries=0) as client:
        answer = client.chat.completions.parse(model=NAME, messages=turns()[:1], response_format=Ship, max_tokens=60)
    assert isinstance(answer.choices[0].message.parsed, Ship)


def test_a_key_that_is_wrong_is_told_as_openai_tells_it(address):
    import openai

    with openai.OpenAI(base_url=address, api_key="guess", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="The API key is wrong"):
            client.models.list()


# LlamaIndex


def test_llama_index_asks(address, said):
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model=NAME, api_base=address, api_key="secret", is_chat_model=True, max_tokens=8, max_retries=0, temperature=0
    )

    def user(seed):
        blocks = [ImageBlock(url=data_uri(picture(seed)), detail="auto"), TextBlock(text=QUESTION)]
        return ChatMessage(role="user", blocks=blocks)

    assert llm.chat([user(1)]).message.content == said[0]
    assert "".join(part.delta or "" for part in llm.stream_chat([user(1)])) == said[0]
    assert llm.chat([user(1), ChatMessage(role="assistant", content=said[0]), user(2)]).message.content == said[1]

