"""The codes of a whole adapter as two tensors instead of two a module, for payloads of few values.

A payload that names every tensor pays for names, shapes and scales before its first value. Sender and receiver hold the
same adapter, so a small payload of signs or 4-bit codes leaves them away. Two tensors travel:

    "signs:<q>"   sparse, one sign a value, over the tensors of the adapter laid end to end in order of name,
    "codes:<q>"   or one 4-bit code a value
    "scales"      dense bf16, one for every tensor of which something is sent

q is the largest rank of the sender: a module has the smaller of q and the rank of the receiver's whole adapter.

Cores between resting factors travel the same way, however many values they have, as "cores:<q>": sparse or dense, in 4
or 8 bits. Steps along drawn directions, which are the same for all modules, travel once, as "scalars".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.compress.entries import Dense, Entry, Quantized, Seeded, Sparse, count
from fedloom.errors import WireError
from fedloom.lora.pair import LoraState, module_of
from fedloom.methods.method import CORE, SCALARS, Entries, State
from fedloom.methods.shared.whole import whole_rank
from fedloom.rounds.joint_drawn import DRAWN, check_unscaled, join_drawn, read_scales, split_drawn
from fedloom.rounds.joint_drawn import SCALES as SCALES
from fedloom.rounds.joint_paths import PATHS, join_paths, named_rank, split_paths
from fedloom.wire import decode, describe

FEW = 64
"""Values a tensor, on the mean, below which they travel together: above, classes of rows and columns save more."""

_ALL = 65536  # a block for all of them: the one scale of the joined codes is 1


@dataclass(frozen=True, slots=True)
class Kind:
    """A form of values that may be joined: how its tensor's name begins, bits of a code, values that share a scale."""

    prefix: str
    bits: int
    block: int


ONCE = "scalars"
"""Steps along directions: the entry "module/S" of every module."""
CORES = "cores:"
_CORES = {(4, _ALL), (8, _ALL)}  # bits and block of cores' codes

SIGNS, CODES = Kind("signs:", 1, 1024), Kind("codes:", 4, _ALL)
"""What `quantize("sign")` and `compress.levels` make."""

_BEGINNINGS = (SIGNS.prefix, CODES.prefix, CORES, DRAWN, PATHS)


@dataclass(frozen=True, slots=True)
class Outline:
    """The shapes of an adapter's tensors, in order of name, and the rank that says which they are.

    digest: of the state that a sender's update rests on; it says which positions are drawn. core: whether the tensors
    are the matrices between resting factors.
    """

    rank: int
    shapes: Mapping[str, tuple[int, ...]]
    digest: str = ""
    core: bool = False

    @classmethod
    def of(
        cls, adapter: LoraState, whole: Mapping[str, int], digest: str = "", *, core: bool = False
    ) -> Outline | None:
        """That of a sender's adapter, where one rank says what it is of an adapter of ranks `whole`; else None."""
        rank = max(adapter.ranks().values(), default=0)
        if not rank or adapter.ranks() != {module: min(rank, most) for module, most in whole.items()}:
            return None
        # A site's rules look at what leaves with the site's own ranks at hand: of a lower rank, cores are named.
        if core and adapter.ranks() != dict(whole):
            return None
        ranks = {module: (pair.rank, whole[module]) for module, pair in adapter.items()}
        return cls(rank, _shapes(adapter, ranks, core=core), digest, core)

    @classmethod
    def at_rank(cls, state: State, rank: int, *, core: bool = False) -> Outline:
        """That of an adapter of this rank, as a receiver knows it."""
        whole = whole_ranks(state)
        ranks = {module: (min(rank, most), most) for module, most in whole.items()}
        return cls(rank, _shapes(state.adapter, ranks, core=core), core=core)

    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(count(shape) for shape in self.shapes.values())


def _shapes(adapter: LoraState, ranks: Mapping[str, tuple[int, int]], *, core: bool) -> dict[str, tuple[int, ...]]:
    """In order of name; ranks: module → (the sender's, that of the whole adapter)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (own, whole) in ranks.items():
        m, n = adapter[module].shape
        shapes |= {f"{module}/{CORE}": (own, whole)} if core else {f"{module}/A": (own, n), f"{module}/B": (m, own)}
    return dict(sorted(shapes.items()))


def whole_ranks(state: State) -> dict[str, int]:
    """Module → rank of the server's adapter."""
    return {module: whole_rank(state, module) for module in state.adapter}


def join_entries(entries: Entries, outline: Outline | None) -> Entries:
    """The two tensors, where these entries are few signs of exactly these tensors; else the entries as they are.

    Signs at drawn positions need not be few: nothing is said of their places (`joint_drawn`).
    """
    if outline is None:
        return entries
    if entries.keys() == {f"{module_of(name)}/{SCALARS}" for name in outline.shapes}:
        return _join_scalars(entries)
    if not outline.core and (paths := join_paths(entries, outline.shapes, outline.rank)) is not None:
        return paths
    if entries.keys() != outline.shapes.keys():
        return entries
    if outline.core:
        return _join_cores(entries, outline) or entries
    for kind in (SIGNS, CODES):
        held = [_codes_of(entries[name], shape, kind) for name, shape in outline.shapes.items()]
        codes = [one for one in held if one is not None]
        number = sum(one.positions.numel() for one, _ in codes)
        if len(codes) == len(held) and 0 < number < min(FEW * len(held), _ALL + 1):
            return _join(codes, outline, kind) or entries
    return join_drawn(entries, outline.shapes, outline.rank, outline.digest) or entries


def _join_scalars(entries: Entries) -> Entries:
    """The one entry of all modules; the entries as they are where modules differ."""
    first, *others = entries.values()
    return {ONCE: first} if all(entry is first for entry in others) else entries


def _join(held: Sequence[tuple[Sparse, Quantized]], outline: Outline, kind: Kind) -> Entries | None:
    """The two tensors; None where a scale is not bf16: it would be rounded, and nothing is after `compress`."""
    places, end = [], 0
    for one, _ in held:
        places.append(one.positions + end)
        end += count(one.shape)
    scales = torch.cat([values.scales for _, values in held])
    rounded = scales.to(torch.bfloat16)
    if not torch.equal(rounded.to(torch.float32), scales):
        return None
    codes = Quantized(torch.cat([values.codes for _, values in held]), torch.ones(1), _ALL, kind.bits)
    return {
        f"{kind.prefix}{outline.rank}": Sparse((end,), torch.cat(places), codes),
        SCALES: Dense((rounded.numel(),), rounded),
    }


def _join_cores(entries: Entries, outline: Outline) -> Entries | None:
    """The two tensors for codes of one form and one scale a tensor; None where these are something else."""
    held = [entries[name] for name in outline.shapes]
    forms = {(type(entry), entry.shape == shape) for entry, shape in zip(held, outline.shapes.values(), strict=True)}
    codes = [entry.values for entry in held if isinstance(entry.values, Quantized)]
    kinds = {(values.bits, values.block) for values in codes}
    if len(codes) < len(held) or len(kinds) != 1 or not kinds <= _CORES or any(v.scales.numel() > 1 for v in codes):
        return None
    kind = Kind(CORES, codes[0].bits, _ALL)
    if not 0 < sum(values.numel() for values in codes) <= _ALL:
        return None
    if forms == {(Sparse, True)}:
        sparse = [(entry, values) for entry, values in zip(held, codes, strict=True) if isinstance(entry, Sparse)]
        return _join(sparse, outline, kind)
    scales = torch.cat([values.scales for values in codes])
    rounded = scales.to(torch.bfloat16)
    if forms != {(Dense, True)} or not torch.equal(rounded.to(torch.float32), scales):
        return None
    joined = Quantized(torch.cat([values.codes for values in codes]), torch.ones(1), _ALL, kind.bits)
    return {f"{CORES}{outline.rank}": Dense((joined.numel(),), joined), SCALES: Dense((rounded.numel(),), rounded)}


def _codes_of(entry: Entry, shape: tuple[int, ...], kind: Kind) -> tuple[Sparse, Quantized] | None:
    """The entry and its values, where they are of this kind with at most one scale."""
    values = entry.values
    if not (isinstance(entry, Sparse) and entry.shape == shape and isinstance(values, Quantized)):
        return None
    fits = values.bits == kind.bits and values.block == kind.block and values.scales.numel() < 2
    return (entry, values) if fits else None


def split_entries(entries: Entries, state: State, base: str = "") -> Entries:
    """What `join_entries` was given; entries that are not joined as they are. Raises WireError where they do not fit.

    state: a receiver that holds the adapter, its tail included, in which the sender's is the leading part. base: the
    digest of the state that the payload rests on, from which drawn positions follow.
    """
    for kind in (SIGNS, CODES):
        named = next((name for name in entries if name.startswith(kind.prefix)), None)
        if named is not None:
            return _split(entries, named, kind, state)
    if ONCE in entries:
        if len(entries) > 1:
            raise WireError(f"{ONCE!r} stands for all modules, and the payload holds other tensors beside it")
        return {f"{module}/{SCALARS}": entries[ONCE] for module in state.adapter}
    named = next((name for name in entries if name.startswith((DRAWN, CORES, PATHS))), None)
    if named is None:
        return entries
    if named.startswith(CORES):
        return _split_cores(entries, named, state)
    if named.startswith(PATHS):
        return split_paths(entries, named, _read_outline(named, named_rank(named), state).shapes)
    rank, _, share = named.removeprefix(DRAWN).partition(":")
    return split_drawn(entries, named, share, _read_outline(named, rank, state).shapes, base)


def is_joined(names: Iterable[str]) -> bool:
    """Whether entries of these names are joined ones."""
    return any(name == ONCE or name.startswith(_BEGINNINGS) for name in names)


def names_in(payload: bytes, state: State) -> Collection[str]:
    """The names of a payload's tensors; of joined ones the names of what they hold. See `split_entries`."""
    names = [tensor.name for tensor in describe(payload).tensors]
    return split_entries(decode(payload).entries, state).keys() if is_joined(names) else names


def _split(entries: Entries, named: str, kind: Kind, state: State) -> Entries:
    outline = _read_outline(named, named.removeprefix(kind.prefix), state)
    codes, scales = entries[named], read_scales(entries, named)
    if not isinstance(codes, Sparse) or codes.shape != (outline.numel(),):
        raise WireError(f"{named!r} of shape {codes.shape} does not fit an adapter of {outline.numel():,} values")
    check_unscaled(named, codes.values, kind.bits)
    assert isinstance(codes.values, Quantized)
    return _cut(codes.positions, codes.values.codes, scales, outline, kind)


def _split_cores(entries: Entries, named: str, state: State) -> Entries:
    outline = _read_outline(named, named.removeprefix(CORES), state, core=True)
    joined, scales = entries[named], read_scales(entries, named)
    if joined.shape != (outline.numel(),) or isinstance(joined, Seeded):
        raise WireError(f"{named!r} of shape {joined.shape} does not fit cores of {outline.numel():,} values")
    values = joined.values
    kind = Kind(CORES, values.bits if isinstance(values, Quantized) and (values.bits, _ALL) in _CORES else 4, _ALL)
    check_unscaled(named, values, kind.bits)
    assert isinstance(values, Quantized)
    if isinstance(joined, Sparse):
        return _cut(joined.positions, values.codes, scales, outline, kind)
    sizes = [count(shape) for shape in outline.shapes.values()]
    if scales.numel() != len(sizes):
        raise WireError(f"{scales.numel()} joined scales do not fit {len(sizes)} cores")
    pieces = zip(outline.shapes.items(), torch.split(values.codes, sizes), torch.split(scales, 1), strict=True)
    return {name: Dense(shape, Quantized(codes, own, _ALL, kind.bits)) for (name, shape), codes, own in pieces}


def _read_outline(named: str, rank: str, state: State, *, core: bool = False) -> Outline:
    """The shapes of the adapter of the rank that a name says."""
    # isdecimal alone would let other scripts' digits through; ten digits are more than any rank.
    if not (rank.isascii() and rank.isdecimal() and len(rank) < 10 and str(int(rank)) == rank and int(rank)):
        raise WireError(f"{named!r} names no rank: expected a number after the first colon")
    if int(rank) > max(whole_ranks(state).values()):
        raise WireError(f"{named!r} is of a larger adapter than this one")
    return Outline.at_rank(state, int(rank), core=core)


def _cut(positions: Tensor, codes: Tensor, scales: Tensor, outline: Outline, kind: Kind) -> dict[str, Sparse]:
    """The tensors again. Raises WireError unless every one that has codes has a scale, and no other."""
    ends = torch.tensor([0, *(count(shape) for shape in outline.shapes.values())]).cumsum(0)
    bounds = torch.searchsorted(positions, ends)
    sizes = bounds.diff().tolist()
    if max(sizes) > kind.block or sum(size > 0 for size in sizes) != scales.numel():
        raise WireError(f"{scales.numel()} joined scales do not fit tensors of {sizes} values")
    found, left = {}, scales
    for (name, shape), start, first, size in zip(
        outline.shapes.items(), ends.tolist(), bounds.tolist(), sizes, strict=False
    ):
        some, own, left = slice(first, first + size), left[: size > 0], left[size > 0 :]
        found[name] = Sparse(shape, positions[some] - start, Quantized(codes[some], own, kind.block, kind.bits))
    return found
