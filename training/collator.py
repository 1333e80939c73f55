"""Samples -> inputs of the model: images are read and cut here, in the workers of a data loader, which hold no model.

Letters: B prompts, I images, S scales, N patches of all scales, M tokens of the longest prompt.
"""

import json
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers.utils import logging

from ..budgets_uhr_bat import count_tokens
from ..common.budgets import scale_budgets
from ..common.chats import ChatError, ChatWriter, as_parts
from ..image_processing_uhr_bat import READING
from ..image_registration_uhr_bat import check_dates, open_dates
from ..regions.cache import read_labels

logger = logging.get_logger(__name__)

IGNORED = -100  # a label that no loss counts
UNSEEDED = -1  # draws are PyTorch's
MAX_WORKERS = 1024  # that count bad images


class UHRBatDataCollator:
    """Batches of samples as the model's `forward` takes them, for Trainer, TRL's SFTTrainer or a plain loop.

    A sample is a row of `load_samples`, or any dictionary with
    - `messages`, as chat templates take them, with one part of the type "image" per image. The last turn is the answer that
      is learnt; turns before it are read as text, as in a chat that goes on, and say nothing to the loss;
    - `images`: of any kind that the processor takes, or {"path": ..., "bytes": ...}; none for text alone;
    - `regions`: label map files of the images (`uhr-bat regions`), for all samples with images or for none;
    - `answers`: "all" to learn every turn of the assistant's, over the visual tokens that the question of the first of them
      needs; else the last one;
    - `options`: how its images are read, as JSON or a dictionary: `bands`, `window`, `value_range` of the image processor,
      `budgets` in place of the collator's; `dates`, whether its two images show one place, the earlier one first;
    - `name`: for messages.

    Args:
        processor: [`UHRBatProcessor`]. An answer goes on to a token at which the generation config of its folder ends.
        budgets: int[S] or int, visual tokens that a prompt may spend; the processor's if None.
        budget_range: the budgets of a batch are multiplied by a factor between these two, drawn log-uniformly, by PyTorch's
            generator, or by what `seed_draws` says.
        padding_side: "left" or "right"; the tokenizer's if None.
        image_options: more arguments of the image processor.
        bad_images: "error", or "skip": an image that cannot be read is counted in `num_skipped` and named in the log, and
            another sample of the batch, or of an earlier one, takes the place of its sample.
    """

    def __init__(
        self,
        processor,
        budgets: list[int] | int | None = None,
        budget_range: tuple[float, float] = (1.0, 1.0),
        padding_side: str | None = None,
        image_options: dict | None = None,
        bad_images: str = "error",
    ):
        if not 0 < budget_range[0] <= budget_range[1]:
            raise ValueError(f"`budget_range` is two positive factors, the smaller one first. Got {budget_range}.")
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has neither a padding token nor an end token: set `tokenizer.pad_token`.")
        if padding_side not in (None, "left", "right"):
            raise ValueError(f"`padding_side` is 'left' or 'right'. Got {padding_side!r}.")
        if bad_images not in ("error", "skip"):
            raise ValueError(f"`bad_images` is 'error' or 'skip'. Got {bad_images!r}.")
        if (image_options or {}).get("max_tiles") or processor.image_processor.max_tiles:
            raise ValueError(
                "Batches hold whole images: `max_tiles` looks closer at one question at a time, leave it out."
            )
        self.processor, self.writer = processor, ChatWriter(processor)
        self.budgets = processor.default_budgets if budgets is None else budgets
        self.budget_range = budget_range
        self.padding_side = padding_side or processor.tokenizer.padding_side
        self.image_options = image_options or {}
        self.bad_images = bad_images
        # Of each worker a number of its own: two that add to one number may lose one.
        self._skipped = torch.zeros(MAX_WORKERS, dtype=torch.long).share_memory_()
        self._seed_and_epoch = torch.tensor([UNSEEDED, 0]).share_memory_()  # workers that live on see another epoch
        self._last_good = self._last_cut = None

    @property
    def num_skipped(self) -> int:
        """Samples whose place was taken by others, because an image could not be read; in all workers together."""
        return int(self._skipped.sum())

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """The inputs of a batch.

        Returns:
            input_ids, attention_mask, labels: long[B, M]; labels are -100 but for answers and the token that ends them;
            answer_mask: bool[B, M], True where there is a label: the selection never sees an answer, whatever becomes of the
            labels;
            pixel_values, pixel_attention_mask, token_counts, images_per_prompt as the processor returns them, where the
            batch has images;
            regions: long[I, N] where the samples have label maps;
            registration: where the batch has `dates`, what `register` found for each sample, False for the others.

        Raises:
            OSError: an image that cannot be read; names the file and the sample.
            ValueError: counts of images and placeholders that differ, a sample over the context window, or an answer without
            text or end.
        """
        samples, images = self.read_samples(samples, self.draw_factor(samples))
        ids, answered = zip(*map(self.write, samples, images))
        labels = [row.where(mask, IGNORED) for row, mask in zip(ids, answered)]
        return {
            **self.pad(ids, self.padding_side),
            "labels": pad_sequence(labels, True, IGNORED, self.padding_side),
            "answer_mask": pad_sequence(list(answered), True, False, self.padding_side),
            **join_images(images),
        }

    def ask(self, samples: list[dict]) -> dict:
        """What `generate` takes to answer the last turn of each sample, at the undrawn budgets, and what it should say.

        Returns:
            inputs: padded on the left;
            answers: str[B], the last turns, which are not among the inputs.
        """
        samples, images = self.read_samples(samples)
        ids = [self.write(*pair, ask=True)[0] for pair in zip(samples, images)]
        return {"inputs": {**self.pad(ids, "left"), **join_images(images)}, "answers": list(map(answer_of, samples))}

    def seed_draws(self, seed: int, epoch: int):
        """From now on the factor of a batch follows from the seed, the epoch and its samples, in whichever worker and process:
        a run that goes on draws what it would have drawn."""
        self._seed_and_epoch.copy_(torch.tensor([seed, epoch]))

    def draw_factor(self, samples) -> float:
        """What the budgets of a batch are multiplied by."""
        (low, high), (seed, epoch) = self.budget_range, self._seed_and_epoch.tolist()
        if seed == UNSEEDED:
            drawn = float(torch.rand(()))
        else:
            rows = [(Path(str(sample.get("name"))).name, sample["messages"]) for sample in samples]
            digest = blake2b(repr((seed, epoch, rows)).encode("utf-8", "surrogatepass"), digest_size=6).digest()
            drawn = int.from_bytes(digest, "big") / 2**48
        return low * (high / low) ** drawn if low < high else low

    # ---- Images ----

    def read_samples(self, samples, factor=None):
        """Samples and what the processor makes of their images, the budgets times a factor; others in place of those that
        cannot be read."""
        read, bad = [], []
        for sample in samples:
            try:
                images = self.read_images(sample, factor)
            except (OSError, ValueError) as error:
                message = f"{sample.get('name', 'a sample')}: {error}"
                if self.bad_images == "error":
                    raise type(error)(message) from error
                bad.append(message)
            else:
                read.append((sample, {**images, **self.read_regions(sample, len(images.get("pixel_values", ())))}))
        if bad:
            worker = get_worker_info()
            self._skipped[(0 if worker is None else 1 + worker.id) % MAX_WORKERS] += len(bad)
            logger.warning("Skipped, as an image cannot be read:" + "".join(f"\n  {message}" for message in bad))
        if not read:
            if self._last_good is None:
                raise OSError(f"No image of a batch can be read, and none was before it. The first one: {bad[0]}")
            return self.read_samples([self._last_good] * len(samples), factor)
        self._last_good = read[0][0]
        return map(list, zip(*read, *[read[0]] * len(bad)))

    def read_images(self, sample, factor) -> dict[str, torch.Tensor]:
        """What the processor returns for the images of one sample; {} for text alone."""
        images, own = [as_image(image) for image in sample.get("images") or []], read_own(sample)
        if own.get("dates"):
            check_dates([len(images)], allowed=(2,))
        if not images:
            return {}
        budgets = own.pop("budgets", self.budgets)
        if factor is not None:  # at least a token for each image
            budgets = scale_budgets(budgets, factor, len(images))
        inputs = self.cut_once(images, own)
        scales = self.image_options.get("scales") or self.processor.image_processor.scales
        available = self.processor.count_shown(inputs["pixel_attention_mask"], scales)
        counts = count_tokens(budgets, scales, [len(images)], available)
        return {**inputs, "token_counts": torch.tensor(counts), "images_per_prompt": torch.tensor([len(images)])}

    def cut_once(self, images, own) -> dict[str, torch.Tensor]:
        """`cut`, unless the sample before showed the same images in the same way."""
        last = self._last_cut
        if last is None or last[1] != own or not same_images(last[0], images):
            self._last_cut = images, own, self.cut(images, **own)
        return self._last_cut[2]

    def cut(self, images, **own) -> dict[str, torch.Tensor]:
        """What the image processor returns, with options of a sample's own."""
        dates = own.pop("dates", False)
        options = self.image_options | own
        if not dates:
            return {**self.processor.image_processor(images, return_tensors="pt", **options)}
        reading = {name: options.pop(name) for name in READING if name in options}
        limit = {name: value for name, value in reading.items() if name == "max_image_pixels"}
        images, dates = open_dates(partial(self.processor.image_processor.open_image, **reading), *reversed(images))
        return {**self.processor.image_processor(images, return_tensors="pt", **options, **limit), "registration": dates}

    def read_regions(self, sample, num_images) -> dict[str, torch.Tensor]:
        """`regions` long[I, N] of a sample with label maps, else {}."""
        paths = sample.get("regions") or []
        if paths and len(paths) != num_images:
            raise ValueError(
                f"{sample.get('name', 'a sample')}: {len(paths)} label maps came with {num_images} images."
            )
        scales, patch_size = self.processor.image_processor.scales, self.processor.image_processor.patch_size
        wanted, rows = {scale: [scale // patch_size] * 2 for scale in scales}, []
        for path in paths:
            labels = read_labels(path)
            found = {scale: list(grid.shape) for scale, grid in labels.items()}
            if found != wanted:
                raise ValueError(f"{path}: label maps of {found} tokens by scale, but the model has {wanted}.")
            rows.append(torch.cat([labels[scale].flatten().long() for scale in scales]))
        return {"regions": torch.stack(rows)} if rows else {}

    # ---- Text ----

    def write(self, sample, images, ask=False) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, whether they are learnt) of a sample, long and bool [M], placeholders repeated as its images need; with `ask`
        of its prompt alone."""
        name, tokenizer = sample.get("name", "a sample"), self.processor.tokenizer
        try:
            if ask:
                ids = self.writer.prompt(sample["messages"][:-1])
                mask = [False] * len(ids)
            else:
                ids, mask = self.writer.write(sample["messages"], sample.get("answers") == "all")
        except ChatError as error:
            raise ValueError(f"{name}: {error}.") from error
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        sizes = images["token_counts"].sum(1) if images else torch.zeros(0, dtype=torch.long)
        placeholder = ids == self.processor.image_token_id
        if placeholder.sum() != len(sizes):
            raise ValueError(f"{name}: {placeholder.sum()} placeholders, but {len(sizes)} images.")
        repeats = torch.ones_like(ids)
        repeats[placeholder] = sizes
        if repeats.sum() > tokenizer.model_max_length:
            raise ValueError(
                f"{name}: {repeats.sum()} tokens with its images, but the context window holds "
                f"{tokenizer.model_max_length}. Lower the budgets: nothing is cut silently."
            )
        return ids.repeat_interleave(repeats), (mask & ~placeholder).repeat_interleave(repeats)

    def pad(self, rows, side) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask long[B, M] of ids long[M] of several lengths."""
        ids = pad_sequence(list(rows), True, self.processor.tokenizer.pad_token_id, side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
        return {"input_ids": ids, "attention_mask": mask}


def answer_of(sample) -> str:
    """What a sample's last turn says."""
    return "".join(part["text"] for part in as_parts(sample["messages"][-1]))


class WithAnswerMask:
    """A collator of TRL for preferences (`DataCollatorForVisionPreference`), whose batches get `answer_mask`: neither the chosen
    nor the rejected answer is seen by the selection, and both are scored over the same visual tokens."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, samples: list[dict]) -> dict:
        """Its batch with `answer_mask` bool[B, M], the `completion_mask`."""
        batch = self.collator(samples)
        return {**batch, "answer_mask": batch["completion_mask"].bool()}


def as_image(image):
    """An image as the processor takes it: a file's path, or its bytes."""
    if not isinstance(image, dict):
        return image
    return image["path"] if image.get("bytes") is None else image["bytes"]


def read_own(sample) -> dict:
    """The `options` of a sample."""
    options = sample.get("options") or {}
    return json.loads(options) if isinstance(options, str) else dict(options)


def same_images(first: list, second: list) -> bool:
    """Whether two lists hold the same files, bytes or objects."""
    return len(first) == len(second) and all(
        value is other or type(value) is type(other) in (str, bytes) and value == other
        for value, other in zip(first, second)
    )


def join_images(rows: list[dict]) -> dict[str, torch.Tensor]:
    """The image inputs of a batch from those of its samples; {} where no sample has an image."""
    with_images = [row for row in rows if row]
    if not with_images:
        return {}
    if any(("regions" in row) != ("regions" in with_images[0]) for row in with_images):
        raise ValueError("Some samples of a batch have label maps, others have none: all with images need one.")
    inputs = {name: torch.cat([row[name] for row in with_images]) for name in with_images[0] if name != "registration"}
    if any("registration" in row for row in rows):
        inputs["registration"] = [found for row in rows for found in row.get("registration", [False])]
    numbers = [int(row["images_per_prompt"]) if row else 0 for row in rows]
    return {**inputs, "images_per_prompt": torch.from_numpy(np.array(numbers))}
