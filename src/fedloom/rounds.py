"""One round, in two functions. Every engine calls only these, so all engines move identical bytes.

    client_turn:  payloads ─decode→ state ─train→ adapter' ─compress→ entries ─encode→ payload
    server_turn:  payloads ─decode→ updates ─aggregate→ entries ─encode→ payload ─decode→ state'

The training step is an argument. The server applies the decoded broadcast, as every client does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedloom.budget import Budget
from fedloom.cohort import Cohort, combine, restricted, shares
from fedloom.consolidation import Consolidation, consolidated
from fedloom.errors import FedloomError, NumericError, RoundError, ShapeError, StaleError, WireError
from fedloom.lora import LoraState, derived_seed, digest, from_tensors, module_of, narrow
from fedloom.method import FROZEN, Context, Entries, Method, State
from fedloom.sparsify import Quantize
from fedloom.tensors import all_finite, dense, floats, to_dense
from fedloom.wire import Header, Limits, Message, decode, encode


@dataclass(frozen=True, eq=False, slots=True)
class Trained:
    """What a training step returns: the adapter after it, of the modules that the client trains, and numbers."""

    adapter: LoraState
    num_examples: int
    loss: float
    steps: int = 0
    seconds: float = 0.0


class Train(Protocol):
    """(state, round, seed) → the adapter trained from state.adapter on top of state.fixed."""

    def __call__(self, state: State, round: int, seed: int) -> Trained: ...


@dataclass(frozen=True, slots=True)
class Job:
    """What server and clients agree on before the first round.

    quantize codes the values of both directions; budget is what a client's payload may take, at most; weighting and
    module_weighting say what a client counts for (`cohort`); consolidation, when the server recompresses its state;
    num_rounds, how long the run is, 0 where that is not known; downloads, how many broadcasts go down in a client's
    turn on the mean, those that it missed included, times what the server's adapter has of the client's values.
    """

    method: Method
    seed: int
    quantize: Quantize
    weighting: str = "examples"
    budget: Budget | None = None
    module_weighting: str = "holders"
    consolidation: Consolidation = Consolidation()
    num_rounds: int = 0
    downloads: float = 1.0

    def context(self, round: int, party: str = "") -> Context:
        """The context of one round; a client's has a seed of its own, the server's and a broadcast's do not."""
        seed = derived_seed(self.seed, "client", party) if party else self.seed
        budget = self.method.budget(self.budget)
        return Context(round, seed, self.quantize, budget, num_rounds=self.num_rounds, downloads=self.downloads)


@dataclass(frozen=True, eq=False, slots=True)
class ClientTurn:
    """A client's state after its turn, the payload it sends, and what its training said."""

    state: State
    payload: bytes
    trained: Trained


@dataclass(frozen=True, eq=False, slots=True)
class ServerTurn:
    """The server's new state, the payload to broadcast, who was refused and why, and the method's numbers.

    Where the server consolidated, its state is a version further than the payload leads.
    """

    state: State
    payload: bytes
    refused: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Draft:
    """Payloads under one header. The last one is kept, since what a method measured last is mostly what is sent."""

    header: Header
    entries: Entries = field(default_factory=dict)
    encoded: bytes = b""

    def size(self, entries: Entries) -> int:
        """Bytes of the payload that carries these entries."""
        return len(self.payload(entries))

    def payload(self, entries: Entries) -> bytes:
        """The payload that carries these entries."""
        known = self.encoded and entries.keys() == self.entries.keys()
        if not (known and all(entry is self.entries[name] for name, entry in entries.items())):
            self.entries, self.encoded = dict(entries), encode(Message(self.header, entries))
        return self.encoded


def start(job: Job, adapter: LoraState, ranks: Mapping[str, int] | None = None) -> State:
    """The state at version 0 of a participant of the given ranks (by module); None for the server's own.

    A module that `ranks` does not name is held whole, as the server holds it: a client that does not train it uses it.
    """
    server = State(adapter, digest=digest(adapter))
    if ranks is None:
        return server
    return job.method.adopt(replace(server, adapter=narrow(adapter, ranks)), adapter, LoraState())


def client_turn(job: Job, client: str, state: State, payloads: Sequence[bytes], train: Train, round: int) -> ClientTurn:
    """Apply what was broadcast, train, and say what changed. Raises NumericError where training diverged."""
    for payload in payloads:
        state = accept(job, state, payload)
    trained = train(state, round, derived_seed(job.seed, "train", client, round))
    for name, tensor in trained.adapter.tensors().items():
        if not all_finite(tensor):
            raise NumericError(
                f"client {client!r}, round {round}: {name} is not finite after training; lower training.learning_rate"
            )
    header = Header("update", job.method.name, round, state.version, state.digest, num_examples=trained.num_examples)
    draft = Draft(header)
    context = replace(job.context(round, client), size=draft.size)
    memory, entries = job.method.compress(restricted(state, trained.adapter), trained.adapter, context)
    return ClientTurn(replace(state, memory=memory), draft.payload(entries), trained)


def server_turn(job: Job, state: State, payloads: Mapping[str, bytes], round: int) -> ServerTurn:
    """Combine what the clients sent, by name, into one broadcast, and apply that.

    A client whose payload is invalid, stale or not finite is refused and reported; the round goes on with the
    others. Raises RoundError if nobody is left.
    """
    examples: dict[str, int] = {}
    modules: dict[str, Collection[str]] = {}
    refused: dict[str, str] = {}
    for client in sorted(payloads):
        try:
            examples[client], modules[client] = inspected(job, state, payloads[client], round)
        except FedloomError as error:
            refused[client] = str(error)
    cohort = Cohort(payloads, shares(examples, job.weighting), modules)
    if not cohort.weights:
        raise RoundError(f"round {round}: no usable update from {len(payloads)} clients ({refused or 'none answered'})")
    header = Header(
        "change", job.method.name, round, state.version, state.digest, result_digest=cohort.digest(state.digest)
    )
    draft = Draft(header)
    context = replace(job.context(round), size=draft.size)
    result = combine(job.method, state, cohort, context, job.module_weighting)
    payload = draft.payload(result.entries)
    after = accept(job, replace(state, memory=result.memory), payload)
    if not job.consolidation.due(round):
        return ServerTurn(after, payload, refused, result.stats)
    after, cost = consolidated(after, job.consolidation.energy)
    return ServerTurn(after, payload, refused, {**result.stats, **cost})


def accept(job: Job, state: State, payload: bytes) -> State:
    """Apply one broadcast, or adopt one full state. Raises StaleError if it is for another base than `state`."""
    message = decode(payload)
    header = message.header
    _same_method(job, header)
    if header.kind == "state":
        tensors = {name: to_dense(entry) for name, entry in message.entries.items()}
        adopted = job.method.adopt(state, from_tensors(tensors), from_tensors(tensors, FROZEN))
        return replace(adopted, version=header.base_version, digest=header.base_digest)
    expect(header, "change", state)
    changed = job.method.receive(state, message.entries, job.context(header.round))
    return replace(changed, version=header.base_version + 1, digest=header.result_digest)


def full_state(job: Job, state: State, round: int) -> bytes:
    """The payload that brings any participant to the server's state, lossless."""
    tensors = state.adapter.tensors() | state.frozen.tensors(FROZEN)
    header = Header("state", job.method.name, round, state.version, state.digest)
    return encode(Message(header, {name: dense(tensor) for name, tensor in tensors.items()}))


def addressed(job: Job, payload: bytes, ranks: Mapping[str, int]) -> bytes:
    """A broadcast cut to what a client of these ranks needs; the same bytes where the method cuts nothing."""
    message = decode(payload)
    entries = job.method.narrow(message.entries, ranks)
    return payload if entries is message.entries else encode(Message(message.header, entries))


def inspected(job: Job, state: State, payload: bytes, round: int) -> tuple[int, frozenset[str]]:
    """Examples and modules of an update that may be averaged. Raises the error that says why it may not."""
    limits = Limits(max_values=4 * state.adapter.numel())
    message = decode(payload, limits)
    header = message.header
    _same_method(job, header)
    expect(header, "update", state)
    if header.round != round:
        raise StaleError(f"an update of round {header.round} arrived in round {round}: it is too late to be averaged")
    if header.num_examples <= 0 and job.weighting == "examples":
        raise WireError("the update says that it rests on no examples: a client needs at least one")
    modules = frozenset(module_of(name) for name in message.entries)
    _check_entries(message.entries, modules, state.adapter, job.method.parts(state, round))
    return header.num_examples, modules


def _check_entries(entries: Entries, modules: Collection[str], adapter: LoraState, parts: tuple[str, ...]) -> None:
    expected = {f"{module}/{part}" for module in adapter if module in modules for part in parts}
    if not expected:
        raise ShapeError("the update is about no module of this adapter: the client trains other modules")
    if set(entries) != expected:
        name = min(set(entries) ^ expected)
        raise ShapeError(f"the update {'lacks' if name in expected else 'has an unexpected'} tensor {name}")
    for name, entry in entries.items():
        module, _, part = name.rpartition("/")
        m, n = adapter[module].shape
        rank = entry.shape[0] if part == "A" else entry.shape[-1]
        wanted = {"A": (rank, n), "B": (m, rank)}.get(part, (adapter[module].rank, adapter[module].rank))
        if entry.shape != wanted or rank > adapter[module].rank:
            raise ShapeError(f"{name} has shape {entry.shape}, expected {wanted} with rank ≤ {adapter[module].rank}")
        if not all_finite(floats(entry.values)):
            raise NumericError(f"{name} holds NaN or infinity: the client's training diverged")


def _same_method(job: Job, header: Header) -> None:
    if header.method != job.method.name:
        raise WireError(f"a payload of method {header.method!r} reached a run of {job.method.name!r}")


def expect(header: Header, kind: str, state: State) -> None:
    """Raises WireError for a payload of another kind, StaleError for one that rests on another state."""
    if header.kind != kind:
        raise WireError(f"a payload of kind {header.kind!r} arrived where {kind!r} was expected")
    if (header.base_version, header.base_digest) != (state.version, state.digest):
        raise StaleError(
            f"the payload rests on version {header.base_version} ({header.base_digest[:8]}), the receiver holds "
            f"version {state.version} ({state.digest[:8]}): send the missed broadcasts or the full state first"
        )
