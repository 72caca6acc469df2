"""`python -m serve cluster --model DIR --replicas N`: listen, start the replicas, and serve until interrupted."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.cluster import deploy
from serve.cluster.config import ROUND_ROBIN, ClusterConfig, parse_config
from serve.engine.runtime import leave_out_torch
from serve.server.cli import check_folder, listen
from serve.server.threads import in_thread
from serve.web.logs import set_up_logging

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from serve.prompt.tokenizer import Tokenizer
    from serve.server.progress import StartProgress

log = logging.getLogger("tokenzero.cluster")


def main(argv: Sequence[str], cli: argparse.ArgumentParser | None = None) -> None:
    """Parse, listen, start the replicas, and serve until interrupted."""
    config = parse_config(argv, cli)
    set_up_logging(config)
    try:
        deploy.check_installed()
        check_folder(config.model)
    except (ValueError, OSError) as error:
        sys.exit(f"tokenzero: {error}")
    listen(config, load)


def load(config: ClusterConfig, progress: StartProgress) -> Starlette:
    """The server's application over replicas that Ray runs. Raises ValueError, OSError, StoreError."""
    leave_out_torch()
    # Linux ends Ray's processes with the thread that started them, so that one stays until the end:
    # https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
    keeper = ThreadPoolExecutor(1, "tokenzero-ray")
    with progress.phase("ray"):
        keeper.submit(deploy.start_ray, config).result()
    text = in_thread(load_text, config, progress)
    with progress.phase("replicas"):
        handle = deploy.deploy(config)
    with progress.phase("server"):
        app = ingress(
            config, handle, text.result(), deploy.take_back_signals, lambda: keeper.submit(deploy.end, config).result()
        )
    log.info("%s: %d replicas", config.model, config.replicas)
    return app


def load_text(config: ClusterConfig, progress: StartProgress) -> Text:
    """What the ingress needs of a checkpoint. Raises ValueError, OSError, StoreError."""
    from model import checkpoint
    from model.families import load_config
    from serve.server import loading

    folder = checkpoint.resolve(config.model)
    tokenizer = loading.load_text(config, folder, progress)
    return Text(tokenizer, loading.stop_ids(load_config(folder).eos_token_ids, tokenizer.hf))


@dataclass(frozen=True)
class Text:
    """The part of a checkpoint that makes tokens of text."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]


def ingress(
    config: ClusterConfig, handle: Any, text: Text, begin: Callable[[], object], end: Callable[[], object]
) -> Starlette:
    """One server's application over the replicas of a handle; `begin` and `end` as of ClusterEngine.

    Raises ValueError, OSError and StoreError as `make_context` does, and for replicas that do not fit together.
    """
    from serve.cluster.client import ClusterEngine
    from serve.cluster.dispatch import Dispatch
    from serve.cluster.figures import ClusterCollector
    from serve.prompt.tokenizer import identity
    from serve.server.app import create_app
    from serve.server.context import make_context

    reports = deploy.first_reports(handle)
    deploy.check_ours(reports[0].identity, config, identity(text.tokenizer.hf))
    engine = ClusterEngine(handle, reports, Dispatch(config.routing == ROUND_ROBIN), begin, end, deploy.head_answers)
    context = make_context(engine, text.tokenizer, text.stop_ids, config)
    context.metrics.registry.register(ClusterCollector(engine))
    return create_app(context)
