"""`python -m serve audit FILE --model DIR`: replay what an audit found wrong."""

from __future__ import annotations

import argparse
import logging
import queue
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cache.keys import root_key
from cache.lmdb_env import StoreError
from cache.pool import pages_for
from cache.tiers import Tiers
from model import checkpoint
from model.fingerprint import with_pages
from model.kernels.dispatch import arranged
from model.rope_scaling import parse_rope_scaling, with_rope_scaling
from serve.audit.auditor import MIN_PAGES, AuditSettings, attach, auditor_of
from serve.audit.case import Case, read_case
from serve.audit.findings import Mismatch
from serve.cost.model import Constants
from serve.engine.engine import Engine
from serve.engine.request import Event, Failed, GenerationRequest, Started, TokenEvent
from serve.engine.settings import EngineSettings
from serve.web.keys import private_salt


def main(argv: Sequence[str]) -> None:
    """Replay a case: compute its sequence, restore it, and print the difference; exit status 1 if there is one."""
    cli = argparse.ArgumentParser(prog="python -m serve audit", description=__doc__)
    cli.add_argument("file", type=Path, metavar="FILE", help="what an audit wrote")
    cli.add_argument("--model", required=True, metavar="DIR_OR_ID", help="the checkpoint that it was written for")
    cli.add_argument("--rope-scaling", metavar="JSON", help="that of the server, where it had one")
    cli.add_argument("--store", metavar="DIR_OR_URL", help="take the pages from there; nothing is written to it")
    cli.add_argument("--store-bytes", type=int, default=1 << 40, help=argparse.SUPPRESS)
    cli.add_argument("--salt", default="", help="the cache salt, where the sequence had one")
    cli.add_argument("--key", default="", metavar="NAME", help="the name of the API key, where it had one")
    args = cli.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        scaling = parse_rope_scaling(args.rope_scaling) if args.rope_scaling else None
        salt = private_salt(args.key, args.salt.encode()) if args.key else args.salt.encode()
        lines, differs = replay(read_case(args.file), args.model, args.store, args.store_bytes, salt, scaling)
    except (OSError, ValueError, StoreError) as error:
        sys.exit(f"audit: {error}")
    print("\n".join(lines))
    sys.exit(1 if differs else 0)


def replay(
    case: Case,
    model: str,
    store: str | None,
    store_bytes: int,
    salt: bytes,
    rope_scaling: Mapping[str, Any] | None = None,
) -> tuple[list[str], bool]:
    """Compare a cold and a warm engine on a case. Returns lines to print, and whether the two differ.

    Raises ValueError where model or salt are not the file's, and what loading a checkpoint and opening a store raise.
    """
    folder = checkpoint.resolve(model)
    config, params = checkpoint.load(folder, jax.numpy.dtype(case.dtype), quantize=case.quantize)
    if rope_scaling is not None:
        config = with_rope_scaling(config, rope_scaling)
    fingerprint = checkpoint.fingerprint(config, params)
    of_pages = with_pages(fingerprint, case.kv_dtype)
    if of_pages.hex() != case.fingerprint:
        raise ValueError(f"--model: {folder} has fingerprint {of_pages.hex()}, the file {case.fingerprint}")
    if root_key(of_pages, case.page_size, salt).hex() != case.root:
        raise ValueError("--salt: it is not the one of the file's sequence, or --key is not")
    params = arranged(params, case.page_size, consume=True)
    tokens = np.asarray(case.tokens, np.int32)
    settings = settings_for(case)
    audit = AuditSettings(share=float("inf"), quiet_s=0.0, max_tokens=len(tokens))
    # Computing a token takes longer than any tier, so all stored pages are read back.
    slow = Constants(fixed=0.0, linear=1e5, attention=0.0)
    request = GenerationRequest(tokens, 1, salt=salt, head=case.head)

    def answers(tiers: Any, times: int) -> tuple[list[tuple[int, Any]], Any]:
        engine = Engine(params, config, settings, fingerprint, tiers, costs=slow)
        attach(engine, audit)
        try:
            return [answered(engine, request) for _ in range(times)], audited(engine)
        finally:
            if tiers:
                tiers.close()

    lines = [f"{len(tokens)} tokens, {case.reused} of them reused; found {case.time}: {summary(case)}"]
    if store:
        tiers = Tiers(store, store_bytes, 0)
        for tier in tiers.pages.tiers:
            for change in ("put_many", "delete"):
                setattr(tier, change, lambda *_: None)
        ((cold, _),), _ = answers(None, 1)
        ((warm, started),), wrong = answers(tiers, 1)
    else:
        ((cold, _), (warm, started)), wrong = answers(None, 2)
    taken = ", ".join(f"{count} from {tier}" for tier, count in started.restored.items()) or "from the device"
    lines.append(f"cold: token {cold}; warm: token {warm}, {started.reused_tokens} tokens reused ({taken})")
    lines.append(f"differs: {wrong}" if wrong else "what was reused is what the model computes")
    return lines, wrong is not None or cold != warm


def settings_for(case: Case) -> EngineSettings:
    """An engine that runs the case alone, with pages to audit all of it."""
    pages = pages_for(len(case.tokens) + 2, case.page_size)
    return EngineSettings(
        num_pages=pages + 2,
        max_model_len=len(case.tokens) + 1,
        page_size=case.page_size,
        max_num_seqs=1,
        max_prefill_tokens=case.max_prefill_tokens,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype,
        audit_pages=max(pages + 2, MIN_PAGES),
    )


def summary(case: Case) -> str:
    """The mismatch of a case, in a few words."""
    return str(Mismatch(case.witness, case.source, case.position, 0, case.layer, case.part, case.error, case.scale))


def answered(engine: Engine, request: Any) -> tuple[int, Any]:
    """Run one request on an engine that was not started, step by step. Returns its first token, and Started."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request, events.put)
    while engine.core.unfinished or engine.inbox.submissions:
        engine.core.cancel(engine.receive() or set())
        engine.core.step()
    engine.core.collect()
    found = [events.get() for _ in range(events.qsize())]
    if failed := [event for event in found if isinstance(event, Failed)]:
        raise ValueError(f"the engine failed: {failed[0].message}")
    return (
        next(event.token for event in found if isinstance(event, TokenEvent)),
        next(event for event in found if isinstance(event, Started)),
    )


def audited(engine: Engine) -> Mismatch | None:
    """Audit all recorded requests. Returns what was wrong with the last one."""
    auditor = auditor_of(engine)
    assert auditor is not None
    while auditor.records or auditor.audit:
        auditor.step(engine)
        if auditor.failures:
            raise ValueError("the audit itself failed, see above")
        if auditor.waits is not None:
            auditor.waits.result()
    return auditor.latest
