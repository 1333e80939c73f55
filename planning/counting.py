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
            if func is aten._to_copy.default and not (kwargs.get("dtype") or args[0].dtype).is_floating_point:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)  # pixels, for NumPy
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
    """Costs of a host's calls, in place of [`costs.Formulas`].

    Attributes:
        row_width: W, the columns of DeepStack included.
        linear_weights: of the decoder's linear layers, which 4 bits would hold.
        tile: FLOPs of a tile, tower and projector.
        chunk: bytes by tiles in the tower, with their rows.
        passes, prompt: of M tokens with the head for the last one, FLOPs and bytes beside the cache.
        padding: FLOPs of each token that fills the last chunk of linear attention.
        looks: {layer: (FLOPs by tokens where `TEXT_AFTER` rows ask, bytes by tokens, padding, FLOPs of a row for a token)}.
        rest: FLOPs of a step beside the layers.
        steps, cached: per kind of layer (FLOPs by keys, or bytes by tokens; the most of them; layers).
    """

    row_width: int
    linear_weights: int
    tile: int
    chunk: Curve
    passes: Curve
    prompt: Curve
    padding: int
    looks: dict[int, tuple[Curve, Curve, int, int]]
    rest: int
    steps: list[tuple[Curve, int, int]]
    cached: list[tuple[Curve, int, int]]
    tiles_on_host = True

    def encode_flops(self, num_tiles):
        return num_tiles * self.tile

    def weigh_flops(self, num_tokens, layer, num_rows, num_text):
        M, (flops, _, padding, row) = num_text + num_tokens, self.looks[layer]
        return flops(M) + (num_rows - TEXT_AFTER) * M * row + -M % CHUNK * padding

    def pass_flops(self, M):
        return self.passes(M) + -M % CHUNK * self.padding

    def pointing_flops(self, num_tokens, num_text):
        return 0

    def step_flops(self, num_cached):
        return self.rest + sum(number * curve(min(num_cached + 1, most)) for curve, most, number in self.steps)

    def chunk_bytes(self, num_tiles, b, on_gpu):
        return self.chunk(num_tiles)

    def added_bytes(self, N, chunk_size, b):
        return 3 * b * N * self.row_width

    def weigh_bytes(self, M, question, b, on_gpu):
        return max(size(M) for _, size, _, _ in self.looks.values())

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


def shapes_of(config, dtype="auto"):
    """A model of the library as its configuration has it, on the meta device; not quantised, whatever its weights are."""
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = None  # as where no kernel was asked for
    dtype = config.dtype or torch.float32 if dtype == "auto" else dtype
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def count_host(model) -> HostCosts:
    """Costs of a host, as its configuration has it: an adapter that is on it is not counted."""
    from ..hosts.modeling import HostModel

    shapes = model
    if model.device.type != "meta":
        with Shapes():
            shapes = HostModel(shapes_of(model.host.config, model.dtype), model.config, model.reader, model.settings)
        shapes.vision_chunk_size, shapes.processor = model.vision_chunk_size, model.processor
    with _Count(shapes) as count:
        return count.costs()


class _Count:
    """Runs of a host on the meta device. Of modules that stand in lists, as layers do, those of one kind that are given the same
    shapes run once, and count as often as they are called."""

    def __init__(self, model):
        self.model, self.host, self.decoder = model, model.host, model.host.get_decoder()
        self.shapes, self.seen, self.of_kind, self.whole = None, {}, {}, None
        lists = [one for one in self.host.modules() if isinstance(one, nn.ModuleList)]
        self.kinds = {module: _kind(module) for modules in lists for module in modules}
        window = min(getattr(self.decoder.config, "sliding_window", None) or 0, LONGEST)
        self.lengths = [max(LENGTH, 256 * (window // 256 + 1)) * times // 4 for times in (4, 5, 6)]

    def __enter__(self):
        for module in self.kinds:
            module.forward = self._once(module, module.forward)
        return self

    def __exit__(self, *error):
        for module in self.kinds:
            del module.forward

    def _once(self, module, forward):
        def run(*args, **kwargs):
            given = tree_leaves((args, kwargs))
            shapes = tuple((one.shape, one.dtype) if torch.is_tensor(one) else type(one) for one in given)
            key = self.kinds[module], shapes, str([one for one in given if isinstance(one, (bool, int, float, str))])
            if key in self.seen and module is not self.whole:
                flops, shape, dtype = self.seen[key]
                self.shapes.flops += flops
                self.of_kind[key[0]] = flops
                return torch.empty(shape, dtype=dtype, device="meta")
            before = self.shapes.flops
            out = forward(*args, **kwargs)
            self.of_kind[key[0]] = self.shapes.flops - before
            if torch.is_tensor(out):
                self.seen[key] = self.shapes.flops - before, out.shape, out.dtype
            return out

        return run

    def run(self, call, *args, whole=None, **kwargs) -> tuple[int, int]:
        """(FLOPs, bytes that were alive at once) of a call. `whole`: a layer that runs itself."""
        self.seen, self.whole, self.shapes = {}, whole, Shapes()
        with self.shapes, _FusedAttention(self.shapes):
            call(*args, **kwargs)
        return self.shapes.flops, self.shapes.peak

    def costs(self) -> HostCosts:
        model, side = self.model, self.model.tile_size
        sizes = (2, 4) if model.vision_chunk_size > 1 else (1,)
        tiles = [self.run(model.project_tiles, torch.full((T, 3, side, side), 127.0)) for T in sizes]
        passes, prompt, padding = self._curves(self._read)
        looks = {}
        for layer in {model.config.importance_layer, *model.config.refinement_layers}:
            looked = {"layer": layer % len(self.decoder.layers), "whole": self.decoder.layers[layer]}
            flops, size, padding_of = self._curves(self._look, **looked)
            one = self.run(self._look, LENGTH, num_rows=1, **looked)[0]
            looks[layer] = flops, size, padding_of, (flops(LENGTH) - one) // (LENGTH * (TEXT_AFTER - 1))
        linear = [one for one in self.decoder.modules() if isinstance(one, nn.Linear)]
        return HostCosts(
            model.row_width, sum(one.weight.numel() for one in linear), tiles[0][0] // sizes[0],
            Curve(tuple((T, size) for T, (_, size) in zip(sizes, tiles))), passes, prompt, padding, looks, *self._steps(),
        )  # fmt: skip

    def _curves(self, call, **options) -> tuple:
        """(FLOPs by tokens, bytes by tokens, FLOPs of each token that fills the last chunk of linear attention)."""
        found = [(M, *self.run(call, M, **options)) for M in self.lengths]
        flops, size = (Curve(tuple((one[0], one[part]) for one in found)) for part in (1, 2))
        return flops, size, (self.run(call, LENGTH + 1, **options)[0] - flops(LENGTH + 1)) // (CHUNK - 1)

    def _prompt(self, M, num_after=TEXT_AFTER):
        """(ids, places of its image tokens, their rows)."""
        ids = torch.full((M,), (self.model.image_token_id + 1) % 2)
        where = list(range(TEXT_BEFORE, M - num_after))
        ids[where] = self.model.image_token_id
        return ids, where, torch.empty(len(where), self.model.row_width, dtype=self.model.dtype, device="meta")

    def _read(self, M):
        inputs = self.model.prompt_with(*self._prompt(M), None)[-1]
        self.host(**inputs, use_cache=False, logits_to_keep=1)

    def _look(self, M, layer, num_rows=TEXT_AFTER):
        ids, _, rows = self._prompt(M, num_rows)
        self.model.read_attention(ids, rows, None, layer=layer, question_tokens="all")

    def _steps(self) -> tuple:
        """(FLOPs of a step beside the layers, per kind of layer those of a step, and the bytes of what is cached)."""
        layers, steps, cached = list(self.decoder.layers), {}, {}
        first = {self.kinds[layer]: idx for idx, layer in reversed(list(enumerate(layers)))}
        number = Counter(self.kinds[layer] for layer in layers)
        for M in CACHED:
            cache = DynamicCache(config=self.decoder.config)
            self.run(self._text, 0, M, cache)
            flops = self.run(self._text, M, 1, cache)[0]
            for kind, idx in first.items():
                layer = cache.layers[idx] if idx < len(cache.layers) else None
                size = sum(one.nbytes for one in tree_leaves(vars(layer) if layer else ()) if torch.is_tensor(one))
                most = getattr(layer, "sliding_window", None) or 2**62
                steps.setdefault((kind, most), []).append((M + 1, self.of_kind[kind]))
                cached.setdefault((kind, most - 1), []).append((M + 1, size))
        rest = flops - sum(number[kind] * self.of_kind[kind] for kind in first)
        of_kinds = (
            [(Curve(tuple(points)), most, number[kind]) for (kind, most), points in one.items()]
            for one in (steps, cached)
        )
        return rest, *of_kinds

    def _text(self, start, M, cache):
        ids = torch.full((1, M), (self.model.image_token_id + 1) % 2)
        given = {"attention_mask": torch.ones(1, start + M, dtype=torch.long), CACHE: cache}
        if self.model.mrope:
            given["position_ids"] = torch.arange(start, start + M).expand(4, 1, M)
        self.host(input_ids=ids, use_cache=True, logits_to_keep=1, **given)


def _kind(module) -> str:
    """What modules of equal cost have in common: classes, shapes, settings."""
    found = []
    for name, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str)) and k != "layer_idx"}
        found.append((name, type(part), settings, [one.shape for one in part.parameters(recurse=False)]))
    return str(found)


__all__ = ["Curve", "HostCosts", "Shapes", "count_host"]
