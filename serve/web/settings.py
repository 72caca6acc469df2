"""Where the values of flags come from: the command line, variables of the environment, a TOML file, or defaults.

A flag comes before its variable, that before the file's entry, and that before the default. An empty variable counts as
none. The file has one entry for each flag, by its name without dashes in front, and no tables: https://toml.io/en/v1.0.0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from serve.web.flags import Flag, flags_of, names_in, option

PREFIX = "TOKENZERO_"
# Variables of no flag: what the kernels' compiler is told, and the notebooks.
OTHER_VARIABLES = ("TOKENZERO_CPU_KERNEL", "TOKENZERO_CPU_MARCH", "TOKENZERO_SMOKE")
# What Kubernetes sets for services of a pod's namespace:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)$")
SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")
PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
SWITCH = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}  # what a flag reads, for error texts
OF_THE_PROCESS = ("config", "show_config")  # fields that a file cannot set


class Configuration(Protocol):
    """What the configuration of every command has besides its own flags."""

    def __init__(self, *, sources: Mapping[str, str], **values: Any) -> None:
        """Set every field."""

    @property
    def sources(self) -> Mapping[str, str]:
        """The place of each field's value that is not its default."""


C = TypeVar("C", bound=Configuration)


class ConfigError(ValueError):
    """A value or a name that is refused; the text begins with its place."""


class Setting(NamedTuple):
    """A flag's value, and its place: the flag, a variable, or a line of a file; empty for a default."""

    value: Any
    place: str


def variable(name: str) -> str:
    """The variable that sets a field: `TOKENZERO_PAGE_SIZE` for page_size."""
    return PREFIX + name.upper()


def nearest(name: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown name."""
    near = get_close_matches(name, [*known], n=1)
    return f"did you mean {near[0]}?" if near else "see --help for the flags that there are"


def file_entries(path: Path, known: Iterable[str]) -> dict[str, Setting]:
    """The entries of a file by their keys, each with its line. Raises ConfigError, also for a key that is not known."""
    try:
        text = path.read_text(encoding="utf-8")
        entries = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: expected a TOML file: {error.strerror}") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"{path}: expected TOML: {error}") from None
    known = [*known]
    settings = {key: Setting(value, f"{path}{line_of(key, text)}") for key, value in entries.items()}
    for key, (value, place) in settings.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"{place}: {key}: expected a flag's value, got a table: write the flags outside of tables"
            )
        if key not in known:
            raise ConfigError(f"{place}: unknown key {key!r:.80}: {nearest(key, known)}")
    return settings


def line_of(key: str, text: str) -> str:
    """`:LINE` of a key in the text of a TOML file; empty if its spelling hides it."""
    found = re.search(rf"""^[ \t]*\[*[ \t]*["']?{re.escape(key)}["']?[ \t]*[=.\]]""", text, re.MULTILINE)
    return f":{text.count(chr(10), 0, found.start()) + 1}" if found else ""


def unknown_variable(environ: Mapping[str, str], known: Iterable[str]) -> str | None:
    """The first variable with our prefix that is not known, as a sentence; None if there is none."""
    known = {*known, *OTHER_VARIABLES}
    for name in sorted(environ):
        of_service = SERVICE_LINK.search(name) or SERVICE_URL.match(environ[name])
        if name.startswith(PREFIX) and name not in known and not of_service:
            return f"{name}: unknown variable: {nearest(name, known)}"
    return None


def service_hint(text: str) -> str:
    """What to do about a variable's text that Kubernetes has set."""
    hint = ", which Kubernetes sets for a service of this name: set enableServiceLinks: false for the pod"
    return hint if SERVICE_URL.match(text) else ""


def placed(problem: str, sources: Mapping[str, str]) -> str:
    """A sentence that begins with a flag, behind the place of its value if that is not the command line."""
    found = re.match(r"--([a-z][a-z0-9-]*)", problem)
    place = sources.get(found[1].replace("-", "_")) if found else None
    return problem if place is None or place.startswith("--") else f"{place}: {problem}"


def toml_value(value: Any) -> str:
    """A flag's value as TOML has it, without the password of a URL. Strings are JSON's: TOML has the same escapes."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str | Path):
        return json.dumps(PASSWORD.sub("***", str(value)), ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_settings(config: type, args: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Setting]:
    """The value of each field that has one, by flag, variable, file or default. Raises ConfigError."""
    known = {name: (default, flag) for name, default, flag in flags_of(config)}
    settings = {name: Setting(default, "") for name, (default, _) in known.items() if default is not MISSING}
    given = {name: Setting(getattr(args, name), option(name)) for name in known if hasattr(args, name)}
    for name in known:
        if name not in given and (text := environ.get(variable(name))):
            given[name] = Setting(value_of_text(variable(name), text, *known[name]), variable(name))
    if "config" not in given:
        return settings | given
    keys = {option(name)[2:]: name for name in known if name not in OF_THE_PROCESS}
    for key, (value, place) in file_entries(given["config"].value, keys).items():
        if keys[key] not in given:
            found = value_of_entry(f"{place}: {key}", value, *known[keys[key]])
            given[keys[key]] = Setting(found, place)
    return settings | given


def value_of_text(place: str, text: str, default: Any, flag: Flag) -> Any:
    """A flag's value in a variable, or one of a file's as text. Raises ConfigError."""
    if isinstance(default, bool):
        if (value := SWITCH.get(text.strip().lower())) is None:
            raise ConfigError(f"{place}: expected true or false, got {text!r:.80}")
        return value
    if flag.action == "append":
        return [parsed(place, each, flag) for each in names_in(text)]
    return parsed(place, text, flag)


def value_of_entry(place: str, value: Any, default: Any, flag: Flag) -> Any:
    """A flag's value in a file. Raises ConfigError."""
    kinds: tuple[type, ...] = (str, int, float)
    expected = "text or a number"
    if isinstance(default, bool):
        kinds, expected = (bool,), "true or false"
    elif flag.action == "append" and isinstance(value, list):
        return [value_of_entry(place, each, default, flag)[0] for each in value]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        found = "something else" if flag.secret else f"{value!r:.80}"
        raise ConfigError(f"{place}: expected {expected}, got {found}")
    return value_of_text(place, str(value), default, flag)


def parsed(place: str, text: str, flag: Flag) -> Any:
    """A value's text as its flag reads it. Raises ConfigError."""
    try:
        value = flag.parse(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{place}: {error}{service_hint(text)}") from None
    except ValueError:
        expected = KINDS.get(flag.parse, "another value")
        raise ConfigError(f"{place}: expected {expected}, got {text!r:.80}{service_hint(text)}") from None
    if flag.choices and value not in flag.choices:
        raise ConfigError(f"{place}: expected one of {', '.join(flag.choices)}, got {value!r:.80}")
    return value


def read_config(config: type[C], args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> C:
    """The configuration that parsed arguments, variables and a file ask for. Raises ConfigError."""
    return made_of(config, find_settings(config, args, os.environ if environ is None else environ))


def made_of(config: type[C], settings: Mapping[str, Setting]) -> C:
    """The configuration with these values. Raises ConfigError for a flag that is missing."""
    for name, _, _ in flags_of(config):
        if name not in settings:
            raise ConfigError(f"{option(name)}: expected a value: give the flag, {variable(name)}, or a --config FILE")
    sources = {name: place for name, (_, place) in settings.items() if place}
    return config(**{name: value for name, (value, _) in settings.items()}, sources=sources)


def parse_flags(
    config: type[C], cli: argparse.ArgumentParser, argv: Sequence[str], problem_of: Callable[[C], str | None]
) -> C:
    """The configuration that arguments, variables and a file ask for; ends the process with a sentence if it is wrong.

    `problem_of` is what else is wrong with it. With --show-config, the process ends after the values are shown.
    """
    args, unknown = cli.parse_known_args(argv)
    try:
        if unknown:
            raise ConfigError(unknown_flag(unknown, config))
        settings = find_settings(config, args, os.environ)
        if settings["show_config"].value:
            print(shown_settings(config, settings))
        made = made_of(config, settings)
    except ConfigError as error:
        cli.error(str(error))
    if problem := problem_of(made):
        cli.error(placed(problem, made.sources))
    if settings["show_config"].value:
        cli.exit()
    return made


def unknown_flag(arguments: Sequence[str], config: type) -> str:
    """What to write in place of the first argument that is no flag, as a sentence."""
    name = next((each.partition("=")[0] for each in arguments if each.startswith("-")), arguments[0])
    known = [option(field) for field, *_ in flags_of(config)]
    switches = [f"--no-{option(field)[2:]}" for field, default, _ in flags_of(config) if default is True]
    return f"{name}: unknown flag: {nearest(name, [*known, *switches])}"


def shown_settings(config: type, settings: Mapping[str, Setting]) -> str:
    """Each flag's value and where it comes from, as a file for --config; secrets are left out."""
    lines: list[str] = []
    shown_group = ""
    for name, _, flag in flags_of(config):
        if name in OF_THE_PROCESS:
            continue
        if flag.group != shown_group:
            lines += ["", f"# {flag.group}"] if lines else [f"# {flag.group}"]
            shown_group = flag.group
        key = option(name)[2:]
        setting = settings.get(name, Setting(None, "missing"))
        if setting.value is None:
            default = f"not set: {flag.shown}" if flag.shown else "not set"
            lines.append(f"# {key}: {setting.place or default}")
        elif flag.secret:
            lines.append(f"# {key}: {setting.place}, not shown")
        else:
            lines.append(f"{key} = {toml_value(setting.value)}  # {setting.place or 'default'}")
    return "\n".join(lines)
