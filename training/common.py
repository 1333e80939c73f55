"""What the stages of training share: arguments, the Trainer's settings, where tokens are."""

import argparse
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import TrainingArguments

from . import scenes

# Three pixels for one of the finest scale: the tiles come out of a resize, as those of real images do.
RENDER_WIDTH = 1152
IGNORED = -100  # a label that no loss counts


def paint(scene):
    """The image of a scene at the size that training and evaluation use."""
    return scenes.render(scene, (RENDER_WIDTH, round(RENDER_WIDTH / scene.aspect)))


def tokens_at(scene, points, grid) -> list[int]:
    """The tokens of a grid that show points (x, y) of a scene, counted row by row."""
    if not points:
        return []
    rows, columns = (scene.to_square(points) * grid).astype(int).T
    return (rows * grid[1] + columns).tolist()


def position_of_tokens(grid) -> np.ndarray:
    """float[N, 2]: (row, column) of the centres of a grid's tokens in [0, 1], row by row."""
    rows, columns = np.indices(grid).reshape(2, -1) + 0.5
    return np.stack((rows / grid[0], columns / grid[1]), axis=-1)


def points_of_tokens(scene, grid) -> np.ndarray:
    """float[N, 2]: (x, y) of the same centres in the scene; those of the letterbox lie outside it."""
    top = (scenes.WIDTH - scene.height) / 2
    return position_of_tokens(grid)[:, ::-1] * scenes.WIDTH - (0, top)


@contextmanager
def settings(config, changes):
    """The configuration with other numbers for the length of a `with` block."""
    before = {name: getattr(config, name) for name in changes}
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


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
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        seed=args.seed,
        logging_steps=20,
        save_steps=args.save_steps,
        save_total_limit=2,
        dataloader_num_workers=args.workers,
        remove_unused_columns=False,
        report_to=[],
        **(options or {}),
    )
    trainer = trainer_class(model=model, args=training_arguments, train_dataset=dataset, **kwargs)
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")) or None)
    return trainer
