"""FLASC: sparse both ways, with an Adam step on the server (Kuo et al., 2024, arXiv 2406.05233).

The server keeps the whole adapter θ to itself and broadcasts its largest elements. Clients train all elements from
there, and send the largest of their change from what they received. A client of lower rank trains the first
components of what it received, and has changed nothing beyond them (`shared.whole`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor

from fedloom.compress.entries import Entry
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import choose, kept_count
from fedloom.errors import ConfigError
from fedloom.lora.pair import PARTS, LoraState
from fedloom.methods.method import Aggregate, Context, Entries, Facts, Method, State, Update
from fedloom.methods.shared.averaging import fill_within_budget, weighted_mean, zero_change
from fedloom.methods.shared.server_optimiser import ServerOptimiser
from fedloom.methods.shared.whole import adopt_whole, read_whole_change, take_whole


def flasc(
    *,
    upload_density: float = 0.25,
    download_density: float = 0.25,
    server_learning_rate: float = 5e-3,
    server_momentum: float = 0.9,
    server_beta2: float = 0.999,
    server_tau: float = 1e-3,
) -> Method:
    """Densities: share of the elements sent each way, in (0, 1]; wire.budget takes the place of upload_density.

    server_*: FedAdam, see `ServerOptimiser`.
    """
    for name, density in (("upload_density", upload_density), ("download_density", download_density)):
        if not 0.0 < density <= 1.0:
            raise ConfigError(f"method.{name} is {density}: expected 0 < density ≤ 1")
    adam = ServerOptimiser("fedadam", server_learning_rate, server_momentum, server_beta2, server_tau)
    return Method(
        name="flasc",
        facts=Facts(
            paper="FLASC (arXiv 2406.05233)",
            unequal_ranks=True,
            sends="largest elements of ΔA and ΔB",
            receives="largest elements of A and B",
            keeps="server: all of A and B, moments",
            broadcasts="step",
        ),
        updates="change",
        compress=partial(send_largest, upload_density),
        aggregate=partial(adam_step, adam, download_density),
        receive=take_whole,
        replaces=PARTS,
        adopt=adopt_whole,
        adds=read_whole_change,
        takes_budget=True,
    )


def largest_entry(tensor: Tensor, density: float, seed: int, context: Context) -> Entry:
    """The elements of largest magnitude."""
    keep = kept_count(tensor.numel(), density)
    return choose(tensor, tensor.abs(), keep, quantize=context.quantize, seed=seed).sent


def send_largest(
    density: float, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """The largest elements of the change from the masked download."""
    before, now = state.adapter.tensors(), after.tensors()

    def entries_at(density: float) -> dict[str, Entry]:
        seeds = {name: derived_seed(context.seed, "upload", context.round, name) for name in now}
        return {name: largest_entry(now[name] - before[name], density, seeds[name], context) for name in now}

    if context.budget is None:
        return state.memory, entries_at(density)
    done = fill_within_budget(state, len(now), entries_at, context)
    return {**state.memory, **done.memory}, done.entries


def adam_step(
    adam: ServerOptimiser, density: float, state: State, updates: Iterable[Update], context: Context
) -> Aggregate:
    """θ moves by FedAdam on the mean change; its largest elements are broadcast."""
    memory = dict(state.memory)
    start = {name: memory.get(f"theta/{name}", tensor) for name, tensor in state.adapter.tensors().items()}
    means = weighted_mean(updates, start=zero_change(state.adapter))
    entries: dict[str, Entry] = {}
    for name, theta in start.items():
        memory[f"theta/{name}"] = theta + adam.step(name, means[name], memory)
        seed = derived_seed(context.seed, "download", context.round, name)
        entries[name] = largest_entry(memory[f"theta/{name}"], density, seed, context)
    return Aggregate(entries, memory)
