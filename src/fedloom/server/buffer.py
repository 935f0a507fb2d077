"""Asynchronous rounds: the updates that wait for the server's next step, and the versions that turns under way rest on.

A round is one step of the server, taken once the buffer is full (FedBuff, Nguyen et al., AISTATS 2022, arXiv
2106.06639). Nobody waits for a slower client: whoever has answered begins its next turn from the newest version, and an
update of an older one counts by its staleness (`rounds.stale`).

A client has one turn a round at most: a second one would be the first again, trained from the same version on the same
examples. So one client has one update in a step.

An update counts for its client, with what the client remembers of it, once it is in the buffer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from fedloom.errors import StaleError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.records.config import FederationSettings
from fedloom.rounds.checks import UpdateFacts, check_update
from fedloom.rounds.job import Job
from fedloom.rounds.stale import Past, weigh_staleness
from fedloom.workspace.checkpoint import Contents


@dataclass(frozen=True, slots=True)
class Begun:
    """A client's turn: the round in which it was begun, and the version that it is trained from."""

    round: int
    version: int


@dataclass(frozen=True, eq=False, slots=True)
class Arrived:
    """An update in the buffer."""

    client: str
    turn: Begun
    payload: bytes
    facts: UpdateFacts


class Buffer:
    """See the module. begun: client → its newest turn; under_way: who is at it; waiting: what came, the first first.

    past: version → the server's state of then, as far as turns under way and waiting updates rest on it; with the
    adapter where the method needs it. now: simulated time, in turns of a client of pace 1; 0 across machines.
    """

    def __init__(self, job: Job, federation: FederationSettings, clients: int) -> None:
        self.job = job
        self.federation = federation
        self.size = federation.updates_per_step(clients)
        self.places = federation.clients_per_round(clients)
        self.begun: dict[str, Begun] = {}
        self.under_way: set[str] = set()
        self.waiting: list[Arrived] = []
        self.past: dict[int, State] = {}
        self.now = 0.0

    @property
    def senders(self) -> set[str]:
        """Who has an update in the buffer."""
        return {one.client for one in self.waiting}

    @property
    def is_full(self) -> bool:
        """Whether the server can take its step."""
        return len(self.senders) >= self.size

    def may_begin(self, client: str, round: int) -> bool:
        """Whether the client is free, and has had no turn in this round."""
        return client not in self.under_way and (client not in self.begun or self.begun[client].round < round)

    def begin(self, client: str, round: int, server: State) -> None:
        """The client begins a turn from the server's state."""
        self.begun[client] = Begun(round, server.version)
        self.under_way.add(client)
        adapter = server.adapter if self.job.method.updates == "factors" else LoraState()
        self.past.setdefault(server.version, State(adapter, version=server.version, digest=server.digest))

    def end(self, client: str) -> None:
        """The client's turn is over, whatever came of it."""
        self.under_way.discard(client)

    def lose(self, client: str) -> None:
        """The client's turn is lost: it may begin it anew, from whatever version is the newest then."""
        self.under_way.discard(client)
        self.begun.pop(client, None)

    def lose_all(self) -> None:
        """All turns under way are lost."""
        for client in sorted(self.under_way):
            self.lose(client)

    def base_of(self, client: str, server: State) -> State:
        """The state that the client's turn rests on, to check its update against: of `server`'s shapes."""
        then = self.past[self.begun[client].version]
        return replace(server, version=then.version, digest=then.digest)

    def take_in(self, client: str, payload: bytes, facts: UpdateFacts, server: State) -> None:
        """Have an update that passed its check wait for the next step. Raises StaleError where it is too old."""
        turn = self.begun[client]
        self.end(client)
        self.check_age(turn, server)
        self.waiting.append(Arrived(client, turn, payload, facts))

    def check_age(self, turn: Begun, server: State) -> None:
        """Raises StaleError for a turn from which the server has gone on too far."""
        staleness = server.version - turn.version
        if staleness > self.federation.max_staleness:
            raise StaleError(
                f"the update rests on version {turn.version}, and the server is {staleness} versions on: "
                f"federation.max_staleness is {self.federation.max_staleness}"
            )

    def drop_stale(self, server: State) -> dict[str, str]:
        """Client → why its update, which waited, is too old by now. Such an update is let go of."""
        dropped: dict[str, str] = {}
        for one in list(self.waiting):
            try:
                self.check_age(one.turn, server)
            except StaleError as error:
                dropped[one.client] = str(error)
                self.waiting.remove(one)
        return dropped

    def take(self) -> list[Arrived]:
        """The updates of the next step, out of the buffer: the first `size` that came, one of each client."""
        first: dict[str, Arrived] = {}
        for one in self.waiting:
            if len(first) < self.size:
                first.setdefault(one.client, one)
        taken = list(first.values())
        self.waiting = [one for one in self.waiting if one not in taken]
        return taken

    def past_of(self, taken: Sequence[Arrived], server: State) -> dict[str, Past]:
        """Client → the older version that its update rests on, where it does."""
        method, exponent = self.job.method, self.federation.staleness_exponent
        found: dict[str, Past] = {}
        for one in taken:
            age, base = server.version - one.turn.version, self.past[one.turn.version]
            if age:
                weight = weigh_staleness(age, exponent)
                found[one.client] = Past(age, weight, method.updates, base.adapter, server.adapter)
        return found

    def describe(self, taken: Sequence[Arrived], server: State) -> dict[str, float]:
        """Numbers of a step worth recording."""
        ages = [server.version - one.turn.version for one in taken]
        clock = {"simulated_time": self.now} if self.now else {}
        return {"mean_staleness": sum(ages) / len(ages), "max_staleness": float(max(ages)), **clock} if ages else clock

    def forget(self) -> None:
        """Let go of versions that nothing rests on any more."""
        needed = {self.begun[client].version for client in self.under_way} | {one.turn.version for one in self.waiting}
        self.past = {version: state for version, state in self.past.items() if version in needed}

    def remember(self) -> Contents:
        """All of it, for a checkpoint."""
        self.forget()
        return Contents(
            states={f"past/{version}": state for version, state in self.past.items()},
            blobs={f"waiting/{place}": one.payload for place, one in enumerate(self.waiting)},
            facts={
                "begun": {client: [turn.round, turn.version] for client, turn in self.begun.items()},
                "under_way": sorted(self.under_way),
                "waiting": [[one.client, one.turn.round, one.turn.version] for one in self.waiting],
                "now": self.now,
            },
        )

    def restore(self, held: Contents, server: State) -> None:
        """Take up what a checkpoint holds. The updates that wait are checked anew, so that their facts are known."""
        facts = held.facts
        self.begun = {client: Begun(*turn) for client, turn in facts["begun"].items()}
        self.under_way, self.now = set(facts["under_way"]), facts["now"]
        self.past = {state.version: state for key, state in held.states.items() if key.startswith("past/")}
        for place, (client, round, version) in enumerate(facts["waiting"]):
            then, payload = self.past[version], held.blobs[f"waiting/{place}"]
            base = replace(server, version=then.version, digest=then.digest)
            seen = check_update(self.job, base, client, payload, round)
            self.waiting.append(Arrived(client, Begun(round, version), payload, seen))


def choose_next(order: Sequence[str], buffer: Buffer, round: int, here: Collection[str]) -> list[str]:
    """Who begins a turn now, in order of name: as many as there are places, the first of `order` that are free."""
    free = [client for client in order if client in here and buffer.may_begin(client, round)]
    return sorted(free[: max(buffer.places - len(buffer.under_way), 0)])
