"""Copies of the test's own process, which have all its imports: what a launcher starts, and what can be killed. And an
executor that needs no process."""

import os
import pickle
import socket
import sys
import threading
from concurrent.futures import Future
from contextlib import nullcontext
from multiprocessing import get_context

from tqdm import tqdm


def forked(kind):
    """In place of a module's `get_context`: its processes are copies of this one, too."""
    return get_context("fork")


def start_copies(number, function, *arguments):
    """`number` processes that call `function(*arguments)` under the variables that `torchrun` sets, where they are several.
    Their exit codes are what it returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind = get_context("fork")
    processes = [kind.Process(target=_run_as, args=(rank, number, port, function, arguments)) for rank in range(number)]
    for process in processes:
        process.start()
    return processes


def run_copies(number, function, *arguments):
    """The same, to their end: each must return 0 or nothing."""
    processes = start_copies(number, function, *arguments)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * number


def _run_as(rank, number, port, function, arguments):
    import torch
    from accelerate.state import AcceleratorState

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": number, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in where.items()} if number > 1 else {}
    # The bars of all copies share a lock: whoever is killed while it is held would leave the others waiting.
    tqdm.set_lock(threading.RLock())
    # A copy makes torch's pool of threads anew when it is asked for: not by two threads that load weights at once.
    torch.set_num_threads(torch.get_num_threads())
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.exit(function(*arguments))


class Inline(nullcontext):
    """An executor that runs what it is given at once, in this process: others take seconds to start, and would not see what a
    test plants. What comes and goes is pickled, as between processes."""

    def __enter__(self):
        return self

    def submit(self, function, *arguments):
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        future = Future()
        future.set_result(pickle.loads(pickle.dumps(function(*arguments))))
        return future
