"""One round, in two functions. Every engine calls only these, so all engines move identical bytes.

    client_turn:  payloads ─decode→ state ─train→ adapter' ─compress→ entries ─encode→ payload
    server_turn:  payloads ─decode→ updates ─aggregate→ entries ─encode→ payload
                                                           └─────receive─→ state'

The training step is an argument. The server applies what every client will decode, as every client does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedloom.compress.entries import all_finite, dense_entry, to_dense
from fedloom.compress.seeds import derived_seed
from fedloom.errors import FedloomError, NumericError, RoundError, ShapeError
from fedloom.lora.pair import LoraState, digest, from_tensors, narrow
from fedloom.methods.method import CORE, CURVATURE, FROZEN, State, send_all
from fedloom.rounds.caps import Caps
from fedloom.rounds.checks import (
    UpdateFacts,
    check_all,
    check_broadcast,
    check_finite,
    check_form,
    check_update,
    leave_out,
    limits_of,
)
from fedloom.rounds.cohort import Cohort, combine, restrict_state
from fedloom.rounds.consolidation import consolidate
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.draft import Draft
from fedloom.rounds.facts import TurnFacts, Watch, describe_modules, is_told, measure_agreement
from fedloom.rounds.job import Job, sender_digest
from fedloom.rounds.joint import Outline, split_entries, whole_ranks
from fedloom.rounds.memory import give_back
from fedloom.rounds.regions import Tree
from fedloom.rounds.robust import Scales
from fedloom.rounds.stale import Past
from fedloom.rounds.step import Task, Train, Trained, fit_to_task
from fedloom.rounds.sums import SUM
from fedloom.rounds.trial import Measure, Trial, Verdict
from fedloom.wire import Header, Message, decode, encode


@dataclass(frozen=True, eq=False, slots=True)
class ClientTurn:
    """A client's state after its turn, the payload it sends, and what its training said."""

    state: State
    payload: bytes
    trained: Trained


@dataclass(frozen=True, eq=False, slots=True)
class ServerTurn:
    """The server's new state, the payload to broadcast, who was refused and why, and the method's numbers.

    Where the server consolidated, its state is one version ahead of the payload's. notes: what the operator of the
    federation should know besides. facts: what else can be said of the round.
    """

    state: State
    payload: bytes
    refused: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    facts: TurnFacts = TurnFacts()


def start(job: Job, adapter: LoraState, ranks: Mapping[str, int] | None = None) -> State:
    """The state at version 0 of a participant. ranks: by module; None for the server.

    A module that `ranks` does not name has the server's rank: the client does not train it, but its model uses it.
    """
    # The digest is of what the seed gives: what a method makes of it may follow from a site's own linear algebra.
    server = State(job.method.begin(adapter), digest=digest(adapter))
    if ranks is None:
        return server
    whole = server.adapter
    return job.method.adopt(replace(server, adapter=narrow(whole, ranks)), whole, LoraState())


def client_turn(job: Job, client: str, state: State, payloads: Sequence[bytes], train: Train, round: int) -> ClientTurn:
    """Apply what was broadcast, train, and say what changed. Raises NumericError where training diverged."""
    watch = Watch()
    for payload in payloads:
        state = accept(job, state, payload)
    watch.lap("decode")
    train = fit_to_task(train, Task(job.method, job.num_rounds, job.ranks.get(client, {})))
    trained = train(state, round, derived_seed(job.seed, "train", client, round))
    trained = replace(trained, adapter=trained.adapter.in_memory())  # what follows is on the CPU, beside `state`
    for name, tensor in {**trained.adapter.tensors(), "moved": trained.moved}.items():
        if not all_finite(tensor):
            raise NumericError(
                f"client {client!r}, round {round}: {name} is not finite after training; lower training.learning_rate"
            )
    give_back(4 * trained.adapter.numel())  # what training took besides
    watch.lap("train")
    sender = sender_digest(client, state.digest, round)
    header = Header("update", job.method.name, round, state.version, state.digest, sender, trained.num_examples)
    draft = Draft(header, _outline(job, state, trained.adapter, round), job.scratch)
    context = replace(job.context(round, client), size=draft.size, moved=trained.moved)
    memory, entries = job.method.compress(restrict_state(state, trained.adapter), trained.adapter, context)
    watch.lap("compress", less=draft.seconds)
    watch.stages["encode"] = draft.seconds  # what a budget has measured on the way
    payload = draft.payload(entries)
    watch.lap("encode")
    del watch.stages["train"]  # the training says it itself
    return ClientTurn(replace(state, memory=memory), payload, replace(trained, stages=watch.stages))


def _outline(job: Job, state: State, adapter: LoraState, round: int) -> Outline | None:
    """What a payload about `adapter` may leave to its receiver to know; None where it says everything itself."""
    if not job.method.joins:
        return None
    core = job.method.parts(state, round) == (CORE,)
    return Outline.of(adapter, whole_ranks(state), state.digest, core=core)


def server_turn(
    job: Job,
    state: State,
    payloads: Mapping[str, bytes],
    round: int,
    *,
    seen: Mapping[str, UpdateFacts] | None = None,
    decoded: Decoded | None = None,
    least: int = 1,
    past: Mapping[str, Past] | None = None,
    tree: Tree | None = None,
    public: Measure | None = None,
) -> ServerTurn:
    """Combine the clients' payloads into one broadcast, and apply it to the server's state.

    payloads: client → payload. An update that is invalid, stale, not finite, out of proportion or cannot be averaged is
    refused and reported; the round goes on with the others. Raises RoundError if fewer than `least` are left.
    seen: the facts of payloads that `check_update` has read already, so that they are not read again. decoded: where
    their entries wait. past: client → the older version that its update rests on, in asynchronous rounds; what such a
    client sent must be among `seen`, since it is no update of this version.
    tree: the regions whose servers check and sum the updates; without it they come straight to this one.
    public: what a state gets wrong of public examples, by which a client that does harm is refused.
    """
    watch, decoded = Watch(), decoded or Decoded.beside(state)
    passed, refused = check_all(job, state, payloads, round, seen or {}, decoded)
    if tree:
        passed, refused = tree.report(passed, refused, state.adapter)
    passed, refused = leave_out(job, passed, refused, decoded)
    watch.lap("decode")
    scales = Scales(job, state, Cohort(payloads, {}, passed, decoded, past=past or {}))
    trial = Trial.begin(public, state, job.robust.tolerance) if public and len(passed) >= max(least, 1) else None
    harmful: dict[str, str] = {}
    harm: dict[str, float] = {}
    fault: Exception | None = None
    while len(passed) + len(harmful) >= max(least, 1) and passed:
        weighed = scales.weigh(passed, len(harmful))
        try:
            turn = _average(job, state, weighed.cohort, round, tree, watch, keep=trial is not None)
        except Exception as error:  # whatever one update does to the method, the others' round goes on
            culprit = _find_culprit(job, state, weighed.cohort, passed, round)
            refused[culprit] = f"the round fails with its update: {type(error).__name__}: {error}"
            del passed[culprit]
            fault = error
            continue
        verdict = _try_without(job, state, scales, trial, turn, passed, round, len(harmful)) if trial else Verdict()
        harm |= verdict.harm
        if not verdict.refused:
            decoded.clear()
            facts = replace(turn.facts, stages=watch.stages, norms={client: one.norm for client, one in passed.items()})
            turn = replace(turn, refused={**refused, **harmful, **weighed.aside}, notes=weighed.notes, facts=facts)
            return _keep_records(turn, trial, harm, harmful, verdict) if trial else turn
        harmful |= verdict.refused
        passed = {client: one for client, one in passed.items() if client not in harmful}
    refused |= harmful
    raise RoundError(
        f"round {round}: {len(passed) or 'no'} usable update{'s' * (len(passed) > 1)} from {len(payloads)} clients "
        f"({refused or 'none answered'}){f', {least} needed' if least > 1 else ''}",
        refused,
        can_skip=bool(harmful),
    ) from fault


def sum_turn(job: Job, state: State, update: bytes, round: int) -> ServerTurn:
    """`server_turn` where all that is known of a round is the sum of its updates (`secure.mean_update`).

    Raises RoundError for a sum that cannot be taken up.
    """
    decoded = Decoded.beside(state)
    try:
        # The bounds on a client hold for the mean where they may: no norm of a mean is above all of its updates' norms.
        alone = replace(job, ranks={}, caps=Caps(max_norm=job.caps.max_norm))
        facts = {SUM: check_update(alone, state, SUM, update, round, decoded)}
        return _average(job, state, Cohort({SUM: update}, {SUM: 1.0}, facts, decoded), round)
    except Exception as error:
        raise RoundError(f"the sum of round {round} cannot be averaged: {type(error).__name__}: {error}") from error


def _try_without(
    job: Job,
    state: State,
    scales: Scales,
    trial: Trial,
    turn: ServerTurn,
    passed: Mapping[str, UpdateFacts],
    round: int,
    gone: int,
) -> Verdict:
    """What the round is without each of its clients, by what it gets wrong of public examples."""

    def without(client: str) -> State:
        others = {name: one for name, one in passed.items() if name != client}
        return _average(job, state, scales.weigh(others, gone + 1).cohort, round, keep=True).state

    return trial.judge(turn.state, scales.weigh(passed, gone).cohort.weights, without)


def _keep_records(
    turn: ServerTurn, trial: Trial, harm: Mapping[str, float], refused: Collection[str], verdict: Verdict
) -> ServerTurn:
    """The turn with what its trial has found in the server's memory and among the numbers of the round."""
    memory = {**turn.state.memory, **trial.remember(harm, refused)}
    return replace(turn, state=replace(turn.state, memory=memory), stats={**turn.stats, **verdict.stats})


def _find_culprit(job: Job, state: State, cohort: Cohort, passed: Mapping[str, UpdateFacts], round: int) -> str:
    """The client whose update made the round fail: the one being read, if it fails alone too; otherwise the largest.

    A factorisation most likely stumbles over the largest update, be it at once or while a later one is folded in.
    """
    if cohort.reading:
        alone = replace(cohort, weights={cohort.reading: 1.0}, reading="")
        try:
            _average(job, state, alone, round)
        except Exception:
            return cohort.reading
    return max(passed, key=lambda client: passed[client].norm)


def _average(
    job: Job,
    state: State,
    cohort: Cohort,
    round: int,
    tree: Tree | None = None,
    watch: Watch | None = None,
    *,
    keep: bool = False,
) -> ServerTurn:
    """The round with these updates. Raises what the method raises, and NumericError for a result that is not finite.

    keep: whether the decoded updates are used again.
    """
    if tree:
        cohort.sums = tree.sum_up(job, state, cohort, round)
    header = Header(
        "change", job.method.name, round, state.version, state.digest, result_digest=cohort.digest(state.digest)
    )
    draft = Draft(header, _outline(job, state, state.adapter, round), job.scratch)
    context = replace(job.context(round), size=draft.size)
    told, watch = is_told(job, round), watch or Watch()
    agreement = measure_agreement(cohort, state) if told else None
    result = combine(job.method, state, cohort, context, job.module_weighting)
    if not keep:
        cohort.decoded.clear()
    watch.lap("aggregate", less=draft.seconds)
    watch.stages["encode"] = draft.seconds  # what a budget has measured on the way
    payload, memory, stats = draft.payload(result.entries), result.memory, result.stats
    watch.lap("encode")
    facts = TurnFacts(agreement=agreement, modules=describe_modules(result.entries, result.kept) if told else None)
    message = draft.received(result.entries, memory.values())
    # What was averaged may be as large as the state that follows, and leaves room for it: memory that is fresh from the
    # system costs more time than the sums do.
    del draft, context, result
    after = _take_up(job, replace(state, memory=memory), message)
    check_finite(after, state)
    watch.lap("aggregate")
    if not job.consolidation.is_due(round):
        return ServerTurn(after, payload, stats=stats, facts=facts)
    after, cost = consolidate(after, job.consolidation.energy)
    check_finite(after)
    watch.lap("aggregate")
    return ServerTurn(after, payload, stats={**stats, **cost}, facts=facts)


def accept(job: Job, state: State, payload: bytes) -> State:
    """Apply one broadcast, or adopt one full state.

    Raises StaleError if it is for another base than `state`; WireError, ShapeError or NumericError if it does not fit
    this adapter. Nothing of such a payload is kept.
    """
    return _take_up(job, state, decode(payload, limits_of(job, state)))


def accept_own(job: Job, state: State, message: Message, ranks: Mapping[str, int]) -> State:
    """`accept` for a broadcast that this process made itself, or its own full state, by a client of these ranks.

    It may be of any size, as a stack of many clients is.
    """
    return _take_up(job, state, replace(message, entries=job.method.narrow(message.entries, ranks)))


def _take_up(job: Job, state: State, message: Message) -> State:
    header = message.header
    entries = split_entries(message.entries, state, header.base_digest)
    check_broadcast(job, state, header, entries)
    try:
        if header.kind == "state":
            tensors = {name: to_dense(entry) for name, entry in entries.items()}
            adopted = job.method.adopt(state, from_tensors(tensors), from_tensors(tensors, FROZEN))
            curvature = from_tensors(tensors, CURVATURE)
            after = replace(adopted, curvature=curvature, version=header.base_version, digest=header.base_digest)
        else:
            changed = job.method.receive(state, entries, job.context(header.round))
            after = replace(changed, version=header.base_version + 1, digest=header.result_digest)
    except FedloomError:
        raise
    except Exception as error:
        raise ShapeError(f"the {header.kind} does not fit this adapter: {type(error).__name__}: {error}") from error
    check_form(state, after)
    return after


def full_state(job: Job, state: State, round: int) -> bytes:
    """The payload that brings any participant to exactly the server's state."""
    tensors = state.adapter.tensors() | state.frozen.tensors(FROZEN) | state.curvature.tensors(CURVATURE)
    header = Header("state", job.method.name, round, state.version, state.digest)
    message = Message(header, {name: dense_entry(tensor) for name, tensor in tensors.items()})
    return encode(message, folder=job.scratch)


def narrow_broadcast(job: Job, payload: bytes, ranks: Mapping[str, int]) -> bytes:
    """A broadcast cut to what a client of these ranks needs; the same bytes where the method cuts nothing."""
    if job.method.narrow is send_all:
        return payload
    message = decode(payload)
    entries = job.method.narrow(message.entries, ranks)
    return payload if entries is message.entries else encode(Message(message.header, entries), folder=job.scratch)
