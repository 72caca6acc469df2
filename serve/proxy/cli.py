"""`python -m serve proxy --upstream URL`: its flags, and the process."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from serve.api.messages import CountTokensRequest
from serve.diagnosis.sections import vocabulary_of
from serve.prompt.render import Prompt, prompt
from serve.prompt.tokenizer import load_tokenizer
from serve.proxy.app import create_proxy
from serve.proxy.reports import Reports
from serve.proxy.upstream import parse_upstream
from serve.rules.normalize import parse_rules
from serve.web.flags import add_address, add_rules, check_address

SWITCH_SECONDS = 5e-4  # that an event waits for the interpreter while a report is made; Python's own 5 ms are too long


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(
        prog="python -m serve proxy",
        usage="%(prog)s --upstream URL [options]",
        description="Put the rules for prompts and the divergence report in front of any Messages or OpenAI engine.",
    )
    cli.add_argument("--upstream", required=True, metavar="URL", help="the engine, such as http://127.0.0.1:8000")
    add_address(cli, 8080)
    cli.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds without a byte from the upstream before a request is given up (default: %(default)s)",
    )
    add_rules(cli)
    cli.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint whose tokenizer counts positions in reports (default: in characters)",
    )
    return cli


def reports_of(model: str | None, show_prompt_text: bool) -> Reports:
    """Reports in tokens of a checkpoint's tokenizer, or in characters; raises ValueError for a folder without one."""
    if not model:
        return Reports(show_prompt_text=show_prompt_text)
    tokenizer = load_tokenizer(model)

    def render(request: CountTokensRequest, tools_first: bool) -> Prompt:
        return prompt(request, tokenizer, tools_first=tools_first)

    return Reports(render, vocabulary_of(tokenizer.hf), "tokens", show_prompt_text)


def main(argv: Sequence[str]) -> None:
    """Parse, and forward until interrupted."""
    import uvicorn

    cli = parser()
    args = cli.parse_args(argv)
    if problem := check_address(args):
        cli.error(problem)
    try:
        rules = parse_rules(args.normalize)
        upstream = parse_upstream(args.upstream, rules, args.timeout)
    except ValueError as error:
        cli.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        reports = reports_of(args.model, args.trace_text == "on")
    except ValueError as error:
        sys.exit(f"proxy: {error}")
    sys.setswitchinterval(SWITCH_SECONDS)
    app = create_proxy(upstream, rules, reports, args.api_key)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="info",
        access_log=False,
        # The upstream's are forwarded.
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=10,
    )
