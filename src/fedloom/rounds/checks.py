"""What a payload must be before it is used: an update before it is averaged, a broadcast before it is kept.

No payload is trusted, whoever sent it. Nothing of it is allocated, averaged or stored before its header, names, shapes
and values fit this run and this adapter. Every function raises a FedloomError that says what is wrong.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.compress.entries import Entry, Quantized, Values, all_finite, floats
from fedloom.errors import FedloomError, NumericError, ShapeError, StaleError, WireError
from fedloom.lora.pair import PARTS, LoraPair, module_of
from fedloom.methods.method import CORE, CURVATURE, FROZEN, SCALARS, SHARED, Entries, State, no_core
from fedloom.methods.shared.whole import adopt_whole, whole_rank
from fedloom.rounds.caps import find_outliers
from fedloom.rounds.decoded import Decoded, read_update
from fedloom.rounds.job import Job, sender_digest
from fedloom.wire import DEFAULT, Header, Limits

MOST_EXAMPLES = 10**9
"""Examples that one update may rest on: no site fine-tunes on more, and sums of such numbers are exact in a float."""

_SLACK = 4
"""A payload may have this many times the values of the expected tensors before its names and shapes are compared:
enough that a wrong rank gets an error that names the tensor, not one about the size of the payload.
"""


@dataclass(frozen=True, slots=True)
class UpdateFacts:
    """What is known of an update after its check: the examples that it claims, its modules, and √Σ v² of its values.

    digest, size: of its payload.
    """

    examples: int
    modules: frozenset[str]
    norm: float
    digest: bytes
    size: int


def check_update(
    job: Job, state: State, client: str, payload: bytes, round: int, decoded: Decoded | None = None
) -> UpdateFacts:
    """The facts of an update that may be averaged. Raises the FedloomError that says why it may not.

    decoded: where its entries wait until it is.
    """
    try:
        return _look_at(job, state, client, payload, round, decoded or Decoded(0))
    except FedloomError:
        raise
    except Exception as error:  # whatever a payload does to the reader is the payload's fault
        raise WireError(f"the update cannot be read: {type(error).__name__}: {error}") from error


def check_all(
    job: Job,
    state: State,
    payloads: Mapping[str, bytes],
    round: int,
    seen: Mapping[str, UpdateFacts],
    decoded: Decoded,
) -> tuple[dict[str, UpdateFacts], dict[str, str]]:
    """(client → facts of its update, where it may be averaged; client → why it may not), both in order of name."""
    found = dict(seen)
    refused = {}
    for client in sorted(payloads.keys() - seen.keys()):
        try:
            found[client] = check_update(job, state, client, payloads[client], round, decoded)
        except FedloomError as error:
            refused[client] = str(error)
    return {client: found[client] for client in sorted(payloads) if client not in refused}, refused


def leave_out(
    job: Job, passed: dict[str, UpdateFacts], refused: dict[str, str], decoded: Decoded
) -> tuple[dict[str, UpdateFacts], dict[str, str]]:
    """The same without those that are out of proportion, which are refused."""
    outliers = find_outliers({client: one.norm for client, one in passed.items()}, job.caps)
    for client in outliers:
        decoded.drop(client)
    return {client: one for client, one in passed.items() if client not in outliers}, refused | outliers


def _look_at(job: Job, state: State, client: str, payload: bytes, round: int, decoded: Decoded) -> UpdateFacts:
    message = read_update(
        payload, state, Limits(max_values=_SLACK * state.adapter.numel() + _scalars_in_all(job, state))
    )
    header, entries = message.header, message.entries
    check_same_method(job, header)
    expect(header, "update", state.version, state.digest)
    if header.round != round:
        raise StaleError(f"an update of round {header.round} arrived in round {round}: it is too late to be averaged")
    if header.result_digest != sender_digest(client, header.base_digest, round):
        raise WireError(f"the update does not name {client!r} as its sender: it is another client's, or an old one's")
    if header.num_examples <= 0 and job.weighting == "examples":
        raise WireError("the update says that it rests on no examples: a client needs at least one")
    if header.num_examples > MOST_EXAMPLES:
        raise WireError(
            f"the update says that it rests on {header.num_examples:,} examples: expected {MOST_EXAMPLES:,} at most"
        )
    parts = job.method.parts(state, round)
    own = job.ranks.get(client)
    modules = _check_names(job, entries, state, parts, own)
    norm = _check_modules(job, entries, state, modules, parts, own)
    decoded.keep(client, entries)
    return UpdateFacts(header.num_examples, modules, norm, hashlib.blake2b(payload).digest(), len(payload))


def _check_names(
    job: Job, entries: Entries, state: State, parts: tuple[str, ...], own: Mapping[str, int] | None
) -> frozenset[str]:
    """The modules of the update. Where the client's ranks are known, they must be the modules that it trains."""
    found = {module_of(name) for name in entries}
    if not found & set(state.adapter):
        raise ShapeError("the update names none of this adapter's modules: the client trains other modules")
    if own is not None:
        found = set(own)
    elif not job.method.module_subsets:
        found = set(state.adapter)
    modules = frozenset(found & set(state.adapter))
    expected = {f"{module}/{part}" for module in modules for part in parts}
    if set(entries) != expected:
        name = min(set(entries) ^ expected)
        raise ShapeError(f"the update {'lacks' if name in expected else 'has an unexpected'} tensor {name!r}")
    return modules


def _check_modules(
    job: Job,
    entries: Entries,
    state: State,
    modules: Collection[str],
    parts: tuple[str, ...],
    own: Mapping[str, int] | None,
) -> float:
    """√Σ v² of all values. Raises ShapeError or NumericError for what is not as it should be; reads each entry once."""
    total = 0.0
    for module in sorted(modules, key=lambda module: f"{module}/"):  # the order of names, in which they are decoded
        held = {part: entries[f"{module}/{part}"] for part in sorted(parts)}
        _check_shapes(job, held, state.adapter[module], module, parts, own)
        for part, entry in held.items():
            size = _norm(floats(entry.values))
            if not math.isfinite(size):
                raise NumericError(f"{module}/{part} holds NaN or infinity: the client's training diverged")
            total += size * size
    if math.sqrt(total) > job.caps.max_norm:
        raise NumericError(
            f"its update has norm {math.sqrt(total):.3g}, federation.max_norm is {job.caps.max_norm:g}: where training "
            "diverges, lower training.learning_rate"
        )
    return math.sqrt(total)


def _check_shapes(
    job: Job,
    held: Mapping[str, Entry],
    pair: LoraPair,
    module: str,
    parts: tuple[str, ...],
    own: Mapping[str, int] | None,
) -> None:
    """Raises ShapeError unless a module's parts have one rank: the announced one, or one up to the adapter's."""
    if SCALARS in parts:
        _check_scalars(job, f"{module}/{SCALARS}", held[SCALARS].shape)
        return
    m, n = pair.shape
    rank = pair.rank if own is None else own[module]
    if own is None and job.method.facts.unequal_ranks:
        first = held[parts[0]].shape
        sent = first[-1 if parts[0] == "B" else 0] if len(first) == 2 else rank
        rank = min(max(sent, 1), rank)
    for part in parts:
        shape, wanted = held[part].shape, {"A": (rank, n), "B": (m, rank), CORE: (rank, pair.rank)}[part]
        if shape != wanted:
            raise ShapeError(f"{module}/{part} has shape {shape}, expected {wanted}: rank {rank}, at most {pair.rank}")


def _check_scalars(job: Job, name: str, shape: tuple[int, ...]) -> None:
    """Raises ShapeError unless there is one number for each direction at most."""
    if len(shape) != 1 or shape[0] > _most_scalars(job):
        raise ShapeError(
            f"{name} has shape {shape}, expected one number each of {_most_scalars(job)} directions at most"
        )


def _most_scalars(job: Job) -> int:
    """The directions that a client may go along in a round."""
    return job.method.forward.seeds if job.method.forward else 0


def _scalars_in_all(job: Job, state: State) -> int:
    """Numbers that there can be where every module has its own."""
    return _most_scalars(job) * len(state.adapter)


def _norm(values: Tensor) -> float:
    """√Σ v², NaN or infinite only where a value is."""
    size = float(torch.linalg.vector_norm(values))
    # Between these bounds the squares fit float32, whose sum is forty times as fast and exact enough to compare sizes.
    # Outside, squares may underflow or overflow in float32, but not in float64.
    return size if 1e-15 < size < 1e15 else float(torch.linalg.vector_norm(values, dtype=torch.float64))


def check_same_method(job: Job, header: Header) -> None:
    """Raises WireError for a payload of another method."""
    if header.method != job.method.name:
        raise WireError(f"a payload of method {header.method!r} reached a run of {job.method.name!r}")


def expect(header: Header, kind: str, version: int, digest: str) -> None:
    """Raises WireError for a payload of another kind, StaleError for one that rests on another state than this one."""
    if header.kind != kind:
        raise WireError(f"a payload of kind {header.kind!r} arrived where {kind!r} was expected")
    if (header.base_version, header.base_digest) != (version, digest):
        raise StaleError(
            f"the payload rests on version {header.base_version} ({header.base_digest[:8]}), the receiver holds "
            f"version {version} ({digest[:8]}): send the missed broadcasts or the full state first"
        )


def limits_of(job: Job, state: State) -> Limits:
    """What a receiver is willing to read: what a change or a state of its adapter can have, and a little more.

    The merged increments may be of any rank where the number of clients is not known; the reader's usual limit holds
    them then.
    """
    own = merged = 0
    for module, pair in state.adapter.items():
        own += _top_rank(job, state, module) * sum(pair.shape)
        merged += _merged_rank(job, state, module) * sum(pair.shape)
    return Limits(max_values=_SLACK * own + min(merged, DEFAULT.max_values) + _scalars_in_all(job, state))


def check_broadcast(job: Job, state: State, header: Header, entries: Entries) -> None:
    """Raises WireError, StaleError, ShapeError or NumericError unless these entries may be applied to `state`."""
    check_same_method(job, header)
    whole = header.kind == "state"
    # What says all there is may be taken up by whoever missed the rounds before.
    if not whole and not (header.base_version > state.version and job.method.says_all(entries, state.adapter)):
        expect(header, "change", state.version, state.digest)
    for name, entry in entries.items():
        module, _, part = name.rpartition("/")
        if module not in state.adapter or part not in _parts_of(job, whole=whole):
            raise ShapeError(f"the payload holds {name!r}, which this adapter does not have")
        _check_outline(job, state, name, entry.shape, whole=whole)
        if not _finite(entry.values):
            raise NumericError(f"{name} holds NaN or infinity: such a {header.kind} is never applied")
        if part.startswith(CURVATURE) and not (floats(entry.values) > 0).all():
            raise NumericError(f"{name} holds a curvature that is not above 0: such a state is never applied")
    wanted = set(state.adapter.tensors()) if whole else set()
    if any(name.rpartition("/")[2].startswith(CURVATURE) for name in entries):
        wanted |= set(state.adapter.tensors(CURVATURE))
    if missing := wanted - set(entries):
        raise ShapeError(f"the payload is a whole state, but lacks tensor {min(missing)!r}")


def _parts_of(job: Job, *, whole: bool) -> tuple[str, ...]:
    """The parts of a module of which a broadcast may have entries, or a full state."""
    always = (*PARTS, *(FROZEN + part for part in PARTS))
    if not whole:
        return (*always, CORE, SCALARS)
    scaled = job.method.forward is not None and job.method.forward.curvature > 0
    return (*always, *(CURVATURE + part for part in PARTS if scaled))


def _check_outline(job: Job, state: State, name: str, shape: tuple[int, ...], *, whole: bool) -> None:
    module, _, part = name.rpartition("/")
    if part == SCALARS:
        _check_scalars(job, name, shape)
        return
    pair = state.adapter[module]
    m, n = pair.shape
    inner = -1 if len(shape) != 2 else shape[0] if part.endswith("A") else shape[1]
    wanted = {"A": (inner, n), "B": (m, inner), CORE: (inner, inner)}[part.removeprefix(FROZEN).removeprefix(CURVATURE)]
    most = _merged_rank(job, state, module) if part.startswith(FROZEN) else _top_rank(job, state, module)
    least = 0 if part.startswith(FROZEN) else most if _holds_whole(job) else pair.rank if whole else 0
    if shape != wanted or not least <= inner <= most:
        raise ShapeError(f"{name} has shape {shape}, expected {wanted} of a rank from {least} to {most}")


def _top_rank(job: Job, state: State, module: str) -> int:
    """The largest rank that the server's adapter may have in a module, as far as a receiver knows."""
    pair, held = state.adapter[module], whole_rank(state, module)
    if _holds_whole(job):
        return held
    if job.ranks:
        return max(pair.rank, job.tops.get(module, 0))
    return max(held, *pair.shape) if job.method.facts.unequal_ranks else pair.rank


def _holds_whole(job: Job) -> bool:
    """Whether every participant holds the whole of the server's adapter, so that every broadcast has its rank."""
    return job.method.adopt is adopt_whole


def _merged_rank(job: Job, state: State, module: str) -> int:
    """The largest rank that merged increments may have: a round adds at most what all clients and the server hold."""
    if not job.method.merges and job.method.core is no_core:
        return 0
    if not job.ranks:
        return DEFAULT.max_values
    once = (len(job.ranks) + 2) * _top_rank(job, state, module)
    return max(once, min(*state.adapter[module].shape, once * max(job.num_rounds, 1)))


def _finite(values: Values) -> bool:
    """Whether all values are finite. Codes are finite, so that of integers only the scales need be looked at."""
    return all_finite(values.scales * 2 ** (values.bits - 1) if isinstance(values, Quantized) else values)


def check_form(before: State, after: State) -> None:
    """Raises ShapeError where a broadcast has changed the modules, shapes or ranks of the participant's adapter."""
    if (before.adapter.shapes(), before.adapter.ranks()) != (after.adapter.shapes(), after.adapter.ranks()):
        raise ShapeError("the payload leads to an adapter of other modules, shapes or ranks than the receiver's")


def check_finite(state: State, before: State | None = None) -> None:
    """Raises NumericError where a value of the state, or of what is remembered beside it, is NaN or infinite.

    before: a state that was checked; a tensor that it shares is not looked at again.
    """
    known = set() if before is None else {id(tensor) for tensor in before.adapter.tensors().values()}
    parts = zip(SHARED, state.shared, strict=True)
    tensors = {f"{part} {name}": tensor for part, held in parts for name, tensor in held.tensors().items()}
    for name, tensor in {**tensors, **state.memory}.items():
        if tensor.is_floating_point() and id(tensor) not in known and not all_finite(tensor):
            raise NumericError(f"the new state's {name} holds NaN or infinity")
