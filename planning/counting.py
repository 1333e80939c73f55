"""UHR-BAT counting: what the calls of a host cost (`hosts/`), counted while its own code runs on tensors without values, so
that any family's configuration is enough.

Layers of one kind are counted once. FLOPs of a pass over M tokens are a polynomial of M, whose points are kept.

Letters: T tiles, M tokens of a prompt, W width of a row, b bytes of a value.
"""

import weakref
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForImageTextToText, DynamicCache

from ..modeling_outputs_uhr_bat import CACHE
from .costs import TEXT_AFTER, TEXT_BEFORE

aten = torch.ops.aten
# Tokens of the shortest counted pass; a window makes it longer, as far as this: longer prompts have masks that shorter ones
# do without. All are multiples of 64, the chunk of linear attention.
LENGTH, LONGEST, CHUNK = 512, 4096, 64
# Tokens before a counted step, fewer than any window.
CACHED = (4, 8)


class Shapes(TorchDispatchMode):
    """Lets code run on the meta device that reads grids, positions and masks: whole numbers and truth values are made on the
    CPU, and keep their values; they meet floats as shapes. No two floats are equal: an image is not blank.

    Attributes:
        flops: as torch's counter counts them.
        live, peak: bytes of the tensors that were made and are alive, now and the most so far.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        self._meet(given, made=False)
        out = self._run(func, args, kwargs, any(one.is_meta for one in given))
        if func.overloadpacket is aten._grouped_mm:  # every token's experts; torch's counter does not know it
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        elif count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        self._meet([out] if isinstance(out, torch.Tensor) else tree_leaves(out), made=True)
        return out

    def _run(self, func, args, kwargs, has_shapes):
        if not has_shapes:
            if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "meta":
                return func(*args, **kwargs)
            made = func(*args, **(kwargs | {"device": torch.device("cpu")}))
            return tree_map(lambda one: _shape(one) if torch.is_tensor(one) and one.is_floating_point() else one, made)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("meta")}
        if func is aten.index.Tensor:  # a mask as an index is its places
            masks = [torch.is_tensor(one) and one.dtype == torch.bool and not one.is_meta for one in args[1]]
            places = [one.nonzero().unbind(1) if mask else [one] for one, mask in zip(args[1], masks)]
            args = (args[0], [one for several in places for one in several])
        if func.overloadpacket is aten._grouped_mm:  # has shapes in bfloat16 alone
            return args[0].new_empty((len(args[0]), args[1].shape[-1]))
        out = func(*tree_map(_shape, args), **tree_map(_shape, kwargs))
        equal = func.overloadpacket in (aten.eq, aten.ne)
        return torch.full(out.shape, func.overloadpacket is aten.ne) if equal else out

    def _meet(self, tensors, made):
        for one in tensors:
            if isinstance(one, torch.Tensor) and (storage := one.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = size = storage.nbytes() if made else 0
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._part, storage._cdata)

    def _part(self, key):
        self.live -= self.known.pop(key)


def _shape(one):
    if not isinstance(one, torch.Tensor) or one.is_meta:
        return one
    return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")


class _FusedAttention(TorchFunctionMode):
    """Attention as the kernels of GPUs and CPUs have it, in one piece: on the meta device torch would make all scores. Its FLOPs
    are the two products over the whole square, the causal half that is skipped included, as torch counts them."""

    def __init__(self, shapes):
        self.shapes = shapes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not (args[0].is_meta and args[0].dim() == 4):
            return func(*args, **kwargs)
        query, key, value = args[:3]
        mask = kwargs.get("attn_mask")
        # A mask of truth values becomes one of numbers, for each layer anew.
        numbers = mask is not None and torch.empty(mask.shape, dtype=query.dtype, device="meta")  # noqa: F841
        self.shapes.flops += 2 * query.shape[:3].numel() * key.shape[2] * (query.shape[3] + value.shape[3])
        return query.new_empty((*query.shape[:3], value.shape[3]))


@dataclass(frozen=True)
class Curve:
    """The polynomial through some points, in whole numbers."""

    points: tuple[tuple[int, int], ...]

    def __call__(self, x: int) -> int:
        return round(sum(y * prod(Fraction(x - o, at - o) for o, _ in self.points if o != at) for at, y in self.points))


@dataclass(frozen=True)
class HostCosts:
    """Costs of a host's calls, in place of [`costs.Formulas`], by sizes.

    Attributes:
        row_width: W, the columns of DeepStack included.
        linear_weights: of the decoder's linear layers, which 4 bits would hold.
        tile: FLOPs of a tile, tower and projector.
        chunk: bytes of so many tiles in the tower, with their rows.
        passes, prompt: FLOPs of a prompt's M tokens, with the head for the last one; bytes beside the cache.
        looks, look_bytes: {layer: of the question's look over M tokens}; FLOPs where one row asks.
        look_row: {layer: FLOPs for each token that one more row asks}.
        padding, look_padding: FLOPs for each token that fills the last chunk of linear attention; by the layer of a look.
        steps: per kind of layer (FLOPs of a step, by keys; the most keys; layers). The rest of a step under `rest`.
        cached: per kind of layer (bytes by tokens; the most tokens; layers).
    """

    row_width: int
    linear_weights: int
    tile: int
    chunk: Curve
    passes: Curve
    prompt: Curve
    looks: dict[int, Curve]
    look_bytes: dict[int, Curve]
    look_row: dict[int, int]
    padding: int
    look_padding: dict[int, int]
    rest: int
    steps: list[tuple[Curve, int, int]]
    cached: list[tuple[Curve, int, int]]

    tiles_on_host = True

    def encode_flops(self, num_tiles):
        return num_tiles * self.tile

    def weigh_flops(self, num_tokens, layer, num_rows, num_text):
        M, layer = num_text + num_tokens, self._layer(layer)
        return self.looks[layer](M) + (num_rows - 1) * M * self.look_row[layer] + -M % CHUNK * self.look_padding[layer]

    def pass_flops(self, M):
        return self.passes(M) + -M % CHUNK * self.padding

    def step_flops(self, num_cached):
        return self.rest + sum(number * curve(min(num_cached + 1, most)) for curve, most, number in self.steps)

    def chunk_bytes(self, num_tiles, b, on_gpu):
        return self.chunk(num_tiles)

    def added_bytes(self, N, chunk_size, b):
        return 3 * b * N * self.row_width

    def weigh_bytes(self, M, question, b, on_gpu):
        return max(curve(M) for curve in self.look_bytes.values())

    def pass_bytes(self, M, at_once, b, on_gpu):
        return at_once * self.prompt(M)

    def visual_bytes(self, question, b):
        """What is kept, and the same in the order of the prompt."""
        return 2 * b * self.row_width * sum(question.counts)

    def cache_bytes(self, M, b):
        return sum(number * curve(min(M, most)) for curve, most, number in self.cached)

    def grown_bytes(self, M, at_once, b):
        """The cache, and the largest layer once more, which is copied when a token is added."""
        return at_once * (self.cache_bytes(M, b) + max(curve(min(M, most)) for curve, most, _ in self.cached))

    def _layer(self, layer):
        return layer if layer in self.looks else max(self.looks)


@torch.no_grad()
def shapes_of(config, dtype="auto"):
    """A model of the library as its configuration has it, on the meta device; not quantised, whatever its weights are."""
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None  # as where no kernel was asked for
    dtype = config.dtype or torch.float32 if dtype == "auto" else dtype
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def count_host(model) -> HostCosts:
    """Costs of a host, as its configuration has it: an adapter that is on it is not counted."""
    from ..hosts.modeling import HostModel

    shapes = model
    if model.device.type != "meta":
        with Shapes():
            shapes = HostModel(shapes_of(model.host.config, model.dtype), model.config, model.reader, model.settings)
        shapes.vision_chunk_size = model.vision_chunk_size
    count = _Count(shapes)
    try:
        return count.costs()
    finally:
        for layer in count.decoder.layers:
            del layer.forward


class _Count:
    def __init__(self, model):
        self.model, self.host, self.decoder = model, model.host, model.host.get_decoder()
        layers, types = list(self.decoder.layers), getattr(self.decoder.config, "layer_types", None)
        self.kinds = [
            _kind(layer) + ((types or {idx: None for idx in range(len(layers))})[idx],)
            for idx, layer in enumerate(layers)
        ]
        self.first = {kind: idx for idx, kind in reversed(list(enumerate(self.kinds)))}
        self.numbers = Counter(self.kinds)
        self.shapes, self.of_layer = None, {}
        window = min(getattr(self.decoder.config, "sliding_window", None) or 0, LONGEST)
        self.lengths = [max(LENGTH, 256 * (window // 256 + 1)) * times // 4 for times in (4, 5, 6)]
        for idx, layer in enumerate(layers):
            layer.forward = self._counted(idx, layer.forward)

    def _counted(self, idx, forward):
        def run(*args, **kwargs):
            if self.first[self.kinds[idx]] != idx:
                return args[0]
            before = self.shapes.flops
            out = forward(*args, **kwargs)
            self.of_layer[idx] = self.shapes.flops - before
            return out

        return run

    def _run(self, call, *args, **kwargs) -> tuple[int, int, dict]:
        """(FLOPs beside those of whole layers, bytes that were alive at once, {kind: FLOPs of a layer})."""
        self.of_layer, self.shapes = {}, Shapes()
        with self.shapes, _FusedAttention(self.shapes):
            call(*args, **kwargs)
        of_kinds = {self.kinds[idx]: flops for idx, flops in self.of_layer.items()}
        return self.shapes.flops - sum(of_kinds.values()), self.shapes.peak, of_kinds

    def costs(self) -> HostCosts:
        model, side = self.model, self.model.tile_size
        sizes = (1, 2, 4) if model.vision_chunk_size > 1 else (1, 2)
        tiles = [(T, *self._run(model.project_tiles, torch.full((T, 3, side, side), 127.0))[:2]) for T in sizes]
        passes = {M: self._run(self._read, M) for M in self.lengths}
        odd = LENGTH + 1
        over = {kind: flops - Curve(tuple((M, of[kind]) for M, (_, _, of) in passes.items()))(odd)
                for kind, flops in self._run(self._read, odd)[2].items()}  # fmt: skip
        padding = {kind: flops // (-odd % CHUNK) for kind, flops in over.items()}
        layers = {model.config.importance_layer, *model.config.refinement_layers}
        looks = {layer % len(self.kinds): self._looks(layer % len(self.kinds), passes) for layer in layers}
        rest, steps, cached = self._steps()
        linear = [one for one in self.decoder.modules() if isinstance(one, nn.Linear)]
        return HostCosts(
            row_width=model.row_width,
            linear_weights=sum(one.weight.numel() for one in linear),
            tile=tiles[0][1],
            chunk=Curve(tuple((T, size) for T, _, size in tiles[-2:])),
            passes=Curve(tuple((M, rest_of + self._times(of)) for M, (rest_of, _, of) in passes.items())),
            prompt=Curve(tuple((M, size) for M, (_, size, _) in passes.items())),
            looks={layer: found[0] for layer, found in looks.items()},
            look_bytes={layer: found[1] for layer, found in looks.items()},
            look_row={layer: found[2] for layer, found in looks.items()},
            padding=self._times(padding),
            look_padding={layer: self._times(padding, layer) for layer in looks},
            rest=rest,
            steps=steps,
            cached=cached,
        )

    def _times(self, of_kinds, below=None) -> int:
        """FLOPs of all layers, or of those below one."""
        return sum(of_kinds[kind] for kind in self.kinds[:below])

    def _prompt(self, M, num_after=TEXT_AFTER):
        """(ids, places of its image tokens, their rows)."""
        ids = torch.full((M,), (self.model.image_token_id + 1) % 2)
        where = list(range(TEXT_BEFORE, M - num_after))
        ids[where] = self.model.image_token_id
        return ids, where, torch.empty(len(where), self.model.row_width, dtype=self.model.dtype, device="meta")

    def _read(self, M):
        inputs = self.model.prompt_with(*self._prompt(M), None)[-1]
        self.host(**inputs, use_cache=False, logits_to_keep=1)

    def _looks(self, layer, passes) -> tuple[Curve, Curve, int]:
        """Looks at a layer, read at the first one of its kind: (FLOPs, bytes, FLOPs of a further row and token)."""
        at = self.first[self.kinds[layer]]

        def look(M, num_after):
            ids, _, rows = self._prompt(M, num_after)
            self.model.read_attention(ids, rows, None, layer=at, question_tokens="all")

        one, more = (self._run(look, LENGTH, rows)[0] for rows in (1, 2))
        found = {M: self._run(look, M, TEXT_AFTER) for M in self.lengths}
        row = (more - one) // LENGTH
        flops = {M: found[M][0] - (TEXT_AFTER - 1) * M * row + self._times(passes[M][2], layer) for M in self.lengths}
        return Curve(tuple(flops.items())), Curve(tuple((M, found[M][1]) for M in self.lengths)), row

    def _steps(self):
        """(FLOPs beside the layers, per kind of layer those of a step, and the bytes of what is cached)."""
        flops, sizes, most = [], [], {}
        for M in CACHED:
            cache = DynamicCache(config=self.decoder.config)
            self._run(self._text, 0, M, cache)
            rest, _, of_kinds = self._run(self._text, M, 1, cache)
            flops.append(of_kinds)
            sizes.append({})
            for kind, idx in self.first.items():
                layer = cache.layers[idx] if idx < len(cache.layers) else None
                tensors = [one for one in tree_leaves(vars(layer) if layer else {}) if isinstance(one, torch.Tensor)]
                sizes[-1][kind] = sum(one.numel() * one.element_size() for one in tensors)
                most[kind] = getattr(layer, "sliding_window", None) or 2**62
        counted = [M + 1 for M in CACHED]
        steps, cached = (
            [(Curve(tuple(zip(counted, (one[kind] for one in found)))), most[kind] - less, number)
             for kind, number in self.numbers.items()]
            for found, less in ((flops, 0), (sizes, 1))
        )  # fmt: skip
        return rest, steps, cached

    def _text(self, start, M, cache):
        ids = torch.full((1, M), (self.model.image_token_id + 1) % 2)
        given = {"attention_mask": torch.ones(1, start + M, dtype=torch.long), CACHE: cache}
        if self.model.mrope:
            given["position_ids"] = torch.arange(start, start + M).expand(4, 1, M)
        self.host(input_ids=ids, use_cache=True, logits_to_keep=1, **given)


def _kind(layer) -> tuple:
    """What layers of equal cost have in common: classes, shapes, settings."""
    return tuple(
        (name, type(module), tuple(one.shape for one in module.parameters(recurse=False)),
         tuple(sorted((key, str(value)) for key, value in vars(module).items()
               if isinstance(value, (bool, int, float, str)) and key != "layer_idx")))
        for name, module in layer.named_modules()
    )  # fmt: skip


__all__ = ["Curve", "HostCosts", "Shapes", "count_host"]
