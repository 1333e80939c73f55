"""The decoder by transformers: answers are decoded together, by one `generate` of padded embeddings, or with models of
other families of padded ids and the rows of their images.

transformers' own continuous batching takes token ids alone. Here what comes while a batch runs joins it after `SLICE`
steps at most: the batch stops, and goes on with the newcomers from what its answers have so far. A row that is finished
or no longer wanted ends by itself.

Letters: B requests of a batch, M tokens of the longest prompt, D decoder width, V size of the vocabulary.
"""

import asyncio
import queue
import threading
from collections import deque

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from ..modeling_outputs_uhr_bat import UHRBatCompressionOutput
from .decoding import Draws, Prompt, Sampling, Scored, end_ids
from .structure import Forms

# Steps after which a batch stops for requests that wait. Its prompts are read anew then, which costs as much as some
# steps; most answers are shorter.
SLICE = 32


class _Job:
    """A request on its way; its tokens go to a queue of the event loop that waits for them."""

    def __init__(self, prompt, sampling, form=None):
        self.prompt, self.sampling, self.form = prompt, sampling, form
        self.logprobs = None  # float[V] of the token that comes next
        self.loop, self.arrived = asyncio.get_running_loop(), asyncio.Queue()
        self.ids, self.done = [], False
        self.again = deque()  # tokens of the answer that are not read with the prompt, but said once more
        self.alone = False  # a batch that it was in failed
        self.draws = None if sampling.is_greedy else Draws(sampling)

    def put(self, ids: list[int] | Exception | None):
        """Tokens, the error that ended the answer, or None at the end."""
        try:
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, ids)
        except RuntimeError:  # the server is closing: nobody waits any more
            self.done = True

    def end(self, error: Exception | None = None):
        self.done = True
        self.put(error)

    def read(self, image_token: int) -> list[int]:
        """What is read of the answer so far when its batch begins anew. From an image's placeholder on, which in a prompt
        would be that of an image, it is said again."""
        known = self.ids.index(image_token) if image_token in self.ids else len(self.ids)
        self.again = deque(self.ids[known:])
        return self.ids[:known]

    def scored(self, token: int) -> int:
        """The token, with its log probability where it is asked for."""
        return token if self.logprobs is None else Scored.among(token, self.logprobs, self.sampling.top_logprobs)


class _Rows(BaseStreamer, StoppingCriteria):
    """The jobs of one `generate`: hands them their tokens, and says which rows are to stop."""

    def __init__(self, jobs, end_ids, is_awaited):
        self.jobs, self.end_ids, self.is_awaited = jobs, end_ids, is_awaited
        self.num_steps = -1  # the streamer's first call brings the prompts
        self.slice = SLICE + max(len(job.again) for job in jobs)

    def put(self, value):
        self.num_steps += 1
        if self.num_steps == 0:
            return
        for job, token in zip(self.jobs, value.tolist()):
            if job.again:
                job.again.popleft()
            elif not job.done:
                job.ids.append(token)
                job.put([job.scored(token)])
                if job.form is not None:
                    job.form.take(token)
                if token in self.end_ids or len(job.ids) >= job.sampling.max_new_tokens:
                    job.end()

    def end(self):
        pass

    def __call__(self, input_ids, scores, **kwargs):
        stopped = self.num_steps >= self.slice and self.is_awaited()
        return torch.tensor([stopped or job.done for job in self.jobs], device=input_ids.device)


class _Draw(LogitsProcessor):
    """float[B, V] of the next token: a row that has a form has the tokens left that keep to it, one that is drawn has one
    left, whatever else is in the batch."""

    def __init__(self, jobs):
        self.jobs = jobs

    def __call__(self, input_ids, scores):
        for row, job in enumerate(self.jobs):
            if job.done:
                continue
            if job.again:
                scores[row] = torch.full_like(scores[row], -torch.inf)
                scores[row, job.again[0]] = 0
                continue
            try:
                if job.sampling.top_logprobs is not None:
                    job.logprobs = scores[row].float().log_softmax(-1).cpu()
                if job.form is not None:
                    scores[row, ~job.form.allowed().to(scores.device)] = -torch.inf
                if job.draws is not None:
                    token = job.draws.next(scores[row])
                    scores[row] = torch.full_like(scores[row], -torch.inf)
                    scores[row, token] = 0
            except Exception as error:  # that of this row: the others are decoded on
                job.end(error)
        return scores


class TransformersDecoder:
    """Answers by `generate`, at most `max_batch` at a time, on a thread of its own.

    Args:
        model: of `load_model`.
        max_batch: answers at a time.
        forms: of answers that keep to a schema.
    """

    def __init__(self, model, max_batch: int, forms: Forms | None = None):
        self.model, self.max_batch, self.forms = model, max_batch, forms
        self.end_ids = end_ids(model)
        self._jobs: list[_Job] = []
        self._arriving: queue.Queue[_Job | None] = queue.Queue()
        self._waiting: deque[_Job] = deque()
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return sum(not job.done for job in self._jobs)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    async def decode(self, prompt, sampling: Sampling):
        """See `Decoder`."""
        form = sampling.schema and await asyncio.to_thread(self.forms.make, sampling.schema)
        job = _Job(prompt, sampling, form)
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
        while True:
            while not self._arriving.empty() or not self._waiting:
                job = self._arriving.get()
                if job is None:
                    for request in self._waiting:
                        request.end(RuntimeError("The server is closing."))
                    return
                self._waiting.append(job)
            self._jobs = [job for job in self._next_jobs() if not job.done]
            try:
                if self._jobs:
                    self._run(self._jobs)
            except Exception as error:
                # Which of the requests it was is not known: by itself, one fails alone.
                for job in self._jobs:
                    if job.alone or len(self._jobs) == 1:
                        job.end(error)
                    job.alone = True
            self._waiting += [job for job in self._jobs if not job.done]
            self._jobs = []

    def _next_jobs(self):
        """The jobs of the next batch, taken from those that wait."""
        jobs = [self._waiting.popleft()]
        while self._waiting and len(jobs) < self.max_batch and not (jobs[0].alone or self._waiting[0].alone):
            jobs.append(self._waiting.popleft())
        return jobs

    @torch.inference_mode()
    def _run(self, jobs):
        """One `generate` of all of them, from what they have so far, padded on the left."""
        inputs = self._inputs(jobs)
        rows = _Rows(jobs, self.end_ids, lambda: bool(self._waiting) or not self._arriving.empty())
        self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max(job.sampling.max_new_tokens - len(job.ids) + len(job.again) for job in jobs),
            streamer=rows,
            stopping_criteria=StoppingCriteriaList([rows]),
            logits_processor=LogitsProcessorList([_Draw(jobs)]),
        )

    def _inputs(self, jobs) -> dict:
        """Of `generate`: the prompts and what is read of their answers."""
        device, embed, by_ids = self.model.device, self.model.get_input_embeddings(), isinstance(jobs[0].prompt, Prompt)
        sequences = []
        for job in jobs:
            ids = torch.tensor(
                job.read(self.model.image_token_id) if by_ids else job.ids, dtype=torch.long, device=device
            )
            prompt = (job.prompt.ids if by_ids else job.prompt).to(device)
            sequences.append(torch.cat((prompt, ids if by_ids else embed(ids))))
        M = max(map(len, sequences))
        pads = [M - len(one) for one in sequences]
        mask = torch.tensor([[0] * pad + [1] * (M - pad) for pad in pads], device=device)
        if not by_ids:
            embeds = torch.stack([F.pad(one, (0, 0, pad, 0)) for one, pad in zip(sequences, pads)])
            return {"inputs_embeds": embeds, "attention_mask": mask}
        filler = self.model.generation_config.pad_token_id or 0
        ids = torch.stack([F.pad(one, (pad, 0), value=filler) for one, pad in zip(sequences, pads)])
        inputs = {"input_ids": ids, "attention_mask": mask}
        kept = [job.prompt.compressed for job in jobs if job.prompt.compressed is not None]
        if kept:
            rows = [tokens.to(device) for one in kept for tokens in one.pooler_output]
            slots = [maps for one in kept for maps in one.slots]
            whole = UHRBatCompressionOutput(pooler_output=rows, slots=slots, regions=[])
            inputs |= self.model.visual_inputs(**inputs, compressed=whole)
        return inputs
