"""Engines that train on several processes: files of `accelerate launch`, named by `uhr-bat train engine NAME`.

accelerate launch --config_file $(uhr-bat train engine fsdp2) -m uhr_bat train --config paper_7b ...
"""

import argparse
import sys

from ..common.loading import ROOT

ENGINES = {path.stem: path for path in sorted((ROOT / "training" / "engines").glob("*.yaml"))}


def main(arguments=None) -> int:
    """Print the path of an engine's file."""
    parser = argparse.ArgumentParser(prog="uhr-bat train engine", description="The path of an engine's file.")
    parser.add_argument("name", choices=ENGINES)
    print(ENGINES[parser.parse_args(arguments).name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
