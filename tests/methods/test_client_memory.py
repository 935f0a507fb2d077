"""What a client holds while it chooses what to send: the adapter before and after training, and little beside them."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import importance, split
from fedloom.lora.pair import PARTS, LoraPair, LoraState
from fedloom.methods.fedsrd import Upload
from fedloom.methods.method import Context, State
from fedloom.methods.shared.averaging import fill_within_budget
from fedloom.methods.table import build
from fedloom.rounds.job import Job
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import client_turn, start


class Alive(TorchFunctionMode):
    """Bytes of the tensors that are made meanwhile, each memory once for as long as somebody holds it.

    there: adapters that were there before.
    """

    def __init__(self, *there: LoraState) -> None:
        super().__init__()
        tensors = (tensor for adapter in there for tensor in adapter.tensors().values())
        self.held = {tensor.untyped_storage()._cdata: 0 for tensor in tensors}
        self.peak = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                memory = tensor.untyped_storage()
                if memory._cdata not in self.held:
                    self.held[memory._cdata] = memory.nbytes()
                    weakref.finalize(memory, self.held.pop, memory._cdata)
                    self.peak = max(self.peak, sum(self.held.values()))
        return made


def adapters(modules: int, side: int, rank: int) -> tuple[LoraState, LoraState]:
    """An adapter before and after training, with a heavy-tailed change and no zeros in B."""
    draw = torch.Generator().manual_seed(0)

    def pair(size: float, power: int) -> LoraPair:
        shapes = (rank, side), (side, rank)
        return LoraPair(*(size * torch.randn(*shape, generator=draw) ** power for shape in shapes))

    names = [f"layers.{number}.proj" for number in range(modules)]
    before = LoraState({name: pair(0.1, 1) for name in names})
    moved = {name: pair(0.01, 3) for name in names}
    return before, LoraState({n: LoraPair(p.A + moved[n].A, p.B + moved[n].B) for n, p in before.items()})


def job_of(method: str, share: float | None, **settings: Any) -> Job:
    made, kept = build(method, settings), None if share is None else Budget(share)
    return Job(made, 0, quantize(made.form(kept)), budget=kept)


@pytest.mark.parametrize(
    ("method", "share"),
    [("fedsrd", None), ("fedsrd", 0.01), ("loom", 0.01), ("flasc", 0.01), ("fed-dare", 0.01), ("fedit", None)],
)
def test_a_turn_holds_two_adapters_and_little_else(method: str, share: float | None) -> None:
    """Before and after are there already. A payload of FedIT is a quarter of an adapter, and is made of codes."""
    pytest.importorskip("numba")  # its loops need less than numpy's
    before, after = adapters(24, 1024, 16)
    job, adapter = job_of(method, share), 4 * before.numel()
    state, trained = start(job, before), Trained(after, 1, 0.0)
    turn = client_turn(job, "ada", state, (), lambda state, round, seed: trained, 1)  # loads what is loaded once
    gc.collect()
    tracemalloc.start()
    with Alive(before, after) as alive:
        client_turn(job, "ada", turn.state, (), lambda state, round, seed: trained, 2)
    beside = tracemalloc.get_traced_memory()[1]  # numpy's memory is among it
    tracemalloc.stop()
    assert (alive.peak + beside) / adapter < (1.0 if method == "fedit" else 0.7)


def sized(job: Job, round: int) -> Context:
    """A context in which a payload takes two bytes for every value."""
    size = lambda entries: 60 + 2 * sum(entry.positions.numel() for entry in entries.values())  # noqa: E731
    return replace(job.context(round, "ada"), size=size)


def all_at_once(up: Upload, state: State, after: LoraState, context: Context) -> tuple[dict[str, Any], dict[str, Any]]:
    """FedSRD's choice with all changes, scores and rests in memory, and one sorted list of all scores."""
    changes = {}
    for module, before in state.adapter.items():
        others = {"A": after[module].B, "B": before.A}
        for part in PARTS:
            delta = after[module].part(part) - before.part(part)
            if up.decay and f"{module}/{part}" in state.memory:
                delta = delta + up.decay * state.memory[f"{module}/{part}"]
            changes[f"{module}/{part}"] = delta, importance(delta, others[part], part)
    ordered = np.sort(np.concatenate([scores.flatten().numpy() for _, scores in changes.values()]))[::-1]

    def cuts(counts: dict[str, int]) -> dict[str, Any]:
        seeds = {name: derived_seed(context.seed, "upload", context.round, name) for name in changes}
        how = {"rescaling": up.rescaling, "quantize": context.quantize}
        return {name: split(*held, counts[name], seed=seeds[name], **how) for name, held in changes.items()}

    def entries_at(density: float) -> dict[str, Any]:
        keep = min(round(density * ordered.size), ordered.size)
        least = ordered[keep - 1] if keep else np.inf
        tried.append(cuts({name: int(((s >= least) & (s > 0)).sum()) for name, (_, s) in changes.items()}))
        return {name: cut.sent for name, cut in tried[-1].items()}

    tried: list[dict[str, Any]] = []
    if context.budget is None:
        made, kept = cuts({name: up.sparsity.keep(scores) for name, (_, scores) in changes.items()}), {}
    else:
        done = fill_within_budget(state, len(changes), entries_at, context)
        made = next(cut for cut in tried if all(cut[n].sent is done.entries[n] for n in cut))
        kept = dict(done.memory)
    rest = {name: cut.rest for name, cut in made.items()} if up.decay else {}
    return {**kept, **rest}, {name: cut.sent for name, cut in made.items()}


@pytest.mark.parametrize("share", [None, 0.02])
@pytest.mark.parametrize("settings", [{}, {"client_residual": 0.7}, {"rescale": "none"}, {"rescale_step": 1.5}])
def test_fedsrd_sends_what_it_would_with_everything_in_memory(share: float | None, settings: dict[str, Any]) -> None:
    before, after = adapters(6, 160, 8)
    job = job_of("fedsrd", share, **settings)
    state = start(job, before)
    for round in (1, 2):
        memory, entries = job.method.compress(state, after, sized(job, round))
        up = job.method.compress.args[0]  # type: ignore[attr-defined]
        wanted, sent = all_at_once(up, state, after, sized(job, round))
        assert memory.keys() == wanted.keys()
        assert all(torch.equal(memory[name], wanted[name]) for name in wanted)
        for name, entry in entries.items():
            assert torch.equal(entry.positions, sent[name].positions)
            assert torch.equal(entry.values.codes, sent[name].values.codes)
            assert torch.equal(entry.values.scales, sent[name].values.scales)
        state = replace(state, memory=memory)


@pytest.mark.parametrize("share", [None, 0.02])
def test_fedsrd_sends_the_same_on_any_number_of_threads(share: float | None) -> None:
    before, after = adapters(4, 4400, 8)  # sums of so many values are split among threads where torch may
    job, threads = job_of("fedsrd", share, client_residual=0.7), torch.get_num_threads()
    trained, found = Trained(after, 1, 0.0), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            turn = client_turn(job, "ada", start(job, before), (), lambda state, round, seed: trained, 1)
            found.append((turn.payload, {name: tensor.clone() for name, tensor in turn.state.memory.items()}))
    finally:
        torch.set_num_threads(threads)
    assert found[0][0] == found[1][0] and found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())
