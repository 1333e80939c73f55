"""A host: a vision-language model of the library's own classes, asked as UHR-BAT is.

Three calls of the host do everything. `get_image_features` of single tiles encodes; a pass that ends in the attention of one
layer looks (`looks.py`); `generate` or `forward` with `mm_encoder_outputs` answers, images that are encoded already, of as
many rows as were kept. Nothing of the library is patched, nothing of ours is saved with the host.

Axes: T tiles, P rows of a tile, W width of a row, V rows of an image, B prompts, M tokens of a prompt. A row has the D columns
of the decoder, and where the host has DeepStack D more for each of its layers.
"""

import inspect
from copy import copy
from math import isqrt

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.utils import logging

from ..configuration_uhr_bat import UHRBatConfig
from ..modeling_compression_uhr_bat import UHRBatCompressionMixin
from ..modeling_encoding_uhr_bat import UHRBatEncodingMixin
from ..modeling_generation_uhr_bat import UHRBatGenerationMixin
from ..modeling_importance_uhr_bat import UHRBatImportanceMixin
from ..modeling_outputs_uhr_bat import CACHE, IMAGE_INPUTS, KeptPlaces, TileCache, has_images
from .looks import attention_modules, look
from .places import coordinates, mark_places, order_of, position_ids
from .settings import HostSettings

logger = logging.get_logger(__name__)


@strict
class HostConfig(UHRBatConfig):
    """UHR-BAT's numbers for a host: its decoder's configuration, and a stand-in for its tower that has the tile and the side
    of a row alone. `full_layers`: those that can be looked at."""

    model_type = "uhr_bat_host"

    full_layers: list[int] | tuple[int, ...] = ()

    def validate_towers(self):
        """A host's towers are its own."""

    def validate_layers(self):
        """What is looked at sees everything."""
        for layer in (self.importance_layer, *self.refinement_layers):
            if layer % self.text_config.num_hidden_layers not in self.full_layers:
                raise ValueError(
                    f"`importance_layer` and `refinement_layers` are layers of full attention, with this model one of "
                    f"{', '.join(map(str, self.full_layers))}. Got {layer}."
                )


class HostTileCache(TileCache):
    """Tiles in the memory of the CPU: a host's rows are wide, a tile of 8 MB with DeepStack."""

    def find(self, level_idx, tile_idx):
        return {tile: rows.to(self.device) for tile, rows in super().find(level_idx, tile_idx).items()}

    def keep(self, level_idx, tiles):
        super().keep(level_idx, {tile: rows.cpu() for tile, rows in tiles.items()})

    def __reduce__(self):
        return HostTileCache, (self.limit, self.device)


class TileReader:
    """A host's tiles: 8-bit pixels to the arguments of its encoder, and what that returns to rows.

    Args:
        image_processor: the host's own.
        side: pixels a side of a tile.
        options: of the processor's call, which keep a tile whole (`tile_side`).
    """

    def __init__(self, image_processor, side: int, options: dict):
        self.image_processor, self.side, self.options = image_processor, side, options

    def inputs(self, tiles: torch.Tensor) -> dict:
        """All that the processor makes of tiles float[T, 3, side, side] of 8-bit numbers."""
        images = list(tiles.detach().round().clamp(0, 255).to(torch.uint8).cpu().numpy())
        counted = "batch_num_images" in self.image_processor.model_input_names
        # Of several images of one prompt this family takes each whole.
        nested = [images] if counted and len(images) > 1 else images
        inputs = dict(self.image_processor(images=nested, return_tensors="pt", **self.options))
        if counted:
            inputs["batch_num_images"] = torch.tensor([max(2, len(images))])
        return inputs

    def encode(self, host, tiles: torch.Tensor):
        """(what the host's encoder returns, float[T, P', W] all rows of every tile).

        Raises:
            ValueError: a tile that came out smaller than it is.
        """
        inputs = {key: _to(value, host.device) for key, value in self.inputs(tiles).items()}
        grid = inputs.get("image_grid_thw")
        if grid is not None and int(grid[0, 1]) * self.image_processor.patch_size != self.side:
            raise ValueError(
                f"Tiles of {self.side} px come out of the image processor with {int(grid[0, 1])} x {int(grid[0, 2])} patches "
                f"of {self.image_processor.patch_size} px: it does not leave them as they are."
            )
        taken = inspect.signature(host.get_image_features).parameters
        outputs = host.get_image_features(**{key: inputs[key] for key in inputs if key in taken}, return_dict=True)
        layers = [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or [])]
        rows = [torch.cat([one.reshape(-1, one.shape[-1]) for one in layer]) for layer in layers]
        return outputs, torch.cat(rows, dim=1).unflatten(0, (len(tiles), -1))


def _to(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


class _OwnGenerate(GenerationMixin):
    """`generate` of [`UHRBatGenerationMixin`] ends in the library's, which is the host's own here."""

    def generate(self, inputs=None, *args, input_ids=None, **kwargs):
        """As the host's. `input_ids`: the prompt with words between the tiles (`marks`), which are not returned."""
        kwargs = self._checked(inputs, kwargs)
        prompt = inputs if input_ids is None else input_ids
        output = self.host.generate(prompt, *args, **kwargs)
        if input_ids is None:
            return output
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        shown = inputs.repeat_interleave(len(sequences) // len(inputs), dim=0).to(sequences)
        sequences = torch.cat((shown, sequences[:, prompt.shape[1] :]), dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _checked(self, inputs, kwargs):
        """Keyword arguments of `generate`. Raises `ValueError` for what the library would do wrongly in silence."""
        config = kwargs.get("generation_config") or self.generation_config

        def setting(name):
            value = kwargs.get(name)
            return getattr(config, name, None) if value is None else value

        encoded = kwargs.get("mm_encoder_outputs")
        if encoded and kwargs.get(CACHE) is not None and (self.mrope or self.bidirectional):
            raise ValueError(
                f"A conversation with images cannot go on from `{CACHE}` with {self.family_name}: where its images lie is not "
                "in it. Pass the whole conversation."
            )
        if encoded and setting("prefill_chunk_size") is not None:
            if self.bidirectional:
                raise ValueError(
                    f"`prefill_chunk_size` is {setting('prefill_chunk_size')}, but an image of {self.family_name} is read in "
                    "both directions, which the library's chunks break. Leave it out."
                )
            if not hasattr(generation_utils, "_slice_mm_encoder_output"):
                logger.warning_once(
                    "This release of transformers cannot read images in chunks: `prefill_chunk_size` is left out."
                )
                kwargs["generation_config"] = copy(config)
                kwargs["generation_config"].prefill_chunk_size = kwargs["prefill_chunk_size"] = None
        known = {"position_ids", CACHE, "inputs_embeds"} & set(kwargs)
        if self.mrope and not encoded and inputs is not None and not known:
            # Without them the host keeps the positions of its last call, which may be another thread's.
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(inputs) if mask is None else mask
            kwargs["position_ids"] = position_ids(torch.zeros_like(mask, dtype=torch.bool), mask.bool(), [])
        return kwargs


class HostModel(
    UHRBatEncodingMixin, UHRBatImportanceMixin, UHRBatCompressionMixin, UHRBatGenerationMixin, _OwnGenerate, nn.Module
):
    """A host behind UHR-BAT's calls: a [`VisionLanguageModel`].

    Args:
        host: a model of the library with `get_image_features` and `mm_encoder_outputs`.
        config: [`HostConfig`].
        reader: [`TileReader`].
        settings: [`HostSettings`].
        largest: pixels a side of the largest image that the host was made for, or None.

    Attributes:
        host: the model itself; what it saves is its own.
        family_name: its model type.
        mrope: whether rows have places in two dimensions.
    """

    def __init__(self, host, config: HostConfig, reader: TileReader, settings: HostSettings, largest: int | None):
        nn.Module.__init__(self)
        self.host, self.config, self.reader, self.settings = host, config, reader, settings
        self.family_name = host.config.model_type
        self.mrope = hasattr(host.base_model, "get_rope_index")
        text = host.config.get_text_config()
        self.taken = set(inspect.signature(host.forward).parameters)
        self.type_names = [name for name in ("token_type_ids", "mm_token_type_ids") if name in self.taken]
        both_ways = getattr(text, "use_bidirectional_attention", None)
        self.bidirectional = "token_type_ids" in self.type_names or both_ways == "vision"
        self.largest_rows = None if largest is None else largest // config.patch_size
        self.attention = attention_modules(host.get_decoder())
        with torch.no_grad():
            outputs, rows = reader.encode(host, torch.full((2, 3, reader.side, reader.side), 127.0))
        self.outputs_class, self.stacked = type(outputs), isinstance(outputs.pooler_output, torch.Tensor)
        self.num_deep = len(getattr(outputs, "deepstack_features", None) or [])
        self.row_width = rows.shape[-1]
        self.train(host.training)

    # ---- What a VisionLanguageModel says of itself ---------------------------------------------------------------------

    device = property(lambda self: self.host.device)
    dtype = property(lambda self: self.host.dtype)
    model = property(lambda self: self)
    generation_config = property(lambda self: self.host.generation_config)
    tile_size = property(lambda self: self.config.tile_size)
    patches_per_side = property(lambda self: self.config.tile_size // self.config.patch_size)
    image_token_id = property(lambda self: self.config.image_token_id)
    context_window = property(lambda self: self.config.text_config.max_position_embeddings)

    def get_input_embeddings(self):
        return self.host.get_input_embeddings()

    def save_pretrained(self, *args, **kwargs):
        """The host's own, as the library saves it."""
        return self.host.save_pretrained(*args, **kwargs)

    def features_of(self, rows):
        """The decoder's columns, without those of DeepStack."""
        return rows[..., : self.row_width // (1 + self.num_deep)]

    def add_scale(self, rows, scale, positions, times):
        """Rows as they are: a host has no embedding of scales."""
        return rows

    def project_tiles(self, tiles):
        """float[T, 3, tile, tile] of 8-bit numbers -> float[T, P, W]; a row that a family puts behind a tile is dropped."""
        return self.reader.encode(self.host, tiles)[1][:, : self.patches_per_side**2]

    def _tile_cache(self, pyramid):
        return HostTileCache(self.tile_cache_bytes, self.device)

    # ---- The calls -----------------------------------------------------------------------------------------------------

    def encode_image(self, *args, **kwargs):
        """See [`UHRBatEncodingMixin.encode_image`]. Without gradients, but where it is trained."""
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return super().encode_image(*args, **kwargs)

    def compress(self, *args, **kwargs):
        """See [`UHRBatCompressionMixin.compress`]. Without gradients, but where it is trained."""
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return super().compress(*args, **kwargs)

    def read_attention(self, input_ids, rows, places, inputs_embeds=None, *, layer=None, question_tokens=None):
        """Look, in the model's own attention: see [`VisionLanguageModel.read_attention`]."""
        self._check_ids(input_ids)
        where = self.find_placeholders(input_ids).nonzero()[:, 0].tolist()
        if not where:
            raise ValueError("The prompt holds no image token, so there is nothing to weigh.")
        layer = self.config.importance_layer if layer is None else layer
        attention = self.attention.get(layer % self.config.text_config.num_hidden_layers)
        if attention is None:
            raise ValueError(
                f"Layer {layer} cannot be looked at: those with full attention are {', '.join(map(str, self.attention))}."
            )
        ids, start, order, inputs = self.prompt_with(input_ids, where, rows, places)
        stop, last = start + len(rows), len(ids) - 1
        question_tokens = question_tokens or self.config.question_tokens
        begin = min(stop, last) if question_tokens == "all" else last
        seen = look(self.host.base_model, attention, begin, **inputs)[start:stop]
        return torch.empty_like(seen).scatter(0, order.to(seen.device), seen)

    def prompt_with(self, input_ids, where, rows, places):
        """A prompt with one image of some rows: (ids long[M] with V placeholders in one run, where it begins, the rows' order, arguments of the host's forward)."""
        before, question = input_ids[: where[0]], input_ids[where[-1] + 1 :]
        ids = torch.cat((before, input_ids.new_full((len(rows),), self.image_token_id), question))
        if places is None:
            side = isqrt(len(rows) - 1) + 1
            kept = [KeptPlaces(_points(torch.arange(len(rows)), side), (side, side), 0)]
        else:
            kept = [KeptPlaces(_points(one.positions, one.grid[1]), one.grid, one.level) for one in places]
        order = order_of(kept, None if self.mrope else self.patches_per_side).to(rows.device)
        inputs = self._inputs_of(ids[None], torch.ones_like(ids)[None], [rows[order]], [kept], [order])
        return ids, where[0], order, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **inputs}

    def visual_inputs(self, input_ids, attention_mask, compressed, labels=None):
        """Answer: arguments of the host's `generate` and `forward`, made anew by each call, as the library may change them.

        With `marks` the prompt itself is another: `input_ids`, `attention_mask` and, where given, `labels` are among them.
        """
        self._check_ids(input_ids)
        kept = [compressed.places(image_idx) for image_idx in range(len(compressed.pooler_output))]
        tile_rows = None if self.mrope else self.patches_per_side
        orders = [order_of(places, tile_rows) for places in kept]
        rows = [tokens[order.to(tokens.device)] for tokens, order in zip(compressed.pooler_output, orders)]
        changed = {}
        if self.settings.marks and not self.mrope:
            changed = self._marked(input_ids, attention_mask, labels, kept, orders)
            input_ids, attention_mask = changed["input_ids"], changed["attention_mask"]
        return changed | self._inputs_of(input_ids, attention_mask, rows, kept, orders)

    def _inputs_of(self, input_ids, attention_mask, rows, kept, orders) -> dict:
        """The host's names for rows in place of image tokens, for where they lie and for which tokens they are."""
        is_image = self.find_placeholders(input_ids)
        made = {name: is_image.long() for name in self.type_names}
        if self.mrope:
            images = [
                (points[order.to(points.device)], extent)
                for (points, extent), order in zip(
                    (coordinates(places, self.settings.places, self.largest_rows) for places in kept), orders
                )
            ]
            visible = attention_mask[:, -input_ids.shape[1] :].bool()
            made["position_ids"] = position_ids(is_image & visible, visible, images)
        width = self.row_width // (1 + self.num_deep)
        pooled, *deep = ([one[:, width * idx : width * (idx + 1)] for one in rows] for idx in range(1 + self.num_deep))
        if (
            self.stacked
        ):  # a row each: images of different sizes, beams and chunks of the prompt then come apart rightly
            pooled = torch.cat(pooled)[:, None]
        fields = {"pooler_output": pooled} | ({"deepstack_features": deep} if deep else {})
        made["mm_encoder_outputs"] = {"image": self.outputs_class(**fields)}
        return made

    def _check_ids(self, input_ids):
        if input_ids is None:
            raise ValueError(
                f"{self.family_name} is asked by `input_ids`: `inputs_embeds` alone do not say where images are."
            )

    def _marked(self, input_ids, attention_mask, labels, kept, orders) -> dict:
        """Prompts with the words of `mark_places` between the tiles of each image, padded on the left."""
        images, found = iter(zip(kept, orders)), {"input_ids": [], "attention_mask": [], "labels": []}
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool())):
            spots = (self.find_placeholders(ids) & mask).nonzero()[:, 0].tolist()
            pieces, done = [], 0
            while spots:
                places, order = next(images)
                for start, words in mark_places(places, order, self.patches_per_side):
                    pieces.append((done, spots[start], words))
                    done = spots[start]
                spots = spots[len(order) :]
            of_row = {"input_ids": ids, "labels": ids if labels is None else labels[row], "attention_mask": mask.long()}
            for name, values in of_row.items():
                parts = []
                for start, stop, words in pieces:
                    written = self.write(words).to(ids)
                    fill = {"input_ids": written, "labels": written * 0 - 100, "attention_mask": written * 0 + 1}
                    parts += [values[start:stop], fill[name]]
                found[name].append(torch.cat((*parts, values[done:])))
        length = max(map(len, found["input_ids"]))
        fills = {"input_ids": self.generation_config.pad_token_id or 0, "attention_mask": 0, "labels": -100}
        made = {
            name: torch.stack([F.pad(one, (length - len(one), 0), value=fills[name]) for one in rows])
            for name, rows in found.items()
        }
        if labels is None:
            del made["labels"]
        return made

    def forward(self, input_ids=None, attention_mask=None, labels=None, answer_mask=None, **kwargs):
        """The host's `forward`, with the images of [`UHRBatImageInputs`]; with `labels` long[B, M] the selection never sees
        an answer, and visual tokens have none."""
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        if has_images(**images):
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            if answer_mask is None and labels is not None:
                answer_mask = labels != -100
            compressed = self.compress(input_ids, attention_mask, answer_mask=answer_mask, **images)
            input_ids, attention_mask, labels = self.expand_placeholders(
                input_ids, attention_mask, compressed, labels=labels
            )
            if labels is not None:
                labels = labels.masked_fill(self.find_placeholders(input_ids), -100)
            kwargs |= self.visual_inputs(input_ids, attention_mask, compressed, labels)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return self.host(**(given | kwargs))


def _points(positions, width) -> torch.Tensor:
    """float64[V, 2]: (row, column) of positions."""
    return torch.stack((positions // width, positions % width), dim=1).double()
