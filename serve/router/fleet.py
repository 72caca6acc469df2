"""What the router knows of its replicas' work in flight: arrays with a row for each replica, and one writer.

A prefill in flight is a range of tokens, priced by its replica's own constants. How far a replica has come is known
only when a first token arrives; in between, it is taken to compute all the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from serve.cost.model import Constants
from serve.router.choice import Known

NO_PAGE = -1


@dataclass(frozen=True)
class Prefill:
    """Tokens [start, stop) of a prompt that a replica computes, or will."""

    start: int
    stop: int
    since: float  # when it was sent there, seconds
    page: int = NO_PAGE  # number of the first page that it computes
    key: int = 0  # of that page


# What is kept for each prefill in flight, and its type.
PREFILL = {"start": np.float64, "stop": np.float64, "since": np.float64, "page": np.int64, "key": np.uint64}


class Fleet:
    """The replicas by name, the order of rows being that of `names`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.constants: list[Constants] = []
        self.shared = np.zeros(0)  # [replicas] the share by which any sequences that decode lengthen a prefill
        self.each = np.zeros(0)  # [replicas] the share by which each of them does
        self.decodes = np.zeros(0, np.int64)  # [replicas] requests that are being answered
        self.places = np.zeros(0)  # [replicas] requests that run at once
        self.answer_s = np.zeros(0)  # [replicas] seconds from a first token to the end: a moving mean
        self.overtakes = np.zeros(0, bool)  # [replicas] whether short prefills pass long ones
        self.arrivals = np.zeros(0)
        self.busy = np.zeros(0)
        self.done_s = np.zeros(0)  # [replicas] seconds spent on the prefills in flight, until `at`
        self.at = np.zeros(0)  # [replicas] seconds
        self.queue = {name: np.zeros((0, 4), type_) for name, type_ in PREFILL.items()}  # [replicas, queue] each
        self.columns: list[dict[str, int]] = []  # of each request's prefill, by replica

    def row(self, name: str) -> int:
        """The row of a replica; raises ValueError for one that is not there."""
        return self.names.index(name)

    def add(self, name: str, costs: Constants, places: float, overtakes: bool) -> None:
        """A replica without work."""
        self.names.append(name)
        self.constants.append(costs)
        self.columns.append({})
        self.places = np.append(self.places, places)
        self.overtakes = np.append(self.overtakes, overtakes)
        self.decodes = np.append(self.decodes, 0)
        for array in ("shared", "each", "answer_s", "arrivals", "busy", "done_s", "at"):
            setattr(self, array, np.append(getattr(self, array), 0.0))
        for key, values in self.queue.items():
            self.queue[key] = np.concatenate([values, np.zeros((1, values.shape[1]), values.dtype)])

    def remove(self, name: str) -> None:
        """Forget a replica."""
        row = self.row(name)
        del self.names[row], self.constants[row], self.columns[row]
        arrays = ("shared", "each", "answer_s", "arrivals", "busy", "done_s", "at", "places", "overtakes", "decodes")
        for array in arrays:
            setattr(self, array, np.delete(getattr(self, array), row))
        for key, values in self.queue.items():
            self.queue[key] = np.delete(values, row, axis=0)

    def sent(self, name: str, request: str, prefill: Prefill) -> None:
        """A replica has one more prefill."""
        row = self.row(name)
        self._pass_time(row, prefill.since)
        free = np.flatnonzero(self.queue["stop"][row] == 0)
        if not len(free):
            free = np.array([self.queue["stop"].shape[1]])
            for key, values in self.queue.items():
                self.queue[key] = np.concatenate([values, np.zeros_like(values)], axis=1)
        column = int(free[0])
        self.columns[row][request] = column
        for key, values in self.queue.items():
            values[row, column] = getattr(prefill, key)

    def prefilled(self, name: str, request: str, now: float) -> None:
        """A replica's prefill is done, or given up; one that is not there is no error."""
        row = self.row(name)
        column = self.columns[row].pop(request, None)
        if column is None:
            return
        self._pass_time(row, now)
        start, stop = self.queue["start"][row, column], self.queue["stop"][row, column]
        cost = self.constants[row].compute_s(start, stop) * self.stretch()[row]
        self.queue["stop"][row, column] = 0
        self.done_s[row] = max(0.0, self.done_s[row] - cost) if self.columns[row] else 0.0

    def _pass_time(self, row: int, now: float) -> None:
        if self.columns[row]:
            self.done_s[row] += max(0.0, now - self.at[row])
        self.at[row] = max(now, self.at[row])

    def stretch(self) -> np.ndarray:
        """By how much what decodes lengthens a prefill, [replicas] float64."""
        return 1 + self.shared * (self.decodes > 0) + self.each * self.decodes

    def known(self, now: float, held: Mapping[str, int]) -> Known:
        """What a choice depends on; `held` is the pages that each replica has cached."""
        costs = np.array([(c.fixed, c.linear, c.attention, c.match) for c in self.constants])  # [replicas, 4]
        fixed, linear, attention, match = costs.T
        stretch, queue = self.stretch(), self.queue
        start, stop = queue["start"], queue["stop"]
        cost = (linear * stretch)[:, None] * (stop - start) + (attention * stretch)[:, None] * (stop**2 - start**2) / 2
        cost = np.where(stop > 0, cost, 0.0)  # [replicas, queue]
        waited = np.where(stop > 0, np.maximum(0.0, now - queue["since"]), 0.0)
        working = (stop > 0).any(1)
        done = np.where(working, self.done_s + np.maximum(0.0, now - self.at), 0.0)
        left = less_done(cost, waited, done, self.overtakes)
        running = (stop > 0).sum(1) + self.decodes
        with np.errstate(divide="ignore", invalid="ignore"):
            place_s = np.where(running >= self.places, (running - self.places + 1) * self.answer_s / self.places, 0.0)
        return Known(
            names=tuple(self.names),
            fixed=fixed,
            linear=linear,
            attention=attention,
            match=match,
            stretch=stretch,
            left=left,
            waited=waited,
            page=np.where(stop > 0, queue["page"], NO_PAGE),
            key=queue["key"],
            overtakes=self.overtakes,
            late_s=np.maximum(0.0, done - cost.sum(1)),
            place_s=place_s,
            arrivals=self.arrivals,
            busy=self.busy,
            decodes=self.decodes,
            held=np.array([held[name] for name in self.names], np.int64),
        )


def less_done(cost: np.ndarray, waited: np.ndarray, done: np.ndarray, overtakes: np.ndarray) -> np.ndarray:
    """What is left of prefills that take `cost` after `done` ([replicas]) seconds of work; [replicas, queue] float64.

    The work is counted off those that run first: by response ratio where short ones overtake, or by time waited.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(cost > 0, waited / np.where(overtakes[:, None], cost, 1.0), -1.0)
    order = np.argsort(-ratio, axis=1, kind="stable")
    ordered = np.take_along_axis(cost, order, 1)
    left = np.clip(np.cumsum(ordered, axis=1) - done[:, None], 0.0, ordered)
    result = np.zeros_like(cost)
    np.put_along_axis(result, order, left, 1)
    return result
