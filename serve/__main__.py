"""`python -m serve --model DIR`: load a checkpoint, compile, and serve it; `explain` and `proxy` do without one."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.sizes import parse_bytes
from serve.engine.runtime import set_up_jax, user_cache
from serve.formats.families import BY_NAME
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.rules.normalize import parse_rules
from serve.web.flags import add_address, add_rules, check_address

if TYPE_CHECKING:
    import jax

    from cache.tiers import Tiers
    from model.config import ModelConfig
    from model.params import Params
    from serve.audit.auditor import AuditSettings
    from serve.engine.settings import EngineSettings

log = logging.getLogger("tokenzero")

# On a GPU: what stays free for activations and the compiler's scratch beside weights and pool.
DEVICE_MARGIN_BYTES = 3 * 2**30
CPU_POOL_BYTES = 2**30
HOST_BYTES = 4 * 10**9
MAX_SPECULATIVE_TOKENS = 15


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(
        prog="python -m serve",
        usage="%(prog)s --model DIR_OR_ID [options]",
        epilog="%(prog)s audit FILE --model DIR replays what an audit found wrong; "
        "%(prog)s explain A.json B.json says where two captured requests diverge, and why; "
        "%(prog)s proxy --upstream URL puts the rules in front of another engine.",
        description="Serve a Hugging Face checkpoint over the Anthropic Messages API, with every prefix cached.",
    )
    model = cli.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a local checkpoint folder, or a hub id")
    model.add_argument("--model-name", metavar="NAME", help="name in /v1/models (default: the last part of --model)")
    model.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto, the default: float32 on CPU, bfloat16 elsewhere",
    )
    model.add_argument("--max-model-len", type=int, metavar="TOKENS", help="prompt and output (default: the model's)")

    http = cli.add_argument_group("server")
    add_address(http, 8000)
    http.add_argument(
        "--max-body-bytes",
        type=parse_bytes,
        default="32MiB",
        metavar="SIZE",
        help="a longer request gets 413 (default: %(default)s)",
    )
    http.add_argument(
        "--memory-bytes",
        type=parse_bytes,
        default=DEFAULT_BOUNDS.total,
        metavar="SIZE",
        help="memory for what is remembered of requests, in fixed shares: see serve/README.md (default: 642MiB)",
    )
    http.add_argument(
        "--stop-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="that stopping takes at most, what is being stored included (default: %(default)s)",
    )

    prompt = cli.add_argument_group("prompt stability")
    prompt.add_argument(
        "--strip-anthropic-preamble",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="remove the x-anthropic-billing-header line that starts an agent's system text (default: on)",
    )
    add_rules(prompt)
    prompt.add_argument(
        "--render-history-with-template",
        action="store_true",
        help="leave earlier answers to the chat template, which may drop thinking (default: they stay as sampled)",
    )

    answers = cli.add_argument_group("answers")
    answers.add_argument(
        "--tool-parser",
        choices=sorted(BY_NAME),
        metavar="NAME",
        help=f"how the model writes thinking and calls: {', '.join(sorted(BY_NAME))} (default: by its chat template)",
    )
    answers.add_argument(
        "--enable-streaming-tool-dispatch",
        action="store_true",
        help="tell each complete tool call as an event tool_call_dispatch as well",
    )

    engine = cli.add_argument_group("engine")
    engine.add_argument(
        "--kv-pool-bytes",
        type=parse_bytes,
        metavar="SIZE",
        help="default: what the device has, less weights and a margin; 1GiB on CPU",
    )
    store = cli.add_argument_group("store")
    store.add_argument(
        "--store",
        metavar="DIR_OR_URL",
        help="keep pages over restarts: in a directory, which servers may share, or at an s3://, gs:// or file:// URL",
    )
    store.add_argument(
        "--store-bytes",
        type=parse_bytes,
        default="20GB",
        metavar="SIZE",
        help="budget of a directory (default: %(default)s)",
    )
    store.add_argument(
        "--host-cache-bytes",
        type=parse_bytes,
        metavar="SIZE",
        help="pages kept in host memory (default: 4GB beside a GPU, but a quarter of memory at most; none on CPU)",
    )
    store.add_argument(
        "--flush-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="a computed page is stored this soon; what a killed server may lose (default: %(default)s)",
    )
    store.add_argument(
        "--restore-bytes",
        type=parse_bytes,
        default="1GiB",
        metavar="SIZE",
        help="pages that were read back and wait to be used, host and device each (default: %(default)s)",
    )
    store.add_argument(
        "--write-queue-bytes",
        type=parse_bytes,
        default="1GiB",
        metavar="SIZE",
        help="pages that wait to be written, host or device (default: %(default)s)",
    )
    store.add_argument(
        "--cost-model",
        metavar="FILE",
        help="what computing costs here, from `python -m experiments.sweep.fit` (default: measured while serving)",
    )
    audit = cli.add_argument_group("audit")
    audit.add_argument(
        "--audit-share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of the device's time: idle moments in which reused prefixes are computed again and compared; "
        "0 turns it off (default: %(default)s)",
    )
    audit.add_argument(
        "--audit-dir",
        type=Path,
        metavar="DIR",
        help="for the sequences that were found wrong, as token ids; `audit FILE` replays one "
        "(default: audits beside the store, or in the user's cache)",
    )
    numbers = (
        ("--page-size", 64, "TOKENS", "tokens in a KV page"),
        ("--max-num-seqs", 16, "N", "requests that run at the same time"),
        ("--max-queue", 256, "N", "requests that may queue; a further one gets 529"),
        ("--max-prefill-tokens", 1024, "TOKENS", "tokens in a prefill step"),
        (
            "--speculative-tokens",
            0,
            "N",
            "tokens to run on trial where an answer repeats earlier text; changes no token",
        ),
    )
    for name, default, unit, text in numbers:
        engine.add_argument(name, type=int, default=default, metavar=unit, help=f"{text} (default: %(default)s)")
    return cli


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, or None."""
    if problem := check_address(args):
        return problem
    for name in ("page_size", "max_num_seqs", "max_queue", "max_prefill_tokens"):
        if getattr(args, name) < 1:
            return f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}"
    if not 0 <= args.speculative_tokens <= MAX_SPECULATIVE_TOKENS:
        return f"--speculative-tokens: expected 0 to {MAX_SPECULATIVE_TOKENS}, got {args.speculative_tokens}"
    try:
        rules_of(args)
    except ValueError as error:
        return f"--normalize: {error}"
    for name in ("flush_seconds", "stop_seconds"):
        if not 0 <= getattr(args, name) < float("inf"):
            return f"--{name.replace('_', '-')}: expected 0 or more, got {getattr(args, name)}"
    if not 0 <= args.audit_share <= 1:
        return f"--audit-share: expected 0 to 1, got {args.audit_share}"
    if args.max_model_len is not None and args.max_model_len < 2:
        return f"--max-model-len: expected at least 2, got {args.max_model_len}"
    return None


def pool_bytes(device: jax.Device, taken: int) -> int:
    """The default size of the KV pool in bytes: on a GPU all but a margin and what is `taken`, on a CPU a modest share.

    Taken are the weights, and the pages on their way between the pool and the tiers.
    """
    stats = device.memory_stats()
    if device.platform != "cpu" and stats:
        return max(0, int(stats["bytes_limit"]) - taken - DEVICE_MARGIN_BYTES)
    import psutil

    return min(CPU_POOL_BYTES, int(psutil.virtual_memory().available) // 2)


def open_tiers(args: argparse.Namespace, on_cpu: bool) -> Tiers | None:
    """The tiers below the device that the flags ask for; None for none. Raises StoreError and ValueError, see Tiers."""
    import psutil

    from cache.tiers import Tiers

    spare = 0 if on_cpu else min(HOST_BYTES, psutil.virtual_memory().total // 4)
    host_bytes = spare if args.host_cache_bytes is None else args.host_cache_bytes
    if not args.store and not host_bytes:
        return None
    return Tiers(args.store, args.store_bytes, host_bytes, args.flush_seconds, args.write_queue_bytes)


def rules_of(args: argparse.Namespace) -> frozenset[str]:
    """The normaliser's rules; raises ValueError for an unknown one."""
    rules = parse_rules(args.normalize)
    return rules if args.strip_anthropic_preamble else rules - {"strip-preamble"}


def store_folder(store: str | None) -> Path | None:
    """The directory of `--store`; none for a URL, as what was sampled stays on the machine."""
    return Path(store) if store and "://" not in store else None


def stop_ids(declared: tuple[int, ...], tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those the model declares, the tokenizer's own, and Llama's end of a call."""
    calls = [id for id, token in tokenizer.added_tokens_decoder.items() if str(token) == "<|eom_id|>"]
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return frozenset([*declared, *own, *calls])


def settings(args: argparse.Namespace, config: ModelConfig, params: Params, dtype: str) -> EngineSettings:
    """The engine's sizes: as many pages as fit, and a context no longer than they hold."""
    import jax
    import numpy as np

    from model.kv import bytes_per_token
    from serve.audit.auditor import audit_pages
    from serve.engine.settings import EngineSettings

    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    taken = weights + args.restore_bytes + args.write_queue_bytes
    budget = pool_bytes(jax.devices()[0], taken) if args.kv_pool_bytes is None else args.kv_pool_bytes
    page = args.page_size * bytes_per_token(config, np.dtype(jax.numpy.dtype(dtype)))
    pages = budget // page
    if pages < 2:
        raise SystemExit(f"--kv-pool-bytes: {budget} bytes hold {pages} pages of {page} bytes, expected at least 2")
    longest = (pages - 1) * args.page_size
    wanted = args.max_model_len or config.max_position
    if args.max_model_len and args.max_model_len > min(longest, config.max_position):
        raise SystemExit(
            f"--max-model-len: got {args.max_model_len}, but the model takes {config.max_position} tokens "
            f"and the KV pool of {budget} bytes holds {longest}"
        )
    own = audit_pages(pages, args.page_size, audit_settings(args))
    if args.max_model_len and args.max_model_len > longest - own * args.page_size:
        own = 0  # the context that was asked for goes first
    if args.audit_share and not own:
        log.info("the KV pool of %d pages has none to spare for the auditor: nothing is audited", pages)
    return EngineSettings(
        num_pages=pages - own,
        max_model_len=min(wanted, longest - own * args.page_size),
        page_size=args.page_size,
        max_num_seqs=args.max_num_seqs,
        max_queue=args.max_queue,
        max_prefill_tokens=args.max_prefill_tokens,
        speculative_tokens=args.speculative_tokens,
        restore_bytes=args.restore_bytes,
        stop_seconds=args.stop_seconds,
        dtype=dtype,
        audit_pages=own,
    )


def audit_settings(args: argparse.Namespace) -> AuditSettings:
    """What the auditor may use."""
    from serve.audit.auditor import AuditSettings

    folder, sample_bytes = store_folder(args.store), DEFAULT_BOUNDS.scaled(args.memory_bytes).audits
    kept = args.audit_dir or (folder or user_cache()) / "audits"
    return AuditSettings(args.audit_share, kept, sample_bytes=sample_bytes)


def main(argv: list[str] | None = None) -> None:
    """Parse, load, compile, serve until interrupted; or explain, or forward."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["explain"]:
        from serve.diagnosis.cli import main as explain

        explain(given[1:])
        return
    if given[:1] == ["audit"]:
        from serve.audit.cli import main as audit

        audit(given[1:])
        return
    if given[:1] == ["proxy"]:
        from serve.proxy.cli import main as proxy

        proxy(given[1:])
        return
    cli = parser()
    args = cli.parse_args(given)
    if problem := check(args):
        cli.error(problem)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # It reports each accelerator that is not there.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    set_up_jax()

    import jax
    import uvicorn
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from cache.lmdb_env import StoreError
    from model import checkpoint
    from model.params import unstacked
    from serve.audit.auditor import attach
    from serve.engine.cost import load_constants
    from serve.engine.engine import Engine
    from serve.prompt.tokenizer import load_tokenizer
    from serve.server.app import create_app
    from serve.server.context import make_context

    on_cpu = jax.default_backend() == "cpu"
    dtype = args.dtype if args.dtype != "auto" else ("float32" if on_cpu else "bfloat16")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            loading = progress.add_task("loading weights", total=None)
            folder = checkpoint.resolve(args.model)
            bounds = DEFAULT_BOUNDS.scaled(args.memory_bytes)
            tokenizer = load_tokenizer(str(folder), args.tool_parser, store_folder(args.store), bounds.segments)
            config, params = checkpoint.load(
                folder,
                jax.numpy.dtype(dtype),
                lambda done, total: progress.update(loading, completed=done, total=total),
            )
            fingerprint = checkpoint.fingerprint(config, params)
            params = unstacked(params) if on_cpu else params
            sizes = settings(args, config, params, dtype)
            costs = load_constants(args.cost_model, config) if args.cost_model else None
            compiling = progress.add_task("compiling steps", total=None)
            engine = Engine(
                params,
                config,
                sizes,
                fingerprint,
                open_tiers(args, on_cpu),
                on_progress=lambda done, total: progress.update(compiling, completed=done, total=total),
                costs=costs,
            )
            attach(engine, audit_settings(args))
            serving = make_context(
                engine,
                tokenizer,
                args.model_name or Path(args.model).name,
                stop_ids(config.eos_token_ids, tokenizer.hf),
                rules=rules_of(args),
                store=store_folder(args.store),
                render_history_with_template=args.render_history_with_template,
                dispatch=args.enable_streaming_tool_dispatch,
                trace_text=args.trace_text == "on",
                bounds=bounds,
            )
    except (ValueError, OSError, StoreError) as error:
        sys.exit(f"tokenzero: {error}")
    console.print(
        f"{args.model}: {dtype} on {jax.devices()[0].device_kind}, "
        f"{sizes.num_pages} pages of {sizes.page_size} tokens, context {sizes.max_model_len}"
    )
    app = create_app(serving, args.api_key, args.max_body_bytes)
    # What is loaded stays: to look through it would hold all threads for up to 0.3 s with each full collection.
    gc.collect()
    gc.freeze()
    uvicorn.run(app, host=args.host, port=args.port, log_level="info", access_log=False, timeout_graceful_shutdown=10)


if __name__ == "__main__":
    main()
