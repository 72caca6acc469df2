"""The server's configuration: one field for each flag of `python -m serve --model DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.sizes import parse_bytes
from serve.formats.families import BY_NAME
from serve.limits.bounds import DEFAULT_BOUNDS, Bounds
from serve.rules.normalize import parse_rules
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
from serve.web.keys import keys_problem
from serve.web.limit_flags import LimitFlags
from serve.web.logs import log_format_flag, log_level_flag
from serve.web.settings import parse_flags

MAX_SPECULATIVE_TOKENS = 15
MODEL, HTTP, PROMPTS, ANSWERS = "model", "server", "prompt stability", "answers"
ENGINE, STORE, AUDIT, CONFIGURATION = "engine", "store", "audit", "configuration"
NOTHING, HEADS, EVERYTHING = "none", "tools-system", "all"  # that keys share


def size_flag(help: str, group: str, default: str | None, shown: str | None = None) -> Any:
    """A field for a number of bytes, whose default is written with its unit."""
    size = None if default is None else parse_bytes(default)
    return flag(help, group, size, metavar="SIZE", parse=parse_bytes, shown=shown or default or "")


@dataclass(frozen=True)
class ServerConfig(LimitFlags):
    """Everything that the command line decides."""

    model: str = flag("a local checkpoint folder or GGUF file, or a hub id", MODEL, metavar="DIR_OR_ID")
    model_name: str | None = flag("name in /v1/models", MODEL, None, metavar="NAME", shown="the last part of --model")
    dtype: str = flag(
        "auto: float32 on CPU, bfloat16 elsewhere", MODEL, "auto", choices=("auto", "float32", "bfloat16")
    )
    quantize: str | None = flag(
        "keep the matrices of a full-precision checkpoint in 8 or 4 bits: less memory, faster decode, other output",
        MODEL,
        None,
        choices=("int8", "int4"),
    )
    max_model_len: int | None = flag(
        "tokens of prompt and output together",
        MODEL,
        None,
        metavar="TOKENS",
        parse=int,
        least=2,
        shown="what the model and the KV pool allow",
    )
    rope_scaling: str | None = flag(
        "another rope_scaling than the checkpoint's, as in a config.json; the context limit follows it",
        MODEL,
        None,
        metavar="JSON",
        shown="the checkpoint's",
    )

    host: str = host_flag(HTTP)
    port: int = port_flag(HTTP, 8000)
    api_key: str | None = api_key_flag(HTTP)
    api_key_file: Path | None = api_key_file_flag(HTTP)  # noqa: RUF009 - a dataclass field
    share_prefix: str = flag(
        "what keys of --api-key-file may read of each other's prompts in the cache: nothing, tools and system text "
        "that several keys have sent, or all of a common prefix",
        HTTP,
        NOTHING,
        choices=(NOTHING, HEADS, EVERYTHING),
    )
    share_after: int = flag(
        "different keys that have to send the same tools and system text before these are shared",
        HTTP,
        3,
        metavar="KEYS",
        least=2,
    )
    share_heads: Path | None = flag(  # noqa: RUF009 - a dataclass field
        "captured requests, a file or a folder of them, whose tools and system text are shared from the start",
        HTTP,
        None,
        metavar="PATH",
        parse=Path,
    )
    allow_host: str = allow_host_flag(HTTP)
    allow_origin: str = allow_origin_flag(HTTP)
    memory_bytes: int = flag(
        "memory for what is remembered of requests, in fixed shares: see serve/README.md",
        HTTP,
        DEFAULT_BOUNDS.total,
        metavar="SIZE",
        parse=parse_bytes,
        shown=f"{DEFAULT_BOUNDS.total >> 20}MiB",
    )
    log_format: str = log_format_flag(HTTP)
    log_level: str = log_level_flag(HTTP)
    shutdown_timeout: float = shutdown_timeout_flag(HTTP)
    stop_seconds: float = flag(
        "time limit for stopping after that, pending writes to the store included", HTTP, 30.0, metavar="S", least=0
    )

    strip_anthropic_preamble: bool = flag(
        "remove the x-anthropic-billing-header line at the start of an agent's system text", PROMPTS, True
    )
    normalize: str = normalize_flag(PROMPTS)
    no_prompt_text_in_reports: bool = prompt_text_flag(PROMPTS)
    on_image: str = flag(
        "what an image, or a PDF without text, becomes: a text in its place, or the request's refusal",
        PROMPTS,
        "placeholder",
        choices=("placeholder", "error"),
    )
    render_history_with_template: bool = flag(
        "render earlier assistant turns with the chat template instead of replaying sampled tokens", PROMPTS, False
    )

    tool_parser: str | None = flag(
        f"how the model writes thinking and calls: {', '.join(sorted(BY_NAME))}",
        ANSWERS,
        None,
        metavar="NAME",
        choices=tuple(sorted(BY_NAME)),
        shown="by its chat template",
    )
    enable_streaming_tool_dispatch: bool = flag(
        "also send a tool_call_dispatch event for each complete tool call", ANSWERS, False
    )

    tp: int = flag(
        "devices over which the model is divided (tensor parallelism): each has a share of the heads of every layer",
        ENGINE,
        1,
        metavar="N",
        least=1,
    )
    kv_pool_bytes: int | None = size_flag(
        "memory for KV pages, on all devices together",
        ENGINE,
        None,
        "1GiB on CPU; elsewhere all that weights, restored and unwritten pages and a margin leave",
    )
    kv_dtype: str | None = flag(
        "of KV pages; int8 and fp8 have a scale for every 16 numbers, hold 1.8 times the tokens of bfloat16 and 3.5 "
        "times those of float32, and round what they hold",
        ENGINE,
        None,
        choices=("int8", "fp8"),
        shown="as --dtype",
    )
    page_size: int = flag("tokens in a KV page", ENGINE, 64, metavar="TOKENS", least=1)
    max_num_seqs: int = flag("requests that run at the same time", ENGINE, 16, metavar="N", least=1)
    max_queue: int = flag("requests that may wait; one more gets 529", ENGINE, 256, metavar="N", least=1)
    max_prefill_tokens: int = flag("tokens in a prefill step", ENGINE, 1024, metavar="TOKENS", least=1)
    speculative_tokens: int = flag(
        "draft tokens per step for prompt-lookup speculative decoding; 0 disables",
        ENGINE,
        0,
        metavar="N",
        least=0,
        most=MAX_SPECULATIVE_TOKENS,
    )

    store: str | None = flag(
        "keep pages over restarts: in a directory, which servers may share, or at an s3://, gs:// or file:// URL",
        STORE,
        None,
        metavar="DIR_OR_URL",
    )
    store_bytes: int = size_flag("size limit of a directory", STORE, "20GB")
    host_cache_bytes: int | None = size_flag(
        "pages kept in host memory", STORE, None, "4GB with a GPU, at most a quarter of memory; none on CPU"
    )
    flush_seconds: float = flag(
        "a computed page is stored after this time at most; a killed server may lose as much",
        STORE,
        1.0,
        metavar="S",
        least=0,
    )
    restore_bytes: int = size_flag(
        "pages that were read back and wait to be used, on host and device each", STORE, "1GiB"
    )
    preload_bytes: int = size_flag(
        "pages of the store that are read before a request asks for them, at most half of the KV pool; 0 disables",
        STORE,
        "8GiB",
    )
    retain_bytes: int | None = size_flag(
        "KV pages that stay on the device because clients ask for it, or an operator pins them; each key has its share",
        STORE,
        None,
        "a quarter of the KV pool",
    )
    pin: Path | None = flag(  # noqa: RUF009 - a dataclass field
        "captured requests, a file or a folder of them, whose tools and system text stay on the device",
        STORE,
        None,
        metavar="PATH",
        parse=Path,
    )
    write_queue_bytes: int = size_flag("pages that wait to be written, on host or device", STORE, "1GiB")
    cost_model: str | None = flag(
        "prefill costs of this machine, from `python -m experiments.sweep.fit`",
        STORE,
        None,
        metavar="FILE",
        shown="measured while serving",
    )

    warm: str | None = flag(
        "request bodies whose prompts are computed at the start up to their last user message: JSON files, .jsonl "
        "files with a body on each line, or folders, comma-separated",
        STORE,
        None,
        metavar="FILES",
    )
    ready_when_warm: bool = flag("say that the server is ready only once --warm is done", STORE, False)

    audit_share: float = flag(
        "share of the device's time in which idle moments recompute reused prefixes and compare; 0 disables",
        AUDIT,
        0.01,
        metavar="SHARE",
        least=0,
        most=1,
    )
    audit_dir: Path | None = flag(  # noqa: RUF009 - a dataclass field
        "for sequences that an audit found wrong, as token ids; `audit FILE` replays one",
        AUDIT,
        None,
        metavar="DIR",
        parse=Path,
        shown="audits in the store, or in the user's cache",
    )

    config: Path | None = config_flag(CONFIGURATION)  # noqa: RUF009 - a dataclass field
    show_config: bool = show_config_flag(CONFIGURATION)
    sources: Mapping[str, str] = sources_field()

    @property
    def keyed(self) -> bool:
        """Whether clients have to send a key."""
        return bool(self.api_key or self.api_key_file)

    @property
    def name(self) -> str:
        """The model's name in /v1/models."""
        return self.model_name or Path(self.model).name

    @property
    def rules(self) -> frozenset[str]:
        """The normaliser's rules. Raises ValueError for an unknown one."""
        rules = parse_rules(self.normalize)
        return rules if self.strip_anthropic_preamble else rules - {"strip-preamble"}

    @property
    def bounds(self) -> Bounds:
        """The share of `--memory-bytes` of each kind of memory."""
        return DEFAULT_BOUNDS.scaled(self.memory_bytes)

    @property
    def state_dir(self) -> Path | None:
        """The directory of `--store`; None for a URL, since sampled answers stay on this machine."""
        return Path(self.store) if self.store and "://" not in self.store else None


def parser(prog: str = "python -m serve") -> argparse.ArgumentParser:
    """The command line of the server."""
    cli = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --model DIR_OR_ID [options]",
        description="Serve a Hugging Face checkpoint over the Anthropic Messages API and OpenAI's\n"
        "two APIs, with every prefix cached.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(cli, ServerConfig)
    return cli


def problem_of(config: ServerConfig) -> str | None:
    """The first thing that is wrong with a configuration, as a sentence that names the flag; None if it is sound."""
    problem = address_problem(config, config.keyed) or range_problem(config)
    if problem or (problem := keys_problem(config.api_key, config.api_key_file)):
        return problem
    if config.share_heads and config.share_prefix != HEADS:
        return f"--share-heads: expected --share-prefix {HEADS} beside it, found {config.share_prefix}"
    if config.share_heads and not config.share_heads.exists():
        return f"--share-heads: {config.share_heads}: expected a captured request or a folder of them, found none"
    if config.ready_when_warm and not config.warm:
        return "--ready-when-warm: expected --warm FILES beside it, found none"
    if config.pin and not config.pin.exists():
        return f"--pin: {config.pin}: expected a captured request or a folder of them, found none"
    if config.quantize and config.tp > 1:
        return f"--quantize: quantised weights are not divided over devices yet, got --tp {config.tp}: leave out one"
    try:
        _ = config.rules
    except ValueError as error:
        return f"--normalize: {error}"
    return rope_problem(config.rope_scaling) if config.rope_scaling else None


def rope_problem(text: str) -> str | None:
    """What is wrong with a rope scaling, as a sentence that names the flag; None if it is sound."""
    from model.rope_scaling import parse_rope_scaling

    try:
        parse_rope_scaling(text)
    except ValueError as error:
        return f"--rope-scaling: {error}"
    return None


def parse_config(argv: Sequence[str], cli: argparse.ArgumentParser | None = None) -> ServerConfig:
    """The configuration that arguments ask for; ends the process with a sentence if they are wrong."""
    return parse_flags(ServerConfig, cli or parser(), argv, problem_of)
