"""llama.cpp's own server as a process, with its defaults: `python -m experiments.harness.llama_server --model GGUF`.

It needs the `foreign` extra, whose package holds the compiled server.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import signal
import sys
from typing import Any

PROGRAM = ("-m", "experiments.harness.llama_server")  # for `running_server`
PACKAGES = ("xllamacpp", "gguf")  # of the `foreign` extra


def missing() -> str | None:
    """What is not installed and how to get it, or None."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} missing: pip install 'tokenzero[foreign]'" if absent else None


def main(argv: list[str] | None = None) -> None:
    """Serve one request at a time until the process is terminated."""
    cli = argparse.ArgumentParser(prog="python -m experiments.harness.llama_server", description=__doc__.split("\n")[0])
    cli.add_argument("--model", required=True, metavar="FILE", help="a GGUF file")
    cli.add_argument("--port", type=int, default=8080, help="(default: %(default)s)")
    cli.add_argument("--context", type=int, default=0, help="tokens of the longest request (default: the model's)")
    args = cli.parse_args(argv)
    if problem := missing():
        sys.exit(f"llama_server: {problem}")
    engine: Any = importlib.import_module("xllamacpp")
    params = engine.CommonParams()
    params.model.path, params.port, params.n_ctx = args.model, args.port, args.context
    params.n_parallel = 1  # requests would otherwise spread over slots that share no prefix
    server = engine.Server(params)
    print(f"llama.cpp listens on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
