"""What stands before the decoder: an image is encoded once, a question chooses its visual tokens, the decoder is handed
embeddings.

Letters: I images, S scales, M tokens of a prompt with its images, D decoder width. Sizes are (height, width).
"""

import hashlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch.utils import _pytree as pytree

from ..common import asking
from ..common.models import base_of, hub_name
from ..common.outputs import files_beside
from ..geo import Georeference
from ..image_processing_uhr_bat import part_reading
from ..image_reading_uhr_bat import kind_of
from ..image_registration_uhr_bat import open_dates, place_of
from ..image_sources_uhr_bat import WHOLE
from ..modeling_outputs_uhr_bat import UHRBatCompressionOutput, UHRBatImageFeatures, UHRBatPyramidFeatures
from ..modeling_pointing_uhr_bat import is_pointed_at
from ..planning import planner_of
from .cache import Abandoned, ContentCache
from .decoding import Prompt
from .digests import DIGESTS

# Whether whoever asked for the work of this thread went meanwhile.
has_left: ContextVar[Callable[[], bool]] = ContextVar("has_left", default=lambda: False)
# Files of a model folder that decide what is computed.
MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", "*.py")


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's code, configuration and weights, or of the Hub's name and revision; of an adapter's, with
    those of its model."""
    digest = hashlib.sha256()
    folders = [folder] if (base := base_of(folder)) is None else [base, folder]
    digest.update("".join(f"{hub_name(named)}\n" for named in folders if hub_name(named)).encode())
    paths = [
        path
        for named in folders
        if not hub_name(named)
        for pattern in MODEL_FILES
        for path in Path(named).glob(pattern)
    ]
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class ImageFile:
    """An image that nothing was read of yet.

    Attributes:
        name: in errors.
        content: bytes of the file, or the path of a raster.
        digest: SHA-256 of the file.
        beside: path, time of the last change, bytes and number of every file that is read with that of a path.
    """

    name: str
    content: bytes | str
    digest: str
    beside: tuple = ()

    @property
    def key(self) -> tuple:
        """Names what is read of it: a raster is read where it lies whenever a question looks closer, and by what lies beside it."""
        return (self.digest, self.content, *self.beside) if isinstance(self.content, str) else (self.digest,)

    @classmethod
    def of_bytes(cls, content: bytes, name="image") -> "ImageFile":
        return cls(name, content, hashlib.sha256(content).hexdigest())

    @classmethod
    def of_file(cls, path: Path, digest: str | None = None) -> "ImageFile":
        """Of a path, which is hashed unless its `digest` is known."""
        beside = []
        for file in files_beside(Path(path)):
            try:
                facts = file.stat()
            except OSError:  # it has just gone
                continue
            beside.append((str(file), facts.st_mtime_ns, facts.st_size, facts.st_ino))
        return cls(Path(path).name, str(path), DIGESTS.of(path) if digest is None else digest, tuple(beside))


@dataclass(frozen=True)
class EncodedImage:
    """An image as the model knows it, whatever it is asked.

    Attributes:
        key: names the file's bytes, how it was read, and the model.
        features: in the CPU's memory, which holds many where a GPU's holds few.
        image_size: (height, width) in pixels of the image that the model saw.
        georeference: of that image.
        held_bytes: of the image itself, where tiles of it are read when a question looks at them.
    """

    key: tuple
    features: UHRBatImageFeatures | UHRBatPyramidFeatures
    image_size: tuple[int, int]
    georeference: Georeference
    held_bytes: int = 0


@dataclass(frozen=True)
class Picture:
    """An image that was opened and checked, and is looked at.

    Attributes:
        image: what `read_image` gave.
        num_bytes: of the file, if it is in memory.
    """

    image: object
    num_bytes: int

    @property
    def held_bytes(self) -> int:
        """Its pixels where it is decoded, else the bytes that it is read from."""
        if isinstance(self.image, Image.Image):
            return self.image.height * self.image.width * 3
        return self.image.held_bytes if kind_of(self.image) == "jpeg" else self.num_bytes


@dataclass(frozen=True)
class Selection:
    """A prompt whose images have become visual tokens.

    Attributes:
        embeds: float[M, D], what the decoder reads; None where that is the `prompt`.
        compressed: what `compress` returned, less the tokens themselves, for pictures and evidence; None without images.
        prompt: of a model of another family.
        first_logits: float[V] of the answer's first token, where a pointer has a part in it; None where the decoder alone has.
    """

    embeds: torch.Tensor | None
    compressed: UHRBatCompressionOutput | None
    prompt: Prompt | None = None
    first_logits: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """That the decoder reads."""
        return len(self.embeds) if self.prompt is None else self.prompt.num_tokens


class Front:
    """Processor and model, with a cache of encoded images and of selections. Safe to share among threads. Work that nobody
    waits for when its turn comes is not begun (`has_left`).

    Args:
        processor, model: of `load_model`.
        model_key: names the model, as `fingerprint` does.
        cache: its limit holds for images and selections together.
        workers: threads that compute at a time; others wait. Decoded pictures are large.
        embeds: whether the decoder is handed embeddings of a model of another family too, not a `Prompt`.

    Raises:
        ValueError: a processor of dynamic pyramids, whose visual tokens are known only when the question is asked.
    """

    def __init__(self, processor, model, model_key: str, cache: ContentCache, workers: int, embeds=False):
        if processor.image_processor.dynamic_pyramid:
            raise ValueError(
                "The image processor has `dynamic_pyramid`, which is asked one question after the other and not served: load it "
                "with `dynamic_pyramid=False`."
            )
        self.processor, self.model, self.model_key, self.cache = processor, model, model_key, cache
        self._embeds = embeds or not hasattr(model, "host")
        # Of both: either may be larger than what the other knows of.
        self.window = min(model.context_window, processor.tokenizer.model_max_length)
        self._work = threading.BoundedSemaphore(workers)
        processor.planner = planner_of(model)  # budgets may be limits

    def open(self, source: ImageFile, **options):
        """The image itself as `read_image` gives it, from the cache where the same file was opened in the same way before.

        Args:
            options: `bands`, `value_range`, `window`, `nodata`, `page`, `max_image_pixels`.

        Raises:
            What `read_image` raises.
        """
        options = {name: value for name, value in options.items() if value is not None}
        key = ("picture", *source.key, repr(sorted(options.items())))
        picture = self.cache.get(key, lambda: self._compute(self._open, source, options))
        self.cache.grown(key)  # a JPEG is decoded when it is looked at
        return picture.image

    def register(self, earlier: ImageFile, later: ImageFile, **options) -> list:
        """The `dates` of `select`, from the cache where the same two files were opened in the same way before; `options` as of `open`.

        Raises:
            What `read_image` and `open_dates` raise.
        """
        options = {name: value for name, value in options.items() if value is not None}

        def opened(source):
            image = self._open(source, options).image
            (crs, transform), part = place_of(image), getattr(image, "part", WHOLE)
            # Less its pixels, which two images would hold, and by a name that tells nobody where the server's folder lies.
            return SimpleNamespace(
                height=image.height, width=image.width, crs=crs, transform=transform, part=part, filename=source.name
            )

        key = ("dates", *earlier.key, *later.key, repr(sorted(options.items())))
        return self.cache.get(key, lambda: self._compute(open_dates, opened, later, earlier)[1])

    def _open(self, source, options):
        image = self.processor.image_processor.process_image(source.content, **options)
        return Picture(image, len(source.content) if isinstance(source.content, bytes) else 0)

    def encode(
        self, source: ImageFile, max_tiles: int | None = None, native: bool | None = None, **options
    ) -> EncodedImage:
        """The encoded image, from the cache where the same file was read in the same way before.

        Args:
            max_tiles, native: of the processor; how many tiles there may be is the question's affair (`select`).
            options: `bands`, `value_range`, `window`, `page`, `overviews`, `max_image_pixels`, as of `read_image`.

        Raises:
            What `read_image` raises.
        """
        options = {name: value for name, value in options.items() if value is not None}
        max_tiles = max_tiles or self.processor.image_processor.max_tiles
        levels = "whole" if max_tiles is None else "native" if native else "scales"
        if native and max_tiles is None:
            raise ValueError(
                "`native` levels are encoded where the question looks, so many tiles: give `max_tiles` too."
            )
        key = ("image", self.model_key, *source.key, levels, repr(sorted(options.items())))
        tiles = {} if max_tiles is None else {"max_tiles": max_tiles, "native": native}
        return self.cache.get(key, lambda: self._compute(self._encode, key, source, options, tiles))

    def _compute(self, step, *args):
        with self._work, torch.inference_mode():
            if has_left.get()():
                raise Abandoned
            return step(*args)

    def _encode(self, key, source, options, tiles):
        picture = self._open(source, options)
        image = picture.image
        _, cutting = part_reading(options)
        inputs = self.processor.image_processor(image, **cutting, **tiles, return_tensors="pt")
        (features,) = asking.encode(self.model, inputs)
        held = picture.held_bytes if tiles else 0
        return EncodedImage(key, self._to(features, "cpu"), (image.height, image.width), Georeference.of(image), held)

    def check_limit(self, budgets: list[int] | int | str | None, max_tiles: int | None = None):
        """Raises `ValueError` for budgets that are a limit of images that are not encoded whole."""
        max_tiles = max_tiles or self.processor.image_processor.max_tiles
        if isinstance(budgets, str) and max_tiles is not None:
            raise ValueError(
                f"`budgets={budgets!r}` is a limit of images whose tiles are all encoded: with `max_tiles` {max_tiles} give a "
                "number."
            )

    def select(
        self,
        prompt: str,
        images: list[EncodedImage],
        budgets: list[int] | int | str | None = None,
        max_tiles: int | None = None,
        dates: list | None = None,
    ) -> Selection:
        """The question's visual tokens in its prompt, from the cache where the same was asked of the same images.

        Args:
            prompt: text with one placeholder per image (`prompt_text`).
            images: in the order of the text; none for text alone.
            budgets: int[S] or one number, or a limit as "24GiB" or "5s"; None for those of the model.
            max_tiles: that the images share, which were encoded with some.
            dates: what `register` returned where the two images show one place, the earlier one first.

        Raises:
            ValueError: counts or budgets that do not fit, or a prompt over the context window.
        """
        max_tiles = max_tiles or self.processor.image_processor.max_tiles
        asked = prompt, images, budgets, max_tiles, dates
        key = ("selection", self.model_key, prompt, *map(repr, asked[2:]), *(image.key for image in images))
        selection = self.cache.get(key, lambda: self._compute(self._select, *asked))
        for image in images:
            self.cache.grown(image.key)
        return selection

    def _select(self, prompt, images, budgets, max_tiles, dates):
        self.check_limit(budgets, max_tiles)
        device = self.model.device
        features = [self._to(image.features, device) for image in images]
        # Without images there is nothing to spend a budget on.
        options = {"image_features": features, "budgets": budgets, "max_tiles": max_tiles} if images else {}
        options |= {} if dates is None else {"dates": dates}
        inputs = self.processor(text=prompt, **options, return_tensors="pt").to(device)
        number = inputs["input_ids"].shape[1]
        if number >= self.window:
            raise ValueError(
                f"The prompt has {number} tokens with its images, but the context window holds {self.window} and the answer "
                "needs room. Shorten the text or lower the budgets."
            )
        if not images:
            return self._handed(inputs)
        compressed = asking.compress(self.model, inputs)
        for image, seen in zip(images, features):
            if seen is not image.features:  # regions that were computed on another device
                found = {name: regions for name, regions in seen.partitions.items() if name != "dates"}
                image.features.partitions.update(_to_cpu(found))
        first_logits = self._point(inputs, compressed)
        kept = UHRBatCompressionOutput(
            importance=_to_cpu(compressed.importance),
            regions=_to_cpu(compressed.regions),
            slots=_to_cpu(compressed.slots),
            images_per_prompt=compressed.images_per_prompt,
            scales=compressed.scales,
            pointed=compressed.pointed and [None if one is None else one.cpu() for one in compressed.pointed],
        )
        return replace(self._handed(inputs, kept, compressed), first_logits=first_logits)

    def _point(self, inputs, compressed):
        """float[V] logits of the answer's first token, as `generate` has them, for a model with a pointer and a prompt that it
        looks at, whose `compressed.pointed` is set by that; else None. The decoder, which is handed embeddings, knows no visual
        tokens to point to."""
        if hasattr(self.model, "host") or self.model.model.pointer is None:
            return None
        if not is_pointed_at(compressed) or compressed.images_per_prompt != [1]:
            return None
        prompt = {name: inputs[name] for name in asking.PROMPT}
        seen = self.model.visual_inputs(**prompt, compressed=compressed)
        return self.model(**prompt, **seen, logits_to_keep=1, use_cache=False).logits[0, -1].float().cpu()

    def _handed(self, inputs, kept=None, compressed=None):
        """The selection of one prompt, with what was kept of its images."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self._embeds and hasattr(self.model, "host"):
            return Selection(self.model.prompt_embeds(ids, mask, compressed)[0].cpu(), kept)
        if not self._embeds:
            written = {} if compressed is None else self.model.visual_inputs(ids, mask, compressed)
            whole = kept and replace(kept, pooler_output=_to_cpu(compressed.pooler_output))
            return Selection(None, kept, Prompt(ids[0].cpu(), whole, written.get("input_ids", ids).shape[1]))
        embeds = self.model.get_input_embeddings()(ids)
        if compressed is not None:
            placeholder = ids == self.model.config.image_token_id
            embeds = embeds.masked_scatter(placeholder[..., None], torch.cat(compressed.pooler_output).to(embeds))
        return Selection(embeds[0].cpu(), kept)

    @staticmethod
    def _to(features, device):
        """The same features where they are there already: what they learn of their regions is kept with them. What keeps its
        tiles stays where they are encoded."""
        if features.kind == "pyramid":
            return features
        here = features.anchor_tokens.device.type == torch.device(device).type
        return features if here else features.to(device)


def _to_cpu(images):
    return pytree.tree_map(torch.Tensor.cpu, images)
