"""Bytes of a payload on a whole model, from one module of each kind, counted as often as it occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedloom.compress.entries import Dense, Entry, floats
from fedloom.compress.quantize import quantize
from fedloom.rounds.joint import ONCE
from fedloom.studies.estimate.paper import paper_encode
from fedloom.wire import Message, decode, describe, encode

CODINGS = ("fp32", "bf16", "int8", "int4")
PAPER = "paper"
"""The coding of the papers: float32 values, and for sparse tensors a bitmap of all elements."""
Sizes = Mapping[str, float]
"""Coding → bytes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One module of each kind, and how often each occurs in the model."""

    shapes: Mapping[str, tuple[int, int]]
    counts: Mapping[str, int]

    @property
    def scale(self) -> float:
        """Adapter values of the model over those of the sample, at equal ranks."""
        whole = sum(self.counts[name] * (m + n) for name, (m, n) in self.shapes.items())
        return whole / sum(m + n for m, n in self.shapes.values())

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole model."""
        return all(count == 1 for count in self.counts.values())


def sizes_of(
    payloads: Mapping[str, bytes], chosen: Sample, auto: str, codings: Sequence[str] = CODINGS, made: str = "fp32"
) -> dict[str, Sizes]:
    """Client → coding → bytes of its payload on the whole model; payloads that are alike are coded once.

    made: the coding that the payloads have, in which they count as they are.
    """
    forms = dict.fromkeys((*codings, auto))
    known: dict[object, dict[str, float]] = {}
    found: dict[str, Sizes] = {}
    for client, payload in payloads.items():
        message = decode(payload)
        alike = tuple((name, entry.shape, type(entry)) for name, entry in message.entries.items())
        if alike not in known:
            known[alike] = {
                coding: scaled_bytes(payload if coding == made else recode(message, coding), chosen) for coding in forms
            }
            if codings:
                known[alike][PAPER] = paper_bytes(message.entries, chosen)
        found[client] = known[alike]
    return found


def mean_sizes(sizes: Sequence[Sizes]) -> dict[str, float]:
    """The mean of each coding."""
    return {coding: sum(size[coding] for size in sizes) / len(sizes) for coding in sizes[0]}


def recode(message: Message, coding: str) -> bytes:
    """The same message with its values in another form."""
    entries = {
        name: replace(entry, values=quantize(coding)(floats(entry.values), seed))
        for seed, (name, entry) in enumerate(message.entries.items())
    }
    return encode(Message(message.header, entries))


def scaled_bytes(payload: bytes, chosen: Sample) -> float:
    """Bytes of a payload if every module were in it as often as in the model."""
    if chosen.is_whole:
        return len(payload)
    told = describe(payload)
    index = told.parts["index"] / max(len(told.tensors), 1)
    tensors = sum(
        occurrences(tensor.name, chosen) * (tensor.position_bytes + tensor.value_bytes + index)
        for tensor in told.tensors
    )
    return told.parts["header"] + told.parts["checksum"] + tensors


def paper_bytes(entries: Mapping[str, Entry], chosen: Sample) -> float:
    """The same in the papers' coding."""
    return sum(
        occurrences(name, chosen)
        * (4 * entry.values.numel() if isinstance(entry, Dense) else len(paper_encode({name: entry})))
        for name, entry in entries.items()
    )


def occurrences(name: str, chosen: Sample) -> int:
    """How often the module of a tensor is in the model; steps along directions are said once for all of them."""
    if name == ONCE:
        return 1
    return chosen.counts[name.rpartition("/")[0]]


def efficiency(entries: Mapping[str, Entry], chosen: Sample) -> float | None:
    """One over the sum of broadcast ranks; each factor counts half."""
    if any(not isinstance(entry, Dense) or name.endswith("/R") for name, entry in entries.items()):
        return None
    ranks = sum(
        occurrences(name, chosen) * (entry.shape[0] if name.endswith("A") else entry.shape[-1]) / 2
        for name, entry in entries.items()
    )
    return 1 / ranks if ranks else None
