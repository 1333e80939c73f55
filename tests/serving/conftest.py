"""A server as users meet it: by each backend, with a folder that requests may name."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import pytest

# Every answer is as long as it may be: no token of the vocabulary that the model says ends it.
NO_END = 1019


@pytest.fixture(scope="session")
def endless_folder(model_folder, tmp_path_factory):
    """UHR-BAT-Tiny, whose answers do not end by themselves. Tests only read it."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(model_folder, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [NO_END]}))
    return folder


@pytest.fixture(scope="session")
def open_folder(tmp_path_factory):
    """What requests may name by a path."""
    return tmp_path_factory.mktemp("open")


class Served(NamedTuple):
    """Where a server listens, and `resident()` bytes of its processes."""

    address: str
    resident: Callable[[], int]


@pytest.fixture(
    scope="session",
    params=["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])],
)
def served(request, endless_folder, open_folder, tmp_path_factory):
    """A server of the model `endless`: on a thread by transformers, by its command and in processes by vLLM."""
    options = ["--allow-local-files", str(open_folder), "--max-image-bytes", "1000000", "--max-requests", "8"]
    if request.param == "vllm":
        if find_spec("vllm") is None:
            pytest.skip("vLLM is not installed: `python run.py test` has an environment for it")
        yield from by_command(request.param, endless_folder, options, tmp_path_factory.mktemp("log"))
    else:
        yield from on_a_thread(endless_folder, options)


@pytest.fixture
def address(served):
    return served.address


def by_command(backend, folder, options, log_folder):
    from uhr_bat.benchmarks.servers import resident_of, server

    command = ["-m", "uhr_bat", "serve", str(folder), "--backend", backend, *options]
    with server(command, log_folder / "log") as (address, process):
        yield Served(address, lambda: resident_of(process))


def on_a_thread(folder, options):
    from served import serve_app
    from uhr_bat.benchmarks.meters import reset_peak
    from uhr_bat.serving import serve

    args = serve.parser().parse_args([str(folder), "--name", "endless", *options])
    with serve_app(serve.build(args)) as url:
        yield Served(url, reset_peak)
