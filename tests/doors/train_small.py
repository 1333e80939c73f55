"""python train_small.py MODEL OUTPUT all|lora: three steps of the Trainer, on one process or under torchrun (gloo)."""

import os
import sys
from pathlib import Path

import conftest  # noqa: F401  makes the package importable
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_trainer import make_trainer
from uhr_bat.modeling_uhr_bat import UHRBatForConditionalGeneration


source, output, what = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
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
    gradient_accumulation_steps=1 if "WORLD_SIZE" in os.environ else 2,
)
trainer.train()
if trainer.is_world_process_zero():
    output.mkdir(parents=True, exist_ok=True)
    trained = {name: one.detach().contiguous() for name, one in model.named_parameters() if one.requires_grad}
    save_file({name: one.clone() for name, one in trained.items()}, output / "trained.safetensors")
