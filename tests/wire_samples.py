"""Messages for the tests of the wire: one for every corner of the format, drawn without any library's generator."""

from __future__ import annotations

import torch

from fedloom.compress.entries import Dense, Entry, Quantized, Seeded, Sparse, Values
from fedloom.compress.masks import seeded_count, seeded_mask, seeded_uniform
from fedloom.compress.quantize import quantize
from fedloom.wire import Header, Message

HEADER = Header("update", "fedsrd", 3, 2, "00112233445566778899aabbccddeeff", num_examples=40)


def numbers(count: int, seed: int) -> torch.Tensor:
    """Values of both signs, many small and few large."""
    return (seeded_uniform(count, seed) - 0.5) / (seeded_uniform(count, seed + 1) + 0.01)


def sparse(shape: tuple[int, int], density: float, kind: str, seed: int) -> Sparse:
    size = shape[0] * shape[1]
    where = seeded_mask(size, density, seed).nonzero().squeeze(1)
    return Sparse(shape, where, quantize(kind)(numbers(where.numel(), seed), seed))


def structured(shape: tuple[int, int], kind: str, seed: int) -> Sparse:
    """Some rows and some columns much denser than the others."""
    rows = torch.tensor([0.9, 0.3, 0.1, 0.02]).repeat_interleave(-(-shape[0] // 4))[: shape[0]]
    columns = torch.tensor([1.0, 0.2, 0.04]).repeat(-(-shape[1] // 3))[: shape[1]]
    chances = rows[:, None] * columns[None, :]
    where = (seeded_uniform(chances.numel(), seed) < chances.flatten()).nonzero().squeeze(1)
    return Sparse(shape, where, quantize(kind)(numbers(where.numel(), seed), seed))


def seeded(shape: tuple[int, int], density: float, kind: str, seed: int) -> Seeded:
    kept = seeded_count(shape[0] * shape[1], density, seed)
    return Seeded(shape, seed, density, quantize(kind)(numbers(kept, seed), seed))


def dense(shape: tuple[int, ...], kind: str, seed: int) -> Dense:
    return Dense(shape, quantize(kind)(numbers(torch.Size(shape).numel(), seed), seed))


def samples() -> dict[str, Message]:
    """Name → message; the golden payloads are these, encoded."""
    none = torch.empty(0, dtype=torch.int64)
    corners: dict[str, Entry] = {
        "empty/A": Dense((0, 5), torch.empty(0)),
        "empty/B": Sparse((5, 0), none, torch.empty(0)),
        "full/A": Sparse((2, 3), torch.arange(6), numbers(6, 1)),
        "odd/A": dense((3, 1), "int4", 2),
        "one/A": Dense((), torch.tensor([float("nan")])),
        "vector/A": Sparse((100000,), torch.tensor([0, 15, 16, 99999]), torch.tensor([1.0, -0.0, float("inf"), 1e-40])),
    }
    entries: dict[str, dict[str, Entry]] = {
        "nothing": {},
        "corners": corners,
        "fp32-dense": {"m/A": dense((4, 6), "fp32", 1), "m/B": dense((5, 4), "fp32", 2)},
        "bf16-gaps": {"m/A": sparse((8, 60), 1 / 16, "bf16", 3), "m/B": sparse((300, 8), 1 / 64, "bf16", 4)},
        "fp16-bitmap": {"m/A": sparse((8, 20), 0.5, "fp16", 5)},
        "int8-seeded": {"m/B": seeded((40, 8), 0.25, "int8", 6)},
        "sign-gaps": {"m/A": sparse((8, 60), 1 / 16, "sign", 8), "m/B": dense((5, 3), "sign", 9)},
        "int4-classes": {"m/A": structured((40, 90), "int4", 7), "m/B": structured((90, 40), "int4", 9)},
    }
    return {name: Message(HEADER, own) for name, own in entries.items()}


def equal(left: Message, right: Message) -> bool:
    """Same header, names, forms and bits."""
    return (
        left.header == right.header
        and sorted(left.entries) == sorted(right.entries)
        and all(equal_entries(entry, right.entries[name]) for name, entry in left.entries.items())
    )


def equal_entries(left: Entry, right: Entry) -> bool:
    if type(left) is not type(right) or left.shape != right.shape:
        return False
    if isinstance(left, Seeded) and (left.seed, left.density) != (right.seed, right.density):
        return False
    if isinstance(left, Sparse) and not torch.equal(left.positions, right.positions):
        return False
    return equal_values(left.values, right.values)


def equal_values(left: Values, right: Values) -> bool:
    if isinstance(left, Quantized):
        same_form = isinstance(right, Quantized) and (left.block, left.bits) == (right.block, right.bits)
        return same_form and bits(left.codes, right.codes) and bits(left.scales, right.scales)
    return not isinstance(right, Quantized) and bits(left, right)


def bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit by bit: NaN is itself, and 0 is not -0."""
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
