"""The figures of recorded sessions, drawn from their summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.harness.figures import COLOURS, panels, plain, save, subplots

Json = dict[str, Any]
GREY = "#9a9a9a"


def draw_all(found: Json, out: Path) -> None:
    """Write every figure of a summary."""
    draw_causes(found, out / "causes.png")
    draw_breaks(found, out / "breaks.png")
    draw_before(found, out / "before_a_break.png")
    draw_granularity(found, out / "granularity.png")
    draw_lifetimes(found, out / "lifetimes.png")


def draw_causes(found: Json, path: Path) -> None:
    """Each cause's share of requests, of computed tokens and of the time to compute them."""
    causes = [each for each in found["causes"] if each["requests"]]
    bars = (
        ("share_of_requests", "requests", GREY),
        ("share_of_new_tokens", "computed tokens", COLOURS[0]),
        ("share_of_h200_s", "time, 8B on an H200", COLOURS[1]),
        ("share_of_demo_s", "time, demo model on two cores", COLOURS[2]),
    )
    figure, axes = subplots(4.8)
    for number, (key, label, colour) in enumerate(bars):
        at = [place + 0.2 * number for place in range(len(causes))]
        axes.barh(at, [100 * each[key] for each in causes], 0.19, color=colour, label=label)
    for place, each in enumerate(causes):
        longest = max(each[key] for key, _, _ in bars)
        axes.annotate(f"{each['requests']:,} requests", (100 * longest + 1, place + 0.3), va="center", fontsize=8)
    axes.set_yticks([place + 0.3 for place in range(len(causes))], [each["cause"] for each in causes])
    axes.invert_yaxis()
    axes.set(xlabel="share of all, %", xlim=(0, 112))
    axes.set_title("Why a request computes tokens, and what that is of all prefill", fontsize=10, loc="left")
    axes.legend(frameon=False, loc="lower right")
    save(figure, path)


def draw_breaks(found: Json, path: Path) -> None:
    """Where breaks lie: behind tools and system text in tokens, and in tenths of the prompt before."""
    breaks = found["breaks"]
    figure, (left, right) = panels(1, 2, 10, 4, width_ratios=(3, 2))
    edges = breaks["behind_head_tokens"]
    names = [f"under {label(edges[0])}", *map(label, edges)]
    for axes in (left, right):
        plain(axes)
    total = sum(breaks["new_tokens_behind_head"]) / 100
    left.bar(range(len(names)), [tokens / total for tokens in breaks["new_tokens_behind_head"]], 0.9, color=COLOURS[0])
    for place, count in enumerate(breaks["requests_behind_head"]):
        left.annotate(str(count), (place, breaks["new_tokens_behind_head"][place] / total + 1), ha="center", fontsize=8)
    left.set_xticks(range(len(names)), names, rotation=45, ha="right")
    left.set(xlabel="tokens from the end of tools and system text, from", ylabel="computed for breaks, %")
    left.set_title("Most breaks lie where tools and system text end (numbers: breaks)", fontsize=9, loc="left")
    lost = breaks["lost_tokens_by_tenth"]
    right.bar(range(10), [100 * tokens / sum(lost) for tokens in lost], 0.9, color=COLOURS[1])
    right.set_xticks(range(10), [f"{10 * tenth}" for tenth in range(10)])
    right.set(xlabel="tenth of the old prompt that still matches, %", ylabel="tokens of old prompts lost, %")
    save(figure, path)


def label(tokens: int) -> str:
    """A signed number of tokens."""
    return f"{tokens // 1000:+}K" if tokens else "0"


def draw_before(found: Json, path: Path) -> None:
    """How often a request breaks after a pause, and by its length."""
    figure, (left, right) = panels(1, 2, 10, 3.8)
    pauses = ("0-5 s", "5-15 s", "15-60 s", "1-5 min", "5-20 min", "20-60 min", "over 1 h")
    lengths = ("under 16K", "16-32K", "32-64K", "64-128K", "128-256K", "over 256K")
    for axes, key, names, what in (
        (left, "by_idle_s", pauses, "pause before the request"),
        (right, "by_length", lengths, "tokens of the prompt"),
    ):
        plain(axes)
        rates = [100 * each["share_that_breaks"] for each in found[key]]
        axes.bar(range(len(names)), rates, 0.8, color=COLOURS[0])
        for place, each in enumerate(found[key]):
            text = f"{each['large_breaks']} of\n{each['requests']:,}"
            axes.annotate(text, (place, rates[place]), ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set(xlabel=what, ylabel="breaks that lose over 8K tokens, %", ylim=(0, 1.25 * max(*rates, 0.1)))
    save(figure, path)


def draw_granularity(found: Json, path: Path) -> None:
    """What is computed over a token-exact cache, by size of blocks and by placement of states."""
    figure, (left, right) = panels(1, 2, 10, 3.8, width_ratios=(2, 3))
    plain(left)
    sizes = found["granularity"]
    left.plot(range(len(sizes)), [each["computed_over_exact"] for each in sizes], "o", color=COLOURS[0])
    for place, each in enumerate(sizes):
        at = (place, each["computed_over_exact"] + 0.008)
        left.annotate(f"{each['reused']:.2%}", at, ha="center", va="bottom", fontsize=8)
    left.set_xticks(range(len(sizes)), [each["tokens"] for each in sizes], rotation=30, ha="right")
    left.set(xlabel="tokens of a block (above: reused)", ylabel="computed, over a token-exact cache", ylim=(0.98, 1.3))
    plain(right)
    for number, each in enumerate(found["states"]):
        at = (each["states_a_session"], each["computed_over_exact"])
        right.scatter(*at, s=36, color=COLOURS[number % len(COLOURS)], label=each["placement"])
    right.set(
        xlabel="states kept a session", ylabel="computed, over exact reuse", xscale="log", ylim=(1, 1.3), xlim=(45, 800)
    )
    right.set_xticks((50, 100, 200, 500), ("50", "100", "200", "500"))
    right.set_xticks([], minor=True)
    right.set_title("States of recurrent layers, by where they are kept", fontsize=9, loc="left")
    right.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_lifetimes(found: Json, path: Path) -> None:
    """The share of reuse that is kept, over the time that entries live after their last use."""
    figure, axes = subplots(3.8, 7)
    lifetimes = found["lifetimes"]
    seconds = [each["lifetime_s"] for each in lifetimes]
    axes.plot(seconds, [100 * each["kept"] for each in lifetimes], marker="o", markersize=4, color=COLOURS[0])
    for each in lifetimes:
        if each["lifetime_s"] in (30, 60, 300, 3600):
            at = (each["lifetime_s"], 100 * each["kept"])
            axes.annotate(f"{each['kept']:.1%}", at, xytext=(6, -12), textcoords="offset points", fontsize=8)
    marks = (5, 10, 30, 60, 300, 1200, 3600, 21_600, 86_400)
    axes.set(
        xscale="log", xlabel="lifetime of an entry after its last use", ylabel="of unlimited reuse, %", ylim=(0, 103)
    )
    axes.set_xticks(marks, ["5 s", "10 s", "30 s", "1 min", "5 min", "20 min", "1 h", "6 h", "1 d"])
    axes.set_xticks([], minor=True)
    save(figure, path)
