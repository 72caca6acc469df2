"""Flags as fields of a frozen dataclass: parser, checks and documentation are made from the same fields.

`settings` finds their values. The flags that the server and the proxy share are defined here.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Protocol

from serve.rules.normalize import DEFAULT_RULES, RULE_COLUMNS, rule_rows


@dataclass(frozen=True)
class Flag:
    """What a field of a configuration says about its flag, besides its name and default."""

    help: str
    group: str
    metavar: str | None = None
    parse: Callable[[str], Any] = str
    shown: str | None = None  # the default as the help shows it; "": the help does not mention one
    choices: tuple[str, ...] | None = None
    least: float | None = None
    most: float = inf
    secret: bool = False  # never shown
    action: type[argparse.Action] | str | None = None


def flag(help: str, group: str, default: Any = MISSING, **options: Any) -> Any:
    """A dataclass field that is set by a flag; a flag without a default is required. `options` are those of Flag."""
    if type(default) in (int, float):
        options.setdefault("parse", type(default))
    if default is None:
        options.setdefault("shown", "")
    return field(default=default, metadata={"flag": Flag(help, group, **options)})


def flags_of(config: type) -> Iterator[tuple[str, Any, Flag]]:
    """(field name, default or MISSING, flag) of each field of a configuration class, those that it shares last."""
    for one in sorted(fields(config), key=lambda one: one.kw_only is True):
        if "flag" in one.metadata:
            yield one.name, one.default, one.metadata["flag"]


def option(name: str) -> str:
    """The option that sets a field: `--page-size` for page_size."""
    return f"--{name.replace('_', '-')}"


def shown_default(default: Any, flag: Flag) -> str:
    """The default as the documentation shows it; "" for a flag that has none to mention."""
    if flag.shown is not None:
        return flag.shown
    return "" if default is MISSING or default is False else "on" if default is True else str(default)


def add_flags(cli: argparse.ArgumentParser, config: type) -> None:
    """Add the flags of a configuration class, in its groups."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, default, flag in flags_of(config):
        group = groups.get(flag.group) or groups.setdefault(flag.group, cli.add_argument_group(flag.group))
        shown = shown_default(default, flag)
        options: dict[str, Any] = {"help": flag.help.replace("%", "%%") + (f" (default: {shown})" if shown else "")}
        options["default"] = argparse.SUPPRESS  # `settings` finds it elsewhere
        if default is False:
            options["action"] = "store_true"
        elif default is True:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"metavar": flag.metavar, "choices": flag.choices, "type": flag.parse}
            options |= {"action": flag.action} if flag.action else {}
        group.add_argument(option(name), **options)


def range_problem(config: Any) -> str | None:
    """The first flag whose number is out of range, with what was expected and found; None if there is none."""
    for name, _, flag in flags_of(type(config)):
        value = getattr(config, name)
        if value is None or flag.least is None or (flag.least <= value <= flag.most and value < inf):
            continue
        expected = f"{flag.least} to {flag.most}" if flag.most < inf else f"at least {flag.least}"
        return f"{option(name)}: expected {expected}, got {value}"
    return None


def flag_tables(config: type, groups: Collection[str] = ()) -> str:
    """The flags of a configuration class as Markdown, a table for each group, or for each of these."""
    tables: dict[str, list[str]] = {}
    for name, default, flag in flags_of(config):
        if groups and flag.group not in groups:
            continue
        written = f"`--[no-]{option(name)[2:]}`" if default is True else f"`{option(name)}`"
        shown = "required" if default is MISSING else "off" if default is False else shown_default(default, flag)
        tables.setdefault(flag.group, []).append(f"| {written} | {flag.help} | {shown} |")
    head = "| flag | meaning | default |\n| --- | --- | --- |\n"
    return "\n\n".join(f"**{group}**\n\n{head}" + "\n".join(rows) for group, rows in tables.items())


class Address(Protocol):
    """The part of a configuration that says where to listen, and which pages may call."""

    @property
    def host(self) -> str:
        """The address to bind."""

    @property
    def allow_host(self) -> str:
        """Names of a server without a key, comma-separated."""

    @property
    def allow_origin(self) -> str:
        """Origins of pages that may call the server, comma-separated."""


def config_flag(group: str) -> Any:
    """The field `config`."""
    return flag("a TOML file of flags; see serve/README.md", group, None, metavar="FILE", parse=Path)


def show_config_flag(group: str) -> Any:
    """The field `show_config`."""
    return flag("print each flag's value and where it comes from, as such a file, and exit", group, False)


def sources_field() -> Any:
    """The field `sources`: the place of each value that is not a default, which decides nothing."""
    return field(default_factory=dict, compare=False, repr=False)


def host_flag(group: str) -> Any:
    """The field `host`."""
    return flag("address to bind; other than loopback, it needs a key", group, "127.0.0.1")


def port_flag(group: str, default: int) -> Any:
    """The field `port`."""
    return flag("port to bind; 0 takes a free one", group, default, least=0, most=2**16 - 1)


def api_key_flag(group: str) -> Any:
    """The field `api_key`."""
    return flag(
        "one key that clients must send, in x-api-key or as Bearer",
        group,
        None,
        metavar="KEY",
        shown="$TOKENZERO_API_KEY",
        secret=True,
    )


def api_key_file_flag(group: str) -> Any:
    """The field `api_key_file`."""
    return flag(
        "several keys by their hashes, a line each, with names and limits; read again on SIGHUP: see serve/README.md",
        group,
        None,
        metavar="FILE",
        parse=Path,
    )


def shutdown_timeout_flag(group: str) -> Any:
    """The field `shutdown_timeout`."""
    return flag(
        "seconds that answers under way have once the server is told to stop; then they end with an error",
        group,
        30.0,
        metavar="S",
        least=0,
    )


def allow_host_flag(group: str) -> Any:
    """The field `allow_host`."""
    return flag(
        "names by which clients may call a server without a key, comma-separated, besides localhost and --host",
        group,
        "",
        metavar="NAMES",
    )


def allow_origin_flag(group: str) -> Any:
    """The field `allow_origin`."""
    return flag(
        "origins of web pages that may call this server and read its answers (CORS), comma-separated, such as "
        "https://app.example; * for all needs an --api-key",
        group,
        "",
        metavar="ORIGINS",
    )


def names_in(listed: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name for each in listed.split(",") if (name := each.strip())]


def normalize_flag(group: str) -> Any:
    """The field `normalize`: names of rules, which `parse_rules` reads."""
    return flag(
        "rules for prompts, comma-separated, or none; list explains them",
        group,
        ",".join(sorted(DEFAULT_RULES)),
        metavar="RULES",
        action=Normalize,
    )


def prompt_text_flag(group: str) -> Any:
    """The field `no_prompt_text_in_reports`."""
    return flag("leave prompt excerpts out of cache-miss reports", group, False)


class Normalize(argparse.Action):
    """Stores the rules; `list` prints all rules and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, option: Any = None
    ) -> None:
        """Store the flag's value."""
        if value == "list":
            print_rules()
            parser.exit()
        args.normalize = value


def print_rules() -> None:
    """Print the rules that `--normalize` accepts."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*RULE_COLUMNS)
    for row in rule_rows():
        table.add_row(*row)
    Console().print(table)


def address_problem(config: Address, keyed: bool) -> str | None:
    """The reason why a server must not listen at this address, or None: without a key, only loopback is safe."""
    if not keyed and not is_loopback(config.host):
        return f"--host {config.host} is reachable from elsewhere: give an --api-key, or bind 127.0.0.1"
    origins = names_in(config.allow_origin)
    if not keyed and "*" in origins:
        return "--allow-origin *: any page could use this server: give an --api-key, or name the pages' origins"
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
            return f"--allow-origin: expected scheme://host or scheme://host:port, found {origin!r}"
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
