"""The decoder by vLLM: requests that come at any time share its steps (continuous batching), its memory is paged.

vLLM is handed embeddings and knows no images: what is compressed how is decided before it. It keeps the keys and values
of beginnings that prompts share by the content of these embeddings.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from .decoding import Sampling, Scored, end_ids

# Of a GPU's memory; the rest is for the towers, and for the decoder's layers that the importance pass reads.
GPU_SHARE = 0.6
# GB for keys and values on a CPU, of which vLLM would take more.
CPU_CACHE_GB = 1


class VLLMDecoder:
    """Answers by vLLM's engine, at most `max_batch` at a time, in processes of its own.

    Args:
        model: whose decoder it is.
        folder: of `decoder_folder`.
        max_batch: answers at a time.
        options: other arguments of vLLM's `AsyncEngineArgs`, as {"tensor_parallel_size": 2}.

    Raises:
        ImportError: vLLM is missing; says where its environment is explained.
    """

    def __init__(self, model, folder: Path, max_batch: int, options: Mapping[str, Any] | None = None):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_CACHE_GB))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ImportError(f"{error}. vLLM takes an environment of its own: serving/README.md says how.") from error

        self.end_ids = end_ids(model)
        self.running = 0
        settings = {
            "model": str(folder),
            # Nothing is tokenized there, but which tokens keep to a schema follows from their texts.
            "skip_tokenizer_init": not (folder / "tokenizer.json").is_file(),
            "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
            "enable_prompt_embeds": True,
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.config.text_config.max_position_embeddings,
            "max_num_seqs": max_batch,
            "enforce_eager": not torch.cuda.is_available(),
            "gpu_memory_utilization": GPU_SHARE,
            "generation_config": "vllm",  # a request says all
            "disable_log_stats": True,
        }
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings | dict(options or {})))

    @property
    def is_alive(self) -> bool:
        return not self._engine.errored

    async def decode(self, embeds: torch.Tensor, sampling: Sampling):
        """See `Decoder`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        params = SamplingParams(
            temperature=0.0 if sampling.is_greedy else sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=sorted(self.end_ids),
            # The folder's ends alone count, not the tokenizer's; but what keeps to a schema ends by the latter.
            ignore_eos=sampling.schema is None,
            detokenize=False,
            logprobs=sampling.top_logprobs,
            structured_outputs=sampling.schema and StructuredOutputsParams(json=sampling.schema),
            output_kind=RequestOutputKind.DELTA,
        )
        self.running += 1
        outputs = self._engine.generate({"prompt_embeds": embeds}, params, uuid4().hex)
        try:
            async for output in outputs:
                tokens = scored(output.outputs[0], sampling.top_logprobs)
                if sampling.schema and output.outputs[0].finish_reason == "stop" and tokens:
                    tokens[-1] = min(self.end_ids)  # the tokenizer's end, which the folder may not know as one
                yield tokens
        finally:
            self.running -= 1
            await outputs.aclose()  # ends a request that nobody wants any more

    async def close(self):
        self._engine.shutdown()


def scored(output, top_logprobs: int | None) -> list[int]:
    """Tokens of a part of vLLM's answer, with their log probabilities where they are asked for: vLLM tells that of a token
    beside those of the likeliest, by rank."""
    if top_logprobs is None:
        return list(output.token_ids)
    told = []
    for token, entries in zip(output.token_ids, output.logprobs):
        ranked = sorted(entries.items(), key=lambda entry: entry[1].rank)[:top_logprobs]
        told.append(Scored.of(token, entries[token].logprob, {one: entry.logprob for one, entry in ranked}))
    return told
