# Copyright 2026 The UHR-BAT authors. Licensed under the Apache License, Version 2.0 (the "License"); you may not use this
# file except in compliance with the License. You may obtain a copy of the License at
# http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to in writing, software distributed
# under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
# implied. See the License for the specific language governing permissions and limitations under the License.
"""UHR-BAT layers: vision tower, projector, scale embedding (eq. 5), and the attention of the question (eq. 2).

Axes: T tiles, P patches of a tile, C width of the tower, V tokens of a scale that show the image, D decoder width, M
tokens of a sequence.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, repeat_kv
from transformers.utils import can_return_tuple

from .configuration_uhr_bat import UHRBatConfig
from .geometry_uhr_bat import scale_place

# Question rows of the importance pass that are scored at once: bounds the scores to heads x 64 x sequence.
QUESTION_BLOCK = 64


class UHRBatVisionTower(nn.Module):
    """CLIP's or SigLIP's vision model up to the layer that is read (`vision_feature_layer`), patch tokens only.

    Its own layers run one after the other: the list of all hidden states is never held, what follows the feature layer
    never runs, and threads share the tower. The model is one level down, as checkpoints of the LLaVA family have it
    (`vision_tower.vision_model`), so that weights are called in memory what they are called in files. Its parts are
    found here too.
    """

    def __init__(self, config: UHRBatConfig):
        super().__init__()
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.form = config.tower_form
        layer = config.vision_feature_layer  # as an index of hidden states, of which the first enters the first layer
        self.num_layers = layer if layer > 0 else config.vision_config.num_hidden_layers + layer + 1
        self.register_load_state_dict_pre_hook(accept_flat_names)
        self.freeze_unread_layers()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("vision_model"), name)

    @property
    def unread_layers(self) -> list[nn.Module]:
        """What stands behind the feature layer: part of the checkpoint, but no token comes through it."""
        model = self.vision_model
        pooling = [model.head] if hasattr(model, "head") else []  # SigLIP's, where its configuration asks for it
        return [*model.encoder.layers[self.num_layers :], model.post_layernorm, *pooling]

    def freeze_unread_layers(self):
        """Without this, training on several devices waits for gradients that never come."""
        for layer in self.unread_layers:
            layer.requires_grad_(False)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """float[T, 3, tile, tile] -> float[T, P, C]"""
        model, unread = self.vision_model, self.unread_layers
        hidden_states = model.embeddings(tiles.to(model.dtype))
        if self.form.first_norm:
            hidden_states = getattr(model, self.form.first_norm)(hidden_states)
        for layer in model.encoder.layers[: self.num_layers]:
            hidden_states = layer(hidden_states, attention_mask=None)
        features = hidden_states[:, self.form.num_class_tokens :]
        if self.training and any(parameter.requires_grad for layer in unread for parameter in layer.parameters()):
            # Somebody trains what no token comes through, as LoRA on "all-linear" does. Training on several devices
            # waits for a gradient of each parameter: one token goes on, for gradients of 0.
            layers = self.vision_model.encoder.layers[self.num_layers :]
            token = hidden_states[:1, :1]
            for layer in unread:
                token = layer(token, attention_mask=None) if layer in layers else layer(token)
            features = features + 0 * token.sum()
        return features


def accept_flat_names(tower, state_dict, prefix, *args):
    """Pre-hook of `load_state_dict` for weights that were saved one level higher, as `vision_tower.encoder`..."""
    nested = prefix + "vision_model."
    for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(nested)]:
        state_dict[nested + name.removeprefix(prefix)] = state_dict.pop(name)


class UHRBatMultiModalProjector(nn.Module):
    """phi of section 3.2: two linear layers with an activation between them; also the form of the token MLP."""

    def __init__(self, in_features: int, out_features: int, activation: str):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class UHRBatScaleEmbedding(nn.Module):
    """p(s) + q(s) of eq. 5 at chosen places of a scale, in the paper's form or in that of the released weights.

    "factorized": one base table [1, g * g, D], interpolated bilinearly over the whole grid of the scale, plus a learned
    vector per scale. "per_scale": one table per scale with g at most `scale_embedding_grid`, interpolated over the grid
    of one tile and repeated for every tile. A scale that has no vector or table of its own, as levels of a pyramid, takes
    what lies between those of its neighbours (`scale_place`).
    """

    def __init__(self, config: UHRBatConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.patches_per_side = config.tile_size // config.patch_size
        self.scales, self.patch_size = [*config.scales, *config.native_scales], config.patch_size
        self.per_scale = config.scale_embedding_form == "per_scale"
        if self.per_scale:
            sides = [min(height, config.scale_embedding_grid) for height, _ in config.grids]
            self.tables = nn.ParameterDict(
                {str(scale): nn.Parameter(torch.zeros(1, g * g, width)) for scale, g in zip(config.scales, sides)}
            )
        else:
            self.table = nn.Parameter(torch.zeros(1, config.scale_embedding_grid**2, width))
            self.scale_vectors = nn.Parameter(torch.zeros(len(self.scales), width))

    def forward(self, scale: int | torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """float32[V, D] for the places long[V] on the grid of a scale, its side in pixels; or of a scale for each place,
        long[V], in the factorized form."""
        width = scale // self.patch_size
        place = scale_place(scale.cpu().numpy() if isinstance(scale, torch.Tensor) else scale, self.scales)
        low, high, part = np.floor(place).astype(int), np.ceil(place).astype(int), place % 1
        if self.per_scale:
            p, weights = self.patches_per_side, ((low, 1 - part), (high, part))
            places = positions // width % p, positions % width % p, p
            tables = [(self.tables[str(self.scales[idx])], weight) for idx, weight in weights if weight]
            return sum(weight * _at_places(table, *places) for table, weight in tables)
        vectors, device = self.scale_vectors.float(), positions.device
        part = torch.as_tensor(part, dtype=torch.float32, device=device)[..., None]
        if isinstance(scale, torch.Tensor):
            low, high = (torch.as_tensor(idx, device=device) for idx in (low, high))
        vector = (1 - part) * vectors[low] + part * vectors[high]
        return _at_places(self.table, positions // width, positions % width, width) + vector


def _at_places(table, rows, columns, extent) -> torch.Tensor:
    """float32[V, D]: a table [1, g * g, D], interpolated bilinearly to a grid of `extent` a side (an integer, or long[V]), at
    some of its places."""
    g = round(table.shape[1] ** 0.5)
    # Sampling at the patch centres is F.interpolate(..., align_corners=False), for the wanted places alone. float32:
    # bfloat16 coordinates are too coarse for 288 patches a side.
    extent = extent[:, None] if isinstance(extent, torch.Tensor) else extent
    centres = (torch.stack((columns, rows), dim=-1).float() + 0.5) * 2 / extent - 1
    embedding = F.grid_sample(
        table.float().view(1, g, g, -1).permute(0, 3, 1, 2),
        centres.view(1, 1, -1, 2),
        padding_mode="border",
        align_corners=False,
    )
    return embedding[0, :, 0].T


def question_attention(attention, hidden_states, position_embeddings, question_start) -> torch.Tensor:
    """Eq. 2 over a whole row: mean attention of the question to every position, over heads and question tokens.

    Only the rows of the question are computed, in blocks: no N x N matrix exists, whatever the attention kernel.

    Args:
        attention: the decoder's own attention module, called while its parameters are in place.
        hidden_states: float[1, M, D], its input.
        position_embeddings: (cos, sin), float[1, M, head] each.
        question_start: first row of the question, which runs to the end.

    Returns:
        float32[M]
    """
    query, key = queries_and_keys(attention, hidden_states, position_embeddings)
    mean = mean_attention(query, key, attention.scaling, question_start)
    mesh = mesh_of_heads(attention, query.shape[1])
    if mesh is not None:  # the mean over a process's own heads: processes have equally many
        mean = SumOfProcesses.apply(mean, mesh.get_group()) / mesh.size()
    return mean


def mean_attention(query, key, scaling, question_start) -> torch.Tensor:
    """float32[M]: what the rows from `question_start` on pay to every position, the mean over heads and these rows, by
    queries and keys float[1, heads, M, head]; in blocks, so that no M x M matrix exists."""
    M, key = query.shape[2], key.transpose(2, 3)
    position = torch.arange(M, device=query.device)
    total = 0
    for rows in position[question_start:].split(QUESTION_BLOCK):
        scores = query[:, :, rows] @ key * scaling
        scores = scores.masked_fill(position > rows[:, None], float("-inf"))
        total = total + F.softmax(scores, dim=-1, dtype=torch.float32).mean(1).sum((0, 1))
    return total / (M - question_start)


class SumOfProcesses(torch.autograd.Function):
    """The sum of what each process of a group holds, on all of them. Each has the whole loss, so gradients go back as
    they come."""

    @staticmethod
    def forward(ctx, values, group):
        values = values.clone()
        torch.distributed.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def mesh_of_heads(attention, num_heads: int):
    """The processes that an attention module's heads are shared out to (tensor parallelism), of which this one has
    `num_heads`; None where it has all."""
    if num_heads == attention.config.num_attention_heads:
        return None
    projection = attention.q_proj  # releases of the library note the mesh on the layer, or on its weight
    return getattr(projection, "_hf_device_mesh", None) or projection.weight.device_mesh


def queries_and_keys(attention, hidden_states, position_embeddings) -> tuple[torch.Tensor, torch.Tensor]:
    """What a decoder's own attention module compares: float[1, heads, M, head] each, keys repeated for their queries."""
    shape = (1, hidden_states.shape[1], -1, attention.head_dim)
    query, key = attention.q_proj(hidden_states).view(shape), attention.k_proj(hidden_states).view(shape)
    if hasattr(attention, "q_norm"):  # Qwen3: each head is normalised
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    return query, repeat_kv(key, attention.num_key_value_groups)


def last_token_logits(attention, hidden_states, position_embeddings) -> torch.Tensor:
    """float[heads, M], of the heads of all processes: scaled products of the last token's queries with the keys of every
    position, before the softmax; the arguments are those of `question_attention`."""
    query, key = queries_and_keys(attention, hidden_states, position_embeddings)
    logits = (query[0, :, -1:] @ key[0].transpose(1, 2))[:, 0] * attention.scaling
    mesh = mesh_of_heads(attention, len(logits))
    if mesh is None:
        return logits
    before = mesh.get_local_rank() * len(logits)
    after = attention.config.num_attention_heads - before - len(logits)
    return SumOfProcesses.apply(F.pad(logits, (0, 0, before, after)), mesh.get_group())


def call_reader(attention: nn.Module, args, kwargs):
    """Forward pre-hook of the decoder's attention modules: calls `read_attention(attention)` if the call carries one.

    FSDP, DeepSpeed and offloading have a layer's weights in place only during its call, so what reads them has to run
    inside it. The reader travels with the call: calls in other threads do not see it.
    """
    read_attention = kwargs.pop("read_attention", None)
    if read_attention is not None:
        read_attention(attention)
    return args, kwargs


class UHRBatTowersMixin:
    """What a [`VisionLanguageModel`] has to do, done by UHR-BAT's own towers: `vision_tower`, `multi_modal_projector`,
    `scale_embedding` and `language_model`."""

    def project_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """float[T, 3, tile, tile] -> float[T, P, D]"""
        return self.multi_modal_projector(self.vision_tower(tiles))

    def add_scale(self, rows, scale, positions, times) -> torch.Tensor:
        """float[V, D] plus `times` the embedding of their places (eq. 5)."""
        return rows + times * self.scale_embedding(scale, positions).to(rows)

    def read_attention(
        self, input_ids, rows, places, inputs_embeds=None, *, layer=None, question_tokens=None
    ) -> torch.Tensor:
        """Eq. 2 over rows float[V, D] in place of the image; the decoder knows their order alone, not their `places`.

        One pass over the text before the image, the rows and the text after it, through the decoder's own layers up to the
        importance layer, where it stops, or through those of the region focus module (`importance_source`).

        Returns:
            float32[V]
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        where = self.find_placeholders(input_ids, inputs_embeds).nonzero()[:, 0].tolist()
        if not where:
            raise ValueError("The prompt holds no image token, so there is nothing to weigh.")
        before, question = inputs_embeds[: where[0]], inputs_embeds[where[-1] + 1 :]
        sequence = torch.cat((before, rows.to(before), question))[None]
        start, stop = len(before), len(before) + len(rows)
        last = sequence.shape[1] - 1
        question_tokens = self.config.question_tokens if question_tokens is None else question_tokens
        question_start = min(stop, last) if question_tokens == "all" else last

        decoder = self.language_model
        # CODEPATH: checkpoints with a distilled module may be weighed by it, all others by their decoder.
        if layer is None and self.config.importance_source == "region_focus":
            layers = self.region_focus.layers
        else:
            last_layer = self.config.importance_layer if layer is None else layer
            layers = decoder.layers[: last_layer % len(decoder.layers) + 1]
        (row,) = self.read_layers(layers, sequence, partial(question_attention, question_start=question_start))
        return row[start:stop]

    def compress(self, input_ids=None, attention_mask=None, inputs_embeds=None, *args, **kwargs):
        """See [`UHRBatCompressionMixin.compress`]. Prompts are embedded once, not by each look: tables may be offloaded."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        return super().compress(input_ids, attention_mask, inputs_embeds, *args, **kwargs)

    def compress_one(self, *args, **looked):
        """See [`UHRBatCompressionMixin`], with the token MLP after the selection."""
        one = super().compress_one(*args, **looked)
        return one if self.token_mlp is None else one._replace(tokens=[self.token_mlp(rows) for rows in one.tokens])

    def read_layers(self, layers, sequence, read, read_at=(-1,), position_ids=None, attention_mask=None) -> list:
        """What is read at some of a stack of decoder layers, up to the last of them, where the pass stops.

        Args:
            layers: of the decoder, or of the region focus module.
            sequence: float[1, M, D].
            read: (attention module, its input float[1, M, D], (cos, sin)) -> what is read.
            read_at: ascending indices of layers.
            position_ids: long[1, M]; counted where not given.
            attention_mask: long[1, M], 0 where there is nothing; None where everything is there.
        """
        decoder, found = self.language_model, []
        if position_ids is None:
            position_ids = torch.arange(sequence.shape[1], device=sequence.device)[None]
        position_embeddings = decoder.rotary_emb(sequence, position_ids)
        # By position: the names of these arguments differ between releases.
        causal_mask = create_causal_mask(decoder.config, sequence, attention_mask, None)
        read_at = [layer_idx % len(layers) for layer_idx in read_at]
        for layer_idx, layer in enumerate(layers[: read_at[-1] + 1]):
            options = {}
            if layer_idx in read_at:

                def read_attention(attention, layer=layer, sequence=sequence):
                    found.append(read(attention, layer.input_layernorm(sequence), position_embeddings))

                # The layer calls the reader when its weights are in place (see `call_reader`).
                options["read_attention"] = read_attention
            if layer_idx == read_at[-1]:  # what it puts out is not needed: it is called with a single row
                layer(
                    sequence[:, :1],
                    position_ids=position_ids[:, :1],
                    position_embeddings=tuple(part[:, :1] for part in position_embeddings),
                    **options,
                )
            else:
                sequence = layer(
                    sequence,
                    attention_mask=causal_mask,
                    position_ids=position_ids,
                    position_embeddings=position_embeddings,
                    **options,
                )
        return found

    @can_return_tuple
    def get_image_features(self, pixel_values, pixel_attention_mask=None, **kwargs) -> BaseModelOutputWithPooling:
        """The uncompressed image: the tower's outputs, and in `pooler_output` float[V, D] per image, all tokens.

        Use `encode_image` for large images: this one holds what the tower returns for all tiles at once.
        """
        I, T = pixel_values.shape[:2]
        tower = self.vision_tower.vision_model  # all of it, to its last layer
        outputs = tower(pixel_values.flatten(0, 1).to(tower.dtype), **kwargs)
        features = self.encode_image(pixel_values, pixel_attention_mask)

        def by_image(states):
            return None if states is None else tuple(state.unflatten(0, (I, T)) for state in states)

        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state.unflatten(0, (I, T)),
            pooler_output=[torch.cat(image.tokens) for image in features],
            hidden_states=by_image(outputs.hidden_states),
            attentions=by_image(outputs.attentions),
        )
