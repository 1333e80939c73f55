"""What commands have in common."""

import functools
import sys


def tells_errors(main):
    """A command's `main(arguments)` whose errors, of the kinds that users can mend, are one line and the exit code 2."""

    @functools.wraps(main)
    def told(arguments=None) -> int:
        try:
            return main(arguments)
        except (OSError, ValueError, ImportError) as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2

    return told
