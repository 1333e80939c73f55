"""The benchmark of serving runs, its sides answer the same, and a soak leaves nothing behind. No time is asserted."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from copies import Inline
from uhr_bat.benchmarks import servers, serving
from uhr_bat.benchmarks.servers import Reply
from uhr_bat.serving import serve


def test_a_side_that_answers_otherwise_or_fails_is_found():
    reference = [[Reply("two", 0.1, 0.2)]]
    serving.check_answers("ours", [[Reply("two", 0.3, 0.4)]], reference)
    for answer in (Reply("three", 0.1, 0.2), Reply("500", 0.0, 0.0, ok=False)):
        with pytest.raises(serving.Disagreement, match=f"ours.*{answer.text}"):
            serving.check_answers("ours", [[answer]], reference)


@pytest.fixture
def bench(served, endless_folder, monkeypatch):
    """The command, for which the server that is there stands in for one of its own, and this process for that of the loop."""
    process = SimpleNamespace(pid=served.pid)

    @contextmanager
    def server(command, log):
        serve.parser().parse_args(command[3:])
        yield served.address, process

    monkeypatch.setattr(serving, "server", server)
    monkeypatch.setattr(serving, "request_body", lambda name, *asked: servers.request_body("endless", *asked))
    monkeypatch.setattr(serving, "one_process", Inline)
    monkeypatch.setattr(serving, "SOAK_USERS", 8)
    monkeypatch.setattr(serving, "QUESTIONS", 4)
    threads = str(torch.get_num_threads())
    common = ["--model", str(endless_folder), "--backend", "vllm", "--quick", "--loop-threads", threads]
    return lambda *options: serving.main([*common, *options])


by_vllm = pytest.mark.parametrize(
    "served", [pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])], indirect=True
)


@by_vllm
def test_many_requests_leave_no_error_and_no_memory_behind(bench, capsys):
    code = bench("--soak", "128")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["requests"] == 128 and result["wrong"] == 0
    assert code == int(result["growth_percent"] > serving.GROWTH_PERCENT)


@by_vllm
def test_all_sides_answer_the_same(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving, "QUESTIONS", 2)
    options = ["--users", "1,3", "--repetitions", "1", "--without-transformers-serve"]
    assert bench(*options, "--output", str(tmp_path)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["users"]["3"].keys() == {serving.LOOP, serving.LOOP_ONCE, "uhr-bat serve (vllm)"}
    assert {path.name for path in tmp_path.iterdir()} == {"serving_vllm.json", "serving_vllm.md"}
    assert "| 3 | uhr-bat serve (vllm) |" in (tmp_path / "serving_vllm.md").read_text()
