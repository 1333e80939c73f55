"""UHR-BAT-Tiny, the embedded default, before it is trained: a tokenizer learnt from made-up questions, and a model of
seeded random weights.

    uhr-bat tiny build --output DIR [--seed N]

DIR becomes a whole model folder, the start of `training/`; weights that are there already are never replaced. Its
configuration and tokenizer are those of the repository's root.

Scales and tile are 2/21 of the paper's (tile 32 instead of 336), so that the grids of tiles keep their proportions: 2,
4, 8 and 12 a side. A patch is 8 pixels: a tile has 4 x 4 tokens, the paper's 24 x 24. The same seed gives the same
bytes.
"""

import argparse
import random
import shutil
from pathlib import Path

from uhr_bat.common.commands import tells_errors
from uhr_bat.common.files import whole_files, write_json
from uhr_bat.common.loading import ROOT
from uhr_bat.common.outputs import MODEL_FILES, Output, check_outputs

WEIGHTS = "model.safetensors"
CONTEXT_WINDOW = 4096
BUDGETS = [4, 8, 40, 94]  # 4 % of the 3,648 tokens, most of them where objects of few pixels show
# The rule that answers most questions about validation scenes (training/README.md).
RULES = {"selector": "distinct", "refinement": [16, 48, 128], "refinement_layers": [1, 1, 2]}
# Levels of large images that have a scale vector of their own: up to 24,576 px, twice as large each time.
NATIVE_SCALES = [768 * 2**depth for depth in range(6)]
VOCAB_SIZE = 1024
# Where training starts: about 1/sqrt(192), one over the root of the width.
INITIALIZER_RANGE = 0.06
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
# Qwen2's own: words with the space before them, digits one by one.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

COLOURS = "red orange yellow green blue purple white black grey brown silver beige".split()
OBJECTS = (
    "ship car plane tank truck taxi boat helicopter container crane building house tree pool tower train van turbine "
    "silo vehicle warehouse greenhouse tent tractor canoe yacht tanker barge trailer excavator solar_panel"
).split()
PLACES = (
    "pier harbour runway bridge tank_farm stadium road crossroads roundabout car_park field forest river lake coast "
    "beach island airport railway station factory school quarry golf_course tennis_court football_pitch power_plant "
    "residential_area industrial_area farmland orchard sea square park breakwater dam dock apron terminal highway"
).split()
QUADRANTS = [f"{a} {b}" for a in ("upper", "lower") for b in ("left", "right")] + [
    "north", "south", "east", "west", "centre", "north-east", "north-west", "south-east", "south-west"
]  # fmt: skip
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve twenty fifty dozens hundreds".split()
LOOKS = (
    "small large long narrow wide bright dark dense sparse round rectangular straight curved parallel empty crowded "
    "damaged destroyed flooded burnt cloudy shadowed moored parked isolated abandoned circular triangular paved wooden"
).split()
TEMPLATES = """
How many {colour} {object}s are at the {place}? | There are {number} {colour} {object}s at the {place}.
What colour are the {object}s at the {place}? | They are {colour}.
What is the colour of the {object} next to the {place} in the {quadrant} of the image? | {colour}
Is there a {object} near the {place}? | Yes, there is a {colour} {object} on the {quadrant} side.
Are there any {object}s in the {quadrant} part of this image? | No, there are none.
Which is closer to the {place}, the {colour} {object} or the {other} {object}? | The {colour} one.
Are there more {object}s than {thing}s in the {quadrant} corner? | Yes. {number} against {number}.
Where is the {place}? | The {place} is in the {quadrant} quadrant, between the {site} and the {object}s.
What type of land use is shown in the {quadrant}? | Mostly {place} and {site}.
Describe this remote-sensing image. | The satellite image shows a {place} with {number} {object}s, beside a {site}.
Compare the {place} with the {site}. | The {place} is larger, brighter, and has fewer {object}s.
Answer with the option's letter from the given choices directly: (A) {colour} (B) {other} (C) {place} (D) {number} | A
What would happen if the {place} were flooded? Explain, step by step. | The {object}s could not reach the {site}.
Give the bounding box of the {look} {colour} {object}: [x1, y1, x2, y2] in pixels. | \
[{digits}, {digits}, 2{digits}, 3{digits}]
How far is it from the {place} to the {site}? | About {digits}00 metres, or {digits}.5 km.
In which direction does the {object} move? Which route would you plan for it? | Along the {place}, heading {quadrant}.
Which of these categories fits the whole scene best: {place}, {site}, mountain, desert, wetland or snow? | {place}
Count the {look} {object}s. Think about every region before answering. | I can see about {number} of them.
Is the {place} mainly surrounded by vegetation, bare soil or water? | \
By bare soil, with some vegetation and shallow water.
Are the {object}s arranged in rows? What does their pattern suggest? | \
They stand in {look} rows, which suggests a {place}.
What is the {look} structure at the top of the picture, and what is it used for? | It is probably a {look} {place}.
At what time of day was this photograph taken, judging from the shadows? | Around noon: the shadows are short.
Has anything changed between the first and the second image? | \
The {colour} {object} has left the {place}; it isn't there.
""".strip().splitlines()


def make_corpus(num_lines=20000, seed=0):
    """Chat text of remote-sensing questions and answers in the prompt's own format, line by line."""
    draw = random.Random(seed)
    for question, answer in (draw.choice(TEMPLATES).split(" | ") for _ in range(num_lines)):
        words = {
            "colour": draw.choice(COLOURS), "other": draw.choice(COLOURS), "number": draw.choice(NUMBERS),
            "object": draw.choice(OBJECTS), "thing": draw.choice(OBJECTS), "place": draw.choice(PLACES),
            "site": draw.choice(PLACES), "quadrant": draw.choice(QUADRANTS), "look": draw.choice(LOOKS),
            "digits": str(draw.randrange(100)),
        }  # fmt: skip
        question, answer = (text.format(**words).replace("_", " ") for text in (question, answer))
        yield f"system\nYou are a helpful assistant.\nuser\n{question}\nassistant\n{answer}\n"


def build_tokenizer(output):
    """Byte-level BPE: every UTF-8 text comes back as it was, so there is no normaliser and no unknown token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(output / "tokenizer.json"))
    # The generic class takes tokenizer.json as it stands; Qwen2Tokenizer would put its NFC normaliser back.
    write_json(
        output / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "UHRBatProcessor",
            "model_max_length": CONTEXT_WINDOW,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "image_token": "<image>",
            "extra_special_tokens": ["<|im_start|>"],
        },
    )
    return tokenizer


def tiny_config(tokenizer):
    """The configuration of UHR-BAT-Tiny; what is not said here is the paper's, as in every new model."""
    from uhr_bat.configuration_uhr_bat import UHRBatConfig

    endoftext, _, im_end, image = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    config = UHRBatConfig(
        scales=[64, 128, 256, 384],
        budgets=BUDGETS,
        num_regions=4,
        coord_weight=8.0,
        **RULES,
        native_scales=NATIVE_SCALES,
        superseded_weight=0.1,
        image_token_index=image,
        importance_layer=1,
        scale_embedding_grid=8,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6,
            "image_size": 32, "patch_size": 8,
        },
        text_config={
            "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
            "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
            "max_position_embeddings": CONTEXT_WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "initializer_range": INITIALIZER_RANGE,
            "tie_word_embeddings": True,
            "eos_token_id": im_end, "pad_token_id": endoftext,
        },
    )  # fmt: skip
    config.dtype = "float32"
    return config


def build_model(output, config, seed=0):
    """Seeded random weights in the layout that every supported transformers release loads."""
    import torch
    from safetensors.torch import save_file
    from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration

    torch.manual_seed(seed)
    model = UHRBatForConditionalGeneration(config)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding table
    save_file(weights, output / WEIGHTS, metadata={"format": "pt"})
    return model


def write_configs(output, config):
    """The configuration, and the files of generation and of the processors."""
    from .model_folder import write_config, write_generation_config, write_processor_configs

    # A base model that never learnt ChatML ends at <|endoftext|>.
    write_generation_config(output, config, ends=[config.text_config.pad_token_id])
    write_processor_configs(output, config)
    write_config(output, config)


@tells_errors
def main(arguments=None):
    from .model_folder import CHAT_TEMPLATE, write_code

    parser = argparse.ArgumentParser(
        prog="uhr-bat tiny build", description="UHR-BAT-Tiny before it is trained, as a whole model folder."
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder without weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args(arguments)
    if (args.output / WEIGHTS).exists():
        parser.error(
            f"{args.output / WEIGHTS} is there already: random weights do not replace it. Name another folder."
        )
    check_outputs((), Output("--output", args.output, names=MODEL_FILES))
    with whole_files(args.output) as built:
        tokenizer = build_tokenizer(built)
        print(f"tokenizer: {tokenizer.get_vocab_size()} entries")
        config = tiny_config(tokenizer)
        write_configs(built, config)
        write_code(built)
        shutil.copyfile(ROOT / CHAT_TEMPLATE, built / CHAT_TEMPLATE)
        model = build_model(built, config, args.seed)
        print(f"model: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, seed {args.seed}")
        for path in sorted(built.iterdir()):
            print(f"{args.output / path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    raise SystemExit(main())
