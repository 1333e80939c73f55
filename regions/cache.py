"""SAM masks of many images, once: one .pt file per image in the released layout, for `read_labels`.

    uhr-bat regions IMAGE... --output DIR --checkpoint SAM [--jobs N] [--view PX]

A file is written whole or not at all, with the settings that it was made by. The same command again goes on where it stopped: whole
files are left as they are, and are refused if they were made by others. An image that cannot be read is named at the end, the others are done. Exit code: 0 all images, 1 not all, 2 wrong
arguments, 130 interrupted.
"""

import argparse
import functools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

from ..common.commands import tells_errors
from ..common.digests import file_digest, folder_digest
from ..common.files import whole_files
from ..common.images import add_image_arguments, image_options
from ..common.loading import load_processor
from ..common.models import add_model_argument, find_model
from ..common.outputs import Output, check_outputs
from ..common.runs import check_same_settings
from ..released_api_uhr_bat import join_tile_masks, load_multiscale_tile_masks
from .segment import MaskSettings, import_segment_anything, load_segmenter, segment_image


@dataclass(frozen=True)
class Job:
    """What is the same for every image."""

    checkpoint: Path
    settings: MaskSettings
    model_type: str | None
    model: str
    view: int | None
    options: dict = field(default_factory=dict)  # how images are read
    changes: dict = field(default_factory=dict)  # of the model's settings

    @functools.cached_property
    def made_by(self) -> dict:
        """What masks depend on, beside the image and the scales."""
        digest = folder_digest if self.checkpoint.is_dir() else file_digest
        about = {"checkpoint": digest(self.checkpoint), **asdict(self.settings), "view": self.view}
        about |= {name: value for name, value in self.options.items() if value is not None}
        return json.loads(json.dumps(about, default=str))


def to_tiles(labels: dict[int, torch.Tensor], patches_per_side: int) -> dict:
    """The released layout of token labels {scale: long[H, W]}; the inverse of `read_labels`."""
    P = patches_per_side
    scales = {}
    for scale, tokens in labels.items():
        # [H, W] -> [rows, P, columns, P] -> [rows * columns, P, P]
        rows, columns = tokens.shape[0] // P, tokens.shape[1] // P
        tiles = tokens.to(torch.int32).view(rows, P, columns, P).transpose(1, 2).reshape(-1, P, P)
        scales[scale] = {
            "tile_masks": [tile.clone() for tile in tiles],
            "tile_coords": [(row, column) for row in range(rows) for column in range(columns)],
        }
    return {"scales": scales}


def read_labels(path: Path) -> dict[int, torch.Tensor]:
    """Token labels {scale: long[H, W]} of a mask cache, 0 = background; raises as `load_multiscale_tile_masks`."""
    return {scale: join_tile_masks(**masks) for scale, masks in load_multiscale_tile_masks(path).items()}


def is_whole(path: Path, scales: list[int], patch_size: int) -> bool:
    """Whether there is a mask cache at `path` with the labels of these scales, and of no others."""
    try:
        labels = read_labels(path)
    except Exception:  # a cut-off or foreign file raises whatever it likes
        return False
    return {scale: tuple(grid.shape) for scale, grid in labels.items()} == {
        scale: (scale // patch_size, scale // patch_size) for scale in scales
    }


def check_made_by(path: Path, job: Job):
    """Raises `ValueError` for a mask cache that says it was made by another SAM or by other settings; foreign ones say nothing."""
    kept = torch.load(path, map_location="cpu", weights_only=True).get("made_by")
    if isinstance(kept, str):
        check_same_settings(path, json.loads(kept), job.made_by)


def write_whole(value, path: Path):
    """`torch.save`, whole or not at all."""
    with whole_files(path.parent) as built:
        torch.save(value, built / path.name)


@functools.cache
def _tools(model, changes, *segmenter):
    """Image processor and segmenter, loaded once per process."""
    return load_processor(model, dict(changes)).image_processor, load_segmenter(*segmenter)


def cache_image(image_path: Path, output: Path, job: Job):
    """Write the mask cache of one image."""
    processor, segmenter = _tools(job.model, tuple(job.changes.items()), job.checkpoint, job.settings, job.model_type)
    image = processor.process_image(str(image_path), **job.options)
    labels = segment_image(image, segmenter, processor.scales, processor.patch_size, job.view)
    masks = to_tiles(labels, processor.crop_size["height"] // processor.patch_size)
    write_whole(masks | {"made_by": json.dumps(job.made_by)}, output)


def cache_images(paths: dict[Path, Path], job: Job, num_jobs: int = 1) -> dict[Path, str]:
    """Write the mask caches {image: file}, in parallel over images; returns {image: reason} of those that failed."""
    from tqdm import tqdm

    failed = {}
    bar = tqdm(total=len(paths), desc="Masks", unit="image")

    def note(image_path, run):
        try:
            run()
        except Exception as error:
            # Errors of reading name their file already.
            failed[image_path] = str(error) or type(error).__name__
        bar.update()

    with bar:
        if num_jobs == 1:
            for image_path, output in paths.items():
                note(image_path, lambda: cache_image(image_path, output, job))
            return failed
        num_threads = max(1, (os.cpu_count() or 1) // num_jobs)
        # Spawned: a forked process inherits the locks of PyTorch's threads, without the threads.
        with ProcessPoolExecutor(num_jobs, get_context("spawn"), torch.set_num_threads, (num_threads,)) as pool:
            futures = {pool.submit(cache_image, *pair, job): pair[0] for pair in paths.items()}
            try:
                for future in as_completed(futures):
                    note(futures[future], future.result)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def name_output(image_path: Path) -> str:
    """The name of the mask cache of an image."""
    return f"{image_path.stem}.pt"


def name_outputs(image_paths: list[Path], output: Path) -> dict[Path, Path]:
    """{image: file}. Raises `ValueError` for two images that would share a file."""
    outputs, taken = {}, {}
    for image_path in dict.fromkeys(image_paths):
        name = name_output(image_path)
        if name in taken:
            raise ValueError(f"{image_path} and {taken[name]} would both be written to {name}: rename one of them.")
        taken[name] = image_path
        outputs[image_path] = output / name
    return outputs


def add_segmenter_arguments(parser):
    """The arguments that name and set up SAM; `uhr-bat evidence partitions` takes them too."""
    defaults = MaskSettings()
    parser.add_argument(
        "--checkpoint", type=Path, metavar="SAM", help="*.pth of segment-anything, or folder of SamModel"
    )
    parser.add_argument(
        "--model-type", metavar="TYPE", help="of a *.pth file: vit_b, vit_l, vit_h (default: by its width)"
    )
    parser.add_argument("--view", type=int, metavar="PX", help="side of the view that SAM sees (default: up to 1344)")
    parser.add_argument("--points-per-side", type=int, default=defaults.points_per_side, metavar="N")
    parser.add_argument("--pred-iou-thresh", type=float, default=defaults.pred_iou_thresh, metavar="X")
    parser.add_argument("--stability-score-thresh", type=float, default=defaults.stability_score_thresh, metavar="X")
    parser.add_argument("--crop-n-layers", type=int, default=defaults.crop_n_layers, metavar="N", help="finer masks")


def job_from(args, options=None) -> Job:
    settings = MaskSettings(
        args.points_per_side, args.pred_iou_thresh, args.stability_score_thresh, crop_n_layers=args.crop_n_layers
    )
    return Job(args.checkpoint, settings, args.model_type, args.model, args.view, options or {}, args.set)


def check_job(job: Job):
    """What can be known before the first image: raises `FileNotFoundError`, `ImportError` or `ValueError`."""
    if not job.checkpoint.exists():
        raise FileNotFoundError(f"{job.checkpoint}: there is no such SAM checkpoint file or folder.")
    if job.checkpoint.is_dir() and not (job.checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"{job.checkpoint}: this is no SamModel folder, there is no config.json in it.")
    if job.checkpoint.is_file():
        import_segment_anything()
    find_model(job.model, weights=False)
    if job.view is not None and job.view < 1:
        raise ValueError(f"--view must be at least 1 pixel. Got {job.view}.")


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat regions", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the .pt files")
    add_model_argument(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="images at once, each with a SAM of its own")
    add_segmenter_arguments(parser)
    add_image_arguments(parser)
    args = parser.parse_args(arguments)
    if args.checkpoint is None:
        parser.error("the following arguments are required: --checkpoint")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1. Got {args.jobs}.")
    job = job_from(args, image_options(args))
    check_job(job)
    outputs = name_outputs(args.images, args.output)
    names = tuple(path.name for path in outputs.values())
    check_outputs((*args.images, job.checkpoint, job.model, args.area), Output("--output", args.output, names=names))
    processor = load_processor(job.model, job.changes).image_processor
    args.output.mkdir(parents=True, exist_ok=True)
    missing = {
        image_path: path
        for image_path, path in outputs.items()
        if not is_whole(path, processor.scales, processor.patch_size)
    }
    for path in outputs.values():
        if path not in missing.values():
            check_made_by(path, job)
    failed = cache_images(missing, job, min(args.jobs, max(1, len(missing))))
    print(
        f"{args.output}: {len(missing) - len(failed)} written, {len(outputs) - len(missing)} were there already, "
        f"{len(failed)} failed"
    )
    for image_path, reason in failed.items():
        print(f"Error: {image_path}: {reason}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
