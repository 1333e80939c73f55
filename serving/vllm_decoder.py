"""The decoder by vLLM: requests that come at any time share its steps (continuous batching), its memory is paged.

vLLM is handed embeddings and knows no images: what is compressed how is decided before it. It keeps the keys and values
of beginnings that prompts share by the content of these embeddings.
"""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from ..common.loading import is_host
from ..common.models import base_of, told, with_revision
from .decoding import Sampling, Scored, end_ids

# Of a GPU's memory; the rest is for the towers, and for the decoder's layers that the importance pass reads.
GPU_SHARE = 0.6
# GB for keys and values on a CPU, of which vLLM would take more.
CPU_CACHE_GB = 1


def check_alone(folder):
    """Raises `ValueError` for a model of another family whose decoder, handed embeddings alone, is another model."""
    folder = base_of(folder) or folder
    if not is_host(folder):
        return
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    text, whole = config.get_text_config(), AutoModelForImageTextToText._model_mapping.get(type(config), None)
    taken = inspect.signature(whole.forward).parameters if whole is not None else ()
    layers = getattr(text, "layer_types", None) or ()
    reasons = {
        "its places are in two dimensions (M-RoPE)": "mrope_section" in (getattr(text, "rope_parameters", None) or {}),
        "its images are read in both directions": "token_type_ids" in taken
        or getattr(text, "use_bidirectional_attention", None) == "vision",
        "its layers read which token it is, too": bool(getattr(text, "hidden_size_per_layer_input", 0)),
        "it has layers of linear attention": "linear_attention" in layers,
        "there is no class of its decoder alone": AutoModelForCausalLM._model_mapping.get(type(text), None) is None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"{with_revision(told(folder))}: the decoder of a model of the type {config.model_type!r} cannot be handed to vLLM as embeddings: "
            f"{', and '.join(found)}. Serve it with --backend transformers."
        )


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
