"""The benchmark of serving runs, its sides answer the same, and a soak leaves nothing behind. No time is asserted."""

import json
from contextlib import ExitStack, contextmanager

import pytest
from copies import forked
from uhr_bat.benchmarks import servers, serving, sides
from uhr_bat.benchmarks.servers import Reply


def test_a_side_that_answers_otherwise_or_fails_is_found():
    reference = [[Reply("two", 0.1, 0.2)]]
    serving.check_answers("ours", [[Reply("two", 0.3, 0.4)]], reference)
    for answer in (Reply("three", 0.1, 0.2), Reply("500", 0.0, 0.0, ok=False)):
        with pytest.raises(serving.Disagreement, match=f"ours.*{answer.text}"):
            serving.check_answers("ours", [[answer]], reference)


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    """`servers.server` that starts a server once, which takes a minute: whoever asks for the same, or with fewer options
    behind, gets the one that runs."""
    pytest.importorskip("vllm")
    with ExitStack() as stack:
        running = []

        @contextmanager
        def server(command, log):
            if not running:
                log = tmp_path_factory.mktemp("log") / "log"
                running.append((command, stack.enter_context(servers.server(command, log))))
            ((started, found),) = running
            assert started[: len(command)] == command
            yield found

        yield server


@pytest.fixture
def copied_loop(monkeypatch):
    """The loop's process is a copy of this one, which has the imports already."""
    monkeypatch.setattr(sides, "get_context", forked)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("copied_loop")
def test_many_requests_leave_no_error_and_no_memory_behind(one_server, monkeypatch, capsys):
    monkeypatch.setattr(serving, "server", one_server)
    monkeypatch.setattr(serving, "QUESTIONS", 4)
    code = serving.main(["--backend", "vllm", "--soak", "128", "--quick"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["requests"] == 128 and result["wrong"] == 0
    assert code == int(result["growth_percent"] > serving.GROWTH_PERCENT)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("copied_loop")
def test_all_sides_answer_the_same(one_server, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving, "server", one_server)
    monkeypatch.setattr(serving, "QUESTIONS", 2)
    options = ["--backend", "vllm", "--users", "1,3", "--repetitions", "1", "--without-transformers-serve", "--quick"]
    assert serving.main([*options, "--output", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["users"]["3"].keys() == {serving.LOOP, serving.LOOP_ONCE, "uhr-bat serve (vllm)"}
    assert {path.name for path in tmp_path.iterdir()} == {"serving_vllm.json", "serving_vllm.md"}
    assert "| 3 | uhr-bat serve (vllm) |" in (tmp_path / "serving_vllm.md").read_text()
