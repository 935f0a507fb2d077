"""Which elements of a change of a LoRA factor are worth sending, and what is kept back.

Importance and the adaptive density are those of FedSRD (arXiv 2510.04601, §3.2).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.compress.entries import Sparse, Values, floats
from fedloom.compress.fast import compiling_pays
from fedloom.errors import ConfigError

Rescale = Literal["l1", "none"]
_LARGE = 2**15  # elements: below it, selecting at once is as fast as taking a sample first
_BIN_SHIFT, _BINS = 19, 2**12  # a float32 but for its sign has 31 bits, of which a bin's number has the first 12
_SAMPLE = 2**12  # elements of the sample at least: enough for a limit a few per cent off
T = TypeVar("T")
Quantize: TypeAlias = Callable[[Tensor, int], Values]
"""(1-D float32 values, seed) → the values as they will travel."""


def importance(delta: Tensor, other: Tensor, part: str, *, out: Tensor | None = None) -> Tensor:
    """How much each element of a factor's change contributes to ΔW: its magnitude times the norm of its partner.

    The partner is the row or column of the other factor that the element is multiplied with.

    For part "A", `delta` is ΔA (r, n) and `other` is B (m, r): I[u, v] = |ΔA[u, v]| · ‖B[:, u]‖₂.
    For part "B", `delta` is ΔB (m, r) and `other` is A (r, n): I[u, v] = |ΔB[u, v]| · ‖A[v, :]‖₂.
    out: memory for the result.
    """
    return torch.abs(delta, out=out).mul_(factor_norms(other, part))


def factor_norms(other: Tensor, part: str) -> Tensor:
    """‖B[:, u]‖₂ as a column (r, 1) for part "A", ‖A[v, :]‖₂ (r,) for part "B": the factors of `importance`."""
    if part == "B":
        norms: Tensor = torch.linalg.vector_norm(other, dim=1)
        return norms
    # What torch adds up down the columns, in the same order and several times faster.
    matrix = other.detach().cpu().numpy()
    return torch.from_numpy(np.sqrt(np.einsum("ij,ij->j", matrix, matrix))).to(other.device).unsqueeze(1)


class _Scratch(threading.local):
    """One thread's memory for what is soon overwritten: memory fresh from the system costs more than arithmetic."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def floats(self, use: str, shape: torch.Size) -> Tensor:
        """Uninitialised float32 memory, the same for every call with this use."""
        if use not in self.held or self.held[use].numel() < shape.numel():
            self.held[use] = torch.empty(shape.numel())
        return self.held[use][: shape.numel()].view(shape)

    def like(self, use: str, tensor: Tensor) -> Tensor | None:
        """Such memory for a result like this tensor; None where fresh memory serves better, or is all that there is."""
        plain = tensor.numel() >= _LARGE and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        return self.floats(use, tensor.shape) if plain else None


scratch = _Scratch()


def kurtosis(values: Tensor) -> float:
    """Pearson kurtosis E(x−μ)⁴ / (E(x−μ)²)², 3 for a normal law; 1, its least value, where all are equal."""
    centred = values.flatten().to(torch.float64, copy=True)
    squares = centred.sub_(centred.mean()).square_()
    variance = squares.mean().item()
    return squares.square_().mean().item() / variance**2 if variance > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Sparsity ρ = base + min(upper, slope · ln κ), κ the kurtosis of the importance (FedSRD eq. 6).

    Heavier tails concentrate the importance in fewer elements, so more of them can be left out.
    """

    base: float = 0.85
    slope: float = 0.1
    upper: float = 0.11

    def __post_init__(self) -> None:
        if not (0.0 <= self.base <= 1.0 and self.slope >= 0.0 and self.upper >= 0.0 and self.base + self.upper <= 1.0):
            raise ConfigError(
                f"sparsity base {self.base}, slope {self.slope}, upper {self.upper}: expected base and upper ≥ 0 "
                "with a sum of at most 1, and slope ≥ 0"
            )

    def keep(self, scores: Tensor) -> int:
        """How many elements to send: the share 1 − ρ of all, at least one of a non-empty tensor."""
        rho = self.base + min(self.upper, self.slope * math.log(max(kurtosis(scores), 1.0)))
        return kept_count(scores.numel(), 1.0 - rho)


def kept_count(numel: int, density: float) -> int:
    """round(density · numel), at least 1 of a non-empty tensor."""
    return min(numel, max(1, round(density * numel)))


def top_positions(scores: Tensor, keep: int) -> Tensor:
    """Flat positions (int64, increasing) of the `keep` largest scores; the first ones win ties.

    Elements that score zero are never kept, since they carry nothing.
    """
    positions, left = shortlist(scores, keep)
    return positions if left.numel() <= keep else positions.index_select(0, select_largest(left, keep))


def shortlist(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(flat positions, scores) of candidates: elements above zero, among them the `keep` largest; by position.

    Selecting costs many times more than comparing, so in a large tensor only elements above a limit are selected from,
    which a sample gives. Where the sample misled, or most are asked for, all elements above zero are listed.
    """
    flat = _flat(scores)
    limit = _limit(flat, keep)
    reached = int(np.count_nonzero(flat >= limit)) if limit > 0 else 0
    if keep < 1:
        among, scored = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    else:
        among, scored = _reaching(flat, limit, reached) if reached >= keep else _above_zero(flat)
    return torch.from_numpy(among), torch.from_numpy(scored)


def _reaching(flat: NDArray[np.float32], limit: float, number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The positions and values of the scores of at least `limit`, of which there are so many."""
    if flat.size < _LARGE or not compiling_pays(flat.size):
        among = np.flatnonzero(flat >= limit)
        return among, flat.take(among)
    from fedloom.compress import compiled

    positions, values = np.empty(number + 1, dtype=np.int64), np.empty(number + 1, dtype=np.float32)
    compiled.list_reaching(flat, float(np.float32(limit)), positions, values)  # as numpy compares
    return positions[:number], values[:number]


def _above_zero(flat: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    among = np.flatnonzero(flat > 0)
    return among, flat.take(among)


def _limit(flat: NDArray[np.float32], keep: int) -> float:
    """A score that `keep` elements reach, or of a large tensor likely somewhat more; 0 where that would not pay."""
    if keep < 1 or 2 * keep > flat.size:
        return 0.0
    if flat.size < _LARGE:
        return float(np.partition(flat, -keep)[-keep])
    # An odd step meets every column of a matrix whose width is a power of two.
    sample = flat[:: flat.size // _SAMPLE | 1]
    wanted = keep / flat.size * sample.size
    # Four standard deviations of the count in the sample: the limit is all but never too high to find `keep`.
    rank = math.ceil(wanted + 4 * math.sqrt(wanted) + 4)
    # Where half of all elements would pass the limit, comparing saves nothing.
    return float(np.partition(sample, -rank)[-rank]) if rank < sample.size // 2 else 0.0


def select_largest(scores: Tensor, keep: int) -> Tensor:
    """Increasing indices of the `keep` largest of some scores (1-D, on the CPU), or of all; the first ones win ties."""
    values = scores.numpy()
    if keep >= values.size:
        return torch.arange(values.size)
    if keep <= 1:
        return torch.tensor([int(values.argmax())] if keep == 1 else [], dtype=torch.int64)
    least = np.partition(values, -keep)[-keep]
    if compiling_pays(values.size):
        from fedloom.compress import compiled

        indices = np.empty(keep + 1, dtype=np.int64)
        compiled.list_largest(values, least, indices)
        return torch.from_numpy(indices[:keep])
    chosen = values >= least
    surplus = int(np.count_nonzero(chosen)) - keep
    if surplus:
        chosen[np.flatnonzero(values == least)[-surplus:]] = False
    return torch.from_numpy(np.flatnonzero(chosen))


def counts_by_importance(over: OverScores) -> Callable[[float], dict[str, int]]:
    """A function from the density of all tensors together to the number of elements of each.

    One threshold on importance holds for all tensors. An element costs about the same in any of them, so every byte is
    spent where it saves most error. Elements that score zero are not counted. The scores of all tensors are never in
    memory at once: each density takes a pass over them.
    """
    table, lock = np.zeros(_BINS, dtype=np.int64), threading.Lock()

    def enter(scores: Tensor) -> None:
        found = np.bincount(_bins(scores), minlength=_BINS)
        with lock:  # several threads may look at a tensor each
            table[:] += found

    over(enter)
    reach = table[::-1].cumsum()[::-1]  # how many scores are in this bin or above

    def counts(density: float) -> dict[str, int]:
        keep = min(round(density * int(table.sum())), int(table.sum()))
        if not keep:
            return dict.fromkeys(over(lambda scores: 0), 0)
        bin = int(np.flatnonzero(reach >= keep)[-1])

        def look(scores: Tensor) -> tuple[int, NDArray[np.float32]]:
            """How many scores are above the threshold's bin, and the scores in it."""
            bins = _bins(scores)
            return int(np.count_nonzero(bins > bin)), _flat(scores)[bins == bin]

        found = over(look)
        inside = np.concatenate([within for _, within in found.values()])
        rank = keep - int(reach[bin] - table[bin])
        least = np.partition(inside, -rank)[-rank]
        return {
            name: above + int(np.count_nonzero((within >= least) & (within > 0)))
            for name, (above, within) in found.items()
        }

    return counts


class OverScores(Protocol):
    """A function of scores, none of them negative → its result for each tensor's, by name."""

    def __call__(self, function: Callable[[Tensor], T], /) -> Mapping[str, T]: ...


def _flat(scores: Tensor) -> NDArray[np.float32]:
    return scores.detach().cpu().flatten().numpy()


def _bins(scores: Tensor) -> NDArray[np.int32]:
    """The bins of some scores: sixteen an octave. As integers the bits of positive floats are in the floats' order."""
    return (_flat(scores).view(np.int32) & 0x7FFFFFFF) >> _BIN_SHIFT


@dataclass(frozen=True, slots=True)
class Rescaling:
    """By how much the elements that are sent are lengthened for those that are not.

    kind: "l1" gives them the L1 norm of the whole tensor, "none" leaves them as they are. cap: the factor, at most.
    step: the L2 norm that they then have, at most, in L2 norms of the whole.
    """

    kind: Rescale = "none"
    cap: float = math.inf
    step: float = math.inf

    def gain(self, tensor: Tensor, kept: Tensor) -> float:
        """The factor for the values that are kept of a tensor."""
        if self.kind == "none" or (norm := kept.abs().sum().item()) == 0.0:
            return 1.0
        gain = min(torch.abs(tensor, out=scratch.like("sizes", tensor)).sum().item() / norm, self.cap)
        if math.isinf(self.step):
            return gain
        length, most = gain * float(kept.norm()), self.step * float(tensor.norm())
        return gain * most / length if length > most else gain


AS_IT_IS = Rescaling()
"""No rescaling."""


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """The elements of a tensor that are sent; their values, times `gain`, before these were coded."""

    sent: Sparse
    values: Tensor
    gain: float

    def rest(self, tensor: Tensor) -> Tensor:
        """What is not sent of the tensor that they were chosen from, and what coding lost: tensor − sent / gain."""
        rest = tensor.flatten().clone()
        # An exact coding leaves exactly zero behind, whatever the gain's own rounding.
        rest[self.sent.positions] = (self.values - floats(self.sent.values)) / self.gain
        return rest.view_as(tensor)


def choose(
    tensor: Tensor,
    scores: Tensor,
    keep: int,
    *,
    rescaling: Rescaling = AS_IT_IS,
    quantize: Quantize | None = None,
    seed: int = 0,
) -> Choice:
    """The `keep` elements of highest score. With a gain above 1 they still count as delivered once: the gain stands in
    for the step that the others did not make.
    """
    flat = tensor.flatten()
    positions = top_positions(scores, keep)
    kept = flat.index_select(0, positions)
    gain = rescaling.gain(tensor, kept)
    values = kept * gain if gain != 1.0 else kept
    coded = values if quantize is None else quantize(values, seed)
    return Choice(Sparse(tuple(tensor.shape), positions, coded), values, gain)


@dataclass(frozen=True, eq=False, slots=True)
class SparseSplit:
    """A tensor divided: what is sent, and the rest that was not (input − sent / gain, of the tensor's shape)."""

    sent: Sparse
    rest: Tensor


def split(
    tensor: Tensor,
    scores: Tensor,
    keep: int,
    *,
    rescaling: Rescaling = AS_IT_IS,
    quantize: Quantize | None = None,
    seed: int = 0,
) -> SparseSplit:
    """Send the `keep` elements of highest score; the rest is all others, and what rounding lost.

    Without rescaling, sent + rest = tensor; exactly so where values travel as float32.
    """
    chosen = choose(tensor, scores, keep, rescaling=rescaling, quantize=quantize, seed=seed)
    return SparseSplit(chosen.sent, chosen.rest(tensor))
