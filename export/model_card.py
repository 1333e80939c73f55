"""The model card, README.md, of an exported folder: what it is, how to ask it, and where its numbers come from."""

import re
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from uhr_bat.budgets_uhr_bat import is_one_budget
from uhr_bat.configuration_uhr_bat import QWEN2_7B, UHRBatConfig

from .checkpoint_files import read_json

CARD = """---
{front_matter}
---

# UHR-BAT

UHR-BAT answers questions about ultra-high-resolution remote-sensing images under a fixed budget of visual tokens. The
image is read at {num_scales} scales, the question decides by its attention which regions matter, and of every scale
exactly its budget of tokens reaches the decoder: important ones as they are, the rest of a region merged into one.

Paper: *UHR-BAT: Budget-Aware Token Compression Vision-Language model for Ultra-High-Resolution Remote Sensing*
(ICML 2026, arXiv:2604.13565). This folder was exported from weights of {origin}.

| Part | Here |
|---|---|
| vision tower | {vision_name}, {vision_layers} layers, width {vision_width}, tiles of {tile} px in patches of {patch} px |
| decoder | {text_name}, {text_layers} layers, width {text_width}, {vocab_size} rows in the vocabulary |
| weights | {num_parameters:,} parameters, {dtype} |

## Quick start

transformers 5.10.4 or newer, below 6.{tokenizer_note}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = "{model_id}"{model_id_note}
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(model_id, trust_remote_code=True, dtype="auto", device_map="auto")

question = [{{"type": "image", "path": "image.jpg"}}, {{"type": "text", "text": "What is moored at the pier?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=256)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

## Budgets

| Scale | Tiles | Tokens of the scale | Budget |
|---|---|---|---|
{budget_rows}
| all | {all_tiles} | {all_tokens} | {all_budgets} |

The budgets are those of one prompt, shared by its images; `processor(..., budgets=[...])` sets others for one call, one
number per scale, never fewer at a finer one. An answer costs the decoder the budget and the text, whatever the image.
{budget_note}
## Results

The paper's own figures, for its 7B model. They were not measured with this folder, and say nothing about a model of
another size or with other training.

| Benchmark | Measure | UHR-BAT (paper) |
|---|---|---|
| XLRS-Bench (Table 1) | weighted average | 44.0 |
| RSHR-Bench (Table 2) | perception / reasoning / all | 29.2 / 45.0 / 34.8 |
| MME-RealWorld-RS (Table 3) | position / color / count | 44.00 / 42.00 / 14.00 |
| MME-RealWorld-RS (Table 3) | average | 33.33 |

The paper gives these budgets for them (appendix B): 180, 1320, 1600 and 8000 tokens on XLRS-Bench, 80, 320, 1600 and
4000 on the other two. Of 131,328 input tokens it keeps 4k at 267.68 TFLOPs and 20.93 s a sample, 12k at 374.24 TFLOPs
and 22.79 s (Table 4).

## Limits

- An object smaller than a patch at the finest scale ({finest} px a side for the whole image) can be invisible, and
  the answer cannot see what is not among the kept tokens. Ask again with a larger budget if a detail matters.
- Counting is weak: 14.00 % in the paper's Table 3.
- The paper fine-tunes on 10,000 image-text pairs. Images and languages unlike those are untested.
- Answers can be wrong without a sign of it: no ground for decisions about people or safety without a human check.
{limits}
## Where this model follows the paper and where the released code

A checkpoint keeps the rules that it was trained with. They stand in `config.json`.

| Point | Paper | Released code | This folder |
|---|---|---|---|
{deviation_rows}

Where label maps are handed in, they take the place of clustering. Budgets of a prompt are shared by its images, with an
importance pass for each. Ties are broken by index: the same input gives the same tokens.

## Licence

The code in this folder is under the Apache License 2.0, see `LICENSE`. The weights: {license}{license_note}.

## Citation

```bibtex
@inproceedings{{dang2026uhrbat,
  title={{UHR-BAT: Budget-Aware Token Compression Vision-Language model for Ultra-High-Resolution Remote Sensing}},
  author={{Dang, Yunkai and Dai, Minxin and Yang, Yuekun and Li, Zhangnan and Li, Wenbin and Miao, Feng and Gao, Yang}},
  booktitle={{International Conference on Machine Learning (ICML)}},
  year={{2026}}
}}
```
"""

TAGS = ["remote-sensing", "ultra-high-resolution", "token-compression", "visual-question-answering", "custom_code"]
LONGVA = "lmms-lab/LongVA-7B"
PARTS = {
    "clip_vision_model": "CLIP",
    "siglip_vision_model": "SigLIP",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "llama": "Llama",
}


def write_model_card(
    path, config: UHRBatConfig, origin, repository, num_parameters, license, base_models, limits, has_tokenizer
):
    """README.md of a model folder.

    Args:
        path: the file.
        config: the model's configuration.
        origin: what the weights were before, in words.
        repository: its name on the Hub, or None: the quick start then loads the folder that it lies in.
        num_parameters: number of weights.
        license: identifier of the Hub, "unknown" where nobody stated one.
        base_models: repositories that the weights come from.
        limits: more of them, a sentence each.
        has_tokenizer: whether the folder holds one.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=license,
        base_model=base_models or None,
        tags=TAGS,
    )
    tiles = [(scale // config.tile_size) ** 2 for scale in config.scales]
    tokens = [height * width for height, width in config.grids]
    one_budget = is_one_budget(config.budgets)
    budgets = ["of all scales"] * len(tiles) if one_budget else [f"{budget:,}" for budget in config.budgets]
    rows = zip(config.scales, tiles, tokens, budgets)
    recorded = config.scale_embedding_form != "per_scale"
    budget_note = "" if recorded else (
        "\nThe released layout does not record budgets: these are the paper's (appendix A).\n"
    )  # fmt: skip
    vision, text = config.vision_config, config.text_config
    card = CARD.format(
        front_matter=data.to_yaml(),
        num_scales=len(config.scales),
        origin=origin,
        vision_name=PARTS[vision.model_type],
        text_name=PARTS[text.model_type],
        vision_layers=vision.num_hidden_layers,
        vision_width=vision.hidden_size,
        tile=config.tile_size,
        patch=config.patch_size,
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        vocab_size=f"{text.vocab_size:,}",
        num_parameters=num_parameters,
        dtype=str(config.dtype).removeprefix("torch."),
        model_id=repository or ".",
        model_id_note="" if repository else "  # this folder, or its name on the Hub",
        tokenizer_note="" if has_tokenizer else (
            "\n\n**The checkpoint held no tokenizer, and neither does this folder. Before you use it, add the files\n"
            "of the one that it was trained with, with `<image>` as a special token.**"
        ),
        budget_rows="\n".join(f"| {s} px | {t} | {n:,} | {b} |" for s, t, n, b in rows),
        all_tiles=sum(tiles),
        all_tokens=f"{sum(tokens):,}",
        all_budgets=f"{config.budgets if one_budget else sum(config.budgets):,}",
        budget_note=budget_note,
        finest=config.scales[-1],
        limits="".join(f"- {limit}\n" for limit in limits),
        license=license,
        license_note=", as the checkpoint did not state it: ask who trained them" if license == "unknown" else "",
        deviation_rows="\n".join(f"| {' | '.join(row)} |" for row in deviations(config)),
    )  # fmt: skip
    path.write_text(card, encoding="utf-8")


def deviations(config: UHRBatConfig) -> list[tuple[str, str, str, str]]:
    """(point, paper, released code, this configuration) wherever the first two differ."""
    additions = {0: "never", 1: "once", 2: "twice"}[config.scale_embedding_additions]
    layer = config.importance_layer
    regions = {"none": "none: top-k by importance", "kmeans": "k-means", "birch": "BIRCH", "grid": "a regular grid"}
    regions = regions[config.region_method]
    k = config.num_regions or "the budget of the scale"
    return [
        ("question tokens (eq. 2)", "mean over the question", "the last prompt token",
         {"all": "mean over all text after the image", "last": "the last prompt token"}[config.question_tokens]),
        ("importance layer", "a fixed layer", "the last", "the last" if layer == -1 else f"layer {layer}"),
        ("threshold (eq. 9)", "importance ≥ mean", "importance > mean",
         {"ge": "importance ≥ mean", "gt": "importance > mean"}[config.threshold]),
        ("scale embedding (eq. 5)", "one table over the whole scale, and a vector per scale",
         "a table per scale, repeated for every tile",
         "a table per scale, repeated for every tile" if config.scale_embedding_form == "per_scale"
         else "one table over the whole scale, and a vector per scale"),
        ("added to the selected tokens", "once", "twice, or never if switched off", additions),
        ("regions without label maps", "k-means, k = 600", "top-k by importance, or k-means with k = budget",
         regions if config.region_method == "none" else f"{regions}, k = {k}"),
        ("coordinates of k-means (eq. 13)", "over the whole image", "inside each tile",
         {"scale": "over the whole image", "tile": "inside each tile"}[config.coord_frame]),
        ("every region keeps a token", "claimed, not ensured by eq. 12", "no",
         "yes" if config.coverage else "not ensured"),
        ("after the selection", "nothing", "a two-layer MLP", "a two-layer MLP" if config.token_mlp else "nothing"),
        ("tokens of the letterbox", "not stated", "can be chosen",
         "never chosen" if config.mask_padding else "can be chosen"),
    ]  # fmt: skip


def read_provenance(folder: Path, config: UHRBatConfig) -> tuple[str, list[str]]:
    """Licence and base models as far as a checkpoint states them: in its own card, else by its towers."""
    stated = (metadata_load(folder / "README.md") if (folder / "README.md").is_file() else None) or {}
    license, base_models = stated.get("license"), stated.get("base_model")
    if isinstance(base_models, str):
        base_models = [base_models]
    if not isinstance(base_models, list) or not all(isinstance(name, str) for name in base_models):
        text = config.text_config.to_dict()
        is_7b = all(text[name] == QWEN2_7B[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
        tower = read_json(folder / "config.json").get("mm_vision_tower")
        is_repository = isinstance(tower, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", tower)
        base_models = [LONGVA] * is_7b + [tower] * bool(is_repository)
    return license if isinstance(license, str) else "unknown", base_models
