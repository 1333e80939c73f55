"""The decoder by transformers: requests that wait are decoded together, by one `generate` of padded embeddings.

transformers' own continuous batching takes token ids alone, so a batch here is filled when it starts: what comes while
it runs waits for its end. A row that is finished or no longer wanted ends by itself.

Letters: B requests of a batch, M tokens of the longest prompt, D decoder width.
"""

import asyncio
import queue
import threading
from collections import deque

import torch
import torch.nn.functional as F
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from .decoding import Sampling, end_ids


class _Job:
    """A request on its way; its tokens go to a queue of the event loop that waits for them."""

    def __init__(self, embeds, sampling):
        self.embeds, self.sampling = embeds, sampling
        self.loop, self.arrived = asyncio.get_running_loop(), asyncio.Queue()
        self.num_tokens, self.done = 0, False
        # What one call of `generate` has for all of its rows.
        self.draws = sampling._replace(max_new_tokens=0)
        if sampling.temperature == 0:
            self.draws = Sampling(0)

    def put(self, ids: list[int] | Exception | None):
        """Tokens, the error that ended the batch, or None at the end."""
        try:
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, ids)
        except RuntimeError:  # the server is closing: nobody waits any more
            self.done = True


class _Rows(BaseStreamer, StoppingCriteria):
    """Hands every job its tokens, step by step, and tells `generate` which rows are finished."""

    def __init__(self, jobs, end_ids):
        self.jobs, self.end_ids, self.begun = jobs, end_ids, False

    def put(self, value):
        if not self.begun:  # the first call brings the prompts
            self.begun = True
            return
        for job, token in zip(self.jobs, value.tolist()):
            if not job.done:
                job.num_tokens += 1
                job.put([token])
                job.done = token in self.end_ids or job.num_tokens >= job.sampling.max_new_tokens

    def end(self):
        pass

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([job.done for job in self.jobs], device=input_ids.device)


class TransformersDecoder:
    """Answers by `generate`, at most `max_batch` at a time, on a thread of its own."""

    def __init__(self, model, max_batch: int):
        self.model, self.max_batch = model, max_batch
        self.end_ids = end_ids(model)
        self.running = 0
        self._arriving: queue.Queue[_Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def decode(self, embeds, sampling: Sampling):
        """See `Decoder`."""
        job = _Job(embeds, sampling)
        self._arriving.put(job)
        try:
            while (ids := await job.arrived.get()) is not None:
                if isinstance(ids, Exception):
                    raise ids
                yield ids
        finally:
            job.done = True

    async def close(self):
        self._arriving.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self):
        waiting: deque[_Job | None] = deque()
        while True:
            if not waiting:
                waiting.append(self._arriving.get())
            while not self._arriving.empty():
                waiting.append(self._arriving.get())
            if None in waiting:
                for job in filter(None, waiting):
                    job.put(RuntimeError("The server is closing."))
                return
            jobs = next_batch(waiting, self.max_batch)
            self.running = len(jobs)
            try:
                self._run(jobs)
                end = None
            except Exception as error:  # the others of the server go on
                end = error
            self.running = 0
            for job in jobs:
                job.put(end)

    @torch.inference_mode()
    def _run(self, jobs):
        """One `generate` of all of them, padded on the left."""
        M = max(len(job.embeds) for job in jobs)
        device, sampling = self.model.device, jobs[0].sampling
        embeds = torch.stack([F.pad(job.embeds, (0, 0, M - len(job.embeds), 0)) for job in jobs]).to(device)
        mask = torch.stack(
            [F.pad(torch.ones(len(job.embeds), dtype=torch.long), (M - len(job.embeds), 0)) for job in jobs]
        )
        draws = {"do_sample": False}
        if sampling.temperature > 0:
            draws = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
        rows = _Rows(jobs, self.end_ids)
        self.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask.to(device),
            max_new_tokens=max(job.sampling.max_new_tokens for job in jobs),
            streamer=rows,
            stopping_criteria=StoppingCriteriaList([rows]),
            **draws,
        )


def next_batch(waiting: deque[_Job], max_batch: int) -> list[_Job]:
    """The job that waits longest and those that may share its call, taken out of `waiting`; none that nobody wants.

    One draw is repeatable only by itself: a job with a seed shares its call with none.
    """
    while waiting and waiting[0].done:
        waiting.popleft()
    if not waiting:
        return []
    draws = waiting[0].draws
    alike = [job for job in waiting if job.draws == draws and not job.done]
    jobs = alike[: 1 if draws.seed is not None else max_batch]
    for job in jobs:
        waiting.remove(job)
    return jobs
