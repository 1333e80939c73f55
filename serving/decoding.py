"""How an answer is decoded, whatever decodes it, and the decoder as a plain model folder."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ..common.files import edited_alone, user_folder, whole_folder
from ..modeling_outputs_uhr_bat import UHRBatCompressionOutput

# A temperature below is 0: what is left of the other tokens no float32 shows, and what is divided by it overflows.
MIN_TEMPERATURE = 1e-5


class Sampling(NamedTuple):
    """Which tokens an answer may have.

    Attributes:
        max_new_tokens: at most so many.
        temperature: below `MIN_TEMPERATURE`, the best token every time.
        top_p: of the probability that is drawn from.
        seed: of the draws; None draws anew every time.
        top_logprobs: how many of the likeliest tokens are told with every token (`Scored`); None for none of it.
        schema: JSON of the schema that the answer keeps to; None for any answer.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    schema: str | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


class Scored(int):
    """A token with its log probability, and {token: log probability} of the likeliest in its place, as the model has them:
    without temperature, `top_p` or a schema."""

    logprob: float
    top: dict[int, float]

    @classmethod
    def of(cls, token: int, logprob: float, top: dict[int, float]) -> "Scored":
        scored = cls(token)
        scored.logprob, scored.top = logprob, top
        return scored

    @classmethod
    def among(cls, token: int, logprobs: torch.Tensor, number: int) -> "Scored":
        """Of the log probabilities float[V] of all tokens, with the likeliest `number` of them."""
        values, ids = logprobs.topk(min(number, len(logprobs)))
        return cls.of(token, logprobs[token].item(), dict(zip(ids.tolist(), values.tolist())))


class Draws:
    """Chooses the tokens of one answer, which do not depend on what else is decoded with it."""

    def __init__(self, sampling: Sampling):
        self.generator = None
        if not sampling.is_greedy:
            self.generator = torch.Generator()
            self.generator.seed() if sampling.seed is None else self.generator.manual_seed(sampling.seed)
            self.warp = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
            if sampling.top_p < 1:
                self.warp.append(TopPLogitsWarper(sampling.top_p))

    def next(self, scores: torch.Tensor) -> int:
        """The token that the logits float[V] give."""
        if self.generator is None:
            return int(scores.argmax())
        probabilities = self.warp(None, scores[None]).softmax(-1).cpu()
        return int(torch.multinomial(probabilities[0], 1, generator=self.generator))


@dataclass(frozen=True)
class Prompt:
    """What the model of another family reads: which tokens are an image's, and where these lie, is not in embeddings.

    Attributes:
        ids: long[M], with a placeholder for every visual token.
        compressed: what was kept for them, with the tokens themselves; None for text alone.
        num_tokens: that the decoder reads: M, and those of words between an image's tiles (`marks`).
    """

    ids: torch.Tensor
    compressed: UHRBatCompressionOutput | None
    num_tokens: int


class Decoder(Protocol):
    """What both backends are. `end_ids` are the tokens that end an answer; `running` answers are on their
    way, unless it has stopped (`is_alive`)."""

    end_ids: frozenset[int]
    running: int
    is_alive: bool

    def decode(self, prompt: torch.Tensor | Prompt, sampling: Sampling) -> AsyncIterator[list[int]]:
        """Tokens of the answer to float[M, D], or to a `Prompt`, as they come, the one that ends it included; `Scored` where
        they are asked for so. Closing the iterator ends the work."""

    async def close(self):
        """Ends what is on its way."""


class FirstToken(LogitsProcessor):
    """Of the one answer of a `generate`: its first token has the logits float[V], the others those of the decoder."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits

    def __call__(self, input_ids, scores):
        logits, self.logits = self.logits, None
        return scores if logits is None else logits[None].to(scores)


async def decode_from(
    decoder: Decoder, prompt: torch.Tensor, logits: torch.Tensor, embed: Callable, sampling: Sampling
) -> AsyncIterator[list[int]]:
    """As `decode` of the decoder, with a first token that it has no part in: the decoder reads it behind the prompt, and goes on.

    Args:
        prompt: float[M, D].
        logits: float[V] of the first token.
        embed: the model's embeddings, long[n] -> float[n, D].
    """

    @torch.inference_mode()
    def begin():
        draws = Draws(sampling)
        token, seed = draws.next(logits), sampling.seed
        if draws.generator is not None and seed is not None:
            # The same seed again would draw the second token by the number that drew the first.
            seed = int(torch.randint(2**31, (), generator=draws.generator))
        read = embed(torch.tensor([token], device=embed.weight.device)).to(prompt)
        if sampling.top_logprobs is not None:
            token = Scored.among(token, logits.float().log_softmax(-1), sampling.top_logprobs)
        return (
            token,
            torch.cat((prompt, read)),
            sampling._replace(max_new_tokens=sampling.max_new_tokens - 1, seed=seed),
        )

    token, longer, rest = await asyncio.to_thread(begin)
    yield [token]
    if token in decoder.end_ids or not rest.max_new_tokens:
        return
    async with aclosing(decoder.decode(longer, rest)) as parts:
        async for ids in parts:
            yield ids


def end_ids(model) -> frozenset[int]:
    """Tokens that end an answer, of the generation's configuration."""
    ids = model.generation_config.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


def decoder_folder(model, tokenizer, model_key: str, cache_home: Path | None = None) -> Path:
    """The folder of a model's decoder alone, in its own class (as Qwen2ForCausalLM), with its tokenizer, written where it is
    missing.

    Args:
        model: of `load_model`, with its weights as they are trained, none of them quantized.
        tokenizer: of the same model.
        model_key: names the model's content, and the folder.
        cache_home: where such folders lie; None: `decoders` in `user_folder`.

    Raises:
        ValueError: the weights are quantized, or an adapter is live in them.
    """
    whole = getattr(model, "host", model)
    if getattr(whole, "hf_quantizer", None) is not None:
        raise ValueError(
            "The decoder of quantized weights cannot be written out. Serve them with --backend transformers."
        )
    if hasattr(whole, "peft_config"):
        raise ValueError(
            "The decoder of an adapter cannot be written out. Merge it into its model (uhr-bat export --merge-adapter), or "
            "serve it with --backend transformers."
        )
    if cache_home is None:
        cache_home = user_folder() / "decoders"
    folder = cache_home / f"{model_key[:32]}-{str(model.dtype).removeprefix('torch.')}"
    with edited_alone(folder):  # servers that start together wait for the first of them
        if not (folder / "tokenizer.json").is_file():  # a folder that is there is whole
            _write(whole, model, tokenizer, folder)
    return folder


def _write(whole, model, tokenizer, folder):
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):  # no memory: the weights are those that the model has
        decoder = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    setattr(decoder, decoder.base_model_prefix, whole.get_decoder())
    decoder.set_output_embeddings(whole.get_output_embeddings())
    decoder.config.dtype = model.dtype
    decoder.config.tie_word_embeddings = whole.config.tie_word_embeddings
    settings = model.generation_config
    decoder.generation_config = GenerationConfig(eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id)
    with whole_folder(folder) as built:
        decoder.save_pretrained(built)
        tokenizer.save_pretrained(built)
