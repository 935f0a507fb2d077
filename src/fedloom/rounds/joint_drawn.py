"""Signs of a whole adapter at positions that both sides draw: two tensors, and no position travels.

Sender and receiver know the adapter and the digest of the state that an update rests on, and so which elements of a
tensor are meant (`methods.shared.drawn`). Two tensors travel:

    "drawn:<q>:<t>"   dense, one sign an element that is sent, over the tensors of the adapter in order of name
    "scales"          dense bf16, one for every tensor of which something is sent

q is the largest rank of the sender, as in `joint`, and t / 65536 the share of every tensor that is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedloom.compress.entries import Dense, Entry, Quantized, Seeded, count, floats
from fedloom.compress.masks import STEPS, seeded_count, threshold
from fedloom.errors import WireError
from fedloom.methods.method import Entries
from fedloom.methods.shared.drawn import drawn_seed

DRAWN = "drawn:"
SCALES = "scales"

Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = 1024  # of signs that share a scale: no tensor that travels this way has more
_ALL = 65536


def join_drawn(entries: Entries, shapes: Shapes, rank: int, digest: str) -> Entries | None:
    """The two tensors, where the entries are signs at the drawn positions of all of these tensors; else None."""
    held = [_signs_of(entries[name], shape, drawn_seed(digest, name)) for name, shape in shapes.items()]
    signs = [one for one in held if one is not None]
    shares = {entry.density for entry in entries.values() if isinstance(entry, Seeded)}
    if len(signs) < len(held) or len(shares) != 1:
        return None
    codes, scales = torch.cat([one.codes for one in signs]), torch.cat([one.scales for one in signs])
    rounded = scales.to(torch.bfloat16)
    if codes.numel() > _ALL or not torch.equal(rounded.to(torch.float32), scales):
        return None
    values = Quantized(codes, torch.ones(min(codes.numel(), 1)), _ALL, 1)
    return {
        f"{DRAWN}{rank}:{threshold(shares.pop())}": Dense((codes.numel(),), values),
        SCALES: Dense((rounded.numel(),), rounded),
    }


def _signs_of(entry: Entry, shape: tuple[int, ...], seed: int) -> Quantized | None:
    values = entry.values
    if not (isinstance(entry, Seeded) and isinstance(values, Quantized) and (entry.shape, entry.seed) == (shape, seed)):
        return None
    return values if (values.bits, values.block) == (1, _BLOCK) and values.scales.numel() < 2 else None


def split_drawn(entries: Entries, named: str, share: str, shapes: Shapes, digest: str) -> dict[str, Entry]:
    """What `join_drawn` was given. Raises WireError where the two tensors do not fit these shapes and this share."""
    scales = read_scales(entries, named)
    if not (share.isascii() and share.isdecimal() and len(share) < 6 and str(int(share)) == share):
        raise WireError(f"{named!r} names no share: expected {DRAWN}<rank>:<share of 65536>")
    if int(share) > STEPS:
        raise WireError(f"{named!r} is of a share above {STEPS}")
    joined, density = entries[named], int(share) / STEPS
    values = joined.values
    seeds = {name: drawn_seed(digest, name) for name in shapes}
    sizes = [seeded_count(count(shape), density, seeds[name]) for name, shape in shapes.items()]
    if not isinstance(joined, Dense) or joined.shape != (sum(sizes),):
        raise WireError(f"{named!r} of shape {joined.shape} does not fit {sum(sizes):,} drawn elements")
    check_unscaled(named, values, 1)
    assert isinstance(values, Quantized)
    if max(sizes, default=0) > _BLOCK or sum(size > 0 for size in sizes) != scales.numel():
        raise WireError(f"{scales.numel()} joined scales do not fit tensors of {sizes} values")
    found: dict[str, Entry] = {}
    for (name, shape), codes, size in zip(shapes.items(), torch.split(values.codes, sizes), sizes, strict=True):
        own, scales = scales[: size > 0], scales[size > 0 :]
        found[name] = Seeded(shape, seeds[name], density, Quantized(codes, own, _BLOCK, 1))
    return found


def check_unscaled(named: str, values: object, bits: int) -> None:
    """Raises WireError unless these are codes of so many bits whose every scale is 1."""
    if not (isinstance(values, Quantized) and (values.bits, values.block) == (bits, _ALL)):
        raise WireError(f"{named!r} does not hold codes of {bits} bits in blocks of {_ALL}")
    if not bool((values.scales == 1.0).all()):
        raise WireError(f"{named!r} does not hold codes of {bits} bits with the one scale 1")


def read_scales(entries: Entries, named: str) -> Tensor:
    """The scales that come with a joined tensor, as float32. Raises WireError where they are not as they should be."""
    scales = entries.get(SCALES)
    if len(entries) != 2 or scales is None:
        raise WireError(f"{named!r} comes with a tensor {SCALES!r} and nothing else: found {', '.join(entries)}")
    given = scales.values
    if not isinstance(scales, Dense) or isinstance(given, Quantized) or given.dtype != torch.bfloat16:
        raise WireError(f"the scales of {named!r} are not dense bf16 values")
    if not bool((given.isfinite() & ~torch.signbit(given)).all()):
        raise WireError(f"a scale of {named!r} is negative, infinite or NaN")
    return floats(given)
