"""Say what a question about an image will cost before it is read: budgets, tiles, FLOPs, memory, seconds.

    uhr-bat plan [--model MODEL] --image-size 30000x20000 [--memory 24GiB | --seconds 5 | --tokens 4000]
                 [--max-tiles 60 [--native]] [--questions 8 | --users 4] [--device cuda] [--dtype bfloat16]

Of MODEL the configuration alone is read, no weights. With a limit, the budgets are the largest that stay
below it. Seconds come from a measurement of the device, which takes some the first time and is kept; a device that is not
here is planned for without them, and so is a model of another family.
"""

import argparse
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..common.commands import check_range, tells_errors
from ..common.images import add_tile_arguments
from ..common.loading import host_settings, is_host, load_config
from ..common.models import add_model_argument, base_of, find_model, model_name, stay_offline

DTYPES = ("float32", "bfloat16", "float16")


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of "30000x20000", width first as images are usually told."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels, as 30000x20000: width, then height")
    width, height = map(int, match.groups())
    return height, width


def planner_of_folder(folder: Path, device: str | None = None, dtype: str | None = None, **changes):
    """The planner of a model, without its weights.

    Args:
        device: "cuda", "cuda:1" or "cpu"; None for the GPU where there is one.
        dtype: of the weights; None for that of the folder.
        changes: other values for settings of the model.
    """
    import torch

    from ..modeling_uhr_bat import UHRBatForConditionalGeneration
    from . import planner_of
    from .counting import Shapes, shapes_of

    base, note = base_of(folder), ""
    place, folder = folder, base or folder
    if is_host(folder):
        from transformers import PreTrainedConfig

        from ..hosts.loading import load_host

        wanted = "auto" if dtype is None else getattr(torch, dtype)
        options = {"calibrated": host_settings(place, base), **changes}
        with Shapes():
            _, model = load_host(folder, make=lambda config: shapes_of(config, wanted), **options)
        if PreTrainedConfig.get_config_dict(folder)[0].get("quantization_config"):
            note = " Weights are counted as if they were not quantised."
    else:
        config = load_config(place, **changes)
        dtype = config.dtype or torch.float32 if dtype is None else getattr(torch, dtype)
        with torch.device("meta"):
            model = UHRBatForConditionalGeneration(config).to(dtype)
    planner = planner_of(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return replace(planner, note=planner.note + note)


def device_of(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: cpu, cuda or cuda:1")
    return text


def plan(args) -> str:
    from .rates import check_device, is_here, known_rates

    planner = planner_of_folder(args.model, args.device, args.dtype, **args.set)
    here = is_here(planner.device)
    if args.seconds is not None:
        check_device(planner.device)
    if here and planner.calls is None and known_rates(planner.config, planner.device, planner.dtype) is None:
        print(f"Measuring {planner.device}, once ...", file=sys.stderr, flush=True)
    options = {
        "max_tiles": args.max_tiles, "native": args.native, "max_image_pixels": args.max_image_pixels,
        "num_questions": max(args.questions, args.users), "num_images": args.users,
    }  # fmt: skip
    if args.tokens is not None:
        question = planner.plan(args.image_size, seconds=False, **options).question
        found = planner.plan_question(planner.spend(question, args.tokens), seconds=here)
    else:
        limit = args.memory
        if args.seconds is not None:
            limit = f"{np.format_float_positional(args.seconds)}s"
        found = planner.plan(args.image_size, limit, seconds=here, **options)
    height, width = args.image_size
    dtype = str(planner.dtype).removeprefix("torch.")
    return f"{model_name(args.model)}, {width:,} x {height:,} px, {dtype} on {planner.device}\n{found}"


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat plan", description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="the same")
    parser.add_argument("--image-size", type=image_size, required=True, metavar="WxH", help="as 30000x20000, in pixels")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--memory",
        metavar="SIZE",
        help="the largest budgets in so much memory, as 24GiB, or free: what the device has left",
    )
    limit.add_argument("--seconds", type=float, metavar="S", help="the largest budgets that are answered in this time")
    limit.add_argument("--tokens", type=int, metavar="N", help="visual tokens of all scales together")
    add_tile_arguments(parser)
    parser.add_argument(
        "--questions", type=int, default=1, metavar="N", help="answered at once about an image (default: 1)"
    )
    parser.add_argument(
        "--users", type=int, default=1, metavar="N", help="at a time, each with an image and a question (default: 1)"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        dest="max_image_pixels",
        metavar="N",
        help="of the largest image (default: the model's)",
    )
    parser.add_argument("--device", type=device_of, help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the folder)")
    args = parser.parse_args(arguments)
    stay_offline(args.model)
    check_range(args, 1, math.inf, "questions", "users", "max_tiles", "max_image_pixels")
    check_range(args, 0, math.inf, "seconds", above=True)
    args.model = find_model(args.model, weights=False)
    print(plan(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
