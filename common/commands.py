"""What commands have in common."""

import functools
import math
import sys
from argparse import ArgumentParser, Namespace

from .budgets import budgets
from .images import add_image_arguments, add_tile_arguments
from .models import add_model_argument


def tells_errors(main):
    """A command's `main(arguments)` whose errors, of the kinds that users can mend, are one line and the exit code
    2."""

    @functools.wraps(main)
    def told(arguments=None) -> int:
        try:
            return main(arguments)
        except (OSError, ValueError, ImportError) as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        except Exception as error:
            if not _is_refusal(error):
                raise
            print(f"Error: {error.__cause__ or error}", file=sys.stderr)
            return 2

    return told


def _is_refusal(error) -> bool:
    """Whether a configuration refused a value: its errors are none of Python's kinds."""
    from huggingface_hub.errors import StrictDataclassError

    return isinstance(error, StrictDataclassError)


def add_question_arguments(parser: ArgumentParser, several=False):
    """The options of a command that asks about an image: budgets, of which there may be several, and the model; how the
    image is read and how much of it is encoded."""
    parser.add_argument(
        "--budgets", type=budgets, metavar="B", nargs="+" if several else None,
        help="visual tokens per scale, as 16,24,40,66, or of all scales, as 146" + "; several" * several,
    )  # fmt: skip
    add_model_argument(parser)
    add_image_arguments(parser)
    add_tile_arguments(parser)


def add_before_argument(parser: ArgumentParser):
    parser.add_argument(
        "--before",
        metavar="IMAGE",
        help="an earlier image of the same place, read likewise: what differs between the two is kept before what does not",
    )


def check_range(args: Namespace, low: float, high: float, *names: str, above: bool = False):
    """Raises `ValueError` where an option, or one of its numbers, is not `low` to `high`; over `low` with `above`. None
    is not
    looked at."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None and not ((low < number if above else low <= number) and number <= high):
                limit = f"over {low:g}" if above else f"at least {low:g}"
                limit += "" if math.isinf(high) else f" and at most {high:g}"
                raise ValueError(f"--{name.replace('_', '-')} must be {limit}. Got {number}.")
