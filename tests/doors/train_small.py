"""python train_small.py MODEL OUTPUT: three steps of the Trainer, of all weights and of an adapter, under torchrun
(gloo), or by `train` in a process that is there."""

import sys
from pathlib import Path

import conftest  # noqa: F401  makes the package importable
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_trainer import make_trainer
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration


def train(source, output, what, gradient_accumulation_steps):
    """Write OUTPUT/WHAT.safetensors: the weights that were trained, "all" or those of an adapter ("lora")."""
    torch.manual_seed(0)
    model = UHRBatForConditionalGeneration.from_pretrained(source)
    if what == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    trainer = make_trainer(
        model,
        output,
        train=[1] * 12,
        max_steps=3,
        learning_rate=1e-3,
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        trained = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
        output.mkdir(parents=True, exist_ok=True)
        save_file({name: one.contiguous() for name, one in trained.items()}, output / f"{what}.safetensors")


if __name__ == "__main__":
    for what in ("all", "lora"):
        train(sys.argv[1], Path(sys.argv[2]), what, gradient_accumulation_steps=1)
