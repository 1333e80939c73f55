"""What was computed, kept by its content up to a number of bytes; the least recently used goes first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from ..modeling_outputs_uhr_bat import TileCache, TokenMaps


def count_bytes(value: Any) -> int:
    """Bytes of all tensors in dataclasses, lists, tuples and dictionaries, memory that several of them share once; of what
    is no tensor, those that it says it holds (`held_bytes`)."""
    storages, held, left = {}, 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):  # outputs of the library are dictionaries too
            left += list(value.values())
        elif isinstance(value, (list, tuple)):
            left += value
        elif isinstance(value, TokenMaps):
            left += [value.values, value.positions]
        elif isinstance(value, TileCache):
            held += value.size
        elif is_dataclass(value):
            held += getattr(value, "held_bytes", 0)
            left += [getattr(value, field.name) for field in fields(value)]
    return held + sum(storages.values())


class Abandoned(Exception):
    """A value was not made: whoever asked for it first wants it no more."""


class ContentCache:
    """Values by keys that name all that they were computed from. Safe to share among threads.

    Args:
        max_bytes: of the tensors in all values. A greater value is handed out and not kept.

    Attributes:
        num_bytes: that are kept at present.
        made, found: how often a value was computed, and how often that was not necessary, by the first part of its key.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"`max_bytes` of a cache must be at least 0. Got {max_bytes}.")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.made: dict[str, int] = {}
        self.found: dict[str, int] = {}
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()  # (value, its bytes)
        self._coming: dict[Hashable, Future] = {}

    def __len__(self):
        return len(self._values)

    def get(self, key: tuple, make: Callable[[], Any]):
        """The value of a key, from `make()` where it is not kept.

        Of several threads that ask for one key at once the first makes the value, and the others wait for it, or for
        its error. An error is not kept; of `Abandoned` the others hear nothing: the next of them makes the value.

        Args:
            key: its first part says of which kind the value is, as "image".
        """
        with self._lock:
            if key in self._values:
                self._count(self.found, key)
                value = self._values[key][0]
                self._keep(key, value)
                return value
            coming = self._coming.get(key)
            if coming is None:
                made = self._coming[key] = Future()
                self._count(self.made, key)
            else:
                self._count(self.found, key)
        if coming is not None:
            try:
                return coming.result()
            except Abandoned:
                return self.get(key, make)
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._coming[key]
                if isinstance(error, Abandoned):
                    self.made[key[0]] -= 1
            made.set_exception(error)
            raise
        with self._lock:
            del self._coming[key]
            self._keep(key, value)
        made.set_result(value)
        return value

    def grown(self, key: tuple):
        """Counts a value anew, if it is kept: what an encoded image carries grows with its questions."""
        with self._lock:
            if key in self._values:
                self._keep(key, self._values[key][0])

    def _count(self, counts, key):
        counts[key[0]] = counts.get(key[0], 0) + 1

    def _keep(self, key, value):
        """Puts a value to the end that goes last, and lets go what is over the limit."""
        self.num_bytes -= self._values.pop(key, (None, 0))[1]
        size = count_bytes(value)
        if size > self.max_bytes:
            return
        self._values[key] = value, size
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, (_, size) = self._values.popitem(last=False)
            self.num_bytes -= size
