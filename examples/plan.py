"""Say what a question about an image will cost before it is read: budgets, tiles, FLOPs, memory, seconds.

    uhr-bat plan [MODEL] --image-size 30000x20000 [--memory 24GiB | --seconds 5 | --tokens 4000]
                 [--max-tiles 60] [--device cuda] [--dtype bfloat16]

MODEL is a model folder; its configuration alone is read, no weights. With a limit, the budgets are the largest that stay
below it. Seconds come from a measurement of the device, which takes some the first time and is kept; a device that is not
here is planned for without them.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from ..common.commands import tells_errors
from ..common.loading import ROOT, check_files, load_config, model_name

DTYPES = ("float32", "bfloat16", "float16")


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of "30000x20000", width first as images are usually told."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels, as 30000x20000: width, then height")
    width, height = map(int, match.groups())
    return height, width


def planner_of(folder: Path, device: str | None = None, dtype: str | None = None):
    """The planner of a model folder, without its weights.

    Args:
        device: "cuda" or "cpu"; None for the GPU where there is one.
        dtype: of the weights; None for that of the folder.
    """
    import torch

    from ..modeling_uhr_bat import UHRBatForConditionalGeneration

    config = load_config(folder)
    dtype = config.dtype or torch.float32 if dtype is None else getattr(torch, dtype)
    with torch.device("meta"):
        model = UHRBatForConditionalGeneration(config).to(dtype)
    return model.planner(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def plan(args) -> str:
    import torch

    from ..rates_uhr_bat import known_rates

    planner = planner_of(args.model, args.device, args.dtype)
    here = planner.device.type == "cpu" or torch.cuda.is_available()
    if args.seconds and not here:
        raise ValueError(
            f"--seconds needs the device itself to be measured, and there is no {planner.device.type} here."
        )
    if here and known_rates(planner.config, planner.device, planner.dtype) is None:
        print(f"Measuring {planner.device.type}, once ...", file=sys.stderr, flush=True)
    if args.tokens is not None:
        question = planner.plan(args.image_size, max_tiles=args.max_tiles, seconds=False).question
        one = planner.plan_question(planner.spend(question, args.tokens), seconds=here)
    else:
        limit = args.memory or (f"{args.seconds}s" if args.seconds else None)
        one = planner.plan(args.image_size, limit, max_tiles=args.max_tiles, seconds=here)
    height, width = args.image_size
    dtype = str(planner.dtype).removeprefix("torch.")
    return f"{model_name(args.model)}, {width:,} x {height:,} px, {dtype} on {planner.device.type}\n{one}"


@tells_errors
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="uhr-bat plan", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=ROOT, metavar="MODEL", help="default: UHR-BAT-Tiny")
    parser.add_argument("--image-size", type=image_size, required=True, metavar="WxH", help="as 30000x20000, in pixels")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--memory", metavar="SIZE", help="the largest budgets in so much memory, as 24GiB")
    limit.add_argument("--seconds", type=float, metavar="S", help="the largest budgets that are answered in this time")
    limit.add_argument("--tokens", type=int, metavar="N", help="visual tokens of all scales together")
    parser.add_argument(
        "--max-tiles", type=int, metavar="N", help="that are encoded, where the question looks (default: all)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the folder)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the folder
    check_files(None, args.model)
    print(plan(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
