"""SparseLoCo: the largest elements of every chunk in two bits, and what was not sent waits (Sarfi et al., 2025,
arXiv 2508.15706).

A client adds its change to a fading memory of what it could not send, e ← β e + Δ, sends of every chunk of e the k
elements of largest magnitude, each as a sign and one of two sizes, and keeps the rest. The memory does what momentum of
the server would do, so the server's step is plain: θ ← θ + α Σ p_k Δ_k. Here θ are the factors A and B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedloom.compress.entries import Quantized, Sparse, floats
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.fed_dare import shorter_entry
from fedloom.methods.method import Aggregate, Context, Entries, Facts, Method, State, Update
from fedloom.methods.shared.averaging import fill_within_budget, weighted_mean, zero_change
from fedloom.methods.shared.whole import add_to_whole, adopt_whole, read_whole_change

MOST = 65536
"""Elements of a chunk that may be sent: so many values may share a scale (docs/wire-format.md)."""
SMALL, LARGE = 2, 3
"""Codes of the two sizes: of the largest hundredth of normal numbers, those above the mean are 1.4 times the others."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What a client sends of a tensor: `topk` elements of every `chunk_size`, in two bits or as wire.values says."""

    chunk_size: int
    topk: int
    decay: float
    two_bits: bool

    def __post_init__(self) -> None:
        if not self.chunk_size >= 1:
            raise ConfigError(f"method.chunk_size is {self.chunk_size}: expected 1 or more")
        most = min(self.chunk_size, MOST)
        if not 1 <= self.topk <= most:
            raise ConfigError(f"method.topk is {self.topk}: expected 1 to {most}, where a chunk has {self.chunk_size}")
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigError(f"method.error_decay is {self.decay}: expected 0 to 1")

    def entry(self, tensor: Tensor, density: float, seed: int, context: Context) -> Sparse:
        """The elements of largest magnitude of every chunk, a share `density` of each but one at least."""
        flat = tensor.flatten()
        chunk = min(self.chunk_size, flat.numel())
        keep = min(max(round(density * chunk), 1), chunk, MOST)
        positions = chunk_top(flat, chunk, keep)
        values = flat[positions]
        coded = in_two_bits(values, keep) if self.two_bits else context.quantize(values, seed)
        return Sparse(tuple(tensor.shape), positions, coded)


def sparseloco(
    *,
    chunk_size: int = 4096,
    topk: int = 64,
    error_decay: float = 0.95,
    server_learning_rate: float = 1.0,
    two_bits: bool = True,
) -> Method:
    """The largest elements of every chunk of ΔA and ΔB go up in two bits; their mean comes down.

    chunk_size, topk: of so many elements of a tensor, in the order of memory, so many are sent; of a shorter chunk the
    same share. wire.budget takes the place of topk. error_decay: β, what is left after a round of what was not sent.
    server_learning_rate: α. two_bits: whether values go up as a sign and one of two sizes; else as wire.values says, as
    those of the mean, which comes down, do.
    """
    if server_learning_rate <= 0.0:
        raise ConfigError(f"method.server_learning_rate is {server_learning_rate}: expected more than 0")
    return Method(
        name="sparseloco",
        facts=Facts(
            paper="SparseLoCo (arXiv 2508.15706)",
            unequal_ranks=True,
            sends="largest elements of chunks of ΔA and ΔB, two bits each",
            receives="the mean change, sparse where that is shorter",
            keeps="client: what it did not send, fading",
            broadcasts="elements",
        ),
        updates="change",
        compress=partial(send_chunks, Upload(chunk_size, topk, error_decay, two_bits)),
        aggregate=partial(outer_step, server_learning_rate),
        receive=add_to_whole,
        adopt=adopt_whole,
        adds=read_whole_change,
        takes_budget=True,
        values="int8",
    )


def send_chunks(
    upload: Upload, state: State, after: LoraState, context: Context
) -> tuple[Mapping[str, Tensor], Entries]:
    """The largest of change and memory; what is left of both is the new memory."""
    before, now = state.adapter.tensors(), after.tensors()

    def wanted(name: str) -> Tensor:
        change, waiting = now[name] - before[name], state.memory.get(name)
        return change if waiting is None else change.add_(waiting, alpha=upload.decay)

    def entries_at(density: float) -> dict[str, Sparse]:
        seeds = {name: derived_seed(context.seed, "upload", context.round, name) for name in now}
        return {name: upload.entry(wanted(name), density, seeds[name], context) for name in now}

    if context.budget is None:
        entries, found = entries_at(upload.topk / upload.chunk_size), dict[str, Tensor]()
    else:
        done = fill_within_budget(state, len(now), entries_at, context)
        entries, found = dict(done.entries), dict(done.memory)
    if upload.decay:
        found |= {name: take_away(wanted(name), entry) for name, entry in entries.items()}
    return {**state.memory, **found}, entries


def outer_step(rate: float, state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """α Σ p_k Δ_k of what arrived; a client of lower rank has changed nothing beyond its rank."""
    means = weighted_mean(updates, start=zero_change(state.adapter))
    return Aggregate({name: shorter_entry(name, rate * tensor, context) for name, tensor in means.items()})


def take_away(tensor: Tensor, entry: Sparse) -> Tensor:
    """What an entry leaves of a tensor, coding's error included."""
    rest = tensor.flatten().clone()
    rest[entry.positions] -= floats(entry.values)
    return rest.view_as(tensor)


def chunk_top(flat: Tensor, chunk: int, keep: int) -> Tensor:
    """Increasing positions of the `keep` largest magnitudes of every chunk; a shorter last one has the same share.

    Of a tensor of zeros there are none; of a chunk with fewer that are not zero, some zeros are among them.
    """
    if not bool(flat.any()):
        return torch.zeros(0, dtype=torch.int64)
    whole = flat.numel() // chunk * chunk
    found = flat[:whole].abs().view(-1, chunk).topk(keep, dim=1).indices
    found += torch.arange(0, whole, chunk)[:, None]
    parts = [found.sort(dim=1).values.flatten()]
    if left := flat.numel() - whole:
        last = flat[whole:].abs().topk(max(left * keep // chunk, 1)).indices
        parts.append(whole + last.sort().values)
    return torch.cat(parts)


def in_two_bits(values: Tensor, block: int) -> Quantized:
    """A sign and one of two sizes for each value, above or below the mean magnitude of its block; one scale a block.

    The scale is that of the least squared error, rounded to bfloat16.
    """
    rows = torch.nn.functional.pad(values, (0, -values.numel() % block)).view(-1, block)
    sizes = rows.abs()
    present = (torch.arange(rows.numel()) < values.numel()).view(-1, block)
    means = (sizes.sum(dim=1) / present.sum(dim=1).clamp_min(1))[:, None]
    codes = torch.where(sizes > means, LARGE, SMALL) * rows.sign().to(torch.int8)
    scales = (rows * codes).sum(dim=1) / codes.to(torch.float32).square().sum(dim=1).clamp_min(1.0)
    flat = codes.to(torch.int8).flatten()[: values.numel()].contiguous()
    return Quantized(flat, scales.to(torch.bfloat16).to(torch.float32), block, 4)
