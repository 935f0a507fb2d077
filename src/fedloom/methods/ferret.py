"""Ferret: coordinates of the change along directions that everybody draws (Shu et al., ICML 2025, arXiv 2409.06277).

Clients train by gradients. A change of a factor is projected on random directions of a shared seed, and its coordinates
travel. Here the directions of a tensor are orthonormal and the same for all clients of a round, so that coordinates add
up; the paper moves all weights, along normal directions of each client's own, and makes the step unbiased, which is
√(1 / share) times as long as the change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from fedloom.compress.entries import Entry, Seeded, dense_entry, to_dense
from fedloom.compress.masks import nearest_density, seeded_mask
from fedloom.compress.rotate import rotate, rotate_back
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError, ShapeError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Aggregate, Context, Entries, Facts, Method, State, Update
from fedloom.methods.shared.averaging import fill_within_budget, weighted_mean, zero_change
from fedloom.methods.shared.whole import add_to_whole, adopt_whole, read_whole_change


def ferret(*, share: float = 0.1, server_learning_rate: float = 2.0) -> Method:
    """share: coordinates of a tensor over its elements, more than 0 and at most 1; wire.budget takes its place.

    server_learning_rate: the length of the server's step, in lengths of the clients' mean change: 1 / √share would be
    an unbiased step, and √share the mean's projection.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"method.share is {share}: expected more than 0, and at most 1")
    if server_learning_rate <= 0.0:
        raise ConfigError(f"method.server_learning_rate is {server_learning_rate}: expected more than 0")
    return Method(
        name="ferret",
        facts=Facts(
            paper="Ferret (arXiv 2409.06277)",
            unequal_ranks=True,
            sends="coordinates of ΔA and ΔB along drawn directions",
            receives="those of the mean change",
            broadcasts="elements",
        ),
        updates="change",
        compress=partial(send_coordinates, share),
        aggregate=partial(mean_coordinates, share, server_learning_rate),
        receive=take_step,
        adopt=adopt_whole,
        plain=in_elements,
        takes_budget=True,
        values="int4",
    )


def seed_of(state: State, name: str) -> int:
    """The seed of a tensor's directions: the same for all who begin with this state, and both ways."""
    return derived_seed(0, "directions", state.digest, name)


def project(tensor: Tensor, share: float, seed: int, context: Context) -> Seeded:
    """A tensor's coordinates along a share of a seed's directions; of a larger share they are the same and more."""
    share = nearest_density(share)
    coordinates = rotate(tensor.flatten(), seed)[seeded_mask(tensor.numel(), share, seed)]
    return Seeded(tuple(tensor.shape), seed, share, context.quantize(coordinates, seed))


def expand(entry: Entry) -> Tensor:
    """The tensor whose coordinates these are; it is zero along all other directions."""
    if not isinstance(entry, Seeded):
        raise ShapeError("method 'ferret' sends coordinates along drawn directions, and this entry names none")
    return rotate_back(to_dense(entry).flatten(), entry.seed).view(entry.shape)


def in_elements(entries: Entries) -> Entries:
    """What coordinates stand for, as elements."""
    return {name: dense_entry(expand(entry)) for name, entry in entries.items()}


def send_coordinates(
    share: float, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """Coordinates of ΔA and ΔB of every module, a share of all or as many as the budget has room for."""
    before, now = state.adapter.tensors(), after.tensors()

    def entries_at(share: float) -> dict[str, Seeded]:
        return {name: project(now[name] - before[name], share, seed_of(state, name), context) for name in now}

    if context.budget is None:
        return state.memory, entries_at(share)
    done = fill_within_budget(state, len(now), entries_at, context, positions=False)
    return {**state.memory, **done.memory}, done.entries


def mean_coordinates(share: float, rate: float, state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """Those of Σ p_k Δ_k, times what makes the step as long as the mean; under a budget of the largest share sent."""
    shares: dict[str, float] = {}

    def read(entries: Entries) -> Mapping[str, Tensor]:
        changes = read_whole_change(in_elements(entries), state.adapter)
        for name, entry in entries.items():
            sent = entry.density if context.budget and isinstance(entry, Seeded) else share
            shares[name] = max(shares.get(name, 0.0), sent)
        return changes

    means = weighted_mean(updates, start=zero_change(state.adapter), read=read)
    entries = {
        name: project(means[name] * (rate * own**-0.5), own, seed_of(state, name), context)
        for name, own in shares.items()
    }
    return Aggregate(entries, stats={"density": sum(shares.values()) / max(len(shares), 1)})


def take_step(state: State, entries: Entries, context: Context) -> State:
    """θ + the change that the coordinates stand for."""
    return add_to_whole(state, in_elements(entries), context)
