"""SHA-256 of files of any size: each is hashed once for as long as it stays as it is, whoever asks and however many at once."""

import asyncio
import hashlib
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# Bytes between two looks at whether somebody still waits.
CHUNK_BYTES = 2**22
# Files whose digests are kept.
MAX_FILES = 4096


class _Hashing:
    """A file that is being hashed, and how many wait for it."""

    def __init__(self):
        self.digest, self.waiting = Future(), 0


class Digests:
    """Digests by path and by what the file system says of the file. Safe to share among threads and event loops.

    Args:
        workers: files that are hashed at a time, on threads of their own.
    """

    def __init__(self, workers: int = 2):
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="digests")
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple, str] = OrderedDict()
        self._coming: dict[tuple, _Hashing] = {}

    def of(self, path: Path) -> str:
        """Raises `OSError` where the file cannot be read."""
        key, hashing = self._join(path)
        try:
            return hashing.digest.result()
        finally:
            self._leave(key, hashing)

    async def wait_for(self, path: Path) -> str:
        """`of`, without a thread that waits. Where all who waited were cancelled, the file is not hashed on."""
        key, hashing = self._join(path)
        try:
            return await asyncio.shield(asyncio.wrap_future(hashing.digest))
        finally:
            self._leave(key, hashing)

    def _join(self, path):
        facts = os.stat(path)
        key = (str(path), facts.st_mtime_ns, facts.st_size, facts.st_ino)
        with self._lock:
            hashing = self._coming.get(key) or _Hashing()
            hashing.waiting += 1
            if key in self._known:
                self._known.move_to_end(key)
                hashing.digest.set_result(self._known[key])
            elif key not in self._coming:
                self._coming[key] = hashing
                self._threads.submit(self._hash, key, hashing)
        return key, hashing

    def _leave(self, key, hashing):
        with self._lock:
            hashing.waiting -= 1
            if not hashing.waiting and self._coming.get(key) is hashing:
                del self._coming[key]  # whoever asks later begins anew

    def _hash(self, key, hashing):
        digest, error = hashlib.sha256(), None
        try:
            with open(key[0], "rb") as file:
                while hashing.waiting and (chunk := file.read(CHUNK_BYTES)):
                    digest.update(chunk)
        except BaseException as raised:
            error = raised
        with self._lock:
            if self._coming.get(key) is hashing:  # else nobody waits, and the file was not read to its end
                del self._coming[key]
                if error is None:
                    self._known[key] = digest.hexdigest()
                    while len(self._known) > MAX_FILES:
                        self._known.popitem(last=False)
        if error is None:
            hashing.digest.set_result(digest.hexdigest())
        else:
            hashing.digest.set_exception(error)


# Of this process.
DIGESTS = Digests()
