"""`python -m experiments.demo_model DIR`: write the demo model, a small checkpoint with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from experiments.workloads.demo_model import write_demo_model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo_model", description=__doc__)
    parser.add_argument("dir", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--force", action="store_true", help="write it again where a complete checkpoint is")
    args = parser.parse_args()
    console = Console()
    written = write_demo_model(args.dir, args.seed, force=args.force, console=console)
    console.print(f"{args.dir}: {'written' if written else 'already holds a checkpoint; --force writes it again'}")


if __name__ == "__main__":
    main()
