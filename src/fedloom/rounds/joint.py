"""The signs of a whole adapter as two tensors instead of two a module, for payloads of few values.

A payload that names every tensor pays for names, shapes and scales before its first value. Sender and receiver hold the
same adapter, so a small payload of signs leaves them away. Two tensors travel:

    "signs:<q>"   sparse, one sign a value, over the tensors of the adapter laid end to end in order of name
    "scales"      dense bf16, one for every tensor of which something is sent

q is the largest rank of the sender: a module has the smaller of q and the rank of the receiver's whole adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.compress.entries import Dense, Entry, Quantized, Sparse, count, floats
from fedloom.errors import WireError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Entries, State
from fedloom.methods.shared.whole import whole_rank

SCALES, SIGNS = "scales", "signs:"
FEW = 64
"""Values a tensor, on the mean, below which they travel together: above, classes of rows and columns save more."""

_BLOCK = 1024  # values that share a scale: what `quantize("sign")` makes
_ALL = 65536  # a block for all of them: the one scale of the joined signs is 1


@dataclass(frozen=True, slots=True)
class Outline:
    """The shapes of an adapter's tensors, in order of name, and the rank that says which they are."""

    rank: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, adapter: LoraState, whole: Mapping[str, int]) -> Outline | None:
        """That of a sender's adapter, where one rank says what it is of an adapter of ranks `whole`; else None."""
        rank = max(adapter.ranks().values(), default=0)
        if not rank or adapter.ranks() != {module: min(rank, most) for module, most in whole.items()}:
            return None
        return cls(rank, {name: tuple(tensor.shape) for name, tensor in sorted(adapter.tensors().items())})

    @classmethod
    def at_rank(cls, state: State, rank: int) -> Outline:
        """That of an adapter of this rank, as a receiver knows it."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module, pair in state.adapter.items():
            held, (m, n) = min(rank, whole_rank(state, module)), pair.shape
            shapes |= {f"{module}/A": (held, n), f"{module}/B": (m, held)}
        return cls(rank, dict(sorted(shapes.items())))

    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(count(shape) for shape in self.shapes.values())


def whole_ranks(state: State) -> dict[str, int]:
    """Module → rank of the server's adapter."""
    return {module: whole_rank(state, module) for module in state.adapter}


def join_entries(entries: Entries, outline: Outline | None) -> Entries:
    """The two tensors, where these entries are few signs of exactly these tensors; else the entries as they are."""
    if outline is None or entries.keys() != outline.shapes.keys():
        return entries
    held = [_signs_of(entries[name], shape) for name, shape in outline.shapes.items()]
    signs = [one for one in held if one is not None]
    number = sum(one.positions.numel() for one, _ in signs)
    if len(signs) < len(held) or not 0 < number < min(FEW * len(held), _ALL + 1):
        return entries
    places, end = [], 0
    for one, _ in signs:
        places.append(one.positions + end)
        end += count(one.shape)
    codes = torch.cat([values.codes for _, values in signs])
    scales = torch.cat([values.scales for _, values in signs])
    rounded = scales.to(torch.bfloat16)
    if not torch.equal(rounded.to(torch.float32), scales):
        return entries  # a scale that is not bf16 would be rounded, and nothing is rounded after `compress`
    return {
        f"{SIGNS}{outline.rank}": Sparse((end,), torch.cat(places), Quantized(codes, torch.ones(1), _ALL, 1)),
        SCALES: Dense((rounded.numel(),), rounded),
    }


def _signs_of(entry: Entry, shape: tuple[int, ...]) -> tuple[Sparse, Quantized] | None:
    """The entry and its values, where they are signs with at most one scale."""
    values = entry.values
    fits = isinstance(entry, Sparse) and entry.shape == shape and isinstance(values, Quantized)
    if not (fits and isinstance(entry, Sparse) and isinstance(values, Quantized)):
        return None
    return (entry, values) if values.bits == 1 and values.block == _BLOCK and values.scales.numel() < 2 else None


def split_entries(entries: Entries, state: State) -> Entries:
    """What `join_entries` was given; entries that are not joined as they are. Raises WireError where they do not fit.

    state: a receiver that holds the adapter, its tail included, in which the sender's is the leading part.
    """
    named = next((name for name in entries if name.startswith(SIGNS)), None)
    if named is None:
        return entries
    rank = named.removeprefix(SIGNS)
    # isdecimal alone would let other scripts' digits through; ten digits are more than any rank.
    if not (rank.isascii() and rank.isdecimal() and len(rank) < 10 and str(int(rank)) == rank and int(rank)):
        raise WireError(f"{named!r} names no rank: expected {SIGNS}<rank>")
    outline = Outline.at_rank(state, int(rank))
    if int(rank) > max(whole_ranks(state).values()):
        raise WireError(f"joined signs of rank {rank} are of a larger adapter than this one")
    signs, scales = _checked(entries, named, outline)
    assert isinstance(signs.values, Quantized)
    return _cut(signs.positions, signs.values.codes, scales, outline)


def _checked(entries: Entries, named: str, outline: Outline) -> tuple[Sparse, Tensor]:
    """The joined signs and the tensors' scales as float32."""
    signs, scales = entries[named], entries.get(SCALES)
    if len(entries) != 2 or scales is None:
        raise WireError(f"joined signs come with a tensor {SCALES!r} and nothing else: found {', '.join(entries)}")
    if not isinstance(signs, Sparse) or signs.shape != (outline.numel(),):
        raise WireError(f"joined signs of shape {signs.shape} do not fit an adapter of {outline.numel():,} values")
    values = signs.values
    if not isinstance(values, Quantized) or (values.bits, values.block) != (1, _ALL) or values.scales.tolist() != [1.0]:
        raise WireError("joined signs are not signs with the one scale 1")
    given = scales.values
    if not isinstance(scales, Dense) or isinstance(given, Quantized) or given.dtype != torch.bfloat16:
        raise WireError("the scales of joined signs are not dense bf16 values")
    if not bool((given.isfinite() & ~torch.signbit(given)).all()):
        raise WireError("a scale of joined signs is negative, infinite or NaN")
    return signs, floats(given)


def _cut(positions: Tensor, codes: Tensor, scales: Tensor, outline: Outline) -> dict[str, Sparse]:
    """The tensors again. Raises WireError unless every one that has signs has a scale, and no other."""
    ends = torch.tensor([0, *(count(shape) for shape in outline.shapes.values())]).cumsum(0)
    bounds = torch.searchsorted(positions, ends)
    sizes = bounds.diff().tolist()
    if max(sizes) > _BLOCK or sum(size > 0 for size in sizes) != scales.numel():
        raise WireError(f"{scales.numel()} scales of joined signs do not fit tensors of {sizes} values")
    found, left = {}, scales
    for (name, shape), start, first, size in zip(
        outline.shapes.items(), ends.tolist(), bounds.tolist(), sizes, strict=False
    ):
        some, own, left = slice(first, first + size), left[: size > 0], left[size > 0 :]
        found[name] = Sparse(shape, positions[some] - start, Quantized(codes[some], own, _BLOCK, 1))
    return found
