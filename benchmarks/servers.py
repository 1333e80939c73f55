"""Servers as processes of their own, users who ask them at once, and how long each waits."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Seconds for a server to load, and for an answer.
# vLLM imports itself in three processes, one after the other: 36 s of a core, minutes of a busy one.
START_SECONDS, ANSWER_SECONDS = 600, 120


class Reply(NamedTuple):
    """What a user got.

    Attributes:
        text: of the answer; of an error, its status and text.
        first_seconds: from the question to the first piece of text.
        seconds: to the end.
        ok: whether it is an answer.
    """

    text: str
    first_seconds: float
    seconds: float
    ok: bool = True


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def server(command: Sequence[str], log: Path, cwd: Path | None = None, **environment: str):
    """The address of a server for a `with` block, from when it is healthy; yields (address, process).

    Args:
        command: of this Python; a port is added.
        log: file for what it prints.
        cwd: the folder that it works in; this one if not given.
        environment: variables beside those of this process.

    Raises:
        RuntimeError: it does not come up; with the end of its log.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            cwd=cwd,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            end = time.monotonic() + START_SECONDS
            while not is_healthy(address):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"The server does not start. Its last words: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield address, process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_healthy(address: str) -> bool:
    """Whether a server is ready."""
    import httpx

    try:
        return httpx.get(f"{address}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def request_body(model: str, image_url: str | None, question: str, max_tokens: int, **fields) -> bytes:
    """A streamed chat completion about an image, or about none."""
    content = [{"type": "image_url", "image_url": {"url": image_url}}] * (image_url is not None)
    content.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": content}]
    return json.dumps(
        {"model": model, "messages": messages, "stream": True, "max_tokens": max_tokens, **fields}
    ).encode()


def ask_at_once(address: str, users: list[list[bytes]]) -> tuple[list[list[Reply]], float]:
    """The answers of every user, who asks one question after the other, all users at the same time; and the seconds
    that passed."""
    return asyncio.run(_ask_at_once(address, users))


async def _ask_at_once(address, users):
    import httpx

    limits = httpx.Limits(max_connections=len(users), max_keepalive_connections=len(users))
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=ANSWER_SECONDS, trust_env=False) as client:

        async def ask_all(bodies):
            return [await _ask(client, body) for body in bodies]

        begun = time.perf_counter()
        answers = await asyncio.gather(*map(ask_all, users))
        return answers, time.perf_counter() - begun


async def _ask(client, body) -> Reply:
    begun, first, text = time.perf_counter(), None, ""
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
        if response.status_code != 200:
            problem = (await response.aread()).decode(errors="replace")
            return Reply(f"{response.status_code} {problem}", 0.0, 0.0, ok=False)
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return Reply(line, 0.0, 0.0, ok=False)
            part = (event["choices"][0]["delta"].get("content") or "") if event.get("choices") else ""
            if part and first is None:
                first = time.perf_counter() - begun
            text += part
    seconds = time.perf_counter() - begun
    return Reply(text, seconds if first is None else first, seconds)


def family(process: subprocess.Popen) -> list:
    """A process and all that it started."""
    import psutil

    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def worked_by(process: subprocess.Popen) -> float:
    """The processor's seconds of a process and of all that it started."""
    return sum(sum(member.cpu_times()[:2]) for member in family(process))


def resident_of(process: subprocess.Popen) -> int:
    """Resident bytes of a process and of all that it started; what they share counts once (PSS)."""
    return sum(member.memory_full_info().pss for member in family(process))
