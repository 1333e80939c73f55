"""Asking: the way from questions to answers, whose steps can be called apart, to time, to draw or to share them.

    images, cut --encode--> features          once for an image, whatever is asked
    questions, features --write_prompts--> inputs      a placeholder per visual token
    inputs --compress--> what was kept        what a question needs of its images
    inputs, kept --generate--> ids --answer_texts--> text

`answers` takes them from the features on, `ask` all of them. They call nothing of a model but what this repository's models have in
common: `encode_image`, `compress`, `visual_inputs`, `generate`, and the call of its processor.

Letters: B prompts of a batch, I images of all prompts, S scales, M tokens of a prompt.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from ..image_processing_uhr_bat import part_reading
from ..image_raster_files_uhr_bat import reason
from ..image_registration_uhr_bat import open_dates
from .objects import Objects, objects_of

PROMPT = ("input_ids", "attention_mask")

# ---- Prompts ---------------------------------------------------------------------------------------------------------


def prompt_text(processor, question, num_images=1) -> str:
    """The text of a question about some images, with one placeholder for each: where the question has them, if it has
    as many as there are images, else before it."""
    if question.count(processor.image_token) != num_images:
        return user_prompt(processor, question.replace(processor.image_token, "").strip(), num_images)
    # As a part: some templates of other families leave out a text by itself.
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    return _rendered(processor, messages)


def user_prompt(processor, text, num_images=1) -> str:
    """The text of a question about some images that stand before it; whatever control tokens it spells are text."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return _rendered(processor, messages, sanitize_control_tokens=True)


def check_letters(text: str):
    """Raises `ValueError` for a text that no tokenizer takes and no file keeps: one with half a letter."""
    if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
        raise ValueError(
            f"Letter {half.start() + 1} of the text, {half[0]!a}, is half of one: write the text in UTF-8."
        )


def _rendered(processor, messages, **options):
    """By the chat template. Raises `ValueError` for one that refuses the messages."""
    check_letters(messages[0]["content"][-1]["text"])
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    except ValueError:
        raise
    except Exception as error:  # templates raise what they like
        raise ValueError(f"The chat template of this model refuses these messages ({reason(error)}).") from error


def write_prompt(processor, question):
    """input_ids and attention_mask, long[1, M], of a question about one image, with one placeholder for it."""
    return _tokenize(processor, [prompt_text(processor, question)])


def _tokenize(processor, texts):
    special = processor.adds_special_tokens(texts[0])
    return processor.tokenizer(texts, add_special_tokens=special, padding=True, return_tensors="pt")


def expand_placeholder(input_ids: torch.Tensor, image_token_id: int, num_tokens: int) -> torch.Tensor:
    """long[M + num_tokens - 1]: the ids long[M] of a prompt with its placeholder once per visual token.

    [7, 8, image, 9], 3 tokens -> [7, 8, image, image, image, 9]
    """
    return input_ids.repeat_interleave(torch.where(input_ids == image_token_id, num_tokens, 1))


# ---- The steps -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(model, image_inputs) -> list:
    """What `encode_image` returns of images that the image processor cut."""
    return model.encode_image(**image_inputs.to(model.device))


def write_prompts(model, processor, questions, features, budgets=None, counts=None, max_tiles=None, dates=None):
    """Inputs of questions about encoded images, on the model's device: `input_ids` and `attention_mask` long[B, M], padded
    on the left, with a placeholder per visual token, and where there are images what `compress` takes beside them.

    Args:
        questions: texts, without or with placeholders for their images.
        features: for every question the list of what `encode` returned for its images; empty for text alone.
        budgets: int[S], one number or a limit, see [`UHRBatProcessor`]; None for those of the model.
        counts: int[I][S], exact visual tokens of every image instead of budgets: of any order, which budgets are not.
        max_tiles: that the pyramids of a prompt share; None for what each has, or of `dates` for those of the processor.
        dates: of questions about two dates of one place, what `open_dates` found for each; None for images that have nothing to
            do with each other.
    """
    texts = [prompt_text(processor, question, len(images)) for question, images in zip(questions, features)]
    images = [image for of_question in features for image in of_question]
    if dates is not None:
        max_tiles = max_tiles or processor.image_processor.max_tiles
    if counts is None:
        options = {"image_features": images, "budgets": budgets, "max_tiles": max_tiles} if images else {}
        options |= {} if dates is None else {"dates": dates}
        return processor(text=texts, **options, padding=True, return_tensors="pt").to(model.device)
    numbers = map(sum, counts)
    expanded = [
        re.sub(re.escape(processor.image_token), lambda found: found[0] * next(numbers), text) for text in texts
    ]
    inputs = _tokenize(processor, expanded)
    inputs |= {"image_features": images, "token_counts": torch.tensor(counts)}
    inputs["images_per_prompt"] = torch.tensor([len(of_question) for of_question in features])
    inputs |= {} if dates is None else {"registration": dates}
    return inputs.to(model.device)


@torch.no_grad()
def compress(model, inputs, rules=None):
    """What `model.compress` keeps of the images of `inputs`; None for text alone. `rules`: see there."""
    return model.compress(**inputs, rules=rules) if inputs.keys() - set(PROMPT) else None


@torch.no_grad()
def generate(model, inputs, compressed=None, **generation) -> torch.Tensor:
    """long[B, new]: the ids of the answers.

    Args:
        inputs: `input_ids` and `attention_mask`, with a placeholder per visual token; or `inputs_embeds` that hold them.
        compressed: what `compress` returned for them; None for text alone, or where `inputs` hold what it takes too.
        generation: other arguments of `generate`; the best token every time unless they say otherwise.
    """
    inputs = _with_images(model, inputs, compressed)
    output = model.generate(**inputs, **{"do_sample": False} | generation)
    return output[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else output


@torch.no_grad()
def generate_logits(model, inputs, compressed=None, **generation) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What `generate` returns, the best token every time, and of each answer float[said, W], the logits of all words for its tokens,
    without the one that ends it."""
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "num_beams": 1}
    output = model.generate(**_with_images(model, inputs, compressed), **generation | options)
    ids, logits = output.sequences[:, -len(output.logits) :], torch.stack(output.logits, dim=1)
    end_ids = model.generation_config.eos_token_id
    said = torch.isin(ids, torch.as_tensor([] if end_ids is None else end_ids).to(ids)).cumsum(1) == 0
    return ids, [own[of_text].float() for own, of_text in zip(logits, said)]


def generate_surely(model, inputs, compressed=None, **generation) -> tuple[torch.Tensor, list[float]]:
    """What `generate` returns, the best token every time, and how sure the model is of each answer (`confidence_of`)."""
    ids, logits = generate_logits(model, inputs, compressed, **generation)
    return ids, [confidence_of(logprobs_of(own, said)) for own, said in zip(logits, ids)]


def logprobs_of(logits, ids, temperature: float = 1.0) -> list[float]:
    """Natural logarithms of the probabilities of the first tokens of ids long[new], by their logits float[said, W]."""
    return (logits / temperature).log_softmax(-1).gather(1, ids[: len(logits), None])[:, 0].tolist()


def confidence_of(logprobs: Sequence[float]) -> float:
    """How sure a model is of an answer, 0 to 1: the probability of its tokens, without the one that ends it; 0 of no tokens.

    Args:
        logprobs: natural logarithms of the tokens' probabilities.
    """
    return math.exp(sum(logprobs)) if logprobs else 0.0


def _with_images(model, inputs, compressed):
    if compressed is None:
        return inputs
    prompt = {name: inputs[name] for name in PROMPT}
    return prompt | model.visual_inputs(**prompt, compressed=compressed)


def answer_texts(processor, ids) -> list[str]:
    """The texts of answers long[B, new]."""
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def answer_objects(model, text, compressed, image_size, *, ids=None, part=None) -> Objects:
    """The objects that an answer about one image points to: the tokens that the model itself names, of one that has
    `point(ids, compressed) -> list of [`Pointed`] for each answer`; else what its text says.

    Args:
        text: of the answer.
        compressed: what `compress` returned for its prompt, perhaps without the tokens themselves.
        image_size: (height, width) of the whole image.
        ids: long[1, new], of the answer, where they are known.
        part: (left, top, right, bottom) of the image that the model was shown; None for all of it.
    """
    return objects_of_answers(model, [text], compressed, [image_size], ids=ids, part=part)[0]


def objects_of_answers(model, texts, compressed, image_sizes, *, ids=None, part=None) -> list[Objects]:
    """Those of a batch, each about the last image of its prompt, which of two dates is the later one: see `answer_objects`.

    Args:
        texts: of the answers, equally many to every prompt.
        image_sizes: (height, width) of that image of every prompt.
        ids: long[answers, new], where they are known.
    """
    known = texts if ids is None else ids
    pointed = model.point(known, compressed) if hasattr(model, "point") else [None] * len(texts)
    found, of_each = [], len(texts) // len(image_sizes)
    ends = [*accumulate(compressed.images_per_prompt)]
    for idx, (text, tokens) in enumerate(zip(texts, pointed)):
        row = idx // of_each
        # Of a dynamic pyramid nobody asks.
        grids = [] if compressed.regions is None else compressed.importance[ends[row] - 1].grids
        found.append(objects_of(model, text, image_sizes[row], grids, part=part, pointed=tokens))
    return found


def printable(text: str) -> str:
    """A text for a terminal or a page: what does not print is "\ufffd"."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


# ---- All of them -----------------------------------------------------------------------------------------------------


def generated(
    model, processor, questions, features, *, budgets=None, rules=None, counts=None, max_tiles=None, dates=None,
    max_new_tokens=16, **generation,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    """The ids long[B, new] of the answers to a batch of questions about encoded images, and what `compress` returned for them:
    see the steps."""
    inputs = write_prompts(model, processor, questions, features, budgets, counts, max_tiles, dates)
    compressed = compress(model, inputs, rules)
    return generate(model, inputs, compressed, max_new_tokens=max_new_tokens, **generation), compressed


def answers(model, processor, questions, features, **options) -> list[tuple[str, int]]:
    """Answers to a batch of questions about encoded images, and the visual tokens that each took; `options` as of `generated`."""
    ids, compressed = generated(model, processor, questions, features, **options)
    spent = [0] * len(questions) if compressed is None else compressed.tokens_per_prompt
    return list(zip(answer_texts(processor, ids), spent))


@dataclass(frozen=True)
class Answer:
    """An answer about one image, or two dates of it, and what it was read from.

    Attributes:
        text: of the answer.
        objects: that it points to, [`Objects`], a sequence of [`ImageObject`] in pixels of the image.
        compressed: what `compress` returned; of two dates the earlier one is its first image.
        image: that was asked about, with its `height` and `width`, opened.
        confidence: how sure the model is of the text, 0 to 1.
    """

    text: str
    objects: Objects
    compressed: Any
    image: Any
    confidence: float

    @property
    def num_tokens(self) -> int:
        """Visual tokens that it took."""
        return self.compressed.tokens_per_prompt[0]


def ask(
    processor, model, image, question, *, before=None, budgets=None, max_tiles=None, native=None, max_new_tokens=64, **reading,
) -> Answer:  # fmt: skip
    """An answer about one image of any kind, or about what changed since an earlier one.

    Args:
        processor, model: of `load_model`.
        image: path, URL, array or whatever else `read_image` takes.
        before: an earlier image of the same place, read likewise: what differs between the two is kept before what does not
            (`dates` of [`UHRBatProcessor`]).
        budgets, max_tiles, native: see [`UHRBatProcessor`].
        reading: how a raster is read, as `bands` and `window` of `open_image`.

    Raises:
        What reading the image raises, and `ValueError` for images that lie apart and for budgets that do not fit.
    """
    images, dates = open_dates(partial(processor.image_processor.open_image, **reading), image, before)
    _, cutting = part_reading(reading)
    image_inputs = processor.image_processor(images, return_tensors="pt", max_tiles=max_tiles, native=native, **cutting)
    options = {"dates": dates, "max_tiles": max_tiles, "budgets": budgets, "max_new_tokens": max_new_tokens}
    return ask_opened(processor, model, images[-1], image_inputs, question, **options)


def ask_opened(
    processor, model, image, image_inputs, question, *, dates=None, budgets=None, max_tiles=None, max_new_tokens=64
) -> Answer:
    """`ask` about an opened image that was cut.

    Args:
        image_inputs: what the image processor made of what `open_dates` opened, and `dates` what it found.
    """
    features = encode(model, image_inputs)
    inputs = write_prompts(model, processor, [question], [features], budgets, max_tiles=max_tiles, dates=dates)
    compressed = compress(model, inputs)
    ids, (confidence,) = generate_surely(model, inputs, compressed, max_new_tokens=max_new_tokens)
    (text,) = answer_texts(processor, ids)
    objects = answer_objects(model, text, compressed, (image.height, image.width), ids=ids)
    return Answer(text, objects, compressed, image, confidence)
