"""Fine-tuning UHR-BAT-Tiny by `uhr-bat train`: samples a second with and without workers, images read and encoded for every
question or once, and memory against the size of a batch."""

import json
import multiprocessing

from ...scenes import painting
from .. import meters, sides
from ..compare import Row, show_ratio, spread

# Images of a side, and questions about each of them.
NUM_IMAGES, SIDE, NUM_QUESTIONS = 6, 2048, 8
BATCH = 4
VISUAL = ("vision_tower", "multi_modal_projector", "scale_embedding")
BATCHES = (1, 2, 4, 8)


def write_data(sizes) -> str:
    """The file of the samples: the questions about an image are the same words."""
    number, size = (2, (160, 20)) if sizes.quick else (NUM_IMAGES, (SIDE, SIDE))
    rows = []
    for seed in range(number):
        painting.write(sizes.folder / f"train_{seed}.jpg", size, seed)
        question = {"image": f"train_{seed}.jpg", "question": "What colour is the ship?", "answer": "red"}
        rows += [question] * (2 if sizes.quick else NUM_QUESTIONS)
    path = sizes.folder / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def run(data: str, output: str, *options) -> dict:
    """Samples a second of one pass over the data, and what it takes in memory beside what was there before; in a process."""
    from ...training import sft
    from ...training.options import read_options

    arguments = ["--train_data", data, "--output_dir", output, "--num_train_epochs", "1", "--save_strategy", "no"]
    arguments += ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_strategy", "no"]
    # This process was spawned, and would spawn the loader's workers, which the command forks.
    multiprocessing.set_start_method("fork", force=True)
    before = meters.reset_peak()
    trainer = sft.train(*read_options([*arguments, *options]))
    speed = trainer.state.log_history[-1]["train_samples_per_second"]
    return {"samples_per_second": speed, "bytes": meters.peak_bytes() - before}


def alone(sizes, data, *options) -> dict:
    """[`run`] in a process of its own."""
    with sides.one_process() as process:
        return process.submit(run, data, str(sizes.folder / "trained"), *options).result()


def training_throughput(sizes) -> list[Row]:
    """Samples a second, in turns; ratios to no worker, and to images in random order."""
    data, batch = write_data(sizes), ["--per_device_train_batch_size", str(BATCH)]
    frozen = [*batch, "--freeze", *VISUAL]
    kinds = {
        "no worker": batch,
        "1 worker": [*batch, "--dataloader_num_workers", "1"],
        "2 workers": [*batch, "--dataloader_num_workers", "2"],
        "group_by_image": [*batch, "--group_by_image", "true"],
        "frozen": frozen,
        "frozen, group_by_image": [*frozen, "--group_by_image", "true"],
    }
    speeds = {kind: [] for kind in kinds}
    for _ in range(sizes.repetitions):
        for kind, options in kinds.items():
            speeds[kind].append(alone(sizes, data, *options)["samples_per_second"])
    name = f"Training UHR-BAT-Tiny, {NUM_QUESTIONS} questions to an image of {SIDE:,} px, batches of {BATCH}, samples a second"
    rows = []
    for what, kind, other in (
        ("1 worker against none", "1 worker", "no worker"),
        ("2 workers against none", "2 workers", "no worker"),
        ("`group_by_image` against random order, the tower frozen, no worker", "group_by_image", "no worker"),
        ("the same, all before the decoder frozen", "frozen, group_by_image", "frozen"),
    ):
        ratio = spread([one / base for one, base in zip(speeds[kind], speeds[other])])
        shown = f"{spread(speeds[kind])['median']:.2f} against {spread(speeds[other])['median']:.2f}"
        result = f"{show_ratio(ratio)}: {shown}"
        rows.append(Row(f"{name}: {what}", "", result, None, {"ratio": ratio, "samples_per_second": speeds[kind]}))
    return rows


def training_memory(sizes) -> list[Row]:
    """Peak of the resident memory less what was resident before, a process for each size of a batch; one worker reads."""
    data, name = write_data(sizes), "Training UHR-BAT-Tiny, peak memory by samples of a batch"
    batches, used = BATCHES[:2] if sizes.quick else BATCHES, {}
    for size in batches:
        options = ["--per_device_train_batch_size", str(size), "--dataloader_num_workers", "1", "--max_steps", "3"]
        used[size] = alone(sizes, data, *options)["bytes"]
    each = (used[batches[-1]] - used[batches[0]]) / (batches[-1] - batches[0])
    result = ", ".join(f"{size}: {value / 1e6:,.0f} MB" for size, value in used.items())
    return [Row(name, "", f"{result}; {each / 1e6:,.0f} MB a sample", None, {"bytes": used})]
