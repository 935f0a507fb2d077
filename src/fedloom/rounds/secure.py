"""A round whose server learns the sum of the sites' updates and nothing else of them.

    site    update → T_k − T₀ → n_k / N of it on a grid of integers, and n_k beside it → one vector, under masks
    server  Σ of the vectors → T₀ + Σ n_k (T_k − T₀) / Σ n_k → the update of one client that has all of the round

T_k are the tensors that a client's entries stand for where updates add (`Method.adds`), T₀ those of a client whose
training changed nothing. What a site counts for, n_k, is its number of examples, N at most; 1 where all count alike.
It travels within the vector, so that nobody is told it. What the server checks of an update otherwise, each site checks
of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError, SecureSumError
from fedloom.lora.pair import LoraPair
from fedloom.methods.method import CORE, Entries, Method, State
from fedloom.rounds.checks import MOST_EXAMPLES, check_update
from fedloom.rounds.cohort import sent_unchanged
from fedloom.rounds.decoded import read_update
from fedloom.rounds.job import Job, sender_digest
from fedloom.rounds.regions import shorter_sum
from fedloom.rounds.sums import SUM, Rounding, Secure
from fedloom.secagg import Grid, Integers, pack_vector
from fedloom.wire import Header, Message, encode

Noise = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""A site's vector in steps of the grid → the same with the site's share of noise added. Its weight is not among it."""


def cannot_hide(method: Method, others: str = "") -> ConfigError:
    """The error about a method whose updates no server can combine from their sum alone. others: some that can."""
    return ConfigError(
        f"privacy.secure_aggregation: the updates of method {method.name!r} do not add, so its server needs each of "
        f"them. Switch it off{f', or use one of {others}' if others else ''}"
    )


def unchanged(job: Job, state: State, round: int) -> dict[str, Tensor]:
    """T₀ by name, in order: the same bits at every site and at the server."""
    method = job.method
    if method.adds is None:
        raise cannot_hide(method)
    if method.updates == "change":
        parts = method.parts(state, round)
        shapes = {f"{module}/{part}": _shape(pair, part) for module, pair in state.adapter.items() for part in parts}
        return {name: torch.zeros(shapes[name]) for name in sorted(shapes)}
    entries: Entries = sent_unchanged(method, state, job.context(round))
    read = method.adds(entries, state.adapter)
    return {name: read[name] for name in sorted(read)}


def _shape(pair: LoraPair, part: str) -> tuple[int, ...]:
    return (pair.rank, pair.rank) if part == CORE else tuple(pair.part(part).shape)


def pick(job: Job, state: State, tensors: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
    """What of these tensors may differ from T₀, as both sides know (`Method.support`), one row of values each."""
    places = {} if job.method.support is None else job.method.support(state, job.context(round))
    return {
        name: tensor.flatten().index_select(0, places[name]) if name in places else tensor.flatten()
        for name, tensor in tensors.items()
    }


def place(job: Job, state: State, picked: Mapping[str, Tensor], round: int) -> dict[str, Tensor]:
    """T₀ with other values where `pick` has taken some."""
    places = {} if job.method.support is None else job.method.support(state, job.context(round))
    found = {}
    for name, start in unchanged(job, state, round).items():
        values = picked[name]
        whole = start.flatten().index_copy(0, places[name], values) if name in places else values
        found[name] = whole.view(start.shape)
    return found


def count_values(job: Job, state: State, round: int) -> int:
    """Length of a site's vector."""
    picked = pick(job, state, unchanged(job, state, round), round)
    return sum(tensor.numel() for tensor in picked.values()) + _secure(job).digits(job.weighting)


def make_vector(
    job: Job, state: State, client: str, payload: bytes, round: int, noise: Noise | None = None
) -> tuple[bytes, Rounding]:
    """(a site's vector, packed; what the grid did to its values) from its update.

    state: the site's, in step with the server, that its training began with. The same arguments give the same bytes,
    but for `noise`. Raises the FedloomError that says why the update may not be averaged.
    """
    secure, facts = _secure(job), check_update(job, state, client, payload, round)
    before = pick(job, state, unchanged(job, state, round), round)
    assert job.method.adds is not None
    sent = pick(job, state, job.method.adds(read_update(payload, state).entries, state.adapter), round)
    weight = secure.weight(facts.examples, job.weighting)
    factor, grid = weight / secure.largest(job.weighting), secure.grid_of(round)
    draw = np.random.default_rng(derived_seed(job.seed, "grid", client, round))
    changes = {n: factor * (sent[n].double() - start.double()).flatten().numpy() for n, start in before.items()}
    if secure.noise is not None:
        size = math.sqrt(sum(float(change @ change) for change in changes.values()))
        changes = {name: change * min(1.0, secure.noise.clip_norm / (size or 1.0)) for name, change in changes.items()}
    pieces = [grid.to_integers(change, draw) for change in changes.values()]
    rounding = _compare(grid, list(changes.values()), pieces, noisy=secure.noise is not None)
    values = np.concatenate(pieces)
    if noise is not None:
        values = noise(grid.to_steps(values)).astype(values.dtype)
    digits = _digits_of(weight, grid.most + 1, secure.digits(job.weighting)).astype(values.dtype)
    return pack_vector(np.concatenate([values, digits]), grid.bits), rounding


def _compare(grid: Grid, changes: list[NDArray[np.float64]], rounded: list[Integers], *, noisy: bool) -> Rounding:
    """What became of the tensors of a change on the grid."""
    cut, largest, size, error = 0, 0.0, 0.0, 0.0
    for change, steps in zip(changes, rounded, strict=True):
        magnitudes = np.abs(change)
        cut += int((magnitudes > grid.reach).sum())
        largest = max(largest, float(magnitudes.max(initial=0.0)))
        if noisy:
            continue
        there = np.clip(change, -grid.reach, grid.reach)
        size += float(there @ there)
        apart = grid.to_values(steps) - there
        error += float(apart @ apart)
    count = sum(map(len, changes))
    return Rounding(count, cut, grid.reach, largest, math.sqrt(error / size) if size else 0.0)


def mean_update(job: Job, state: State, total: Integers, sites: int, round: int) -> bytes:
    """The sum of so many sites' vectors as the update of one client, `SUM`, which has all of the round.

    Raises SecureSumError for a sum that no vectors of honest sites have.
    """
    secure, before = _secure(job), pick(job, state, unchanged(job, state, round), round)
    grid, most = secure.grid_of(round), secure.largest(job.weighting)
    steps = grid.to_steps(total)
    count = len(steps) - secure.digits(job.weighting)
    weight = sum(int(digit) * (grid.most + 1) ** place for place, digit in enumerate(steps[count:]))
    if not sites <= weight <= sites * most:
        raise SecureSumError(
            f"the sum says that {sites} sites weigh {weight:,} together: expected {sites} to {sites * most:,}. One of "
            "them has sent a wrong vector"
        )
    at, means = 0, {}
    for name, start in before.items():
        own = steps[at : at + start.numel()] * (grid.step * most / weight)
        means[name] = (start.double() + torch.from_numpy(own)).float()
        at += start.numel()
    sender = sender_digest(SUM, state.digest, round)
    header = Header("update", job.method.name, round, state.version, state.digest, sender, min(weight, MOST_EXAMPLES))
    whole = place(job, state, means, round)
    return encode(Message(header, {name: shorter_sum(tensor) for name, tensor in whole.items()}))


def _digits_of(weight: int, base: int, count: int) -> NDArray[np.int64]:
    """A weight's digits to a base, the lowest first. Sums of digits are those of the sum, as none is carried."""
    return np.array([weight // base**place % base for place in range(count)], np.int64)


def _secure(job: Job) -> Secure:
    assert job.secure is not None, "the run has no secure aggregation"
    return job.secure
