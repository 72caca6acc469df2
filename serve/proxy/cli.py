"""`python -m serve proxy --upstream URL`: the proxy's flags, and its process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.api.messages import CountTokensRequest
from serve.diagnosis.sections import vocabulary_of
from serve.prompt.render import Prompt, prompt
from serve.prompt.tokenizer import load_tokenizer
from serve.proxy.app import create_proxy
from serve.proxy.reports import Reports
from serve.proxy.upstream import Upstream, parse_upstream
from serve.rules.normalize import parse_rules
from serve.web.browsers import browser_rules, cors
from serve.web.connections import Connections
from serve.web.flags import (
    add_flags,
    address_problem,
    allow_host_flag,
    allow_origin_flag,
    api_key_file_flag,
    api_key_flag,
    config_flag,
    flag,
    host_flag,
    normalize_flag,
    port_flag,
    prompt_text_flag,
    range_problem,
    show_config_flag,
    shutdown_timeout_flag,
    sources_field,
)
from serve.web.keys import keys_problem, open_keys
from serve.web.limit_flags import ConnectionFlags
from serve.web.logs import log_format_flag, log_level_flag, set_up_logging
from serve.web.settings import parse_flags

OPEN_FILES = 2  # of a connection: another one leads to an engine
GROUP = "proxy"


@dataclass(frozen=True)
class ProxyConfig(ConnectionFlags):
    """Everything that the command line decides."""

    upstream: Sequence[str] = flag(
        "an engine, such as http://127.0.0.1:8000; given more than once, each request goes where its first token is "
        "expected soonest",
        GROUP,
        metavar="URL",
        action="append",
    )
    host: str = host_flag(GROUP)
    port: int = port_flag(GROUP, 8080)
    api_key: str | None = api_key_flag(GROUP)
    api_key_file: Path | None = api_key_file_flag(GROUP)  # noqa: RUF009 - a dataclass field
    allow_host: str = allow_host_flag(GROUP)
    allow_origin: str = allow_origin_flag(GROUP)
    upstream_api_key: str | None = flag(
        "key for the upstream in place of the clients' own",
        GROUP,
        None,
        metavar="KEY",
        shown="$TOKENZERO_UPSTREAM_API_KEY, or the clients' keys are forwarded",
        secret=True,
    )
    log_format: str = log_format_flag(GROUP)
    log_level: str = log_level_flag(GROUP)
    shutdown_timeout: float = shutdown_timeout_flag(GROUP)
    timeout: float = flag(
        "seconds without a byte from the upstream after which a request is given up", GROUP, 600.0, metavar="S"
    )
    normalize: str = normalize_flag(GROUP)
    no_prompt_text_in_reports: bool = prompt_text_flag(GROUP)
    model: str | None = flag(
        "checkpoint whose tokenizer counts positions in reports", GROUP, None, metavar="DIR", shown="in characters"
    )
    config: Path | None = config_flag(GROUP)  # noqa: RUF009 - a dataclass field
    show_config: bool = show_config_flag(GROUP)
    sources: Mapping[str, str] = sources_field()

    @property
    def keyed(self) -> bool:
        """Whether clients have to send a key."""
        return bool(self.api_key or self.api_key_file)

    @property
    def rules(self) -> frozenset[str]:
        """The normaliser's rules. Raises ValueError for an unknown one."""
        return parse_rules(self.normalize)

    @property
    def engines(self) -> list[Upstream]:
        """The engines to forward to. Raises ValueError for one that is named twice, and see `parse_upstream`."""
        parsed = [parse_upstream(url, self.rules, self.timeout, self.upstream_api_key) for url in self.upstream]
        names = [one.url for one in parsed]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"--upstream: {twice} is given more than once: name each engine once")
        return parsed


def parser() -> argparse.ArgumentParser:
    """The command line of the proxy."""
    cli = argparse.ArgumentParser(
        prog="python -m serve proxy",
        usage="%(prog)s --upstream URL [--upstream URL ...] [options]",
        description="Apply the rules for prompts, and report where prompts diverge, in front of any engine that has "
        "the Messages API or one of OpenAI's, or several of them.",
    )
    add_flags(cli, ProxyConfig)
    return cli


def problem_of(config: ProxyConfig) -> str | None:
    """The first thing that is wrong with a configuration, as a sentence; None if it is sound."""
    try:
        _ = config.rules, config.engines
    except ValueError as error:
        return str(error)
    problem = address_problem(config, config.keyed) or range_problem(config)
    return problem or keys_problem(config.api_key, config.api_key_file)


def make_reports(model: str | None, show_prompt_text: bool) -> Reports:
    """Reports in tokens of a checkpoint's tokenizer, or in characters. Raises ValueError for a folder without one."""
    if not model:
        return Reports(show_prompt_text=show_prompt_text)
    tokenizer = load_tokenizer(model)

    def render(request: CountTokensRequest, tools_first: bool) -> Prompt:
        return prompt(request, tokenizer, tools_first=tools_first)

    return Reports(render, vocabulary_of(tokenizer.hf), "tokens", show_prompt_text)


def main(argv: Sequence[str]) -> None:
    """Parse, and forward until interrupted."""
    from serve.web.draining import DrainingApp, make_server

    config = parse_flags(ProxyConfig, parser(), argv, problem_of)
    rules, upstreams = config.rules, config.engines
    set_up_logging(config)
    try:
        reports = make_reports(config.model, not config.no_prompt_text_in_reports)
    except ValueError as error:
        sys.exit(f"proxy: {error}")
    keys = open_keys(config.api_key, config.api_key_file)
    browsers = browser_rules(config, config.keyed)
    app = create_proxy(upstreams, rules, reports, keys, browsers, cors(config))
    connections: Connections[Any] = Connections(config, reports.count_refused)
    draining = DrainingApp(app, shutdown_seconds=config.shutdown_timeout)
    # The upstream's headers are forwarded.
    own = {"server_header": False, "date_header": False}
    make_server(draining, connections, config.host, config.port, OPEN_FILES, **own).run()
    if draining.failure:
        raise draining.failure
