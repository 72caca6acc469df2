"""The cluster's configuration: the server's flags, and some of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from serve.server.config import ANSWERS, CONFIGURATION, HTTP, PROMPTS, ServerConfig, problem_of
from serve.web.flags import add_flags, flag, flags_of
from serve.web.limit_flags import LIMITS
from serve.web.settings import parse_flags

GROUP = "cluster"
TTFT, ROUND_ROBIN = "ttft", "round-robin"


@dataclass(frozen=True)
class ClusterConfig(ServerConfig):
    """Everything that the command line decides."""

    replicas: int = flag("engines, each with a KV pool of its own", GROUP, 2, metavar="N", least=1)
    max_replicas: int | None = flag(
        "Ray adds replicas up to this number while all are busy",
        GROUP,
        None,
        metavar="N",
        parse=int,
        least=1,
        shown="--replicas",
    )
    cpus_per_replica: float | None = flag(
        "cores of each replica; below 1 they share one",
        GROUP,
        None,
        metavar="CORES",
        parse=float,
        least=0.01,
        shown="this machine's, divided; 1 with --address or on GPUs",
    )
    address: str | None = flag(
        "head of a running Ray cluster; its replicas outlive this command",
        GROUP,
        None,
        metavar="HOST:PORT",
        shown="Ray is started here, and ends with this command",
    )
    routing: str = flag(
        "how a replica is chosen: for the earliest first token, or in turn to compare with",
        GROUP,
        TTFT,
        choices=(TTFT, ROUND_ROBIN),
    )

    @property
    def for_replicas(self) -> ClusterConfig:
        """What replicas have to know: not where the ingress listens, its key, and how many they are."""
        defaults = {name: default for name, default, about in flags_of(ClusterConfig) if about.group in NOT_THEIRS}
        kept = {"stop_seconds": self.stop_seconds, "memory_bytes": self.memory_bytes}
        return replace(self, **defaults | kept, sources={})

    @property
    def version(self) -> str:
        """A hash of what replicas have to know."""
        known = [(name, getattr(self.for_replicas, name)) for name, *_ in flags_of(ClusterConfig)]
        return blake2b(repr(known).encode(), digest_size=8).hexdigest()


NOT_THEIRS = (HTTP, PROMPTS, ANSWERS, GROUP, CONFIGURATION, LIMITS)


def parser(prog: str = "python -m serve cluster") -> argparse.ArgumentParser:
    """The command line of the cluster."""
    cli = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --model DIR_OR_ID --replicas N [options]",
        description="Serve a checkpoint with several engines behind one endpoint; Ray Serve runs them.\n"
        "--kv-pool-bytes, --max-num-seqs and --max-queue are each replica's.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(cli, ClusterConfig)
    return cli


def parse_config(argv: Sequence[str], cli: argparse.ArgumentParser | None = None) -> ClusterConfig:
    """The configuration that arguments ask for; ends the process with a sentence if they are wrong."""

    def problem(config: ClusterConfig) -> str | None:
        return problem_of(config) or replicas_problem(config)

    return parse_flags(ClusterConfig, cli or parser(), argv, problem)


def replicas_problem(config: ClusterConfig) -> str | None:
    """What is wrong with the numbers of replicas, as a sentence; None if they are sound."""
    if config.max_replicas is not None and config.max_replicas < config.replicas:
        return f"--max-replicas: expected at least --replicas {config.replicas}, got {config.max_replicas}"
    return None
