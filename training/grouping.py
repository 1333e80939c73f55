"""Questions about the same image, one after another: it is then read, cut and encoded once for all of them.

Letters: I images of a batch.
"""

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch
from torch.utils.data import Sampler

from .parts import is_visual

ENCODED_INPUTS = ("pixel_values", "pixel_attention_mask", "regions")


def image_key(images: Sequence) -> tuple:
    """What tells the images of a sample from those of another: paths, or the bytes of files in the table."""
    return tuple((image["path"], image["bytes"]) if isinstance(image, dict) else image for image in images or [])


def hold_out(images: Sequence, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(indices of the samples that are learnt from, those that are held out): none of one shows an image of the other.

    A file is one image by whatever path it is named. Samples without images are held out one by one.

    Args:
        images: of every sample, as `load_samples` gives them.
        share: of the samples that is held out, about: groups of samples that share images stay whole.
        seed: of what is held out.

    Raises:
        ValueError: all samples show the same images.
    """
    parents = {}

    def root(key):
        while parents.setdefault(key, key) != key:
            parents[key] = key = parents[parents[key]]
        return key

    keys = [[_file_key(key) for key in image_key(found)] or [idx] for idx, found in enumerate(images)]
    for first, *others in keys:
        for other in others:
            parents[root(other)] = root(first)
    groups = {}
    for idx, (first, *_) in enumerate(keys):
        groups.setdefault(root(first), []).append(idx)
    if len(groups) < 2:
        raise ValueError(
            f"`eval_share` holds images out, and all {len(keys)} samples show the same ones, or are linked by samples that show "
            "several. Name `eval_data`."
        )
    groups, held = list(groups.values()), []
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = share * len(keys)
    for group in [groups[idx] for idx in order[:-1]]:  # one stays to learn from
        # A group that goes further beyond the share than it stands before it is passed over.
        if not held or abs(len(held) + len(group) - wanted) < abs(len(held) - wanted):
            held += group
    out = set(held)
    return [idx for idx in range(len(keys)) if idx not in out], sorted(held)


def _file_key(key):
    """What tells an image from others: the file itself where it is one."""
    if isinstance(key, tuple):
        path, content = key
        if content is not None:
            return blake2b(content, digest_size=16).digest()  # a table's files need not all be in memory
        return path if "://" in path else os.path.realpath(path)
    return key


class GroupedByImage(Sampler[int]):
    """Samples in random order, those about the same images one after another.

    The order follows from `seed` and the epoch alone, so that processes agree and a run goes on where it was.

    Args:
        images: of every sample, as `load_samples` gives them.
        seed: of the order.
    """

    def __init__(self, images: Sequence, seed: int):
        groups = {}
        for idx, of_sample in enumerate(images):
            # A sample of text alone is a group of its own.
            groups.setdefault(image_key(of_sample) or idx, []).append(idx)
        self.groups, self.seed, self.epoch = list(groups.values()), seed, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for group_idx in torch.randperm(len(self.groups), generator=generator).tolist():
            group = self.groups[group_idx]
            yield from (group[idx] for idx in torch.randperm(len(group), generator=generator).tolist())


class EncodedImages:
    """The images of a batch, encoded once each.

    Where nothing before the decoder is trained they are the same in the next batch, too: those of the last one are kept.
    """

    def __init__(self, model):
        self.model = model
        trained = any(weight.requires_grad and is_visual(name) for name, weight in model.named_parameters())
        self.grad, self.known = trained, []

    def __call__(self, inputs: dict) -> dict:
        """The inputs of a batch with `image_features`, some of them the same object, in place of `pixel_values` and what
        belongs to these."""
        images = {name: inputs[name] for name in ENCODED_INPUTS if name in inputs}
        known, used = list(self.known), []
        for row in zip(*images.values()):
            found = next((encoded for encoded in known if all(map(torch.equal, encoded[0], row))), None)
            if found is None:
                with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
                    (features,) = self.model.encode_image(**{name: value[None] for name, value in zip(images, row)})
                found = row, features
                known.append(found)
            used.append(found)
        if not self.grad:
            self.known = [encoded for encoded in known if any(encoded is other for other in used)]
        rest = {name: value for name, value in inputs.items() if name not in images}
        return {**rest, "image_features": [features for _, features in used]}
