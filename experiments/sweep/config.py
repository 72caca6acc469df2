"""The config of a sweep: its axes, its checks, and the points that it names."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from experiments.sweep.prompts import PLACED, Arm, Point
from experiments.sweep.targets import ARMS, TargetConfig
from model.families import load_config

Count = Annotated[int, Meta(ge=1)]


class Axes(Struct, frozen=True, forbid_unknown_fields=True):
    """The config's `[axes]`: every combination is a point."""

    model: Annotated[tuple[str, ...], Meta(min_length=1)]  # a folder, a GGUF file, or an endpoint's name for it
    prompt_tokens: Annotated[tuple[Count, ...], Meta(min_length=1)]
    arm: Annotated[tuple[Arm, ...], Meta(min_length=1)] = ("varying",)
    position: Annotated[tuple[str | int, ...], Meta(min_length=1)] = ("0%",)
    header_tokens: Annotated[tuple[Count, ...], Meta(min_length=1)] = (32,)
    suffix_tokens: Annotated[tuple[Count, ...], Meta(min_length=1)] = (64,)
    page_size: Annotated[tuple[Count, ...], Meta(min_length=1)] = (64,)


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """A sweep's config file."""

    axes: Axes
    target: TargetConfig = TargetConfig()
    seed: int = 0
    warmups: Annotated[int, Meta(ge=0)] = 3  # measurements that are thrown away, for each model and page size
    repeats: Count = 5
    tools_tokens: Annotated[int, Meta(ge=0)] = 0  # of the stable text: where the arm tools-first puts its header


class ConfigError(Exception):
    """A config that cannot be measured."""


def read_config(text: bytes) -> Config:
    """A config from TOML. Raises ConfigError, which names the field, if it cannot be measured."""
    try:
        config = msgspec.toml.decode(text, type=Config)
    except msgspec.MsgspecError as error:
        raise ConfigError(str(error)) from None
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ConfigError for arms, positions and targets that do not go together."""
    axes, target = config.axes, config.target
    if missing := [arm for arm in axes.arm if arm not in ARMS[target.kind]]:
        able = ", ".join(sorted(ARMS[target.kind]))
        raise ConfigError(f"axes.arm: target {target.kind} has no {', '.join(missing)}; it has {able}")
    if not target.own and not target.url:
        raise ConfigError(f"target.url: expected the endpoint's URL for target {target.kind}")
    if not target.own and len(axes.page_size) > 1:
        raise ConfigError(f"axes.page_size: target {target.kind} has its own page size: leave the axis out")
    for place in axes.position:
        if isinstance(place, str) and not re.fullmatch(r"\d+(\.\d+)?%", place):
            raise ConfigError(f"axes.position: expected a percentage such as '25%' or a count of tokens, got {place!r}")
    for point in points(config):
        size = f"a prompt of {point.prompt_tokens} with {point.header_tokens} of header and {point.suffix_tokens}"
        if point.stable_tokens < 1:
            raise ConfigError(f"axes.prompt_tokens: {size} of suffix leaves no token to cache: raise it")
        if point.arm in PLACED and not 0 <= point.position <= point.stable_tokens:
            raise ConfigError(f"axes.position: {point.place} is outside the {point.stable_tokens} tokens of {size}")
        if point.arm == "tools-first" and not 1 <= config.tools_tokens <= point.stable_tokens:
            raise ConfigError(
                f"tools_tokens: arm tools-first wants 1 to {point.stable_tokens} for {size}, got {config.tools_tokens}"
            )
    if target.own:
        for model in axes.model:
            check_model(model, max(axes.prompt_tokens))


def check_model(model: str, longest: int) -> None:
    """Raise ConfigError if a model is not a checkpoint folder or GGUF file, or cannot take prompts of this length."""
    try:
        limit = load_config(model).max_position
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"axes.model: {model} is no checkpoint that can be served: {error}; make the demo model with "
            f"`python -m experiments.demo_model {model}`, or name another folder"
        ) from None
    if longest >= limit:
        raise ConfigError(
            f"axes.prompt_tokens: {model} takes prompts below {limit} tokens, got {longest}: lower the axis"
        )


def points(config: Config) -> list[Point]:
    """Every combination of the axes, once; an arm that places its header itself has no position."""
    axes = config.axes
    product = itertools.product(
        axes.model,
        axes.page_size,
        axes.prompt_tokens,
        axes.header_tokens,
        axes.suffix_tokens,
        axes.arm,
        axes.position,
    )
    made = (
        Point(arm, model, page, length, header, suffix, str(place) if arm in PLACED else "")
        for model, page, length, header, suffix, arm, place in product
    )
    return list(dict.fromkeys(made))


def schedule(config: Config, group: Sequence[Point]) -> list[tuple[Point, int]]:
    """The group's points and repeat numbers, in rounds, each round in its own random order."""
    rng = random.Random(repr((config.seed, group[0])))
    return [(point, repeat) for repeat in range(config.repeats) for point in rng.sample(list(group), len(group))]


def groups(config: Config) -> Iterator[list[Point]]:
    """The points of each model and page size: what one target serves without a restart."""
    for _, group in itertools.groupby(points(config), key=lambda point: (point.model, point.page_size)):
        yield list(group)
