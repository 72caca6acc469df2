"""Sequences that an audit found wrong, as files, and `python -m serve audit FILE --model DIR`, which replays one.

A file holds the prompt as token ids, whatever `--trace-text` says: without them nothing could be computed again. So
only its owner may read it (mode 0600), and the latest FILES of them are kept. The salt is in it as a digest only: the
root key of its pages, from which their other keys follow. The replay of a salted sequence takes the salt.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import msgspec
import numpy as np

from cache.keys import root_key

if TYPE_CHECKING:
    from serve.audit import Mismatch, Reuse
    from serve.engine import Engine
    from serve.sequence import Event

log = logging.getLogger("tokenzero.audit")

VERSION = 1
FILES = 16
BYTES = 16 << 20  # of all files together; the latest stays in any case


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that was found wrong, and all that it takes to look at it again."""

    version: int = VERSION
    time: str  # ISO 8601, UTC
    fingerprint: str  # of the model, hexadecimal
    root: str  # key of the pages' parent, hexadecimal: a digest of fingerprint, page size and salt
    page_size: int
    prefill_chunk: int
    dtype: str
    device: str
    jax: str
    tokens: list[int]
    reused: int  # the prefix that was audited
    first: int | None  # the token that was sampled behind all of `tokens`, if it was the most likely one
    witness: str  # these as in audit.Mismatch
    source: str
    position: int
    layer: int | None
    part: str | None
    error: float
    scale: float

    @staticmethod
    def of(engine: Engine, reuse: Reuse, wrong: Mismatch) -> Case:
        """The case of a mismatch."""
        settings = engine.settings
        root = root_key(engine.fingerprint, settings.page_size, reuse.salt)
        return Case(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=engine.fingerprint.hex(),
            root=root.hex(),
            page_size=settings.page_size,
            prefill_chunk=settings.prefill_chunk,
            dtype=settings.dtype,
            device=jax.devices()[0].device_kind,
            jax=jax.__version__,
            tokens=reuse.tokens.tolist(),
            reused=reuse.reused,
            first=reuse.first,
            witness=wrong.witness,
            source=wrong.source,
            position=wrong.position,
            layer=wrong.layer,
            part=wrong.part,
            error=wrong.error,
            scale=wrong.scale,
        )


def keep(folder: Path | None, case: Case) -> Path | None:
    """Write a case to a file of its own in the folder, and let the oldest ones go; None if that is not possible."""
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        stem = f"{case.time.replace(':', '').removesuffix('+0000')}-{case.root[:8]}"
        path = next(p for i in range(1000) if not (p := folder / f"{stem}-{i:03}.json").exists())
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(case))
        found = sorted(folder.glob("*-*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)
        total = 0
        for i, each in enumerate(found):
            total += each.stat().st_size
            if i >= FILES or (i and total > BYTES):
                each.unlink()
    except (OSError, StopIteration) as error:
        log.warning("%s: an audit's sequence is not kept: %s", folder, error)
        return None
    return path


def read(path: Path) -> Case:
    """The case in a file. Raises OSError if it cannot be read, ValueError if it is not a case."""
    try:
        case = msgspec.json.decode(path.read_bytes(), type=Case)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: expected what an audit wrote, found {error}") from error
    if case.version != VERSION or not 0 < case.reused < len(case.tokens) or case.page_size < 1:
        raise ValueError(
            f"{path}: expected version {VERSION} and a reused prefix within its tokens, found version "
            f"{case.version} with {case.reused} of {len(case.tokens)} tokens, pages of {case.page_size}"
        )
    return case


def main(argv: Sequence[str]) -> None:
    """Replay a case: compute its sequence, take it from the cache, and say what differs. Exit status 1 if it does."""
    cli = argparse.ArgumentParser(prog="python -m serve audit", description=__doc__)
    cli.add_argument("file", type=Path, metavar="FILE", help="what an audit wrote")
    cli.add_argument("--model", required=True, metavar="DIR_OR_ID", help="the checkpoint that it was written for")
    cli.add_argument("--store", metavar="DIR_OR_URL", help="take the pages from there; nothing is written to it")
    cli.add_argument("--store-bytes", type=int, default=1 << 40, help=argparse.SUPPRESS)
    cli.add_argument("--salt", default="", help="the cache salt, where the sequence had one")
    args = cli.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    from cache.environment import StoreError

    try:
        lines, differs = replay(read(args.file), args.model, args.store, args.store_bytes, args.salt.encode())
    except (OSError, ValueError, StoreError) as error:
        sys.exit(f"audit: {error}")
    print("\n".join(lines))
    sys.exit(1 if differs else 0)


def replay(case: Case, model: str, store: str | None, store_bytes: int, salt: bytes) -> tuple[list[str], bool]:
    """What a cold and a warm engine make of a case, in lines, and whether they differ.

    Raises ValueError where model or salt are not the file's, and what loading a checkpoint and opening a store raise.
    """
    from cache.persistence import Tiers
    from model import checkpoint
    from model.params import unstacked
    from serve.audit import LEAST_PAGES, AuditSettings
    from serve.cost import Constants
    from serve.engine import Engine, EngineSettings
    from serve.sequence import GenerationRequest

    folder = checkpoint.resolve(model)
    config, params = checkpoint.load(folder, jax.numpy.dtype(case.dtype))
    fingerprint = checkpoint.fingerprint(config, params)
    if fingerprint.hex() != case.fingerprint:
        raise ValueError(f"--model: {folder} has fingerprint {fingerprint.hex()}, the file {case.fingerprint}")
    if root_key(fingerprint, case.page_size, salt).hex() != case.root:
        raise ValueError("--salt: it is not the one of the file's sequence")
    params = unstacked(params) if jax.default_backend() == "cpu" else params
    tokens = np.asarray(case.tokens, np.int32)
    pages = -(-(len(tokens) + 2) // case.page_size)
    settings = EngineSettings(
        num_pages=pages + 2,
        max_model_len=len(tokens) + 1,
        page_size=case.page_size,
        max_batch=1,
        prefill_chunk=case.prefill_chunk,
        dtype=case.dtype,
        audit_pages=max(pages + 2, LEAST_PAGES),
    )
    audit = AuditSettings(share=float("inf"), quiet_s=0.0, max_tokens=len(tokens))
    # To compute a token costs more than any tier: what there is, is read back.
    never = Constants(fixed=0.0, linear=1e5, attention=0.0)
    request = GenerationRequest(tokens, 1, salt=salt)

    def answers(tiers: Any, times: int) -> tuple[list[tuple[int, Any]], Any]:
        engine = Engine(params, config, settings, fingerprint, tiers, costs=never, audit=audit)
        assert engine.auditor is not None
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


def summary(case: Case) -> str:
    """What was found, in a few words."""
    from serve.audit import Mismatch

    return str(Mismatch(case.witness, case.source, case.position, 0, case.layer, case.part, case.error, case.scale))


def answered(engine: Engine, request: Any) -> tuple[int, Any]:
    """Run one request by turning the loop of an engine that was not started: its first token, and Started."""
    from serve.sequence import Failed, Sampled, Started

    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request, events.put)
    while engine.waiting or engine.running or engine.inbox.submissions or (engine.pager and engine.pager.parked):
        engine.drop(engine.receive() or set())
        engine.step()
    engine.land()
    found = [events.get() for _ in range(events.qsize())]
    if failed := [event for event in found if isinstance(event, Failed)]:
        raise ValueError(f"the engine failed: {failed[0].message}")
    return (
        next(event.token for event in found if isinstance(event, Sampled)),
        next(event for event in found if isinstance(event, Started)),
    )


def audited(engine: Engine) -> Mismatch | None:
    """Audit the latest request by hand: what is wrong with what it reused."""
    auditor = engine.auditor
    assert auditor is not None
    while auditor.records or auditor.audit:
        auditor.turn(engine)
        if auditor.failures:
            raise ValueError("the audit itself failed, see above")
        if auditor.waits is not None:
            auditor.waits.result()
    return auditor.latest
