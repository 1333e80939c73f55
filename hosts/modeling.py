"""A host: a vision-language model of the library's own classes, asked as UHR-BAT is, by three calls of its own.

`get_image_features` of single tiles encodes; a pass that ends in the attention of one layer looks (`looks.py`); `generate` or
`forward` with `mm_encoder_outputs` answers, from as many rows as were kept. Nothing of the library is patched.

Axes: T tiles, P rows of a tile, W width of a row, V rows of an image, B prompts, M tokens of a prompt. A row has the columns of
the decoder, and with DeepStack as many again for each of its layers.
"""

import inspect
from dataclasses import replace
from math import isqrt, prod

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin
from transformers.generation import utils as generation_utils

from ..configuration_uhr_bat import UHRBatConfig
from ..modeling_compression_uhr_bat import UHRBatCompressionMixin
from ..modeling_encoding_uhr_bat import UHRBatEncodingMixin
from ..modeling_generation_uhr_bat import UHRBatGenerationMixin
from ..modeling_importance_uhr_bat import UHRBatImportanceMixin
from ..modeling_outputs_uhr_bat import CACHE, IMAGE_INPUTS, KeptPlaces, Places, TileCache, has_images
from .looks import attention_modules, full_layers, look, relative_attention
from .places import coordinates, mark_places, order_of, position_ids
from .settings import HostSettings

NO_LOOK = "Layer {} cannot be looked at: those with full attention are {}."


@strict
class HostConfig(UHRBatConfig):
    """UHR-BAT's numbers for a host: its decoder's configuration, and a stand-in for its tower that has the sides of a tile and
    a row alone. Any tower and decoder will do."""

    model_type = "uhr_bat_host"
    anchor_share_by_default = False  # whether nobody asked for it

    def validate_towers(self): ...

    def validate_layers(self):
        """Layers that are looked at have full attention."""
        full, number = full_layers(self.text_config), self.text_config.num_hidden_layers
        for layer in (self.importance_layer, *self.refinement_layers):
            if layer + number * (layer < 0) not in full:
                raise ValueError(NO_LOOK.format(layer, ", ".join(map(str, full))))

    def validate_anchor(self):
        """The anchor, which a question looks at as a whole, leaves room for text in the context window."""
        rows, window = prod(self.grids[0]) if self.scales else 0, self.text_config.max_position_embeddings
        if rows >= window:
            raise ValueError(
                f"The coarsest level has {rows} rows, but the context window holds {window} tokens and needs room for text: "
                "lower `anchor`."
            )


class TileReader:
    """A host's tiles of `side` px: 8-bit pixels to the arguments of its encoder, and what that returns to rows.

    Attributes, of which `measure` finds all but the first out:
        options: of the processor's call, which keep a tile whole (`tile_side`).
        rows_per_side: p, of a tile's rows p * p; a family may have a row more, which is dropped.
        largest_rows: rows a side of the largest square image that the host was made for; None where that is not stated.
        outputs_class, stacked, num_layers: what the encoder returns, whether in one tensor, with how many of DeepStack.
    """

    def __init__(self, image_processor, side: int, options: dict):
        self.image_processor, self.side, self.options = image_processor, side, options

    @torch.no_grad()
    def measure(self, host) -> int:
        outputs, rows = self.encode(host, self.blank(2).to(host.device))
        self.rows_per_side, self.row_width = isqrt(rows.shape[1]), rows.shape[2]
        newlines = (
            "batch_num_images" in self.image_processor.model_input_names
        )  # a row that the library puts behind a tile
        if self.side % self.rows_per_side or rows.shape[1] != self.rows_per_side**2 + newlines:
            raise ValueError(f"A tile of {self.side} px has {rows.shape[1]} rows: no square grid of whole pixels.")
        self.outputs_class, self.stacked = type(outputs), isinstance(outputs.pooler_output, torch.Tensor)
        size, self.largest_rows = dict(self.image_processor.size or {}), None
        if hasattr(self.image_processor, "temporal_patch_size"):  # Qwen-VL and its like count pixels
            self.largest_rows = isqrt(size["longest_edge"]) * self.rows_per_side // self.side
        self.num_layers = 1 + len(getattr(outputs, "deepstack_features", None) or [])
        return self.rows_per_side

    def blank(self, number) -> torch.Tensor:
        """float[T, 3, side, side], grey tiles."""
        return torch.full((number, 3, self.side, self.side), 127.0)

    def inputs(self, tiles: torch.Tensor, device=None) -> dict:
        """All that the processor makes of tiles float[T, 3, side, side] of 8-bit numbers."""
        images = list(tiles.detach().round().clamp(0, 255).to(torch.uint8).cpu().numpy())
        counted = "batch_num_images" in self.image_processor.model_input_names
        # Of several images of one prompt this family takes each whole.
        images = [images] if counted and len(tiles) > 1 else images
        inputs = self.image_processor(images=images, return_tensors="pt", **self.options)
        if counted:
            inputs["batch_num_images"] = torch.tensor([max(2, len(tiles))])
        return dict(inputs.to(device) if device is not None else inputs)

    def encode(self, host, tiles: torch.Tensor):
        """(what the host's encoder returns, float[T, P', W] all rows of every tile)."""
        inputs = self.inputs(tiles, tiles.device)
        grid = inputs.get("image_grid_thw")
        if grid is not None and grid[0, 1] * self.image_processor.patch_size != self.side:
            raise ValueError(
                f"A tile of {self.side} px does not come out of the image processor as it is, by {grid[0]}."
            )
        taken = inspect.signature(host.get_image_features).parameters
        outputs = host.get_image_features(**{key: inputs[key] for key in inputs if key in taken}, return_dict=True)
        layers = [outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or [])]
        rows = [torch.cat([one.reshape(-1, one.shape[-1]) for one in layer]) for layer in layers]
        return outputs, torch.cat(rows, dim=1).unflatten(0, (len(tiles), -1))


class _OwnGenerate(GenerationMixin):
    """The host's own `generate`, where that of [`UHRBatGenerationMixin`] ends in the library's."""

    def generate(self, inputs=None, *args, input_ids=None, **kwargs):
        """As the host's. `input_ids`: the prompt with words between the tiles (`marks`), which are not returned."""
        output = self.host.generate(inputs if input_ids is None else input_ids, *args, **self._checked(inputs, kwargs))
        if input_ids is None:
            return output
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        shown = inputs.repeat_interleave(len(sequences) // len(inputs), dim=0).to(sequences)
        sequences = torch.cat((shown, sequences[:, input_ids.shape[1] :]), dim=1)
        return sequences if isinstance(output, torch.Tensor) else replace(output, sequences=sequences)

    def _checked(self, inputs, kwargs):
        """Keyword arguments of `generate`. Raises `ValueError` for what the library would do wrongly in silence."""
        config, encoded = kwargs.get("generation_config") or self.generation_config, kwargs.get("mm_encoder_outputs")
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        mask, images = kwargs.get("attention_mask"), encoded
        if self.mrope and inputs is not None:
            mask = torch.ones_like(inputs) if mask is None else mask
            # What is in a cache may be images, too, whose places are not.
            images = encoded or inputs.shape != mask.shape or bool(self.find_placeholders(inputs).any())
        # Before 5.23, chunks leave images out.
        lost = self.bidirectional or not hasattr(generation_utils, "_slice_mm_encoder_output")
        parts = (CACHE, kwargs.get(CACHE), self.mrope or self.bidirectional), ("prefill_chunk_size", chunk, lost)
        for name, value, wrong in parts:
            if images and wrong and value is not None:
                raise ValueError(
                    f"`{name}` cannot go with images of {self.family_name} in this transformers: what is read in parts has "
                    "them in wrong places, or blind to each other. Leave it out, and pass the whole prompt."
                )
        if self.mrope and not images and inputs is not None and not {"position_ids", "inputs_embeds"} & set(kwargs):
            # Without them the host keeps the positions of its last call, which may be another thread's.
            kwargs["position_ids"] = position_ids(torch.zeros_like(mask).bool(), mask.bool(), [])
        return kwargs


def _graded(call):
    def graded(self, *args, **kwargs):
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return call(self, *args, **kwargs)

    return graded


class HostModel(
    UHRBatEncodingMixin, UHRBatImportanceMixin, UHRBatCompressionMixin, UHRBatGenerationMixin, _OwnGenerate, nn.Module
):
    """A host behind UHR-BAT's calls: a [`VisionLanguageModel`]. `host` is the model itself: a class of the library with
    `get_image_features` and `mm_encoder_outputs`."""

    def __init__(self, host, config: HostConfig, reader: TileReader, settings: HostSettings):
        super().__init__()
        self.host, self.config, self.reader, self.settings = host, config, reader, settings
        self.family_name, self.mrope = host.config.model_type, hasattr(host.base_model, "get_rope_index")
        for name, others in (("marks", self.mrope), ("places", not self.mrope)):  # what would change nothing
            if others and getattr(settings, name) != getattr(HostSettings(), name):
                says = f"`{name}` is of models {'without' if self.mrope else 'with'} M-RoPE, and {self.family_name} is none."
                raise ValueError(f"{says} It has `{'places' if self.mrope else 'marks'}`.")
        self.taken = set(inspect.signature(host.forward).parameters)
        self.type_names = [name for name in ("token_type_ids", "mm_token_type_ids") if name in self.taken]
        both_ways = getattr(config.text_config, "use_bidirectional_attention", None)
        self.bidirectional = "token_type_ids" in self.type_names or both_ways == "vision"
        self.attention = attention_modules(host.get_decoder())
        self.tile_rows = None if self.mrope else config.tile_size // config.patch_size
        self.train(host.training)

    # ---- What a VisionLanguageModel says of itself ---------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where weights are, or are put for a call."""
        hooks = (
            [getattr(one, "_hf_hook", None) for one in self.host.modules()] if self.host.device.type == "meta" else []
        )
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((one for one in devices if one is not None), self.host.device))

    # In training where the host is, whoever else holds it: a trainer has a peft model around it.
    training = property(lambda self: self.host.training, lambda self, mode: None)
    dtype = property(lambda self: self.host.dtype)
    model = property(lambda self: self)
    generation_config = property(lambda self: self.host.generation_config)
    tile_size = property(lambda self: self.config.tile_size)
    patches_per_side = property(lambda self: self.config.tile_size // self.config.patch_size)
    row_width = property(lambda self: self.reader.row_width)
    image_token_id = property(lambda self: self.config.image_token_id)
    context_window = property(lambda self: self.config.text_config.max_position_embeddings)
    save_pretrained = property(lambda self: self.host.save_pretrained)
    get_input_embeddings = property(lambda self: self.host.get_input_embeddings)
    get_output_embeddings = property(lambda self: self.host.get_output_embeddings)
    can_generate = property(lambda self: self.host.can_generate)  # asked by a pipeline

    def features_of(self, rows):
        return rows[..., : self.row_width // self.reader.num_layers]

    def add_scale(self, rows, scale, positions, times):
        return rows

    def project_tiles(self, tiles):
        """float[T, 3, tile, tile] of 8-bit numbers -> float[T, P, W]; a row that a family puts behind a tile is dropped."""
        return self.reader.encode(self.host, tiles.to(self.device))[1][:, : self.patches_per_side**2]

    def _tile_cache(self, pyramid):
        return TileCache(self.tile_cache_bytes, self.device, "cpu")  # rows are wide, a tile of 8 MB with DeepStack

    def find_placeholders(self, input_ids, inputs_embeds=None):
        if input_ids is None:
            raise ValueError(f"{self.family_name} needs `input_ids`: `inputs_embeds` do not say where images are.")
        return input_ids == self.image_token_id

    def attention_of(self, layer: int) -> nn.Module:
        """The attention module of a layer. Raises `ValueError` for one that cannot be looked at."""
        found = self.attention.get(layer + self.config.text_config.num_hidden_layers * (layer < 0))
        if found is None:
            raise ValueError(NO_LOOK.format(layer, ", ".join(map(str, self.attention))))
        return found

    # ---- The calls -----------------------------------------------------------------------------------------------------

    # Without gradients, but where it is trained.
    encode_image = _graded(UHRBatEncodingMixin.encode_image)
    compress = _graded(UHRBatCompressionMixin.compress)

    def read_attention(self, input_ids, rows, places, inputs_embeds=None, *, layer=None, question_tokens=None):
        """Look, in the model's own attention: see [`VisionLanguageModel.read_attention`]."""
        layer = self.config.importance_layer if layer is None else layer
        empty = [self.processor.empty_prompt().to(input_ids)] if self.settings.relative_attention else []
        (seen,) = self.looks([input_ids, *empty], rows, places, [layer], question_tokens)
        return relative_attention(*seen.mean(1)) if empty else seen[0].mean(0)

    def looks(self, prompts, rows, places, layers, question_tokens=None) -> list[torch.Tensor]:
        """float32[B, G, V] of each of some layers, from one pass: what B prompts long[M] pay to the same rows, by groups of heads
        that share a key; the rest as in `read_attention`."""
        found = [self.find_placeholders(ids).nonzero()[:, 0].tolist() for ids in prompts]
        if not all(found):
            raise ValueError("The prompt holds no image token, so there is nothing to weigh.")
        first, *others = zip(prompts, found)
        _, _, order, inputs = self.prompt_with(*first, rows, places, *others)
        modules, questions, spans = [self.attention_of(layer) for layer in layers], [], []
        for where, end in zip(found, inputs["attention_mask"].sum(1).tolist()):
            begin = where[0] + len(rows) if (question_tokens or self.config.question_tokens) == "all" else end
            questions.append((min(begin, end - 1), end))
            spans.append(slice(where[0], where[0] + len(rows)))
        seen = look(self.host.base_model, modules, questions, **inputs)
        seen = [torch.stack([one[:, span] for one, span in zip(layer, spans)]) for layer in seen]
        return [torch.empty_like(one).scatter(-1, order.to(one.device).expand_as(one), one) for one in seen]

    def prompt_with(self, input_ids, where, rows, places, *others):
        """A prompt with one image: (ids with V placeholders in one run, where it begins, the rows' order, arguments of the
        host's forward). `others`: (ids, where) of prompts that are asked beside it, padded on the right."""
        image = input_ids.new_full((len(rows),), self.image_token_id)
        prompts = [torch.cat((ids[: at[0]], image, ids[at[-1] + 1 :])) for ids, at in ((input_ids, where), *others)]
        if places is None:
            side = isqrt(len(rows) - 1) + 1
            places = [Places(torch.arange(len(rows)), (side, side), 0)]
        points = [torch.stack((one.positions // one.grid[1], one.positions % one.grid[1]), 1) for one in places]
        kept = [KeptPlaces(point.double(), one.grid, one.level) for point, one in zip(points, places)]
        order, padding = order_of(kept, self.tile_rows), int(self.image_token_id == 0)
        whole = {"input_ids": pad_sequence(prompts, batch_first=True, padding_value=padding)}
        whole["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True)
        number = len(prompts)
        return prompts[0], where[0], order, whole | self._inputs_of(*whole.values(), [rows] * number, [kept] * number)

    def visual_inputs(self, input_ids, attention_mask, compressed, labels=None):
        """Answer: see [`VisionLanguageModel`]. With `marks` the prompt is another: its `input_ids`, `attention_mask` and `labels`,
        where given, are among the arguments."""
        kept, changed = [compressed.places(image_idx) for image_idx in range(len(compressed.pooler_output))], {}
        if self.settings.marks and not self.mrope:
            changed = self._marked(input_ids, attention_mask, labels, kept)
            input_ids, attention_mask = changed["input_ids"], changed["attention_mask"]
        return changed | self._inputs_of(input_ids, attention_mask, compressed.pooler_output, kept)

    def prompt_embeds(self, input_ids, attention_mask, compressed=None) -> torch.Tensor:
        """float[1, M, D]: a prompt, and what was kept of its images, as a decoder reads it that needs embeddings alone."""
        made = {} if compressed is None else self.visual_inputs(input_ids, attention_mask, compressed)
        input_ids = made.get("input_ids", input_ids)
        is_image = self.find_placeholders(input_ids)
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        rows = [one.flatten(0, -2) for one in made["mm_encoder_outputs"]["image"].pooler_output] if made else []
        return embeds.masked_scatter(is_image[..., None], torch.cat((embeds[0, :0], *rows)))

    def _inputs_of(self, input_ids, attention_mask, rows=(), kept=()) -> dict:
        """The host's names for rows in place of image tokens, for where they lie and for which tokens they are."""
        is_image, orders = self.find_placeholders(input_ids), [order_of(places, self.tile_rows) for places in kept]
        rows = [one[order.to(one.device)] for one, order in zip(rows, orders)]
        made = {name: is_image.long() for name in self.type_names}
        if self.mrope:
            rule, largest = self.settings.places, self.reader.largest_rows
            images = [coordinates(places, order, rule, largest) for places, order in zip(kept, orders)]
            visible = attention_mask[:, -input_ids.shape[1] :].bool()
            made["position_ids"] = position_ids(is_image & visible, visible, images)
        if not rows:
            return made
        width, num_layers = self.row_width // self.reader.num_layers, self.reader.num_layers
        pooled, *deep = ([one[:, width * idx : width * (idx + 1)] for one in rows] for idx in range(num_layers))
        if self.reader.stacked:  # a row each: images of different sizes, beams and chunks then come apart rightly
            pooled = torch.cat(pooled)[:, None]
        has_deep = hasattr(self.reader.outputs_class, "deepstack_features")  # of no layer, too
        fields = {"pooler_output": pooled} | ({"deepstack_features": deep} if has_deep else {})
        return made | {"mm_encoder_outputs": {"image": self.reader.outputs_class(**fields)}}

    def _marked(self, input_ids, attention_mask, labels, kept) -> dict:
        """Prompts with the words of `mark_places` between the tiles of each image, padded on the left."""
        images, rows = iter(kept), []
        for prompt in torch.stack((input_ids, attention_mask, input_ids if labels is None else labels), dim=1):
            spots, done = (self.find_placeholders(prompt[0]) & prompt[1].bool()).nonzero()[:, 0].tolist(), 0
            parts = []
            while spots:
                places = next(images)
                order = order_of(places, self.tile_rows)
                for start, words in mark_places(places, order, self.patches_per_side):
                    written = prompt.new_tensor(self.processor.tokenizer.encode(words, add_special_tokens=False))
                    written = torch.stack((written, written * 0 + 1, written * 0 - 100))
                    parts += [prompt[:, done : spots[start]], written]
                    done = spots[start]
                spots = spots[len(order) :]
            rows.append(torch.cat((*parts, prompt[:, done:]), dim=1))
        made = pad_sequence([row.T for row in rows], batch_first=True, padding_side="left").unbind(-1)
        made = dict(zip(("input_ids", "attention_mask", "labels"), made))
        given = made.pop("labels").masked_fill(made["attention_mask"] == 0, -100)
        return made if labels is None else made | {"labels": given}

    def forward(self, *args, **kwargs):
        return self.host(**self.prepare(*args, **kwargs))

    def prepare(self, input_ids=None, attention_mask=None, labels=None, answer_mask=None, **kwargs) -> dict:
        """Arguments of the host's own `forward`, with the images of [`UHRBatImageInputs`] compressed, for whoever calls that, as
        a peft model around it. The selection sees no answer, and visual tokens have no label."""
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        if has_images(**images):
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            answer_mask = labels != -100 if answer_mask is None and labels is not None else answer_mask
            compressed = self.compress(input_ids, attention_mask, answer_mask=answer_mask, **images)
            expanded = self.expand_placeholders(input_ids, attention_mask, compressed, labels=labels)
            input_ids, attention_mask, labels = expanded
            if labels is not None:
                labels = labels.masked_fill(self.find_placeholders(input_ids), -100)
            kwargs |= self.visual_inputs(input_ids, attention_mask, compressed, labels)
        elif input_ids is not None and not {CACHE, "inputs_embeds", "mm_encoder_outputs"} & set(kwargs):
            # In training a host asks for the types of text alone, too, and some keep the positions of their last call.
            if self.find_placeholders(input_ids).any():
                raise ValueError("The prompts hold image tokens, but no images were passed.")
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            kwargs = self._inputs_of(input_ids, mask) | kwargs
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return given | kwargs
