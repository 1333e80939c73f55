"""FLOPs of one question by formula (`planning/costs.py`), for both sides: the 7B model fits no counter's machine.

The formula is held against a counter: over a whole question on a small geometry of the same form, and over the 7B towers
on the meta device.
"""

import torch
from PIL import Image

from ...common.loading import ROOT
from ...configuration_uhr_bat import UHRBatConfig
from ...evaluation.rows import REFINEMENT
from ...geometry_uhr_bat import shown_patches
from ...modeling_uhr_bat import UHRBatForConditionalGeneration
from ...planning import costs
from ...token_rules_uhr_bat import CompressionRules
from .. import meters
from ..compare import Row, expect
from ..images import photograph
from ..sides import ANSWER_TOKENS, SIDES, TEXT_AFTER, TEXT_BEFORE, Meter, ask, build_model, prompt_ids, side_of

# What the question would look at once more at 7B, tokens of each scale after the anchor, up to which decoder layer.
REFINEMENT_7B = ((144, 384, 768), (21, 21, 21))


def flops_of_sides(config, text_before, text_after, num_answer_tokens) -> dict[str, dict[str, int]]:
    """{"ours" and "straightforward": {stage: FLOPs}} of one question about one square image; without a refinement.

    Args:
        config: geometry and budgets.
        text_before, text_after: text tokens of the prompt, before and after the image.
        num_answer_tokens: tokens that are generated.
    """
    text = {"text_before": text_before, "text_after": text_after, "num_answer_tokens": num_answer_tokens}
    question = costs.question_of(config, (max(config.scales),) * 2, **text)
    ours = costs.question_flops(config, question)
    ours.pop("refinement", None)
    sizes, num_tiles = question.available, sum(question.tiles)
    of_all_tiles = costs.tower_flops(config, num_tiles) + costs.projector_flops(config, sum(sizes))
    return {
        "ours": ours,
        "straightforward": {
            "encode": 2 * of_all_tiles,
            "importance": costs.decoder_flops(config, question.num_text + sizes[0]),
            "prefill": costs.decoder_flops(config, question.prompt) + costs.head_flops(config, question.prompt),
            "regions": ours["regions"],
            "answer": ours["answer"],
        },
    }


def zoomed_stages(config, max_tiles, text_before, text_after, candidates=(), layers=()) -> dict[str, int]:
    """{stage: FLOPs} of ours up to the visual tokens, where a question looks at `max_tiles` tiles of the fixed scales; of a
    square image. `candidates`, `layers`: of the refinement of every scale after the anchor, none by default."""
    config = changed(config, refinement=list(candidates), refinement_layers=list(layers))
    text = {"text_before": text_before, "text_after": text_after}
    question = costs.question_of(config, (max(config.scales),) * 2, max_tiles=max_tiles, **text)
    flops = costs.question_flops(config, question)
    return {stage: number for stage, number in flops.items() if stage not in ("prefill", "answer")}


# Measures


def flop_counts(sizes) -> list[Row]:
    """The 7B geometry at the paper's default budgets, by a formula that is held against a counter."""
    check_formula(sizes)
    config = UHRBatConfig.from_pretrained(ROOT / "export" / "uhr_bat_7b")
    counted = flops_of_sides(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)
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


def refinement(config, candidates, layers) -> int:
    """The passes that refine the importance; at the finest scale the last token asks alone."""
    rows = [TEXT_AFTER] * (len(candidates) - 1) + [1]
    return sum(
        costs.weighing_flops(config, *of_scale, TEXT_BEFORE + TEXT_AFTER) for of_scale in zip(candidates, layers, rows)
    )


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
    formula = refinement(config, rules.refinement, rules.refinement_layers)
    expect(counted == formula, f"refinement: the counter says {counted}, the formula {formula}.")

    rows = []
    for name, folder, (candidates, layers) in (
        ("7B", ROOT / "export" / "uhr_bat_7b", REFINEMENT_7B),
        ("UHR-BAT-Tiny", ROOT, (REFINEMENT["refinement"], REFINEMENT["refinement_layers"])),
    ):
        config = UHRBatConfig.from_pretrained(folder)
        stages = flops_of_sides(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)["ours"]
        again = sum(stages.values()) - stages["encode"] - stages["regions"]
        price = refinement(config, candidates, layers)
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
    counted = flops_of_sides(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)
    straightforward = sum(counted["straightforward"].values())
    rest = counted["ours"]["prefill"] + counted["ours"]["answer"]
    tiny = UHRBatConfig.from_pretrained(ROOT)
    # The same share of the decoder's layers comes before a look: 7 of 28 where it is 1 of 4.
    times = config.text_config.num_hidden_layers // tiny.text_config.num_hidden_layers
    shallow = changed(config, importance_layer=times * tiny.importance_layer)
    shallow_layers = [times * layer for layer in tiny.refinement_layers]
    rows = []
    for part in (4, 8):
        max_tiles = tiles[0] + sum(tiles[1:]) // part
        for name, priced, refined in (
            ("the anchor's importance alone", config, ((), ())),
            ("refined importance", config, REFINEMENT_7B),
            ("the anchor's importance alone, read as deep as by UHR-BAT-Tiny", shallow, ((), ())),
            ("refined importance, read as deep as by UHR-BAT-Tiny", shallow, (REFINEMENT_7B[0], shallow_layers)),
            ("importance by a region focus module", focused(config), ((), ())),
        ):
            stages = zoomed_stages(priced, max_tiles, TEXT_BEFORE, TEXT_AFTER, *refined)
            total = sum(stages.values()) + rest
            rows.append(
                Row(
                    f"FLOPs of the first question, 7B, {max_tiles} of {sum(tiles)} tiles, {name}",
                    ">= 3x fewer",
                    f"{straightforward / total:.2f}x ({total / 1e12:.0f} against {straightforward / 1e12:.0f} TFLOPs)",
                    straightforward >= 3 * total,
                    {
                        "ratio": straightforward / total,
                        "tflops": {key: number / 1e12 for key, number in stages.items()},
                    },
                )
            )
    return rows


def focused(config):
    """The configuration with a region focus module of as many layers as LRS-VQA's, which importance is read from."""
    layers = [layer for layer in (0, 1, 5, 11, 14) if layer < config.text_config.num_hidden_layers]
    return changed(config, region_focus={"layers": layers}, importance_source="region_focus")


def changed(config, **changes):
    """A copy of the configuration with other values for some fields."""
    return UHRBatConfig.from_dict({**config.to_dict(), **changes})


def check_zoomed(sizes):
    """Everything up to the visual tokens on the small geometry, with refinement and without, and by a module."""
    side = side_of("ours", "quick")
    image, ids, max_tiles = side.read(photograph(sizes.folder, (400, 400))), prompt_ids(side.model.config), 50
    of_module = build_model(focused(side.model.config)).model
    shallow = build_model(changed(side.model.config, importance_layer=1)).model
    for model, candidates, layers in (
        (side.model.model, (), ()),
        (side.model.model, (40, 90, 60), (1, 0, 2)),
        (shallow, (40, 90, 60), (1, 0, 2)),
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
        expected = flops_of_sides(config, TEXT_BEFORE, TEXT_AFTER, ANSWER_TOKENS)[name]
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
    formula = [costs.tower_flops(config, 2), expected["prefill"]]
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
