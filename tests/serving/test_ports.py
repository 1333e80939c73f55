"""A server's start: options and port are looked at before a model is loaded."""

import socket

import pytest
from uhr_bat.serving import demo, serve
from uhr_bat.serving.ports import take_port, url_of


@pytest.fixture
def taken():
    """A port of this machine where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model is loaded")

    for one in (serve, demo):
        monkeypatch.setattr(one, "load_model", load)


@pytest.mark.parametrize("command", [serve, demo])
def test_a_port_that_is_in_use_is_said_before_a_model_is_loaded(command, taken, nothing_loads, capsys):
    if command is demo:
        pytest.importorskip("gradio")
    assert command.main(["--port", str(taken)]) == 2
    said = capsys.readouterr()
    assert f"Port {taken} of 127.0.0.1 is in use: give another --port" in said.err
    assert "http://" not in said.out + said.err and "GRADIO" not in said.err


@pytest.mark.parametrize(
    "command, options, message",
    [
        (serve, "--max-batch 0", "--max-batch must be at least 1. Got 0."),
        (serve, "--max-batch -3", "--max-batch must be at least 1. Got -3."),
        (serve, "--max-requests 0", "--max-requests must be at least 1. Got 0."),
        (serve, "--max-pixels 0", "--max-pixels must be at least 1. Got 0."),
        (serve, "--max-image-bytes -5", "--max-image-bytes must be at least 1. Got -5."),
        (serve, "--cache-bytes -1", "--cache-bytes must be at least 0. Got -1."),
        (serve, "--port 99999", "--port must be at least 0 and at most 65535. Got 99999."),
        (serve, "--host nowhere.invalid", "--host nowhere.invalid: there is no such address"),
        (serve, "--host 192.0.2.1", "Port 8000 of 192.0.2.1 cannot be used"),
        (serve, "--allow-local-files /nowhere", "/nowhere: there is no such folder to allow."),
        (demo, "--port -1", "--port must be at least 0 and at most 65535. Got -1."),
        (demo, "--max-new-tokens 0", "--max-new-tokens must be at least 1. Got 0."),
    ],
)
def test_options_that_no_server_can_have_are_refused_before_a_model_is_loaded(
    command, options, message, nothing_loads, capsys
):
    assert command.main(options.split()) == 2
    assert message in capsys.readouterr().err


def test_a_port_is_held_from_when_it_is_taken():
    (first,) = take_port("127.0.0.1", 0)
    with first, pytest.raises(OSError, match="is in use"):
        take_port("127.0.0.1", first.getsockname()[1])


def test_all_addresses_of_a_name_have_one_port():
    sockets = take_port("localhost", 0)
    assert len({one.getsockname()[1] for one in sockets}) == 1
    for one in sockets:
        one.close()


def test_an_address_is_written_as_browsers_read_it():
    assert [url_of(host, 80) for host in ("127.0.0.1", "::1")] == ["http://127.0.0.1:80", "http://[::1]:80"]
