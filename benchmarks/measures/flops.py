"""FLOPs of one question by formula, stage by stage, for both sides: the 7B model fits no counter's machine.

The formula is held against a counter: over a whole question on a small geometry of the same form, and over the 7B towers
on the meta device. As torch counts: a multiplication and an addition are two, attention is the
whole square, element-wise work is nothing. Averages and sums of the k-means and of the merging are nothing, too.

Letters: T tiles, P patches of a tile, N tokens, M tokens of a sequence, D width, R regions.
"""

import torch
from PIL import Image

from ...common.loading import ROOT
from ...compression_uhr_bat import CompressionRules
from ...configuration_uhr_bat import UHRBatConfig
from ...geometry_uhr_bat import shown_patches
from ...modeling_uhr_bat import UHRBatForConditionalGeneration
from ...zooming_uhr_bat import split_tiles
from ...evaluation.choices import REFINEMENT
from .. import meters
from ..compare import Row, expect
from ..images import photograph
from ..sides import ANSWER_TOKENS, SIDES, TEXT_AFTER, TEXT_BEFORE, Meter, ask, build_model, prompt_ids, side_of

# What the question would look at once more at 7B, tokens of each scale after the anchor, up to which decoder layer.
REFINEMENT_7B = ((144, 384, 768), (21, 21, 21))

# The formula


def vision_tower(config, num_tiles, up_to_features=False) -> int:
    """All layers of the tower; ours ends at the one that the features are read from."""
    vision = config.vision_config
    D, P = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    num_layers, patches = vision.num_hidden_layers, 2 * P * 3 * vision.patch_size**2 * D

    def layer(M):
        return 2 * M * 4 * D**2 + 2 * M * 2 * D * vision.intermediate_size + 4 * M**2 * D

    if up_to_features:
        num_layers = config.vision_feature_layer % (num_layers + 1)
    return num_tiles * (patches + num_layers * layer(P + 1))


def projector(config, N) -> int:
    C, D = config.vision_config.hidden_size, config.text_config.hidden_size
    return 2 * N * (C * D + D * D)


def decoder(config, M, num_cached=0) -> int:
    """All layers, for M new tokens behind `num_cached` ones."""
    text = config.text_config
    D, (query, key) = text.hidden_size, attention_widths(config)
    layer = 2 * M * (2 * D * query + 2 * D * key + 3 * D * text.intermediate_size)
    layer += 4 * M * (num_cached + M) * query
    return text.num_hidden_layers * (layer)


def attention_widths(config) -> tuple[int, int]:
    """Width of all heads together, of the queries and of the keys."""
    text = config.text_config
    return text.num_attention_heads * config.head_width, text.num_key_value_heads * config.head_width


def question_rows(config, M, num_rows) -> int:
    """Ours at the importance layer: queries and keys of all rows, and the scores of the question's."""
    text = config.text_config
    query, key = attention_widths(config)
    return 2 * M * text.hidden_size * (query + key) + 2 * num_rows * M * query


def weighing(config, num_tokens, layer, num_rows, num_text) -> int:
    """Ours: the question weighs tokens of the image, in a pass up to a layer that reads one row more than it scores."""
    num_layers, M = config.text_config.num_hidden_layers, num_text + num_tokens
    whole = (layer % num_layers * decoder(config, M) + decoder(config, 1)) // num_layers
    return whole + question_rows(config, M, num_rows)


def reading_layer(config) -> int:
    """Layer at which the question's attention to the anchor is read, of the decoder or of the region focus module."""
    return len(config.focus.layers) - 1 if config.importance_source == "region_focus" else config.importance_layer


def refinement(config, candidates, layers, text_before, text_after) -> int:
    """The passes that refine the importance; at the finest scale the last token asks alone."""
    rows = [text_after] * (len(candidates) - 1) + [1]
    passes = zip(candidates, layers, rows)
    return sum(weighing(config, number, layer, asking, text_before + text_after) for number, layer, asking in passes)


def kmeans(config, sizes) -> int:
    """Distances of every token to every centre, in all iterations."""
    width = config.text_config.hidden_size + 2
    counts = [config.num_regions or budget for budget in config.budgets]
    return sum(config.kmeans_iterations * 2 * N * width * R for N, R in zip(sizes, counts) if N > R)


def head(config, M) -> int:
    return 2 * M * config.text_config.hidden_size * config.text_config.vocab_size


def question_flops(config, text_before, text_after, num_answer_tokens) -> dict[str, dict[str, int]]:
    """{"ours" and "straightforward": {stage: FLOPs}} of one question about one image.

    Args:
        config: geometry and budgets; a square image, so that every token shows it.
        text_before, text_after: text tokens of the prompt, before and after the image.
        num_answer_tokens: tokens that are generated.
    """
    sizes = [height * width for height, width in config.grids]
    M = text_before + sizes[0] + text_after
    num_rows = text_after if config.question_tokens == "all" else 1
    prompt = text_before + sum(map(min, zip(config.budgets, sizes))) + text_after

    project = projector(config, sum(sizes))
    tiles = [(scale // config.tile_size) ** 2 for scale in config.scales]
    steps = sum(decoder(config, 1, prompt + step) + head(config, 1) for step in range(num_answer_tokens - 1))
    same = {"regions": kmeans(config, sizes), "answer": steps}
    return {
        "ours": {
            "encode": vision_tower(config, sum(tiles), up_to_features=True) + project,
            "importance": weighing(config, sizes[0], config.importance_layer, num_rows, text_before + text_after),
            "prefill": decoder(config, prompt) + head(config, 1),
            **same,
        },
        "straightforward": {
            "encode": 2 * (vision_tower(config, sum(tiles)) + project),
            "importance": decoder(config, M),
            "prefill": decoder(config, prompt) + head(config, prompt),
            **same,
        },
    }


def zoomed_stages(config, max_tiles, text_before, text_after, candidates=(), layers=()) -> dict[str, int]:
    """{stage: FLOPs} of ours up to the visual tokens, where a question looks at `max_tiles` tiles of the fixed scales; of a
    square image. `candidates`, `layers`: of the refinement of every scale after the anchor, none by default."""
    P = (config.tile_size // config.patch_size) ** 2
    chosen = split_tiles([(scale // config.tile_size) ** 2 for scale in config.scales], max_tiles)
    num_rows = text_after if config.question_tokens == "all" else 1
    passes = [min(number, tiles * P) for number, tiles in zip(candidates, chosen[1:])]
    return {
        "encode": vision_tower(config, sum(chosen), up_to_features=True) + projector(config, sum(chosen) * P),
        "importance": weighing(config, chosen[0] * P, reading_layer(config), num_rows, text_before + text_after),
        "refinement": refinement(config, passes, layers, text_before, text_after),
        "regions": kmeans(config, [tiles * P for tiles in chosen]),
    }


# Measures


def flop_counts(sizes) -> list[Row]:
    """The 7B geometry at the paper's default budgets, by a formula that is held against a counter."""
    check_formula(sizes)
    config = UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    counted = question_flops(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)
    check_towers(config, counted["straightforward"])
    totals = {name: sum(stages.values()) for name, stages in counted.items()}
    again = totals["ours"] - counted["ours"]["encode"] - counted["ours"]["regions"]
    first, second = totals["straightforward"] / totals["ours"], totals["straightforward"] / again
    numbers = {name: {stage: value / 1e12 for stage, value in counted[name].items()} for name in counted}
    return [
        Row(
            "FLOPs of a question, 7B, budget 3000",
            ">= 1.5x fewer",
            f"{first:.2f}x ({totals['ours'] / 1e12:.0f} against {totals['straightforward'] / 1e12:.0f} TFLOPs)",
            first >= 1.5,
            {"ratio": first, "tflops": numbers},
        ),
        Row(
            "FLOPs of a second question about an encoded image",
            ">= 3.5x fewer",
            f"{second:.2f}x ({again / 1e12:.0f} TFLOPs)",
            second >= 3.5,
            {"ratio": second, "tflops": again / 1e12},
        ),
    ]


def refined(sizes) -> list[Row]:
    """What the refined importance costs beside a question on an encoded image, by a formula held against a counter."""
    side = side_of("ours", "quick")
    config, model = side.model.config, side.model.model
    rules = CompressionRules.of(config, {"refinement": [40, 90, 60], "refinement_layers": [1, 0, 2]})
    image = side.encode(side.preprocess(side.read(photograph(sizes.folder, (400, 400)))))
    ids = prompt_ids(config)[0]
    with torch.no_grad():
        importance = model.estimate_importance(ids, image.anchor_tokens)
        with meters.FlopMeter() as meter:
            model.refine_importance(ids, image, importance, rules)
            counted = meter.get_total_flops()
    formula = refinement(config, rules.refinement, rules.refinement_layers, TEXT_BEFORE, TEXT_AFTER)
    expect(counted == formula, f"refinement: the counter says {counted}, the formula {formula}.")

    rows = []
    for name, folder, (candidates, layers) in (
        ("7B", ROOT / "export" / "uhr_bat_7b", REFINEMENT_7B),
        ("UHR-BAT-Tiny", ROOT, (REFINEMENT["refinement"], REFINEMENT["refinement_layers"])),
    ):
        config = UHRBatConfig.from_pretrained(folder)
        stages = question_flops(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)["ours"]
        again = sum(stages.values()) - stages["encode"] - stages["regions"]
        price = refinement(config, candidates, layers, TEXT_BEFORE, TEXT_AFTER)
        rows.append(
            Row(
                f"FLOPs of the refined importance, {name}, {', '.join(map(str, candidates))} tokens",
                "<= 20 % of a question on an encoded image" if name == "7B" else "",
                f"{100 * price / again:.1f} % ({price / 1e12:.4g} of {again / 1e12:.4g} TFLOPs)",
                price <= 0.2 * again if name == "7B" else None,
                {"tflops": price / 1e12, "of_a_question": price / again},
            )
        )
    return rows


def zoomed(sizes) -> list[Row]:
    """The first question where a quarter of the tiles behind the anchor's is encoded, or an eighth, against the
    straightforward implementation, by a formula that is held against a counter."""
    check_zoomed(sizes)
    config = UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    tiles = [(scale // config.tile_size) ** 2 for scale in config.scales]
    counted = question_flops(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)
    straightforward = sum(counted["straightforward"].values())
    rest = counted["ours"]["prefill"] + counted["ours"]["answer"]
    rows = []
    for part in (4, 8):
        max_tiles = tiles[0] + sum(tiles[1:]) // part
        for name, one, refined in (
            ("the anchor's importance alone", config, ((), ())),
            ("refined importance", config, REFINEMENT_7B),
            ("importance by a region focus module", focused(config), ((), ())),
        ):
            stages = zoomed_stages(one, max_tiles, TEXT_BEFORE, TEXT_AFTER, *refined)
            total = sum(stages.values()) + rest
            rows.append(
                Row(
                    f"FLOPs of the first question, 7B, {max_tiles} of {sum(tiles)} tiles, {name}",
                    ">= 3x fewer",
                    f"{straightforward / total:.2f}x ({total / 1e12:.0f} against {straightforward / 1e12:.0f} TFLOPs)",
                    straightforward >= 3 * total,
                    {"ratio": straightforward / total, "tflops": {key: one / 1e12 for key, one in stages.items()}},
                )
            )
    return rows


def focused(config):
    """The configuration with a region focus module of as many layers as LRS-VQA's, which importance is read from."""
    layers = [layer for layer in (0, 1, 5, 11, 14) if layer < config.text_config.num_hidden_layers]
    changes = {"region_focus": {"layers": layers}, "importance_source": "region_focus"}
    return UHRBatConfig.from_dict({**config.to_dict(), **changes})


def check_zoomed(sizes):
    """Everything up to the visual tokens on the small geometry, with refinement and without, and by a module."""
    side = side_of("ours", "quick")
    image, ids, max_tiles = side.read(photograph(sizes.folder, (400, 400))), prompt_ids(side.model.config), 50
    of_module = build_model(focused(side.model.config)).model
    for model, candidates, layers in (
        (side.model.model, (), ()),
        (side.model.model, (40, 90, 60), (1, 0, 2)),
        (of_module, (), ()),
    ):
        config = model.config
        rules = {"refinement": list(candidates), "refinement_layers": list(layers)}
        pyramids = side.processor(image, max_tiles=max_tiles)
        with torch.no_grad(), meters.FlopMeter() as meter:
            features = model.encode_image(**pyramids)
            model.compress(input_ids=ids, image_features=features, budgets=config.budgets, rules=rules)
            counted = meter.get_total_flops()
        formula = sum(zoomed_stages(config, max_tiles, TEXT_BEFORE, TEXT_AFTER, candidates, layers).values())
        expect(counted == formula, f"zoomed: the counter says {counted}, the formula {formula}.")


def check_formula(sizes):
    """Every stage of a whole question on the small geometry: the formula is what the counter says."""
    path = photograph(sizes.folder, (400, 400))
    for name in SIDES:
        side = side_of(name, "quick")
        config = side.model.config
        expected = question_flops(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)[name]
        with meters.FlopMeter() as meter:
            mark = Meter(meter.get_total_flops)
            ask(side, path, prompt_ids(config), mark)
        counted = {stage: value for stage, value in mark.stages.items() if value}
        expect(counted == expected, f"{name}: the counter says {counted}, the formula {expected}.")


def check_towers(config, expected):
    """The 7B towers on the meta device, two tiles and the prompt with its visual tokens."""
    with torch.device("meta"), torch.no_grad():
        model = UHRBatForConditionalGeneration(config)
        prompt = torch.empty(1, TEXT_BEFORE + sum(config.budgets) + TEXT_AFTER, config.text_config.hidden_size)
        tiles = torch.empty(2, 3, config.tile_size, config.tile_size)
        with meters.FlopMeter() as meter:
            model.model.vision_tower.vision_model(tiles)
            counted = [meter.get_total_flops()]
            model.lm_head(model.model.language_model(inputs_embeds=prompt).last_hidden_state)
            counted.append(meter.get_total_flops() - counted[0])
    formula = [vision_tower(config, 2), expected["prefill"]]
    expect(counted == formula, f"7B on the meta device: the counter says {counted}, the formula {formula}.")


def padding(sizes) -> list[Row]:
    """Tiles that pass the vision tower, of the 228 of the letterboxed square. Quick geometry: the tiles are the same."""
    side, results, met = side_of("ours", "quick"), {}, True
    calls = []
    tower = side.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    tile, scales = side.model.config.tile_size, side.model.config.scales
    for name, size in (("4:3", (640, 480)), ("3:1", (720, 240))):
        calls.clear()
        pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
        side.encode(side.preprocess(Image.fromarray(pixels)))
        grids = [(scale // tile, scale // tile) for scale in scales]
        showing = sum(int(shown_patches((size[1], size[0]), grid).sum()) for grid in grids)
        results[name] = {"encoded": sum(calls), "show the image": showing}
        met &= sum(calls) == showing
    handle.remove()
    text = ", ".join(f"{name}: {counts['encoded']} of 228 encoded" for name, counts in results.items())
    return [Row("Padding-only tiles of a 4:3 and a 3:1 image", "not encoded", text, met, results)]
