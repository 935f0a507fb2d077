"""The best update that fits a number of bytes: how many elements of each tensor, and in which form.

One threshold on importance for all tensors: an element costs about the same wherever it is, so this spends every byte
where it saves most error. For each form of values the threshold that fills the budget is found from the entropy of
positions; the form that leaves the least error wins, and is then encoded and corrected until it truly fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.errors import ConfigError
from fedloom.lora import derived_seed
from fedloom.sparsify import Quantize
from fedloom.tensors import Entry, Sparse, to_dense
from fedloom.wire.codec import encode
from fedloom.wire.message import Header, Message
from fedloom.wire.quantize import quantize

VALUE_BITS = {"int4": 3.2, "int8": 7.0, "fp16": 12.5, "bf16": 9.5, "fp32": 25.5}
"""About what a value costs packed: where the search begins."""

_BIN_SHIFT = 16  # float32 bits that a histogram of scores leaves out: bins 0.8 % wide
_TRIES = 12


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of values: the density that it affords, and the error that would be left."""

    kind: str
    density: float
    error: float


@dataclass(frozen=True, eq=False, slots=True)
class Fitted:
    """An update of `size` ≤ `budget` bytes: its entries, their form, and what the choice was made from.

    error: √(Σ lost² / Σ all²) over importance, of elements left out and of rounding; density: share of elements
    sent; threshold: the least importance sent.
    """

    entries: Mapping[str, Sparse]
    kind: str
    size: int
    budget: int
    density: float
    error: float
    threshold: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Changes:
    """What could be sent: float32 tensors of any shape by name, and the importance of every element, not negative."""

    tensors: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]

    def select(self, threshold: float, kind: str, seed: int) -> dict[str, Sparse]:
        """Of every tensor the elements of at least this importance, those of none left out."""
        entries = {}
        for name, tensor in self.tensors.items():
            scores = self.scores[name].flatten()
            positions = ((scores >= threshold) & (scores > 0)).nonzero().squeeze(1)
            values = quantize(kind)(tensor.flatten()[positions], derived_seed(seed, "budget", name))
            entries[name] = Sparse(tuple(tensor.shape), positions, values)
        return entries

    def error(self, entries: Mapping[str, Sparse]) -> float:
        """√(Σ lost² / Σ all²) of importance: an element's importance is lost in the proportion of its value."""
        gone = whole = 0.0
        for name, tensor in self.tensors.items():
            share = torch.where(tensor != 0, (tensor - to_dense(entries[name])) / tensor, 0.0)
            gone += (share * self.scores[name]).double().square().sum().item()
            whole += self.scores[name].double().square().sum().item()
        return math.sqrt(gone / whole) if whole else 0.0

    def density(self, entries: Mapping[str, Sparse]) -> float:
        """The share of all elements that are sent."""
        return _sent(entries) / max(sum(tensor.numel() for tensor in self.tensors.values()), 1)


def fit(
    tensors: Mapping[str, Tensor],
    budget: int,
    header: Header,
    *,
    scores: Mapping[str, Tensor] | None = None,
    kinds: Sequence[str] = ("int4", "int8", "bf16"),
    seed: int = 0,
) -> Fitted:
    """The entries with the least error whose payload has at most `budget` bytes, header included.

    scores: importance of every element (see `sparsify.importance`), of the tensors' shapes; magnitudes by default.
    kinds: forms of values to choose from. Raises ConfigError where not even an empty update fits.
    """
    plain = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in sorted(tensors.items())}
    given = plain if scores is None else {name: scores[name].detach().to("cpu", torch.float32) for name in plain}
    changes = Changes(plain, {name: score.abs() for name, score in given.items()})
    least = len(encode(Message(header, changes.select(math.inf, kinds[0], seed))))
    if least > budget:
        raise ConfigError(f"wire.budget is {budget} bytes, but an update without a single value takes {least}")
    histogram = _Histogram(changes.scores)
    candidates = []
    for kind in kinds:
        trial = changes.select(histogram.threshold(budget - least, VALUE_BITS[kind]), kind, seed)
        candidates.append(Candidate(kind, changes.density(trial), changes.error(trial)))
    kind = min(candidates, key=lambda candidate: candidate.error).kind
    threshold, entries, size = _settled(changes, histogram, kind, header, budget, least, seed)
    density, error = changes.density(entries), changes.error(entries)
    return Fitted(entries, kind, size, budget, density, error, threshold, tuple(candidates))


@dataclass(frozen=True, slots=True)
class ByteBudget:
    """A budget for the whole payload of one message with this header (see `method.Budget`)."""

    size: int
    header: Header

    def allotments(
        self, changes: Mapping[str, tuple[Tensor, Tensor]], seed: int
    ) -> Iterator[tuple[Mapping[str, int], Quantize]]:
        """Ever smaller (elements of each tensor, form of the values), each the best for its bytes.

        changes: name → (change, importance). The first one aims a little below the budget: values that are rescaled and
        rounded anew may pack worse than what was measured.
        """
        tensors = {name: change for name, (change, _) in changes.items()}
        scores = {name: score for name, (_, score) in changes.items()}
        for attempt in range(1, 7):
            fitted = fit(tensors, int(self.size * 0.98**attempt), self.header, scores=scores, seed=seed)
            yield {name: entry.positions.numel() for name, entry in fitted.entries.items()}, quantize(fitted.kind)

    def fits(self, entries: Mapping[str, Entry]) -> bool:
        """Whether these entries stay within the budget."""
        return len(encode(Message(self.header, entries))) <= self.size


def _settled(
    changes: Changes, histogram: _Histogram, kind: str, header: Header, budget: int, least: int, seed: int
) -> tuple[float, Mapping[str, Sparse], int]:
    """(threshold, entries, bytes): the largest update of this kind that some guesses of what a value costs led to."""
    best: tuple[float, Mapping[str, Sparse], int] = (math.inf, changes.select(math.inf, kind, seed), least)
    bits = VALUE_BITS[kind]
    for _ in range(_TRIES):
        threshold = histogram.threshold(budget - least, bits)
        entries = changes.select(threshold, kind, seed)
        size = len(encode(Message(header, entries)))
        if size <= budget and threshold < best[0]:
            best = (threshold, entries, size)
        # The next guess is what a value really cost, and a little more where that was too much.
        cost = (8 * (size - least) - histogram.position_bits(threshold)) / max(_sent(entries), 1)
        if size <= budget and (size > 0.995 * budget or abs(cost - bits) < 0.01):
            break
        bits = max(cost, 0.1) * (1.0 if size <= budget else 1.004)
    return best


def _sent(entries: Mapping[str, Sparse]) -> int:
    return sum(entry.values.numel() for entry in entries.values())


class _Histogram:
    """How many elements of each tensor have at least a given importance; positive floats sort like their bits."""

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.sizes = np.array([tensor.numel() for tensor in scores.values()], dtype=np.int64)
        bins = 2 ** (31 - _BIN_SHIFT)
        self.at_least = np.empty((bins, len(scores)), dtype=np.int32)
        for number, tensor in enumerate(scores.values()):
            counts = np.bincount(tensor.flatten().view(torch.int32).numpy() >> _BIN_SHIFT, minlength=bins)
            counts[0] = 0  # nothing of no importance is sent
            self.at_least[:, number] = counts[::-1].cumsum()[::-1]

    def threshold(self, size: int, value_bits: float) -> float:
        """The least threshold at which positions and values take at most `size` bytes."""
        low, high = 1, len(self.at_least) - 1
        while low < high:
            middle = (low + high) // 2
            if self._bits(middle, value_bits) <= 8 * size:
                high = middle
            else:
                low = middle + 1
        return float(np.array(low << _BIN_SHIFT, dtype=np.int32).view(np.float32))

    def position_bits(self, threshold: float) -> float:
        """The entropy of the positions of all elements of at least this importance."""
        return self._bits(int(np.array(threshold, dtype=np.float32).view(np.int32)) >> _BIN_SHIFT, 0.0)

    def _bits(self, bin_: int, value_bits: float) -> float:
        counts: NDArray[np.int32] = self.at_least[bin_]
        share = np.clip(counts / np.maximum(self.sizes, 1), 1e-12, 1 - 1e-12)
        entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share)
        return float((self.sizes * entropy).sum() + counts.sum() * value_bits)
