"""Two small models of the library's own classes, before they are trained: what a host looks like that never heard of UHR-BAT.

| form | tower | decoder | an image |
|---|---|---|---|
| qwen3_vl | 2-D rotary places, patches of 8 px merged by four, DeepStack from one layer | M-RoPE | whole, at any size |
| gemma3 | SigLIP's, patches of 8 px averaged by four | the order of rows alone, seen both ways | pressed into 160 px |

Both read 16 px a visual token and have the words of UHR-BAT-Tiny; no weight comes from it.
"""

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from ...common.loading import ROOT

FORMS = ("qwen3_vl", "gemma3")
CELL = 16  # px of a visual token
LONGEST = 512  # px: the largest image that the Qwen3-VL form takes whole has 1,024 visual tokens
TILE = 160  # px, of the Gemma 3 form
ROWS = (TILE // CELL) ** 2
TOKENS = {
    "qwen3_vl": {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "before": "<|vision_start|>",
        "after": "<|vision_end|>",
    },
    "gemma3": {"image": "<image_soft_token>", "before": "<start_of_image>", "after": "<end_of_image>"},
}
# What the chat template writes for an image, and what that becomes in the prompt around its rows.
MARKERS = {"qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>"}
AROUND = {"qwen3_vl": MARKERS["qwen3_vl"], "gemma3": "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"}
DECODER = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 48, "vocab_size": 1032, "max_position_embeddings": 8192,
    "initializer_range": 0.06, "tie_word_embeddings": True, "pad_token_id": 1020, "bos_token_id": None, "eos_token_id": 1022,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ IMAGE if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(form: str) -> PreTrainedTokenizerFast:
    names = TOKENS[form]
    named = {"image_token": names["image"]}
    if form == "gemma3":
        named |= {"boi_token": names["before"], "eoi_token": names["after"]}
    made = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>",
        extra_special_tokens=named, model_max_length=DECODER["max_position_embeddings"],
    )  # fmt: skip
    made.add_tokens([name for name in names.values() if name not in made.get_vocab()], special_tokens=True)
    made.chat_template = TEMPLATE.replace("IMAGE", repr(MARKERS[form]))
    return made


def image_processor_of(form: str):
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if form == "qwen3_vl":
        sizes = {"shortest_edge": 32 * 32, "longest_edge": LONGEST * LONGEST}  # of the area, as the family counts
        return transformers.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=sizes, **half)
    return transformers.Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE}, **half)


def model_of(form: str, seed: int):
    """A model of seeded random weights."""
    vocabulary = tokenizer_of(form).get_vocab()
    ids = {name: vocabulary[token] for name, token in TOKENS[form].items()}
    torch.manual_seed(seed)
    if form == "qwen3_vl":
        config = transformers.Qwen3VLConfig(
            text_config=DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                                       "mrope_section": [8, 8, 8], "mrope_interleaved": True}},
            vision_config={"hidden_size": 160, "intermediate_size": 640, "depth": 4, "num_heads": 2, "patch_size": 8,
                           "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": DECODER["hidden_size"],
                           "num_position_embeddings": 256, "deepstack_visual_indexes": [1]},
            image_token_id=ids["image"], video_token_id=ids["video"], vision_start_token_id=ids["before"],
            vision_end_token_id=ids["after"], tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.Qwen3VLForConditionalGeneration(config)
    else:
        config = transformers.Gemma3Config(
            text_config=DECODER | {"query_pre_attn_scalar": DECODER["head_dim"], "sliding_window": 4096,
                                   "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]},
            vision_config={"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 2,
                           "image_size": TILE, "patch_size": CELL // 2, "vision_use_head": False},
            mm_tokens_per_image=ROWS, boi_token_index=ids["before"], eoi_token_index=ids["after"],
            image_token_index=ids["image"], tie_word_embeddings=True, initializer_range=DECODER["initializer_range"],
        )  # fmt: skip
        model = transformers.Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=192**-0.5)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 1020, 1022
    return model


def rows_of(form: str, size) -> int:
    """Visual tokens of a picture of (width, height)."""
    return ROWS if form == "gemma3" else size[0] * size[1] // CELL**2


def save_plain(model, form: str, folder):
    """A model folder as the Hub has them."""
    model.save_pretrained(folder)
    tokenizer_of(form).save_pretrained(folder)
    image_processor_of(form).save_pretrained(folder)
