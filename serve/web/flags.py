"""Flags that the server and the proxy have in common: where it listens, who may ask, and the rules for prompts."""

from __future__ import annotations

import argparse
import ipaddress
import os
from typing import Any

from serve.rules.normalize import DEFAULT_RULES, RULES


def add_address(cli: argparse._ActionsContainer, port: int) -> None:
    """Where to listen and who may ask: `--host`, `--port`, by default this one, and `--api-key`."""
    cli.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to bind; beyond loopback it takes an --api-key (default: %(default)s)",
    )
    cli.add_argument("--port", type=int, default=port, help="0 takes any free port (default: %(default)s)")
    cli.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("TOKENZERO_API_KEY"),
        help="in x-api-key or as Bearer (default: $TOKENZERO_API_KEY)",
    )


def add_rules(cli: argparse._ActionsContainer) -> None:
    """What is done to prompts, and how much is told of them: `--normalize` and `--trace-text`."""
    cli.add_argument(
        "--normalize",
        action=Normalize,
        default=",".join(sorted(DEFAULT_RULES)),
        metavar="RULES",
        help="rules for prompts, comma-separated, or none; list explains them (default: %(default)s)",
    )
    cli.add_argument(
        "--trace-text",
        choices=["on", "off"],
        default="on",
        help="off: what is told of a prompt that missed the cache shows none of its words (default: %(default)s)",
    )


class Normalize(argparse.Action):
    """Keeps the rules; `list` prints what there is and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, option: Any = None
    ) -> None:
        """Take the flag's value."""
        if value == "list":
            print_rules()
            parser.exit()
        args.normalize = value


def print_rules() -> None:
    """Print what `--normalize` takes."""
    from rich.console import Console
    from rich.table import Table

    table = Table("rule", "default", "what it does", "what the model reads")
    for name, rule in RULES.items():
        table.add_row(name, "on" if name in DEFAULT_RULES else "off", rule.description, rule.reads)
    Console().print(table)


def check_address(args: argparse.Namespace) -> str | None:
    """What is wrong with where to listen and who may ask, or None."""
    if not args.api_key and not is_loopback(args.host):
        return f"--host {args.host} is reachable from elsewhere: give an --api-key, or bind 127.0.0.1"
    if not 0 <= args.port < 2**16:
        return f"--port: expected 0 to 65535, got {args.port}"
    return None


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
