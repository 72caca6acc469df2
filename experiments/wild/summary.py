"""The rows of all requests as figures: shares by cause, where breaks lie, and what comes before them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.wild.classify import BEHIND_HEAD_TOKENS, BREAKS, NAMES, Cause
from experiments.wild.costs import machines, prefill_ms, span_ms
from experiments.wild.granularity import PLACEMENTS, by_block_size
from experiments.wild.ttl import LIFETIMES_S

BLOCK = 64
LARGE_TOKENS = 8_000  # of the old prompt; a break that loses more is a large one
LENGTHS = (0, 16_384, 32_768, 65_536, 131_072, 262_144, 2**31)  # tokens
IDLE_S = (0, 5, 15, 60, 300, 1200, 3600, 1e9)
BEHIND = (-(2**31), -8000, -4000, -2000, -1000, 0, 1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 2**31)  # tokens
CALLS = 150  # of a session, whose hit rates are told by number
Json = dict[str, Any]


def share(part: Any, whole: Any, digits: int = 5) -> float:
    """A part of a whole; 0 of nothing."""
    return round(float(part / whole), digits) if whole else 0.0


def quantiles(values: np.ndarray, *percent: float) -> list[float] | None:
    """Percentiles of values, without those that are not known; None without any."""
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return [round(float(v), 1) for v in np.percentile(known, percent)] if len(known) else None


def new_tokens(rows: np.ndarray) -> np.ndarray:
    """Tokens of each prompt, in blocks, that are not reused: [requests] int64."""
    new: np.ndarray = BLOCK * (rows["blocks"].astype(np.int64) - rows["reused"])
    return new


def lost_tokens(rows: np.ndarray) -> np.ndarray:
    """Tokens of the agent's prompt before that are not reused, [requests] int64."""
    lost: np.ndarray = BLOCK * np.maximum(0, rows["before"].astype(np.int64) - rows["reused"])
    return lost


def overall(rows: np.ndarray) -> Json:
    """Reuse by an unlimited cache."""
    tokens, later = BLOCK * rows["blocks"].astype(np.int64), rows["before"] >= 0
    rates = rows["reused"][later] / rows["blocks"][later]
    first, new = rows["cause"] == Cause.FIRST, new_tokens(rows)
    long = first & (new > 65_536)
    return {
        "sessions": len(np.unique(rows["session"])),
        "requests": len(rows),
        "requests_of_subagents": int(rows["subagent"].sum()),
        "tokens": int(tokens.sum()),
        "prompt_tokens_q10_50_90_99": quantiles(rows["tokens"], 10, 50, 90, 99),
        "reused": share(BLOCK * rows["reused"].sum(dtype=np.int64), tokens.sum()),
        "reused_if_models_shared": share(rows["reused_text"].sum(dtype=np.int64), rows["blocks"].sum(dtype=np.int64)),
        "hit_rate_by_call": [round(float(v), 4) for v in np.percentile(rates, [5, 50, 95])] if later.any() else None,
        "reads_per_write": share(BLOCK * rows["reused"].sum(dtype=np.int64), new.sum(), 2),
        "first_requests_over_64k": {
            "requests": int(long.sum()),
            "share_of_their_new_tokens": share(new[long].sum(), new[first].sum()),
        },
        "idle_s_q50_90_95_99": quantiles(rows["idle_s"], 50, 90, 95, 99),
        "idle_s_after_tool_use_q50_90": quantiles(rows["idle_s"][rows["waits_for_person"] == 0], 50, 90),
        "idle_s_after_end_turn_q50_90": quantiles(rows["idle_s"][rows["waits_for_person"] == 1], 50, 90),
    }


def causes(rows: np.ndarray) -> list[Json]:
    """What each cause costs of all prefill."""
    new, ms = new_tokens(rows), {name: prefill_ms(costs, rows) for name, costs in machines().items()}
    made = []
    for cause in Cause:
        chosen = rows["cause"] == cause
        made.append(
            {
                "cause": NAMES[cause],
                "requests": int(chosen.sum()),
                "share_of_requests": share(chosen.sum(), len(rows)),
                "new_tokens": int(new[chosen].sum()),
                "share_of_new_tokens": share(new[chosen].sum(), new.sum()),
                "new_tokens_q50_90": quantiles(new[chosen], 50, 90),
                **{f"{name}_s": round(float(each[chosen].sum() / 1000), 1) for name, each in ms.items()},
                **{f"share_of_{name}_s": share(each[chosen].sum(), each.sum()) for name, each in ms.items()},
                **{f"{name}_ms_q50_90": quantiles(each[chosen], 50, 90) for name, each in ms.items()},
            }
        )
    return made


def breaks(rows: np.ndarray) -> Json:
    """Where the prompts of breaks stop matching, and how the large ones come."""
    broken = rows[np.isin(rows["cause"], BREAKS)]
    new, lost = new_tokens(broken), lost_tokens(broken)
    behind = BLOCK * broken["reused"].astype(np.int64) - broken["head"]
    tenth = np.minimum(9, 10 * broken["reused"] // np.maximum(1, broken["before"]))
    large = lost > LARGE_TOKENS
    change = BLOCK * (broken["blocks"].astype(np.int64) - broken["before"])
    by_place, by_tenth = np.digitize(behind, BEHIND[1:-1]), [tenth == number for number in range(10)]
    return {
        "requests": len(broken),
        "behind_head_tokens": BEHIND[1:-1],
        "requests_behind_head": np.bincount(by_place, minlength=len(BEHIND) - 1).tolist(),
        "new_tokens_behind_head": np.bincount(by_place, new, len(BEHIND) - 1).astype(int).tolist(),
        "requests_by_tenth": [int(chosen.sum()) for chosen in by_tenth],
        "lost_tokens_by_tenth": [int(lost[chosen].sum()) for chosen in by_tenth],
        "large": {
            "requests": int(large.sum()),
            "share_of_requests": share(large.sum(), len(rows)),
            "share_of_new_tokens": share(new[large].sum(), new_tokens(rows).sum()),
            "near_end_of_head": int((np.abs(behind[large]) <= BEHIND_HEAD_TOKENS).sum()),
            "change_tokens_q25_50_75": quantiles(change[large], 25, 50, 75),
            "idle_s_q50_75_90": quantiles(broken["idle_s"][large], 50, 75, 90),
            "think_s_q50_75_90": quantiles(broken["think_s"][large], 50, 75, 90),
        },
    }


def binned(rows: np.ndarray, values: np.ndarray, edges: Sequence[float]) -> list[Json]:
    """Requests that have one before them, by bins of a value: how many break, and what those compute."""
    broken, made = np.isin(rows["cause"], BREAKS), []
    new, all_new = new_tokens(rows), new_tokens(rows).sum()
    for low, high in pairwise(edges):
        chosen = (values >= low) & (values < high) & (rows["before"] >= 0)
        hit = chosen & broken & (lost_tokens(rows) > LARGE_TOKENS)
        made.append(
            {
                "from": low,
                "requests": int(chosen.sum()),
                "large_breaks": int(hit.sum()),
                "share_that_breaks": share(hit.sum(), chosen.sum()),
                "share_of_new_tokens": share(new[hit].sum(), all_new),
            }
        )
    return made


def by_call(rows: np.ndarray) -> Json:
    """The hit rates of the main agents' requests by their number in the session: percentiles 5, 50 and 95."""
    main = rows[~rows["subagent"]]
    rates, made = main["reused"] / main["blocks"], []
    for number in range(CALLS):
        chosen = rates[main["number"] == number]
        made.append([round(float(v), 4) for v in np.percentile(chosen, [5, 50, 95])] if len(chosen) else [None] * 3)
    return {"percentiles": [5, 50, 95], "by_call": made}


def granularity(rows: np.ndarray) -> list[Json]:
    """What blocks of each size reuse, and what is computed beside what a token-exact cache computes."""
    tokens, costs, sizes = rows["tokens"].astype(np.int64), machines()["h200"], by_block_size(rows)
    exact = (tokens - sizes["token-exact"]).sum()
    made = []
    for name, reused in sizes.items():
        ms = span_ms(costs, reused.astype(float), tokens.astype(float))
        made.append(
            {
                "tokens": name,
                "reused": share(reused.sum(), tokens.sum()),
                "computed_over_exact": share((tokens - reused).sum(), exact, 4),
                "h200_ms_q50": quantiles(ms, 50),
                "h200_s": round(float(ms.sum() / 1000), 1),
            }
        )
    return made


def states(rows: np.ndarray, found: np.ndarray, sessions: int) -> list[Json]:
    """The table of placements of recurrent layers' states; `found` is [placements, 2] of granularity.from_states."""
    tokens, exact = BLOCK * rows["blocks"].sum(dtype=np.int64), new_tokens(rows).sum()
    return [
        {
            "placement": place.name,
            "reused": share(reused, tokens),
            "computed_over_exact": share(tokens - reused, exact, 4),
            "states_a_session": round(count / max(1, sessions), 1),
        }
        for place, (reused, count) in zip(PLACEMENTS, found.tolist(), strict=True)
    ]


def lifetimes(rows: np.ndarray, kept: np.ndarray) -> list[Json]:
    """The share of reuse that is kept by lifetime; `kept` is [lifetimes + 1] of ttl.kept, also by recorded pauses."""
    known = ~np.isnan(rows["think_s"]) & (rows["before"] >= 0)
    reused, think = rows["reused"][known].astype(np.int64), rows["think_s"][known]
    return [
        {
            "lifetime_s": lifetime,
            "kept": share(tokens, kept[-1]),
            "kept_by_think_time": share(reused[think <= lifetime].sum(), reused.sum()),
        }
        for lifetime, tokens in zip(LIFETIMES_S, kept[:-1].tolist(), strict=True)
    ]
