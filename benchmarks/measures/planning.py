"""What a plan says against what a question takes: peaks of memory by stage, and shapes and bytes of the 7B model.

Letters: N tokens, D width of the decoder.
"""

from dataclasses import replace

import torch
from PIL import Image

from ...common import asking
from ...common.loading import ROOT
from ...configuration_uhr_bat import UHRBatConfig
from ...geometry_uhr_bat import patch_centres
from ...modeling_outputs_uhr_bat import CACHE
from ...modeling_uhr_bat import UHRBatForConditionalGeneration
from ...planning import plan
from ...planning.costs import Formulas, attention_widths, question_flops, question_of, region_counts
from ...token_clustering_uhr_bat import CLUSTERINGS
from ...token_compression_uhr_bat import select_tokens
from .. import meters, sides
from ..compare import Row, expect

# Stages of a plan that one call of the model goes through.
CALLS = {
    "preprocess": ("preprocess",),
    "encode": ("encode",),
    "compress": ("importance", "regions", "selection"),
    "generate": ("prefill", "answer"),
}
WITHIN = 0.15


def _config(vision_width, width, scales, budgets, **fields) -> UHRBatConfig:
    """Towers of two layers that are so wide, tiles of 336 px."""
    vision = {"hidden_size": vision_width, "intermediate_size": 4 * vision_width, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 336, "patch_size": 14, "projection_dim": 64}
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 4, "vocab_size": 1024, "eos_token_id": None, "max_position_embeddings": 32768}
    return UHRBatConfig(
        vision_config=vision, text_config=text, scales=scales, budgets=budgets, image_token_index=1023,
        kmeans_iterations=2, **fields,
    )  # fmt: skip


# Name: (configuration, dtype, (height, width) of the image). Each is large in another term.
GEOMETRIES = {
    "pixel values and the image": (
        lambda: _config(64, 64, [672, 1344, 2688, 4032], [80, 320, 600, 2000], num_regions=100), torch.float32, (8000, 8000)
    ),
    "tokens of all scales": (
        lambda: _config(64, 1024, [672, 1344, 2688], [80, 320, 600], num_regions=100), torch.float32, (2000, 2000)
    ),
    "tokens of all scales, bfloat16, 4:3": (
        lambda: _config(64, 1536, [672, 1344, 2688], [80, 320, 600], num_regions=100), torch.bfloat16, (1500, 2000)
    ),
    "the tower's chunk": (
        lambda: _config(512, 64, [672, 1344], [80, 320], num_regions=100), torch.float32, (1500, 1500)
    ),
    "a long prompt": (
        lambda: _config(64, 768, [672, 1344, 2016], [2000, 4000, 9000], region_method="grid"), torch.float32, (1500, 1500)
    ),
}  # fmt: skip
# Questions that are answered at once about one image, where they are several.
AT_ONCE = {"eight questions at once": 8}
GEOMETRIES["eight questions at once"] = (
    lambda: _config(64, 512, [672, 1344], [400, 800], region_method="grid"), torch.float32, (1500, 1500)
)  # fmt: skip
QUICK = {"quick": (sides.quick_config, torch.float32, (400, 300))}


def peaks_of(name, quick=False) -> dict:
    """{call: bytes beside the libraries}, planned and measured, of a question about an image, inside a process."""
    make, dtype, (height, width) = (QUICK if quick else GEOMETRIES)[name]
    _run(sides.build_model(sides.quick_config()), (200, 200), lambda call: None)  # what first calls set up
    before = meters.reset_peak()
    measured = {}

    def mark(call):
        measured[call] = meters.peak_bytes() - before
        meters.reset_peak()

    model = sides.build_model(make()).to(dtype)
    meters.reset_peak()
    at_once = AT_ONCE.get(name, 1)
    _run(model, (height, width), mark, at_once)
    text = {"text_before": sides.TEXT_BEFORE, "text_after": sides.TEXT_AFTER, "num_answer_tokens": sides.ANSWER_TOKENS}
    planned = plan(model, (height, width), seconds=False, num_questions=at_once, **text)
    return _compared(planned, measured)


def peaks_on_gpu() -> dict:
    """The same of the 7B geometry in bfloat16, of the GPU's memory."""
    device = torch.device("cuda")
    model, measured = sides.model_on(device, quick=False), {}

    def mark(call):
        measured[call] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.reset_peak_memory_stats(device)
    _run(model, (8500, 8500), mark)
    measured.pop("preprocess")  # is the host's
    return _compared(plan(model, (8500, 8500), seconds=False), measured)


def _compared(plan, measured) -> dict:
    planned = {call: [sum(plan.memory[stage].values()) for stage in CALLS[call]] for call in measured}
    return {call: {"planned": max(planned[call]), "measured": measured[call]} for call in measured}


@torch.no_grad()
def _run(model, size, mark, at_once=1):
    """Questions about a made-up image, whose pixel values and tokens are held to the end."""
    side, (height, width) = sides.Ours(model), size
    image = Image.effect_noise((width, height), 64).convert("RGB")
    inputs = side.preprocess(image).to(model.device)
    mark("preprocess")
    del image
    features = asking.encode(model, inputs)
    mark("encode")
    ids = sides.prompt_ids(model.config).to(model.device).repeat(at_once, 1)
    compressed = model.compress(input_ids=ids, image_features=features * at_once)
    mark("compress")
    inputs = dict(zip(asking.PROMPT, model.expand_placeholders(ids, torch.ones_like(ids), compressed)))
    asking.generate(model, inputs, compressed, max_new_tokens=sides.ANSWER_TOKENS)
    mark("generate")


def planned_memory(sizes) -> list[Row]:
    """The formula of a plan against the peak of a process, beside the libraries; a process for each geometry."""
    rows = []
    for name in QUICK if sizes.quick else GEOMETRIES:
        with sides.one_process() as process:
            rows.append(
                _row(f"Planned memory, CPU, large in {name}", process.submit(peaks_of, name, sizes.quick).result())
            )
    if torch.cuda.is_available() and not sizes.quick:
        rows.append(_row(f"Planned memory, 7B, bfloat16, {torch.cuda.get_device_name()}", peaks_on_gpu()))
    return rows


def _row(name, peaks) -> Row:
    """Of the whole question; the calls are in the numbers."""
    planned, measured = (max(call[key] for call in peaks.values()) for key in ("planned", "measured"))
    off = planned / measured - 1
    text = f"{planned / 1e6:,.0f} MB planned, {measured / 1e6:,.0f} MB measured, {100 * off:+.1f} %"
    return Row(name, "within 15 %", text, abs(off) <= WITHIN, {"calls": peaks})


# ---- The 7B model without its weights --------------------------------------------------------------------------------


class _Walked(UHRBatForConditionalGeneration):
    """On the meta device, with ids on the CPU: where placeholders are is a value."""

    def __init__(self, config):
        super().__init__(config)
        self.model.find_placeholders = lambda input_ids, inputs_embeds=None: input_ids == config.image_token_id


@torch.no_grad()
def walk(config, num_answer_tokens=3) -> tuple[dict, dict, dict]:
    """Every stage of a question about a square image on the meta device, which knows shapes and no values, in bfloat16.

    Which tokens stay is a value: the selection runs on the CPU, on made-up importance and regions.

    Returns:
        ({name: shape}, {stage: FLOPs}, {name: bytes})
    """
    question = replace(question_of(config, (max(config.scales),) * 2), num_answer_tokens=num_answer_tokens)
    ids = sides.prompt_ids(config)[0]
    D, flops, shapes, counted = config.text_config.hidden_size, {}, {}, 0
    with torch.device("meta"), meters.FlopMeter() as meter:
        model = _Walked(config).to(torch.bfloat16).eval()

        def mark(stage):
            nonlocal counted
            flops[stage], counted = meter.get_total_flops() - counted, meter.get_total_flops()

        tokens = []
        for scale_idx, (N, T) in enumerate(zip(question.available, question.tiles)):
            tiles, chosen = torch.empty(T, 3, config.tile_size, config.tile_size), torch.arange(T)
            projected = model.model._project_in_chunks(tiles, chosen, desc="").flatten(0, 1)
            added = config.scale_embedding_additions
            tokens.append(model.model._add_scale(projected, config.scales[scale_idx], torch.arange(N), added))
        mark("encode")
        shapes["tokens"] = [list(rows.shape) for rows in tokens]

        text = torch.empty(len(ids), D, dtype=torch.bfloat16)
        shapes["importance"] = list(model.estimate_importance(ids, tokens[0], text).shape)
        mark("importance")

        shapes["regions"] = []
        for rows, grid, R in zip(tokens, config.grids, region_counts(config, question)):
            coords, norms = patch_centres(torch.arange(len(rows)), grid), torch.empty(len(rows))
            regions = CLUSTERINGS["kmeans"](rows, norms, coords, R, config.kmeans_iterations, None) if R else norms
            shapes["regions"].append(list(regions.shape))
        mark("regions")

        embeds = torch.empty(1, question.prompt, D, dtype=torch.bfloat16)
        output = model.model.language_model(inputs_embeds=embeds, use_cache=True)
        shapes["scores"] = list(model.lm_head(output.last_hidden_state[:, -1:]).shape)
        mark("prefill")
        for _ in range(num_answer_tokens - 1):
            step = {"inputs_embeds": embeds[:, :1], "use_cache": True, CACHE: output[CACHE]}
            output = model.model.language_model(**step)
            model.lm_head(output.last_hidden_state)
        mark("answer")
        layers = output[CACHE].layers
        cached = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        shapes["keys of a layer"] = list(layers[0].keys.shape)

    generator = torch.Generator().manual_seed(0)
    shapes["visual tokens"] = []
    for N, R, count in zip(question.available, region_counts(config, question), question.counts):
        regions = torch.randint(max(R, 1), (N,), generator=generator)
        slots = select_tokens(torch.rand(N, generator=generator), regions, count)
        shapes["visual tokens"].append([int(slots.max()) + 1, D])

    def size(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    held = {"weights": size((*model.parameters(), *model.buffers())), "tokens": size(tokens), "KV cache": size(cached)}
    return shapes, flops, held


def walked(sizes) -> list[Row]:
    """The 7B model on the meta device: its shapes, and its FLOPs and bytes against the formulas, to the last one."""
    config = sides.quick_config() if sizes.quick else UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    config.kmeans_iterations = 2  # each the same
    shapes, flops, held = walk(config)
    question = replace(question_of(config, (max(config.scales),) * 2), num_answer_tokens=3)
    expected = {stage: number for stage, number in question_flops(config, question).items() if stage in flops}
    expect(flops == expected, f"FLOPs on the meta device are {flops}, the formula says {expected}.")
    D, N, R = config.text_config.hidden_size, question.available, question.counts
    heads = config.text_config.num_key_value_heads
    formulas = {
        "tokens": [[number, D] for number in N],
        "importance": [N[0]],
        "regions": [[number] for number in N],
        "visual tokens": [[number, D] for number in R],
        "scores": [1, 1, config.text_config.vocab_size],
        "keys of a layer": [1, heads, question.prompt + 2, attention_widths(config)[1] // heads],
    }
    expect(shapes == formulas, f"Shapes on the meta device are {shapes}, and should be {formulas}.")
    cache = Formulas(config).cache_bytes(question.prompt + 2, 2)
    expect(
        (held["tokens"], held["KV cache"]) == (2 * D * sum(N), cache),
        f"Bytes on the meta device are {held}, the formula says {2 * D * sum(N)} of tokens and {cache} of cache.",
    )
    result = ", ".join(f"{name} {number / 1e9:.2f} GB" for name, number in held.items())
    name = f"7B on the meta device, {sum(N):,} tokens, {sum(R):,} kept"
    goal = "shapes, FLOPs and bytes of the formulas"
    return [Row(name, goal, f"{result}, all the same", True, {"shapes": shapes, "flops": flops, "bytes": held})]
