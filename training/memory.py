"""What a recipe needs of a GPU's memory, by a formula, before it runs: `uhr-bat train memory --config FILE`.

Letters: B samples of a batch, M tokens of the longest, L layers of the decoder, D its width, K the width of its keys, F
that of its MLP, R its vocabulary; N tokens of all scales of an image before they are compressed, C width of the tower.
"""

import sys
from dataclasses import dataclass

import torch

from ..budgets_uhr_bat import is_one_budget
from ..common.budgets import scale_budgets
from ..common.commands import tells_errors
from ..common.loading import host_settings, is_host, load_config
from ..common.models import base_of, find_model
from ..configuration_uhr_bat import UHRBatConfig
from ..planning.costs import NF4_BYTES, attention_widths
from .options import read_options
from .parts import add_adapter, check_host, decoder_name, freeze_parts, is_visual

TEXT_TOKENS = 500  # beside the visual ones, where a recipe states no `max_length`
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes that an optimiser keeps of a parameter whose own are b; two averages each.
STATES = {"adamw_torch": lambda b: 2 * b, "adamw_torch_fused": lambda b: 2 * b, "adamw_8bit": lambda b: 2,
          "paged_adamw_8bit": lambda b: 2, "sgd": lambda b: 0, "adafactor": lambda b: 0}  # fmt: skip


@dataclass
class Memory:
    """Bytes of one device, by what takes them."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __str__(self):
        parts = ", ".join(f"{name} {value / 2**30:.1f}" for name, value in vars(self).items())
        return f"{self.total / 2**30:.1f} GiB ({parts})"


def predict_memory(config: UHRBatConfig, options, data, training, host=None) -> Memory:
    """The sum of five parts, on one device, nothing sharded or offloaded; b is 2 bytes where `bf16` is set, else 4.

        weights       bytes of every parameter: of `dtype`; with NF4, 0.516 for the decoder's linear layers
        gradients     bytes of every parameter that is trained
        optimizer     what it keeps of these: two averages of the parameter's type (AdamW), or of one byte
        activations   with checkpointing b B M D L, the inputs of the layers, and one layer while it runs; else all layers:
                      a layer holds b B M (8 D + 4 K + 5 F) (norms and residuals, queries to output, the MLP's products)
                      and the images b B N (C + 5 D): the projector's input, its two layers, embedding and copies;
                      b B N 3 D where nothing before the decoder is trained, and no more than the tokens are held
        logits        B M R (b + 8): as computed, in float32, and their gradient

    The copy of weights that autocast makes (b for each parameter that is wider) is among the weights. What CUDA and the
    allocator take beside it, about 1 to 2 GiB, is not in the formula.

    `host`: a model of another family, of shapes alone, whose rows are as wide as its `row_width`. Raises `ValueError` for a decoder of
    experts.
    """
    model = _meta_model(config, options, host)
    dtype = config.dtype if options.dtype == "auto" else options.dtype
    size = BYTES[str(dtype or "float32").removeprefix("torch.")]
    b = 2 if training.bf16 or training.fp16 else size
    weights = gradients = states = 0
    decoder = "language_model" if host is None else decoder_name(host.host)
    for name, parameter in model.named_parameters():
        number = parameter.numel()
        linear = f"{decoder}.layers" in name and parameter.ndim == 2 and "lora_" not in name
        width = NF4_BYTES if options.load_in_4bit and linear else 4 if "lora_" in name else size
        weights += number * (width + (b if width > b and "lora_" not in name else 0))
        if parameter.requires_grad:
            gradients += number * width
            states += number * STATES[str(training.optim.value)](width)

    text, vision, B = config.text_config, config.vision_config, training.per_device_train_batch_size
    if not hasattr(text, "intermediate_size") or getattr(text, "num_experts", None):
        raise ValueError("The memory of a decoder of experts is not in the formula.")
    L, D, F, R = text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.vocab_size
    K = attention_widths(config)[1]
    budgets = scale_budgets(config.budgets if data.budgets is None else data.budgets, data.budget_range[1])
    visual = budgets if is_one_budget(budgets) else sum(budgets)
    M = data.max_length or visual + TEXT_TOKENS
    N = sum(height * width for height, width in config.grids)
    layer = b * B * M * (8 * D + 4 * K + 5 * F)
    held = b * B * M * D * L + layer if training.gradient_checkpointing else layer * L
    visual_trained = any(parameter.requires_grad and is_visual(name) for name, parameter in model.named_parameters())
    width = D if host is None else host.row_width
    images = b * B * N * (vision.hidden_size + 5 * width if visual_trained else 3 * width)
    return Memory(weights, gradients, states, held + images, B * M * R * (b + 8))


def _meta_model(config, options, host):
    """The model without its weights, its parts frozen or with an adapter."""
    from ..modeling_uhr_bat import UHRBatForConditionalGeneration

    with torch.device("meta"):
        model = UHRBatForConditionalGeneration(config) if host is None else host.host
        if base_of(options.model_name_or_path) is not None:
            from peft import PeftConfig, get_peft_model

            adapter = PeftConfig.from_pretrained(options.model_name_or_path)
            adapter.inference_mode = False
            return get_peft_model(model, adapter)
        if options.use_peft:
            return add_adapter(model, options)
    freeze_parts(model, options.freeze)
    return model


@tells_errors
def main(arguments=None) -> int:
    """Print what a recipe needs; its options are those of `uhr-bat train`."""
    # The recipe's own device may not be here: `bf16` is refused on a CPU that nobody asked for.
    arguments = [*(sys.argv[1:] if arguments is None else arguments), "--use_cpu", "true"]
    options, data, training = read_options(arguments, prog="uhr-bat train memory")
    options.model_name_or_path = str(find_model(options.model_name_or_path, weights=False))
    base = base_of(options.model_name_or_path)
    if is_host(base or options.model_name_or_path):
        options.use_peft |= base is not None
        check_host(options)
        from ..hosts.loading import load_host
        from ..hosts.settings import over
        from ..planning.counting import Shapes, shapes_of

        settings = over(host_settings(options.model_name_or_path, base), options.model_settings)
        with Shapes():
            _, host = load_host(base or options.model_name_or_path, make=shapes_of, **settings)
        print(predict_memory(host.config, options, data, training, host))
        return 0
    config = load_config(options.model_name_or_path, **(options.model_settings or {}))
    print(predict_memory(config, options, data, training))
    return 0


if __name__ == "__main__":
    sys.exit(main())
