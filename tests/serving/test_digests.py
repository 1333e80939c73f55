"""Files that are hashed once, whoever asks."""

import asyncio
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from uhr_bat.serving.digests import Digests


def test_all_who_ask_at_once_share_one_reading(tmp_path):
    path, digests = tmp_path / "pipe", Digests()
    os.mkfifo(path)  # what is read of it is gone: a second reading would find nothing

    async def ask():
        with ThreadPoolExecutor(3) as threads:
            loop = asyncio.get_running_loop()
            asked = [*(digests.wait_for(path) for _ in range(3))]
            asked += [loop.run_in_executor(threads, digests.of, path) for _ in range(3)]
            waiting = asyncio.gather(*asked)
            await asyncio.sleep(0.2)
            path.write_bytes(b"picture")
            return await waiting

    assert set(asyncio.run(ask())) == {hashlib.sha256(b"picture").hexdigest()}


def test_a_file_that_changed_has_another_digest(tmp_path):
    path, digests = tmp_path / "a", Digests()
    for content in (b"one", b"other"):
        path.write_bytes(content)
        assert [digests.of(path) for _ in range(2)] == [hashlib.sha256(content).hexdigest()] * 2


def test_what_nobody_waits_for_any_more_is_not_hashed_on(tmp_path):
    digests, large, small = Digests(workers=1), tmp_path / "large", tmp_path / "small"
    large.touch()
    os.truncate(large, 2**40)  # hours
    small.write_bytes(b"a")

    async def ask():
        gone = [asyncio.ensure_future(digests.wait_for(large)) for _ in range(2)]
        await asyncio.sleep(0.1)
        for one in gone:
            one.cancel()
        return await digests.wait_for(small)

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == hashlib.sha256(b"a").hexdigest()


def test_a_file_that_cannot_be_read_is_an_error_for_all(tmp_path):
    digests = Digests()
    with pytest.raises(FileNotFoundError):
        digests.of(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        asyncio.run(digests.wait_for(tmp_path))
