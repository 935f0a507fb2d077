"""How many elements of every tensor a client sends, and in which form: by the method's own rule or a byte budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fedloom.errors import ConfigError
from fedloom.method import Context, Entries, State
from fedloom.sparsify import Quantize
from fedloom.tensors import Values
from fedloom.wire import Header, Message, encode, quantize
from fedloom.wire.budget import fit

_MARGIN = 0.98
"""Share of the budget aimed at: rescaling and rounding anew may pack a little worse than what was measured."""
_TRIES = 6


@dataclass(frozen=True, slots=True)
class Allotment:
    """Name → number of elements, and the form of their values."""

    counts: Mapping[str, int]
    quantize: Quantize


def sent_within(
    changes: Mapping[str, tuple[Tensor, Tensor]],
    rule: Callable[[Tensor], int],
    send: Callable[[Allotment], Entries],
    method: str,
    state: State,
    context: Context,
) -> Entries:
    """What `send` makes of the first allotment whose payload fits context.budget, or of the method's own `rule`.

    changes: name → (change, importance); rule: importance → number of elements. Raises ConfigError where no allotment
    fits.
    """
    if context.budget is None:
        counts = {name: rule(scores) for name, (_, scores) in changes.items()}
        return send(Allotment(counts, context.quantize))
    header = Header("update", method, context.round, state.version, state.digest, num_examples=2**31 - 1)
    for allotment in allotments(changes, context.budget, header, context):
        entries = send(allotment)
        if len(encode(Message(header, entries))) <= context.budget:
            return entries
    raise ConfigError(f"wire.budget of {context.budget} bytes is too small for {len(changes)} tensors: raise it")


def allotments(
    changes: Mapping[str, tuple[Tensor, Tensor]], budget: int, header: Header, context: Context
) -> Iterator[Allotment]:
    """Ever smaller allotments, each the best for its bytes: one threshold on importance, the form of least error."""
    tensors = {name: change for name, (change, _) in changes.items()}
    scores = {name: score for name, (_, score) in changes.items()}
    for attempt in range(_TRIES):
        fitted = fit(tensors, int(budget * _MARGIN ** (1 + attempt)), header, scores=scores, seed=context.seed)
        counts = {name: entry.positions.numel() for name, entry in fitted.entries.items()}
        yield Allotment(counts, partial(_as_kind, fitted.kind))


def _as_kind(kind: str, values: Tensor, seed: int) -> Values:
    return quantize(values, kind, seed)
