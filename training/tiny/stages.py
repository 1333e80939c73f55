"""What the stages of training share: arguments, and the Trainer's settings."""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from ...common.loading import load_model
from ...common.outputs import MODEL_FILES, Output, check_outputs

WARMUP = 0.05  # of a training by the clock at most


def make_parser(verb, doc, steps, batch_size, learning_rate) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"uhr-bat {verb}", description=doc.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder to start from")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="model folder to write")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size, help="scenes of a step, on one device")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of a step")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-steps", type=int, default=200, help="a checkpoint every so many steps")
    parser.add_argument("--workers", type=int, default=1, help="processes that paint scenes")
    return parser


def read_arguments(parser, arguments, *outputs: str) -> argparse.Namespace:
    """Its arguments, after what they write was checked: the model folder, and files of other options, as "features"."""
    args = parser.parse_args(arguments)
    others = [Output(f"--{name}", getattr(args, name)) for name in outputs]
    check_outputs((args.model,), Output("--output", args.output, names=MODEL_FILES), *others)
    return args


def load_with_attentions(folder):
    """Processor and model of a stage whose losses need attention maps, which only eager attention returns."""
    processor, model = load_model(folder, torch.float32, device_map=None)
    model.set_attn_implementation({"text_config": "eager"})
    return processor, model


def computes_bfloat16() -> bool:
    """Whether the device has instructions for it: a CPU without them takes fifty times as long as in float32."""
    if torch.cuda.is_available():
        return True
    known = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10
    return known.get("avx512_bf16", False) or known.get("amx_bf16", False)


def train(trainer_class, model, dataset, args, options=None, **kwargs):
    """Train, with other options of the Trainer where given; a run that was cut off goes on from its last checkpoint
    under `--output`/checkpoints."""
    checkpoints = args.output / "checkpoints"
    training_arguments = TrainingArguments(
        output_dir=checkpoints,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, args.steps // 10),
        weight_decay=0.01,
        max_grad_norm=1.0,
        **{"bf16": computes_bfloat16()} | (options or {}),
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
        logging_steps=20,
        save_steps=args.save_steps,
        save_total_limit=2,
        dataloader_num_workers=args.workers,
        remove_unused_columns=False,
        report_to=[],
    )
    trainer = trainer_class(model=model, args=training_arguments, train_dataset=dataset, **kwargs)
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")) or None)
    return trainer


def add_minutes(parser):
    """The option that ends a stage by the clock."""
    parser.add_argument(
        "--minutes", type=float, help="of training, after the scenes are encoded; or --steps, if sooner"
    )


class LogsParts:
    """For a Trainer whose log has the mean of what was noted in `parts` {name: [float]} since its last line."""

    mean = staticmethod(np.mean)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts = defaultdict(list)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs |= {name: round(float(self.mean(values)), 4) for name, values in self.parts.items()}
            self.parts.clear()
        super().log(logs, *args, **kwargs)


class ByTheClock:
    """For a Trainer that may end by the clock.

    Args:
        stop: of `time.monotonic()`, when the training ends: the rate has come down by then, whatever the number of steps.
    """

    def __init__(self, *args, stop=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.stop, self.start = stop, None
        if stop is not None:
            self.add_callback(_StopInTime(self))

    def progress(self, step) -> float:
        """Part of the training that is over, 0 to 1, by steps or by time."""
        part = step / self.args.max_steps
        if self.stop is not None:
            self.start = self.start or time.monotonic()
            part = max(part, (time.monotonic() - self.start) / max(1e-9, self.stop - self.start))
        return min(part, 1.0)

    def create_scheduler(self, num_training_steps, optimizer=None):
        warmup = max(1, self.args.get_warmup_steps(num_training_steps))

        def factor(step):
            progress = self.progress(step)
            return min(1, max((step + 1) / warmup, progress / WARMUP)) * (0.5 + 0.5 * float(np.cos(np.pi * progress)))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


class _StopInTime(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or self.trainer.progress(state.global_step) >= 1
