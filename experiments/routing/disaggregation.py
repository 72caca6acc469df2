"""When prefill and decode on replicas of their own would pay, by the cost model.

Together, an arriving prompt's chunks lengthen the steps of those that decode, and these lengthen the prompt's. Apart,
neither is disturbed, but the prompt's keys and values must be moved, and machines stand idle where the two kinds of
work are not in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.routing.replica import Engine


@dataclass(frozen=True)
class Traffic:
    """What a fleet is asked, on average."""

    new_tokens: int  # of a prompt, that its cache does not have
    prompt: int  # tokens
    output: int  # tokens
    itl_s: float  # the time between two tokens of an answer that is still good


def prefill_s(engine: Engine, traffic: Traffic) -> float:
    """Seconds to prefill an average prompt's new tokens alone."""
    return engine.constants.compute_s(traffic.prompt - traffic.new_tokens, traffic.prompt)


def mixed_step_s(engine: Engine, traffic: Traffic, decoding: int) -> float:
    """Seconds of a step with a chunk of a prefill and `decoding` sequences: each of these waits so long for a token."""
    chunk = min(engine.max_mixed_prefill_tokens, traffic.new_tokens)
    return engine.steps_s(traffic.prompt - chunk, chunk, 1, decoding, decoding * traffic.prompt)


def decode_step_s(engine: Engine, traffic: Traffic, decoding: int) -> float:
    """Seconds of a step in which `decoding` sequences decode and nothing is prefilled."""
    return engine.steps_s(0, 0, 1, decoding, decoding * traffic.prompt)


def together_s(engine: Engine, traffic: Traffic, decoding: int) -> float:
    """Seconds of a replica for one request, where its prefill shares steps with `decoding` sequences all the time.

    Each of its chunks takes a mixed step, in which the others get a token as well. What it costs is the time by which
    these steps are longer than steps that only decode, and its own share of the steps of its answer.
    """
    chunks = -(-traffic.new_tokens // min(engine.max_mixed_prefill_tokens, traffic.new_tokens))
    longer = mixed_step_s(engine, traffic, decoding) - decode_step_s(engine, traffic, decoding)
    return chunks * longer + traffic.output * decode_step_s(engine, traffic, decoding) / decoding


def apart_s(engine: Engine, traffic: Traffic, decoding: int, move_s: float) -> float:
    """Seconds of replicas for one request with prefill apart; `move_s` is a token's, which the sender is busy with.

    Only new tokens move: the decoding replica holds the rest from the agent's last call.
    """
    prefill = prefill_s(engine, traffic) + move_s * traffic.new_tokens
    return prefill + traffic.output * decode_step_s(engine, traffic, decoding) / decoding


def largest_batch(engine: Engine, traffic: Traffic, mixed: bool) -> int:
    """The most sequences that decode at once with steps of at most `itl_s`; with prefills between if `mixed`."""
    step = mixed_step_s if mixed else decode_step_s
    most = 0
    while most < engine.max_num_seqs and step(engine, traffic, most + 1) <= traffic.itl_s:
        most += 1
    return most


def gain(engine: Engine, traffic: Traffic, move_s: float) -> float:
    """Requests a second of a fleet with prefill apart, over one with both together, at the same bound on ITL.

    Above 1 it pays. The ratio of the two kinds of replicas is taken to be the best one. Infinite where no mixed step is
    within the bound.
    """
    mixed, alone = largest_batch(engine, traffic, True), largest_batch(engine, traffic, False)
    if not mixed:
        return float("inf") if alone else float("nan")
    return together_s(engine, traffic, mixed) / apart_s(engine, traffic, alone, move_s)
