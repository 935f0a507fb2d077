"""A whole run, from the bytes of a played round and the attendance that its settings draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedloom.server.attendance import Attendance
from fedloom.studies.estimate.made_up import Ranks
from fedloom.studies.estimate.rounds import Prediction, Traffic


@dataclass(frozen=True, slots=True)
class RunBytes:
    """Bytes of a run: up, down in turns with what was missed, the result to everybody; and how many turns it has."""

    up: float
    down: float
    delivery: float
    turns: int

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.up + self.down + self.delivery


def play_course(told: Prediction, ranks: Mapping[str, Ranks], rounds: Iterable[Attendance], most: float) -> RunBytes:
    """The run. ranks: client → module → rank, of all clients. most: bytes that a full state cannot exceed."""
    traffic = {client: of_client(told, ranks, client) for client in ranks}
    known, steps, turns = dict.fromkeys(ranks, 0), 0, 0
    up = down = 0.0
    for present in rounds:
        for client in present.asked:
            down += catch_up(told, traffic[client], known[client], steps, most)
            known[client] = steps
        for client in present.answering:
            turns += 1
            up += traffic[client].up if steps else traffic[client].first_up
        steps += bool(present.answering)
    delivery = sum(catch_up(told, traffic[client], known[client], steps, most) for client in known)
    return RunBytes(up, down, delivery, turns)


def of_client(told: Prediction, ranks: Mapping[str, Ranks], client: str) -> Traffic:
    """A client's bytes: those of a client that was played with the same ranks, or in proportion to the ranks."""
    own, size = ranks[client], sum(ranks[client].values())
    played = min(told.traffic, key=lambda name: (ranks[name] != own, abs(sum(ranks[name].values()) - size)))
    like, share = told.traffic[played], size / sum(ranks[played].values())
    return Traffic(share * like.first_up, like.first_down, share * like.up, like.down)


def catch_up(told: Prediction, traffic: Traffic, known: int, steps: int, most: float) -> float:
    """What brings a client that knows so many steps up to date: the missed broadcasts, the newest, or the state."""
    if known == steps:
        return 0.0
    if told.replaces and steps > 1:
        return min(traffic.down, state_bytes(told, steps), most)
    missed = (steps - known) * traffic.down + (0.0 if known else traffic.first_down - traffic.down)
    return min(missed, state_bytes(told, steps), most)


def state_bytes(told: Prediction, steps: int) -> float:
    """Bytes of the full state: of methods that merge it grows with every round, as it did in those that were played."""
    states = told.states
    if steps <= len(states):
        return states[steps - 1]
    # Of other methods it only fills up, and has done so by then.
    growth = states[-1] - states[-2] if told.merges else 0.0
    return states[-1] + (steps - len(states)) * growth
