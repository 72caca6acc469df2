"""The tables of READMEs that the code makes: `python -m serve.docs` rewrites them.

A table stands between `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from model.kv import bytes_per_token
from model.memory import active_parameters, longest_context, parameters, weight_bytes
from model.published import MODELS, published
from model.states import bytes_per_state
from serve.cluster.config import GROUP, ClusterConfig
from serve.diagnosis.causes import CAUSES
from serve.proxy.cli import ProxyConfig
from serve.rules.normalize import RULE_COLUMNS, rule_rows
from serve.server.app import ROUTES
from serve.server.config import ServerConfig
from serve.server.key_metrics import KEYS
from serve.server.metrics import documented, documented_metrics
from serve.web.flags import flag_tables
from serve.web.headers import REQUEST_HEADERS, RESPONSE_HEADERS, Header

FOLDER = Path(__file__).parent
PAGES = (FOLDER / "README.md", FOLDER / "proxy" / "README.md", FOLDER.parent / "model" / "README.md")
BLOCK = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def route_table() -> str:
    """The server's routes, each with the first sentence of its function."""
    rows = []
    for route in ROUTES:
        method = min((route.methods or set()) - {"HEAD"})
        name = f"`{method} {route.path.replace(':path', '')}`"
        text = (route.endpoint.__doc__ or "").splitlines()[0].removeprefix(f"{name}: ")
        rows.append((name, text.removesuffix(".")))
    return markdown_table(("route", "what it returns"), rows)


def header_table(headers: Iterable[Header], proxy: bool) -> str:
    """The headers that the server has, or those of the proxy."""
    rows = [(f"`{header.name}`", header.text) for header in headers if (header.proxy if proxy else header.server)]
    return markdown_table(("header", "meaning"), rows)


def metric_table() -> str:
    """Every metric of `/metrics`."""
    rows = [
        (f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.text)
        for metric in [*documented_metrics(), *documented(KEYS)]
    ]
    return markdown_table(("metric", "type", "labels", "meaning"), rows)


def rule_table() -> str:
    """The rules for prompts."""
    return markdown_table(RULE_COLUMNS, [(f"`{name}`", *cells) for name, *cells in rule_rows()])


def memory_table() -> str:
    """What published models take of devices, with weights of 16 and of 4 bits and keys and values of 16."""
    devices = (24, 80, 141)
    head = ("model", "parameters, active", "weights in 16, 8, 4 bits, GB", "KV of a token", "a state")
    rows = []
    for name in MODELS:
        config = published(name)
        weights = ", ".join(f"{weight_bytes(config, bits) / 1e9:,.1f}" for bits in (16, 8, 4))
        sizes = f"{parameters(config) / 1e9:.1f}B, {active_parameters(config) / 1e9:.1f}B"
        contexts = (
            " / ".join(tokens(longest_context(config, memory * 10**9, bits)) for bits in (16, 4)) for memory in devices
        )
        kv = f"{bytes_per_token(config, 'bfloat16') / 1024:g} KiB"
        state = f"{bytes_per_state(config) / 1e6:.0f} MB" if config.recurrent_layers else "–"
        rows.append((name, sizes, weights, kv, state, *contexts))
    return markdown_table((*head, *(f"on {memory} GB" for memory in devices)), rows)


def tokens(count: int) -> str:
    """A number of tokens in a few characters; a dash for none."""
    return f"{count // 1000}K" if count >= 1000 else "–"


TABLES: dict[str, Callable[[], str]] = {
    "routes": route_table,
    "request-headers": lambda: header_table(REQUEST_HEADERS, proxy=False),
    "response-headers": lambda: header_table(RESPONSE_HEADERS, proxy=False),
    "proxy-request-headers": lambda: header_table(REQUEST_HEADERS, proxy=True),
    "proxy-response-headers": lambda: header_table(RESPONSE_HEADERS, proxy=True),
    "metrics": metric_table,
    "flags": lambda: flag_tables(ServerConfig),
    "proxy-flags": lambda: flag_tables(ProxyConfig),
    "cluster-flags": lambda: flag_tables(ClusterConfig, (GROUP,)),
    "rules": rule_table,
    "memory": memory_table,
    "causes": lambda: markdown_table(("cause", "meaning"), [(f"`{cause}`", text) for cause, text in CAUSES.items()]),
}


def with_tables(page: str) -> str:
    """The page with its tables as the code has them now."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found['name']]()}\n{found[4]}", page)


def main() -> None:
    """Rewrite the tables of all pages."""
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
