"""What each key of a file has used, for `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from serve.server.metrics import COUNTER, GAUGE, Figure, read_figures
from serve.web.keys import Keys, Usage

Usages = Mapping[str, Usage]


def total(name: str) -> Callable[[Usages], dict[str, int]]:
    """A reader of one total of every key."""
    return lambda usages: {key: usage.totals[name] for key, usage in usages.items()}


KEYS: tuple[Figure[Usages], ...] = (
    Figure("key_requests", COUNTER, "Requests of a key of --api-key-file", total("requests"), "key"),
    Figure(
        "key_refused_requests", COUNTER, "Requests beyond one of the key's limits", total("refused_requests"), "key"
    ),
    Figure("key_prompt_tokens", COUNTER, "Prompt tokens of a key's answers", total("prompt_tokens"), "key"),
    Figure("key_reused_tokens", COUNTER, "Of these, tokens whose KV was reused", total("reused_tokens"), "key"),
    Figure("key_generated_tokens", COUNTER, "Tokens of a key's answers", total("generated_tokens"), "key"),
    Figure(
        "key_requests_in_flight",
        GAUGE,
        "Requests of a key that wait or run",
        lambda usages: {key: usage.requests for key, usage in usages.items()},
        "key",
    ),
    Figure(
        "key_tokens_in_flight",
        GAUGE,
        "Tokens of their prompts, and of the answers that they ask for",
        lambda usages: {key: usage.tokens for key, usage in usages.items()},
        "key",
    ),
)


class KeyCollector(Collector):
    """Reads what each key has used, or the key with the name `only`, at each scrape."""

    def __init__(self, keys: Keys, only: str | None = None) -> None:
        self.keys, self.only = keys, only

    def collect(self) -> Iterator[Metric]:
        """The figures of the keys."""
        usages = {name: usage for name, usage in list(self.keys.usages.items()) if self.only in (None, name)}
        yield from read_figures(KEYS, usages)
