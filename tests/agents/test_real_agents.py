"""The tools as an agent of the OpenAI Agents SDK calls them; what its language model says is a script."""

import asyncio
import json
import os
import sys

import pytest

agents = pytest.importorskip("agents", reason="`python run.py test` has an environment for it")
from agents.mcp import MCPServerStdio  # noqa: E402
from images import random_image  # noqa: E402
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText  # noqa: E402

QUESTION = "How many ships are at the pier?"
agents.set_tracing_disabled(True)


class Script(agents.Model):
    """A language model that says what it is told to: each turn gets what the last tool gave."""

    def __init__(self, turns):
        self.turns, self.tools = list(enumerate(turns)), []

    async def get_response(self, system_instructions, input, model_settings, tools, *args, **kwargs):
        self.tools = [tool.name for tool in tools]
        number, turn = self.turns.pop(0)
        said = turn(input[-1]["output"] if number else None)
        if isinstance(said, str):
            text = ResponseOutputText(annotations=[], text=said, type="output_text")
            item = ResponseOutputMessage(
                id=str(number), content=[text], role="assistant", status="completed", type="message"
            )
        else:
            name, arguments = said
            item = ResponseFunctionToolCall(
                arguments=json.dumps(arguments), call_id=str(number), name=name, type="function_call"
            )
        return agents.ModelResponse(output=[item], usage=agents.Usage(), response_id=None)

    def stream_response(self, *args, **kwargs):
        raise NotImplementedError


def facts(output):
    (text,) = [part["text"] for part in output if part["type"] == "input_text"]
    return json.loads(text)


def test_an_agent_finds_where_to_look_looks_and_asks(tmp_path):
    random_image(300, 400).save(tmp_path / "scene.png")
    about, seen = {"image": "scene.png", "question": QUESTION, "max_tiles": 16}, {}

    def look(output):
        seen["windows"] = facts(output)["windows"]
        return "look", {"image": "scene.png", "window": seen["windows"][0]["window"]}

    def ask(output):
        seen["pictures"] = [part["image_url"] for part in output if part["type"] == "input_image"]
        return "ask", about | {"max_tokens": 4}

    def misuse(output):
        seen["answer"] = facts(output)["answer"]
        return "look", {"image": "/etc/passwd"}

    def end(output):
        seen["refused"] = str(output)
        return f"The answer is {seen['answer']}."

    script = Script([lambda _: ("where", about | {"side": 128, "number": 1}), look, ask, misuse, end])
    command = {"command": sys.executable, "args": ["-m", "uhr_bat", "mcp", "--allow-local-files", str(tmp_path)]}

    async def run():
        async with MCPServerStdio(
            params=command | {"env": dict(os.environ)}, client_session_timeout_seconds=300
        ) as server:
            agent = agents.Agent("an agent", mcp_servers=[server], model=script)
            return await agents.Runner.run(agent, "Count the ships.")

    assert asyncio.run(run()).final_output == f"The answer is {seen['answer']}."
    assert set(script.tools) == {"open", "ask", "objects", "where", "look", "plan"}
    assert len(seen["windows"]) == 1 and seen["pictures"][0].startswith("data:image/jpeg;base64,")
    assert "there is no such file in the folder" in seen["refused"]
