"""A simulation's config: the fleet, the loads and the seeds, and the workload that each load makes of a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from experiments.routing.gateway import OURS
from experiments.routing.plan import read_plan
from experiments.routing.policies import POLICIES
from experiments.routing.replica import Engine
from experiments.routing.workload import (
    AGENTX_PAGE,
    Lane,
    Request,
    Workload,
    agents_at_work,
    bursty,
    poisson,
    read_agentx,
    read_open_loop,
    synthetic_agents,
)
from experiments.workloads.traces import MOONCAKE_BLOCK, Agents
from serve.cost.file import CostFile
from serve.cost.model import Constants

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Arrivals = Literal["trace", "poisson", "bursty"]
Kind = Literal["agentx", "mooncake", "synthetic", "plan"]


class EngineConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The config's `[engine]`: one replica; seconds, unless a comment says otherwise."""

    step: Seconds  # the least that a step takes
    decode_pair: Seconds  # a decoded token, for each token before it
    capacity: Count  # tokens that the prefix cache holds
    fixed: Seconds = 0.0  # this and the next three: the cost model's constants
    linear: Seconds = 0.0
    attention: Seconds = 0.0
    match: Seconds = 0.0
    max_num_seqs: Count = 16
    restore: Seconds = 0.0  # a token from the shared store; 0 without a store


class Load(Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[loads]]` of a trace."""

    trace: Kind
    rate: Annotated[float, Meta(gt=0)]  # agents at work on each replica, or how many times as fast as the trace
    replicas: Count = 8
    sessions: Count = 100  # of AgentX's archive, or calls of each synthetic agent
    requests: Count | None = None  # of Mooncake's file
    arrivals: Arrivals = "trace"
    slow: Annotated[float, Meta(ge=0, le=1)] = 0.0  # the share of replicas that take twice the time for everything
    longest_pause: Seconds = 30.0  # between an answer and an agent's next call
    apart: Seconds = 5.0  # from one synthetic agent's first call to the next one's


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """A simulation's config file."""

    engine: EngineConfig
    loads: Annotated[tuple[Load, ...], Meta(min_length=1)]
    seeds: Annotated[tuple[int, ...], Meta(min_length=1)] = (0, 1, 2)
    policies: Annotated[tuple[str, ...], Meta(min_length=1)] = (*POLICIES, OURS)


class ConfigError(Exception):
    """A config that cannot be simulated."""


def read_config(path: Path) -> Config:
    """A config from TOML. Raises ConfigError, which names the field, if it cannot be simulated."""
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=Config)
    except (msgspec.MsgspecError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
    unknown = sorted(set(config.policies) - {*POLICIES, OURS})
    if unknown:
        raise ConfigError(f"{path}: policies has {unknown}, expected some of {[*POLICIES, OURS]}")
    return config


def engine_of(config: EngineConfig, page_size: int, constants: Path | None = None) -> Engine:
    """A replica; `constants` is a cost model's file whose constants are used instead of the config's.

    Raises ConfigError for a file that is not a cost model.
    """
    costs = Constants(config.fixed, config.linear, config.attention, config.match)
    if constants:
        try:
            costs = msgspec.json.decode(constants.read_bytes(), type=CostFile).constants
        except (msgspec.MsgspecError, OSError) as error:
            raise ConfigError(f"{constants} is not a cost model: {error}") from None
    return Engine(
        costs,
        step_s=config.step,
        decode_pair_s=config.decode_pair,
        num_pages=config.capacity // page_size,
        page_size=page_size,
        max_num_seqs=config.max_num_seqs,
        restore_s=config.restore,
    )


def kind_of(trace: Path | None) -> Kind:
    """What a trace file is by its name; None is for synthetic agents. Raises ConfigError for another name."""
    if trace is None:
        return "synthetic"
    kinds: dict[str, Kind] = {".jsonl": "mooncake", ".xz": "agentx", ".tar": "agentx", ".json": "plan"}
    if trace.suffix not in kinds:
        raise ConfigError(f"{trace}: expected a .tar.xz of AgentX, a .jsonl of Mooncake, or the .json of a plan")
    return kinds[trace.suffix]


def workload_of(load: Load, trace: Path | None, seed: int) -> Workload:
    """The workload that a load makes of its trace. Raises ValueError for a trace that cannot be read."""
    match load.trace:
        case "plan":
            assert trace is not None
            return read_plan(trace)
        case "mooncake":
            assert trace is not None
            lanes = read_open_loop(trace, load.rate, load.requests)
            page, name = MOONCAKE_BLOCK, trace.stem
        case "agentx":
            assert trace is not None
            sessions = paused(read_agentx(trace, load.sessions, seed), load.longest_pause)
            lanes = agents_at_work(sessions, round(load.rate * load.replicas), ramp_s=60.0, seed=seed)
            page, name = AGENTX_PAGE, "agentx"
        case "synthetic":
            work = Agents(seed=seed, agents=round(load.rate * load.replicas), calls=load.sessions, projects=4)
            sessions = paused(synthetic_agents(work), load.longest_pause)
            lanes = [Lane(load.apart * number, requests) for number, requests in enumerate(sessions)]
            page, name = AGENTX_PAGE, "synthetic"
    moved = {"trace": lambda lanes, seed: lanes, "poisson": poisson, "bursty": bursty}[load.arrivals]
    return Workload(name, page, moved(lanes, seed))


def paused(sessions: list[list[Request]], longest: float) -> list[list[Request]]:
    """The sessions with no pause above `longest` seconds."""
    return [[replace(request, pause_s=min(request.pause_s, longest)) for request in each] for each in sessions]
