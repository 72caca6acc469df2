"""Prompt-lookup speculative decoding: what a verification step costs, and what answers over HTTP gain by it."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.bench.batching.setup import PASSES, Config, Json, demo_engine, drawing, medians, served
from experiments.bench.timing import Passes


def speculation(folder: Path, config: Config, console: Console) -> Json:
    """Decode after a long prompt with and without draft tokens: answers over HTTP, and the time of a step.

    The weights are random, so how many draft tokens are accepted says nothing of a trained model. `break_even` does not
    depend on that: so many draft tokens of a verification step must be accepted on average for it to be worth its time.
    """
    steps = step_seconds(folder, config)
    rounds: list[Json] = []
    with served(folder, config) as plain, served(folder, config, config.speculative_tokens) as speculating:
        for number in track(range(config.repeats), description="speculation", console=console):
            without = plain.ask(1 + number, config.output)
            before = speculating.token_counts()
            with_drafts = speculating.ask(1 + number, config.output)
            generated, drafted, accepted = np.subtract(speculating.token_counts(), before).tolist()
            token, speculative_token = (
                (timing.total_ms - timing.ttft_ms) / max(1, timing.output_tokens - 1)
                for timing in (without, with_drafts)
            )
            rounds.append(
                {
                    "token_ms": token,
                    "speculative_token_ms": speculative_token,
                    "speed": token / speculative_token,
                    "drafted_per_token": drafted / generated,
                    "accepted_per_token": accepted / generated,
                    "same_text": float(without.text == with_drafts.text),
                }
            )
    plain_step, verification = steps
    found = {
        "step_ms": 1e3 * plain_step,
        "verification_ms": 1e3 * verification,
        "break_even": verification / plain_step - 1,
    }
    found = {name: round(value, 4) for name, value in found.items()}
    return {"tokens": config.tokens, "draft_tokens": config.speculative_tokens} | found | medians(rounds)


def step_seconds(folder: Path, config: Config) -> tuple[float, float]:
    """Median seconds of a decode step at the prompt's end: a plain one, and one that verifies draft tokens."""
    engine = demo_engine(folder, config, config.speculative_tokens)
    passes = Passes(engine, drawing(2, engine.config.vocab_size)(config.tokens))
    last = config.tokens - 1 - config.speculative_tokens
    plain, verification = (
        median(passes.seconds(last, 1 + draft, draft) for _ in range(4 * PASSES))
        for draft in (0, config.speculative_tokens)
    )
    return plain, verification
