"""A whole run, from the bytes of a played round and the turns that its settings draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedloom.studies.estimate.made_up import Ranks
from fedloom.studies.estimate.rounds import Prediction, Traffic
from fedloom.studies.estimate.schedule import Turns
from fedloom.studies.estimate.sums import add_messages


@dataclass(frozen=True, slots=True)
class RunBytes:
    """A run. rounds: of each, client → its bytes (up, down) in turns, with what was missed; delivery: client → the
    result. turns: how many updates come in. relayed: bytes between regions and root.
    """

    rounds: Sequence[Mapping[str, tuple[float, float]]]
    delivery: Mapping[str, float]
    turns: int
    relayed: float = 0.0

    @property
    def up(self) -> float:
        """Bytes of all updates."""
        return sum(up for clients in self.rounds for up, _ in clients.values())

    @property
    def down(self) -> float:
        """Bytes down in turns."""
        return sum(down for clients in self.rounds for _, down in clients.values())

    @property
    def delivered(self) -> float:
        """Bytes of the result to everybody."""
        return sum(self.delivery.values())

    @property
    def bytes(self) -> float:
        """All of the clients' lines."""
        return self.up + self.down + self.delivered


def play_course(
    told: Prediction,
    ranks: Mapping[str, Ranks],
    rounds: Iterable[Turns],
    most: float,
    regions: Mapping[str, Sequence[str]] | None = None,
) -> RunBytes:
    """The run. ranks: client → module → rank, of all clients. most: bytes that a full state cannot exceed."""
    traffic = {client: of_client(told, ranks, client) for client in ranks}
    known, begun, steps, turns = dict.fromkeys(ranks, 0), dict[str, int](), 0, 0
    played: list[Mapping[str, tuple[float, float]]] = []
    relayed = 0.0
    for present in rounds:
        fetched = {client: catch_up(told, traffic[client], known[client], steps, most) for client in present.asked}
        for client in present.asked:
            known[client] = begun[client] = steps
        sent = {
            client: traffic[client].up if begun.get(client, steps) else traffic[client].first_up
            for client in present.answering
        }
        turns += len(sent)
        if told.summed:
            sent, fetched = add_messages(sent, fetched)
        played.append({client: (sent.get(client, 0.0), fetched.get(client, 0.0)) for client in {**fetched, **sent}})
        if regions and told.relay:
            relayed += handed_on(regions, ranks, fetched)
            for clients in regions.values():
                here = [client for client in clients if client in sent]
                whole = told.relay.sum if steps else told.relay.first_sum
                relayed += (whole if here else 0.0) + told.relay.each_client * len(here)
        steps += bool(present.combined)
    delivery = {client: catch_up(told, traffic[client], known[client], steps, most) for client in known}
    if regions:
        relayed += handed_on(regions, ranks, delivery)
    return RunBytes(played, delivery, turns, relayed)


def handed_on(regions: Mapping[str, Sequence[str]], ranks: Mapping[str, Ranks], fetched: Mapping[str, float]) -> float:
    """Bytes that the root sends regions for their clients: what the client that lacks most is sent, once for all of
    the same ranks.
    """
    total = 0.0
    for clients in regions.values():
        kinds: dict[tuple[tuple[str, int], ...], float] = {}
        for client in clients:
            if client in fetched:
                kind = tuple(sorted(ranks[client].items()))
                kinds[kind] = max(kinds.get(kind, 0.0), fetched[client])
        total += sum(kinds.values())
    return total


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
        return min(min(told.replaces, steps - known) * traffic.down, state_bytes(told, steps), most)
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
