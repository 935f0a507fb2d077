"""Who has turns in which round of a run that is still to come, as the run itself will draw it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedloom.compress.quantize import quantize
from fedloom.errors import StaleError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Method, State
from fedloom.records.config import Config, FederationSettings
from fedloom.records.ledger import Training
from fedloom.rounds.checks import UpdateFacts
from fedloom.rounds.job import Job
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import ClientTurn
from fedloom.server.attendance import Attendance, draw_rounds
from fedloom.server.buffer import Buffer, choose_next
from fedloom.server.timeline import Timeline, draw_order, draw_vanishing

_EMPTY = ClientTurn(State(LoraState()), b"", Trained(LoraState(), 1, 0.0))


@dataclass(frozen=True, slots=True)
class Turns:
    """One round. asked: who begins a turn in it, in order; answering: whose updates come in; combined: those that the
    server averages in it. In synchronous rounds the last two are the same.
    """

    asked: tuple[str, ...]
    answering: tuple[str, ...]
    combined: tuple[str, ...]


def turns_of(rounds: Iterable[Attendance]) -> Iterator[Turns]:
    """Synchronous rounds."""
    return (Turns(present.asked, present.answering, present.answering) for present in rounds)


def draw_turns(config: Config, clients: Collection[str], method: Method) -> list[Turns]:
    """Every round of the run that the settings describe."""
    if config.federation.mode == "buffered":
        return list(_play_buffer(config.federation, sorted(clients), method))
    return list(turns_of(draw_rounds(config, clients)))


def _play_buffer(federation: FederationSettings, clients: Sequence[str], method: Method) -> Iterator[Turns]:
    """Asynchronous rounds on the run's own clock, with updates that are empty: who is at a turn, and who comes in."""
    buffer = Buffer(Job(method, federation.seed, quantize("fp32")), federation, len(clients))
    timeline, server = Timeline(federation), State(LoraState())
    for round in range(1, federation.num_rounds + 1):
        buffer.drop_stale(server)
        asked, answering = _fill(federation, clients, buffer, timeline, server, round)
        combined = tuple(one.client for one in buffer.take())
        yield Turns(tuple(asked), tuple(answering), combined)
        if combined:
            server = State(LoraState(), version=server.version + 1)
        buffer.forget()


def _fill(
    federation: FederationSettings,
    clients: Sequence[str],
    buffer: Buffer,
    timeline: Timeline,
    server: State,
    round: int,
) -> tuple[list[str], list[str]]:
    """(who begins a turn in the round, whose updates come in), as a simulation fills its buffer."""
    order, asked, answering = draw_order(federation, clients, round), list[str](), list[str]()
    while not buffer.is_full:
        for client in choose_next(order, buffer, round, clients):
            buffer.begin(client, round, server)
            vanishes = draw_vanishing(federation, client, round)
            turn, trained = (None, None) if vanishes else (_EMPTY, Training(round, client, 0.0, 0, 1))
            timeline.begin(client, buffer.now, 0, turn, trained)
            asked.append(client)
        if not timeline.flights:
            break
        for flight in timeline.land(round):
            buffer.now = flight.due
            if flight.trained is None:
                buffer.end(flight.client)
                continue
            answering.append(flight.client)
            try:
                buffer.take_in(flight.client, b"", UpdateFacts(1, frozenset(), 0.0, b"", 0), server)
            except StaleError:
                buffer.end(flight.client)
    return asked, answering
