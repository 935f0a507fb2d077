"""Adapters of true shapes without a model: a global pair, and what clients changed of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.compress.entries import Sparse, floats, to_dense
from fedloom.compress.seeds import derived_seed
from fedloom.lora.pair import LoraPair

DENSITY = 0.05


@dataclass(frozen=True, eq=False, slots=True)
class Client:
    """One client's pair after training, its weight, and the sparse ΔB and ΔA that it would send."""

    pair: LoraPair
    weight: float
    delta_b: Sparse
    delta_a: Sparse


@dataclass(frozen=True, eq=False, slots=True)
class Module:
    """One module's global pair and its clients."""

    name: str
    pair: LoraPair
    clients: tuple[Client, ...]

    def pairs(self) -> list[LoraPair]:
        """The clients' pairs."""
        return [client.pair for client in self.clients]

    def weights(self) -> list[float]:
        """The clients' weights, which sum to 1."""
        return [client.weight for client in self.clients]


def module(name: str, shape: tuple[int, int], ranks: Sequence[int], seed: int, device: str = "cpu") -> Module:
    """A module whose clients have these ranks; reproducible from the seed and the name, whatever the device."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "bench", name))
    m, n = shape
    top = max(ranks)
    pair = LoraPair(_normal((top, n), generator) / n**0.5, _normal((m, top), generator) * 0.02)
    share = torch.rand(len(ranks), generator=generator) + 0.5
    shares = (share / share.sum()).tolist()
    clients = [_client(pair, r, w, generator) for r, w in zip(ranks, shares, strict=True)]
    return Module(name, _moved(pair, device), tuple(_on(client, device) for client in clients))


def _on(client: Client, device: str) -> Client:
    delta_b, delta_a = _moved_entry(client.delta_b, device), _moved_entry(client.delta_a, device)
    return Client(_moved(client.pair, device), client.weight, delta_b, delta_a)


def _moved(pair: LoraPair, device: str) -> LoraPair:
    return LoraPair(pair.A.to(device), pair.B.to(device))


def _moved_entry(entry: Sparse, device: str) -> Sparse:
    return Sparse(entry.shape, entry.positions.to(device), floats(entry.values).to(device))


def _client(pair: LoraPair, rank: int, weight: float, generator: torch.Generator) -> Client:
    m, n = pair.shape
    delta_a, delta_b = _sparse((rank, n), n**-0.5, generator), _sparse((m, rank), 0.02, generator)
    noise_a = _normal((rank, n), generator) * (0.3 * n**-0.5)
    noise_b = _normal((m, rank), generator) * 0.006
    trained = LoraPair(
        (pair.A[:rank] + to_dense(delta_a)).add_(noise_a), (pair.B[:, :rank] + to_dense(delta_b)).add_(noise_b)
    )
    return Client(trained, weight, delta_b, delta_a)


def _sparse(shape: tuple[int, int], scale: float, generator: torch.Generator) -> Sparse:
    """5 % of the elements, chosen at random, with heavy tails (the cube of a normal variable)."""
    positions = (torch.rand(shape[0] * shape[1], generator=generator) < DENSITY).nonzero().squeeze(1)
    values = _normal((positions.numel(),), generator).pow(3) * (0.1 * scale)
    return Sparse(shape, positions, values)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)
