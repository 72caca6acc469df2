"""What the router knows of its replicas' work in flight: arrays with a row for each replica, and one writer.

A prefill in flight is a range of tokens, priced by its replica's own constants. How far a replica has come is known
only when a first token arrives; in between, it is taken to compute all the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from serve.cost.model import Constants
from serve.router.choice import Known

NO_PAGE = -1
RECENT = 1 / 64  # the weight of the latest request in moving means
BUSIEST = 0.9  # a fleet is never taken to be busier: its queues say more by then


@dataclass(frozen=True)
class Prefill:
    """Tokens [start, stop) of a prompt that a replica computes, or will."""

    start: int
    stop: int
    since: float  # when it was sent there, seconds
    page: int = NO_PAGE  # number of the first page that it computes
    key: int = 0  # of that page


@dataclass
class Mean:
    """A moving mean; the first value stands for all before it."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """One more value."""
        self.count += 1
        self.value += max(RECENT, 1 / self.count) * (value - self.value)


# What is kept for each replica, and its type; [replicas] each.
ROW = {
    "beside": np.float64,  # seconds by which each sequence that decodes lengthens a token's computing
    "decodes": np.int64,  # requests that are being answered
    "places": np.float64,  # requests that run at once
    "answer_s": np.float64,  # seconds from a first token to the end: a moving mean
    "overtakes": np.bool_,  # whether short prefills pass long ones
    "done_s": np.float64,  # spent on the prefills in flight, until `at`
    "at": np.float64,  # seconds
}
# What is kept for each prefill in flight, and its type.
PREFILL = {"start": np.float64, "stop": np.float64, "since": np.float64, "page": np.int64, "key": np.uint64}


class Fleet:
    """The replicas by name, the order of rows being that of `names`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.constants: list[Constants] = []
        self.columns: list[dict[str, int]] = []  # of each request's prefill in `queue`, by replica
        self.rows: dict[str, np.ndarray] = {name: np.zeros(0, type_) for name, type_ in ROW.items()}
        self.queue = {name: np.zeros((0, 4), type_) for name, type_ in PREFILL.items()}  # [replicas, queue] each
        self.gap_s = Mean()  # between requests
        self.work_s = Mean()  # of a request
        self.last = float("-inf")  # when a request was sent, seconds

    def row(self, name: str) -> int:
        """The row of a replica; raises ValueError for one that is not there."""
        return self.names.index(name)

    def add(self, name: str, costs: Constants, places: float, overtakes: bool) -> None:
        """A replica without work."""
        self.names.append(name)
        self.constants.append(costs)
        self.columns.append({})
        for kept in (self.rows, self.queue):
            for key, values in kept.items():
                kept[key] = np.concatenate([values, np.zeros((1, *values.shape[1:]), values.dtype)])
        self.rows["places"][-1], self.rows["overtakes"][-1] = places, overtakes

    def set_costs(self, name: str, costs: Constants, beside_s: float) -> None:
        """What a replica's work takes from now on, and what each sequence that decodes adds to a token's computing."""
        row = self.row(name)
        self.constants[row], self.rows["beside"][row] = costs, beside_s

    def remove(self, name: str) -> None:
        """Forget a replica."""
        row = self.row(name)
        del self.names[row], self.constants[row], self.columns[row]
        for kept in (self.rows, self.queue):
            for key, values in kept.items():
                kept[key] = np.delete(values, row, axis=0)

    def asked(self, work_s: float, now: float) -> None:
        """A request of `work_s` seconds was sent to one of the replicas."""
        if self.last > float("-inf"):
            self.gap_s.add(max(0.0, now - self.last))
        self.last = now
        self.work_s.add(work_s)

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
        cost = self.constants[row].compute_s(start, stop) + self.beside()[row] * (stop - start)
        left, since = [*self.columns[row].values()], self.queue["since"][row]
        # Where none overtakes, the next one begins when the oldest ends: no error in the costs adds up in a long queue.
        is_next = not self.rows["overtakes"][row] and (since[left] >= since[column]).all()
        self.queue["stop"][row, column] = 0
        done = self.rows["done_s"]
        done[row] = max(0.0, done[row] - cost) if left and not is_next else 0.0

    def answering(self, name: str) -> None:
        """A replica answers one more request."""
        self.rows["decodes"][self.row(name)] += 1

    def answered(self, name: str, seconds: float) -> None:
        """A replica answers one less; it took `seconds` from the first token on."""
        row, rows = self.row(name), self.rows
        rows["decodes"][row] = max(0, rows["decodes"][row] - 1)
        mean = rows["answer_s"][row]
        rows["answer_s"][row] = mean + RECENT * (seconds - mean) if mean else seconds

    def _pass_time(self, row: int, now: float) -> None:
        done, at = self.rows["done_s"], self.rows["at"]
        if self.columns[row]:
            done[row] += max(0.0, now - at[row])
        at[row] = max(now, at[row])

    def idle(self, name: str) -> bool:
        """Whether a replica has no prefill in flight."""
        return not self.columns[self.row(name)]

    def full(self, name: str) -> bool:
        """Whether a replica has no place for one more request among those that run."""
        row = self.row(name)
        return bool(len(self.columns[row]) + self.rows["decodes"][row] >= self.rows["places"][row])

    def decodes(self, name: str) -> int:
        """Requests that a replica answers."""
        return int(self.rows["decodes"][self.row(name)])

    def beside(self) -> np.ndarray:
        """Seconds by which what decodes lengthens a token's computing, [replicas] float64."""
        answer_s = self.rows["answer_s"]
        # Answers that end during a prefill lengthen only a part of it.
        lasting = answer_s / (answer_s + max(self.work_s.value, 1e-9))
        seconds: np.ndarray = self.rows["beside"] * self.rows["decodes"] * lasting
        return seconds

    def known(self, now: float, held: np.ndarray, room: np.ndarray, regret: float, reuse: np.ndarray) -> Known:
        """What a choice depends on; `held` and `room` ([replicas] int64), `regret` and `reuse` as in Known."""
        costs = np.array([(c.fixed, c.linear, c.attention, c.match) for c in self.constants])  # [replicas, 4]
        fixed, linear, attention, match = costs.reshape(-1, 4).T
        linear = linear + self.beside()
        queue, rows = self.queue, self.rows
        start, stop = queue["start"], queue["stop"]
        waits = stop > 0
        cost = linear[:, None] * (stop - start) + attention[:, None] * (stop**2 - start**2) / 2
        cost = np.where(waits, cost, 0.0)  # [replicas, queue]
        waited = np.where(waits, np.maximum(0.0, now - queue["since"]), 0.0)
        done = np.where(waits.any(1), rows["done_s"] + np.maximum(0.0, now - rows["at"]), 0.0)
        rate = 1 / self.gap_s.value / len(self.names) if self.gap_s.value else 0.0
        running = waits.sum(1) + rows["decodes"]
        over = np.maximum(0.0, running - rows["places"] + 1)
        return Known(
            names=tuple(self.names),
            fixed=fixed,
            linear=linear,
            attention=attention,
            match=match,
            left=less_done(cost, waited, done, rows["overtakes"]),
            waited=waited,
            page=np.where(waits, queue["page"], NO_PAGE),
            key=queue["key"],
            overtakes=rows["overtakes"],
            late_s=np.maximum(0.0, done - cost.sum(1)),
            # Places fall free one after another, `places` of them in the time of an answer.
            place_s=over * rows["answer_s"] / rows["places"],
            arrivals=rate,
            busy=min(BUSIEST, rate * self.work_s.value),
            decodes=rows["decodes"],
            held=held,
            room=room,
            regret=regret,
            reuse=reuse,
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
