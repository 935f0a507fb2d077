"""A budget that has no room for a single element is refused before the first round."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedloom.compress.entries import Sparse, count
from fedloom.compress.levels import coded
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, narrow, subset
from fedloom.methods.method import CORE, as_given
from fedloom.rounds.job import Job, group_alike
from fedloom.rounds.joint import Outline, join_entries
from fedloom.wire import Header, Message, encode

_SURE = 12  # bytes that a payload of one element may take more in another round: its numbers and its position grow


def check_room(job: Job, initial: LoraState, clients: Mapping[str, Mapping[str, int]]) -> None:
    """Raises ConfigError where `job.budget` has a payload, up or down, with no room for one element.

    initial: the server's first adapter; clients: module → rank, by client. The budget that a method has of its own
    is not checked: whoever set nothing has nothing to correct.
    """
    smallest = job.method.smallest
    if smallest is None or job.budget is None:
        return
    kinds = {tuple(sorted(held.items())): held for _, held, _ in group_alike(clients)}
    adapters = {kind: subset(narrow(initial, held), held.keys()) for kind, held in kinds.items()}
    for adapter in (initial, *adapters.values()):
        allowed, least = smallest(adapter, job.context(1)), least_bytes(job, adapter, initial)
        if allowed < least:
            needed = math.ceil(job.budget.bytes(adapter.numel()) * least / max(allowed, 1))
            raise ConfigError(
                f"wire.budget of {job.budget} leaves {allowed} bytes for the smallest payload of this run, and one "
                f"of a single element takes {least}: set wire.budget to {needed} or more, or lower method.taper"
            )


def least_bytes(job: Job, adapter: LoraState, whole: LoraState) -> int:
    """Bytes of a payload with one element of this adapter, which is `whole` or a part of it."""
    digest = 32 * "f"
    header = Header("update", job.method.name, job.num_rounds, job.num_rounds, digest, digest, 10**6)
    entries: dict[str, Sparse] = {}
    for name, shape in _sent_shapes(job, adapter, whole).items():
        place = torch.tensor([] if entries else [count(shape) - 1], dtype=torch.int64)
        # Cores are coded by `compress.levels` alone; other methods' values as the run says.
        ones = torch.ones(place.numel())
        rests = name.endswith(f"/{CORE}")
        entries[name] = Sparse(shape, place, coded(ones.to(torch.int8), 1.0, 4) if rests else job.quantize(ones, 0))
    core = job.method.begin is not as_given
    outline = Outline.of(adapter, whole.ranks(), core=core) if job.method.joins else None
    return len(encode(Message(header, join_entries(entries, outline)))) + _SURE


def _sent_shapes(job: Job, adapter: LoraState, whole: LoraState) -> dict[str, tuple[int, ...]]:
    """The tensors of a payload: both factors of every module, or the matrix between two that rest from the start."""
    if job.method.begin is as_given:
        return {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    return {f"{module}/{CORE}": (pair.rank, whole[module].rank) for module, pair in adapter.items()}
