"""Who does harm in a round, by what the model gets wrong of public examples that the server holds.

Each client's update is left out in turn, and what the server would broadcast then is tried: the method's own aggregate
of the others, as it would be received. A client is tried as a part of its round and not alone, so that a specialist,
who forgets the others' skills, is judged by what the round has of it. This holds with any number of liars, four sites
or two, since the error is no vote.

Without a client the others count for more, so that who sends nothing takes its share p of the gain which the others
would make alone: that much is no harm. Harm is what goes beyond it: what a client makes worse than if it had sent
nothing and kept its share, by a straight line between the error before the round and the one without it. An honest
specialist mostly does none, even where its round is better without it; who trains towards the opposite does p times
that gain. Where the others alone make the error larger, harm is what the client adds to that.

A client is refused whose account has more harm than is little beside the error (`tolerance`); the account is
max(0, account + harm) after each round (Page's cumulative sum), so that a little harm in every round adds up, and who
does good on the whole stays at zero. All that a client has done is summed up besides: in its first round, and while it
did more good than harm, it may do as much as p times the others' gain. But whoever does no harm in this round is taken,
whatever it has done: a specialist that was bad for the first rounds is not shut out for it, and a liar has to be of
use. Where the round as a whole makes the error much larger, the client is refused without which it is best, until that
is over: liars who all do the same would otherwise hide behind one another. All this is in the server's memory, and so
in every checkpoint.

It costs one aggregate and one pass over the public examples for every client of a round and one more, and as much again
less one client for everybody who is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.methods.method import State

Measure = Callable[[State], float]
"""What the model for which a state stands gets wrong of public examples, from 0 to 1."""
_LITTLE = 0.1
"""Under this error the tolerance is a share of this: nearer to zero most of it is noise."""
_RECORD = "harm/"
"""Before a client's name in the server's memory."""
_TOGETHER = 4.0
"""Tolerances by which a whole round may make the error larger: honest steps overshoot now and then."""
_WORST = 1.0
"""What a model counts for that answers nothing finite."""


@dataclass(frozen=True, slots=True)
class Record:
    """The harm of a client's rounds. account: what it has not made good; total: their plain sum."""

    account: float = 0.0
    total: float = 0.0

    def charge(self, harm: float) -> Record:
        """After another round."""
        return Record(max(self.account + harm, 0.0), self.total + harm)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round's trial has found. refused: the client that does most harm and why, where it is too much.

    stats: `public_error` after the round, and `max_public_harm`, the most harm that a client does. harm: of each
    client in this round.
    """

    refused: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    harm: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Trial:
    """The trials of one round.

    before: the error before it; tolerance: share of it that a client may do harm. records: client → what it has done
    in earlier rounds.
    """

    measure: Measure
    before: float
    tolerance: float
    records: Mapping[str, Record] = field(default_factory=dict)

    @classmethod
    def begin(cls, measure: Measure, state: State, tolerance: float) -> Trial:
        """From the server's state before the round."""
        held = {name.removeprefix(_RECORD): one for name, one in state.memory.items() if name.startswith(_RECORD)}
        return cls(measure, _finite(measure(state)), tolerance, {c: Record(*one.tolist()) for c, one in held.items()})

    def remember(self, harm: Mapping[str, float]) -> dict[str, Tensor]:
        """The records after a round in which clients did this harm, as the server's memory has them."""
        after = {**self.records, **{client: self._record(client).charge(done) for client, done in harm.items()}}
        return {
            _RECORD + client: torch.tensor([after[client].account, after[client].total], dtype=torch.float64)
            for client in sorted(after)
        }

    def _record(self, client: str) -> Record:
        return self.records.get(client, Record())

    def judge(self, after: State, shares: Mapping[str, float], without: Callable[[str], State]) -> Verdict:
        """The round that led to `after` with these shares. without(client) is what it leads to without that client.

        Without the last client the round leads nowhere.
        """
        reached = _finite(self.measure(after))
        rest = {c: self._rest(without, c) if len(shares) > 1 else self.before for c in shares}
        idle = {c: max(shares[c] * (self.before - error), 0.0) for c, error in rest.items()}
        harm = {c: reached - error - idle[c] for c, error in rest.items()}
        over = {c: self._excess(c, harm[c], idle[c]) for c in shares}
        worst = max(over, key=lambda client: over[client])
        stats = {"public_error": reached, "max_public_harm": max(harm.values())}
        if over[worst] <= 0.0 and reached - self.before <= _TOGETHER * self._little:
            return Verdict(stats=stats, harm=harm)
        useless = over[worst] > 0.0 and self._is_useless(worst, harm[worst])
        reason = self._explain(worst, reached, rest[worst], alone=over[worst] > 0.0, useless=useless)
        return Verdict({worst: reason}, stats, {worst: harm[worst]})

    def _excess(self, client: str, harm: float, idle: float) -> float:
        """By how much its account is over what it may; at most this harm. idle: its share of the others' gain."""
        allowed = self._little if self._is_useless(client, harm) else max(idle, self._little)
        return min(self._record(client).charge(harm).account - allowed, harm)

    def _is_useless(self, client: str, harm: float) -> bool:
        """Whether its rounds so far, this one included, did more harm than good; a first one says nothing."""
        return client in self.records and self._record(client).charge(harm).total > 0.0

    @property
    def _little(self) -> float:
        return self.tolerance * max(self.before, _LITTLE)

    def _rest(self, without: Callable[[str], State], client: str) -> float:
        try:
            return _finite(self.measure(without(client)))
        except Exception:  # the others fail: then this one is not to blame
            return _WORST

    def _explain(self, client: str, reached: float, rest: float, *, alone: bool, useless: bool) -> str:
        what = "with its update" if alone else "the round as a whole does harm: with this update"
        past = self._record(client).account
        return (
            f"{what} the error on federation.public is {reached:.4g}, without it {rest:.4g}; before the round it was "
            f"{self.before:.4g}{f', and its earlier harm is {past:.2g}' if past else ''}"
            f"{', and it has done more harm than good' if useless else ''} (federation.public_tolerance is "
            f"{self.tolerance:g})"
        )


def _finite(error: float) -> float:
    return error if math.isfinite(error) else _WORST
