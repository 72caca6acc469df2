"""The targets of a sweep: an engine in this process, our own server, or any Messages or OpenAI endpoint.

A target makes a prompt of parts, asks for one token, and reports how long that took and what was cached. Those that a
sweep starts itself can be restarted, and their device cache can be evicted.
"""

from __future__ import annotations

import os
import queue
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx
import msgspec
import numpy as np

from experiments.harness import llama_server
from experiments.harness.client import NoText, measure, timed_events
from experiments.harness.provenance import versions
from experiments.harness.server import running_server
from experiments.sweep.prompts import PromptPart, messages, tokens_of
from experiments.workloads.gguf_file import write_gguf
from model.formats.gguf_file import is_gguf

# A request that an overloaded endpoint refused, or whose answer was empty, is sent again with other fresh text. Random
# weights end their turn at once in a few percent of answers.
ATTEMPTS = 12
OUTPUT_TOKENS = 8  # a model that ends its turn at once has no text to time, so it may say a few words
ONE_REQUEST = {"connection": "close"}  # a server may close a connection while it is used again
EVERYWHERE = frozenset({"stable", "varying", "stripped", "tools-first", "relocated"})
ARMS = {
    "in-process": EVERYWHERE | {"restarted", "evicted"},
    "server": EVERYWHERE | {"restarted", "evicted", "mutated-thinking"},
    "llama.cpp": EVERYWHERE | {"mutated-thinking"},
    "messages": EVERYWHERE | {"mutated-thinking"},
    "openai": EVERYWHERE | {"mutated-thinking"},
}
STORED = frozenset({"restarted", "evicted"})  # arms that read from a tier what the device has lost


class TargetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The config's `[target]`."""

    kind: Literal["in-process", "server", "llama.cpp", "messages", "openai"] = "in-process"
    url: str = ""  # messages, openai: up to and without `/v1`
    key_variable: str = ""  # messages, openai: the environment variable that holds the API key
    max_prefill_tokens: int = 1024  # in-process, server
    flags: tuple[str, ...] = ()  # server: further flags of `python -m serve`

    @property
    def own(self) -> bool:
        """Whether the sweep starts it."""
        return self.kind in ("in-process", "server", "llama.cpp")


class TargetError(Exception):
    """The target does not answer, or breaks its API."""


class EmptyAnswer(TargetError):
    """The model ended its turn at once, which leaves no first token to time."""


@dataclass(frozen=True)
class Answer:
    """One measured request; None for what the target does not report."""

    ttft_ms: float
    prompt_tokens: int
    cached_tokens: int | None
    restored_tokens: int = 0  # of the cached ones, those read back from a tier


class Target(Protocol):
    """What a sweep needs of a target."""

    def ask(self, parts: Sequence[PromptPart], nonce: str) -> Answer:
        """Ask once; fresh parts depend on `nonce`. Raises TargetError."""

    def restart(self) -> None:
        """Restart it on the same store."""

    def evict(self, nonce: str) -> None:
        """Fill the device with other prompts, so that all earlier pages are evicted."""

    def about(self) -> dict[str, Any]:
        """Dtype and device, as far as they are known."""

    def close(self) -> None:
        """End what was started."""


@dataclass(frozen=True)
class Sizes:
    """The capacity of a target that the sweep starts."""

    page_size: int
    longest: int  # tokens of the longest prompt
    stored: bool  # whether pages go to a tier

    @property
    def context(self) -> int:
        """Tokens of the longest request, with some room for what a chat template adds."""
        return self.longest + self.longest // 20 + 256

    @property
    def pages(self) -> int:
        """Pages of the device pool: the shared prompt and others; few where an arm has to evict it."""
        return (2 if self.stored else 4) * (-(-self.context // self.page_size) + 1)


class InProcess:
    """An engine in this process, asked in tokens: no HTTP, no tokenizer, no other request."""

    def __init__(self, model: str, config: TargetConfig, sizes: Sizes, folder: Path, seed: int) -> None:
        """Load and compile. Raises ValueError or OSError for a checkpoint that cannot be read."""
        import jax

        from model import checkpoint
        from model.kernels.dispatch import arranged
        from serve.engine.runtime import set_up_jax

        set_up_jax()
        self.target, self.sizes, self.folder, self.seed = config, sizes, folder, seed
        on_cpu = jax.default_backend() == "cpu"
        self.dtype, self.device = "float32" if on_cpu else "bfloat16", jax.devices()[0].device_kind
        self.config, params = checkpoint.load(model, jax.numpy.dtype(self.dtype))
        self.fingerprint = checkpoint.fingerprint(self.config, params)
        self.params = arranged(params, sizes.page_size)
        self.start()

    def start(self) -> None:
        """An engine with an empty pool."""
        from cache.tiers import Tiers
        from serve.engine.engine import Engine
        from serve.engine.settings import EngineSettings

        settings = EngineSettings(
            num_pages=self.sizes.pages,
            max_model_len=self.sizes.context,
            page_size=self.sizes.page_size,
            max_num_seqs=1,
            max_prefill_tokens=self.target.max_prefill_tokens,
            dtype=self.dtype,
        )
        tiers = Tiers(str(self.folder / "store"), 20 * 10**9, 0) if self.sizes.stored else None
        self.engine = Engine(self.params, self.config, settings, self.fingerprint, tiers)
        self.engine.start()

    def ask(self, parts: Sequence[PromptPart], nonce: str) -> Answer:
        """See Target: from the submission to the first event, which the engine's thread sends."""
        from serve.engine.request import Event, Failed, Finished, GenerationRequest, Started

        tokens = tokens_of(parts, self.config.vocab_size, self.seed, np.random.default_rng(list(nonce.encode())))
        events: queue.Queue[tuple[float, Event]] = queue.Queue()
        start = time.perf_counter()
        self.engine.submit(GenerationRequest(tokens, 1), lambda event: events.put((time.perf_counter(), event)))
        first, answer = 0.0, None
        while True:
            at, event = events.get()
            first = first or at
            if isinstance(event, Started):
                restored = sum(event.restored.values())
                answer = Answer((first - start) * 1e3, event.prompt_tokens, event.reused_tokens, restored)
            if isinstance(event, Failed):
                raise TargetError(event.message)
            if isinstance(event, Finished):
                assert answer is not None
                return answer

    def restart(self) -> None:
        """See Target."""
        self.engine.stop()
        self.start()

    def evict(self, nonce: str) -> None:
        """See Target."""
        ask_fillers(self, self.sizes, self.sizes.pages, nonce)

    def close(self) -> None:
        """See Target."""
        self.engine.stop()

    def about(self) -> dict[str, Any]:
        """See Target."""
        return {"dtype": self.dtype, "device": self.device}


@dataclass(eq=False)
class Endpoint:
    """A Messages or OpenAI endpoint; its cache is known only by the usage that it reports."""

    kind: Literal["messages", "openai"]
    url: str
    model: str
    seed: int
    longest: int  # tokens of the longest prompt
    key: str = ""
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=600, headers=ONE_REQUEST))
    chars_per_token: float = 0.0

    def calibrate(self) -> None:
        """Learn the characters per token from two prompts; what the template adds cancels out."""
        self.chars_per_token = 4.0
        sizes = max(1, self.longest // 8), max(2, self.longest // 2)
        short, long = map(self.probe, sizes)
        if long.prompt_tokens <= short.prompt_tokens:
            raise TargetError(
                f"{self.url} reports no usage, by which prompts are sized: expected prompt tokens in its answers"
            )
        self.chars_per_token = 4.0 * (sizes[1] - sizes[0]) / (long.prompt_tokens - short.prompt_tokens)

    def probe(self, size: int) -> Answer:
        """Ask about a text of `size` tokens, again if the answer is empty. Raises TargetError."""
        parts = [PromptPart("base", size, fresh=False), PromptPart("question", 16, place="user")]
        for attempt in range(ATTEMPTS - 1):
            with suppress(EmptyAnswer):
                return self.ask(parts, f"probe {size} {attempt}")
        return self.ask(parts, f"probe {size}")

    def ask(self, parts: Sequence[PromptPart], nonce: str) -> Answer:
        """See Target: the time is that to the answer's first text or thinking."""
        chat = messages(parts, self.chars_per_token, self.seed, random.Random(nonce))
        body = {"model": self.model, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
        headers = {"x-api-key": self.key, "authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            return (ask_messages if self.kind == "messages" else ask_openai)(self.client, self.url, body, chat, headers)
        except NoText as error:
            raise EmptyAnswer(f"{self.url}: {error}") from error
        except (httpx.HTTPError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise TargetError(f"{self.url}: {type(error).__name__}: {error}") from error

    def restart(self) -> None:
        """See Target; configs with arms that need it are refused."""
        raise NotImplementedError("a sweep restarts only what it started")

    def evict(self, nonce: str) -> None:
        """See Target; configs with arms that need it are refused."""
        raise NotImplementedError("how much a foreign cache holds is not known")

    def close(self) -> None:
        """See Target."""
        self.client.close()

    def about(self) -> dict[str, Any]:
        """See Target: our own server reports them at `/health`."""
        try:
            health = self.client.get(f"{self.url}/health").json()
            return {key: health.get(key) for key in ("dtype", "device")}
        except (httpx.HTTPError, ValueError, AttributeError):
            return {"dtype": None, "device": None}


def ask_messages(
    client: httpx.Client, url: str, body: dict[str, Any], chat: list[dict[str, Any]], headers: dict[str, str]
) -> Answer:
    """Ask a Messages endpoint; a thinking block of ours has no signature."""
    system = [message["content"] for message in chat if message["role"] == "system"]
    turns = []
    for message in chat[len(system) :]:
        text = {"type": "text", "text": message["content"]}
        thought = message.get("reasoning_content")
        thinking = [{"type": "thinking", "thinking": thought, "signature": ""}] if thought else []
        turns.append({"role": message["role"], "content": [*thinking, text]})
    payload = body | {"messages": turns} | ({"system": system[0]} if system else {})
    timing = measure(client, url, payload, headers | {"anthropic-version": "2023-06-01"})
    tiers = timing.usage.get("cache_read_by_tier") or {}
    return Answer(
        timing.ttft_ms,
        timing.prompt_tokens,
        timing.usage.get("cache_read_input_tokens"),
        sum(tokens for tier, tokens in tiers.items() if tier != "device"),
    )


def ask_openai(
    client: httpx.Client, url: str, body: dict[str, Any], chat: list[dict[str, Any]], headers: dict[str, str]
) -> Answer:
    """Ask a chat completions endpoint."""
    payload = body | {"messages": chat, "stream": True, "stream_options": {"include_usage": True}}
    first: float | None = None
    usage: dict[str, Any] = {}
    for at, event in timed_events(client, f"{url}/v1/chat/completions", payload, headers):
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            if any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls")):
                first = first or at
        usage = event.get("usage") or usage
    if first is None:
        raise NoText("the answer has no text: the model ended its turn at once")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(first, usage["prompt_tokens"], details.get("cached_tokens"))


class Process(Endpoint):
    """A server of the Messages API in its own process."""

    program: Sequence[str] = ("-m", "serve")

    def __init__(self, model: str, served: Path, flags: Sequence[str], sizes: Sizes, folder: Path, seed: int) -> None:
        super().__init__("messages", "", model, seed, sizes.longest)
        self.served, self.flags, self.sizes, self.log = served, flags, sizes, folder / "server.log"
        self.start()
        try:
            self.calibrate()
        except TargetError:
            self.close()
            raise

    def start(self) -> None:
        """A server process."""
        self.running = running_server(self.served, *self.flags, log=self.log, program=self.program, compiled=True)
        try:
            self.url = self.running.__enter__().url
        except RuntimeError as error:
            raise TargetError(str(error)) from error

    def restart(self) -> None:
        """See Target."""
        self.close()
        self.start()

    def close(self) -> None:
        """See Target; the client reconnects if it is used again."""
        self.running.__exit__(None, None, None)


class OwnServer(Process):
    """`python -m serve`."""

    def __init__(self, model: str, config: TargetConfig, sizes: Sizes, folder: Path, seed: int) -> None:
        from model.families import load_config
        from model.kv import bytes_per_token

        page = sizes.page_size * bytes_per_token(load_config(model), "float32")
        store = ("--store", str(folder / "store")) if sizes.stored else ()
        flags = (
            *("--page-size", str(sizes.page_size), "--kv-pool-bytes", str(sizes.pages * page)),
            *("--max-model-len", str(sizes.context), "--max-prefill-tokens", str(config.max_prefill_tokens)),
            *(*store, *config.flags),
        )
        super().__init__(model, Path(model), flags, sizes, folder, seed)

    def evict(self, nonce: str) -> None:
        """See Target; on a GPU, pages in bfloat16 are half as large."""
        ask_fillers(self, self.sizes, 2 * self.sizes.pages, nonce)


class LlamaCpp(Process):
    """llama.cpp's server with its defaults, on the checkpoint as a GGUF file."""

    program = llama_server.PROGRAM

    def __init__(self, model: str, sizes: Sizes, folder: Path, seed: int) -> None:
        if problem := llama_server.missing():
            raise TargetError(problem)
        if not is_gguf(served := Path(model)):
            write_gguf(Path(model), served := folder / "model.gguf")
        super().__init__(model, served, ("--context", str(sizes.context)), sizes, folder, seed)

    def about(self) -> dict[str, Any]:
        """See Target; keys and values are float16, as is its default."""
        return {"dtype": "float32", "device": "cpu", "engine": versions(llama_server.PACKAGES)}


def open_target(model: str, config: TargetConfig, sizes: Sizes, folder: Path, seed: int) -> Target:
    """The target, ready, for one model and page size; `folder` is scratch for a store and a log.

    Raises TargetError if it does not answer, ValueError or OSError for a checkpoint that cannot be read.
    """
    if config.kind == "in-process":
        return InProcess(model, config, sizes, folder, seed)
    if config.kind == "server":
        return OwnServer(model, config, sizes, folder, seed)
    if config.kind == "llama.cpp":
        return LlamaCpp(model, sizes, folder, seed)
    key = os.environ.get(config.key_variable, "") if config.key_variable else ""
    endpoint = Endpoint(config.kind, config.url.rstrip("/"), model, seed, sizes.longest, key)
    endpoint.calibrate()
    return endpoint


def prepare(target: Target, parts: Sequence[PromptPart], nonce: str) -> None:
    """Ask only to fill the cache; an empty answer does as well."""
    with suppress(EmptyAnswer):
        target.ask(parts, nonce)


def ask_fillers(target: Target, sizes: Sizes, pages: int, nonce: str) -> None:
    """Ask for other prompts of the longest size, one more than fill a pool of `pages`."""
    for number in range(pages * sizes.page_size // sizes.longest + 1):
        prepare(target, [PromptPart("question", sizes.longest, place="user")], f"{nonce} filler {number}")
