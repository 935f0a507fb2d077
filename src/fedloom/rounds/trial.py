"""Who does harm in a round, by what the model gets wrong of public examples that the server holds.

Each client's update is left out in turn, and what the server would broadcast then is tried: the method's own aggregate
of the others, as it would be received. A client is tried as a part of its round and not alone, so that a specialist,
who forgets the others' skills, is judged by what the round has of it. This holds with any number of liars, four sites
or two, since the error is no vote.

Without a client the others count for more, so that who sends nothing takes its share p of the gain which the others
would make alone: that much is no harm. Harm is what goes beyond it: what a client makes worse than if it had sent
nothing and kept its share, by a straight line between the error before the round and the one without it, as a share of
the error before: a tenth of it is as much early as late. An honest specialist mostly does none, even where its round is
better without it; who trains towards the opposite does p times that gain. Where the others alone make the error larger,
harm is what the client adds to that.

The error of a token is 1 − p^b, p the probability of the right one. b is a small number while nothing is learned, when
every p is next to nothing and 1 − p says the same whatever a liar does, and grows to one with what the model can do:
then what it cannot do, since nobody teaches it or nobody yet, hardly counts, and nobody is blamed for it.

A client is refused whose account would have more harm than is tolerated (`tolerance`); the account is max(0, account +
harm) after each round that it was taken in (Page's cumulative sum), so that a little harm in every round adds up, and
who does good on the whole stays at zero. All that a client would have done is summed up besides, with what it was
refused for: in its first round, and while that is more good than harm, it may do as much as p times the others' gain;
once it is more harm than is tolerated, it may do none. But whoever does no harm in this round is taken, whatever it has
done: a specialist that was bad for the first rounds is not shut out for it, and a liar has to be of use. Where the
round as a whole makes the error much larger, the client is refused without which it is best, until that is over: liars
who all do the same would otherwise hide behind one another. All this is in the server's memory, and so in every
checkpoint.

It costs one aggregate and one pass over the public examples for every client of a round and three more passes, and as
much again for everybody who is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.methods.method import State

Measure = Callable[[State, float], float]
"""What the model for which a state stands gets wrong of public examples, from 0 to 1, token by token bent by b."""
_LEAST_BEND = 0.2
"""b while the model can do nothing. With 1, liars in the first rounds went unseen; docs/LOG.md has both."""
_LITTLE = 0.1
"""Under this error harm is a share of this: nearer to zero most of it is noise."""
_RECORD = "harm/"
"""Before a client's name in the server's memory."""
_TOGETHER = 4.0
"""Tolerances of harm that a whole round may do: honest steps overshoot now and then."""
_WORST = 1.0
"""What a model counts for that answers nothing finite."""


@dataclass(frozen=True, slots=True)
class Record:
    """The harm of a client's rounds, as shares of the error before each.

    account: what it has done and not made good; total: the plain sum, with what it was refused for.
    """

    account: float = 0.0
    total: float = 0.0

    def charge(self, harm: float, *, refused: bool = False) -> Record:
        """After another round."""
        return Record(self.account if refused else max(self.account + harm, 0.0), self.total + harm)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round's trial has found. refused: the client that does most harm and why, where it is too much.

    stats: `public_error` after the round, and `max_public_harm`, the most harm that a client does. harm: of each
    client in this round. Harm is a share of the error before it.
    """

    refused: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    harm: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Trial:
    """The trials of one round.

    bend: b of its errors; before: the error before it; tolerance: the share of it that a client may do harm. records:
    client → what it has done in earlier rounds.
    """

    measure: Measure
    bend: float
    before: float
    tolerance: float
    records: Mapping[str, Record] = field(default_factory=dict)

    @classmethod
    def begin(cls, measure: Measure, state: State, tolerance: float) -> Trial:
        """From the server's state before the round."""
        held = {name.removeprefix(_RECORD): one for name, one in state.memory.items() if name.startswith(_RECORD)}
        bend = max(1.0 - _finite(measure(state, 1.0)), _LEAST_BEND)
        records = {client: Record(*one.tolist()) for client, one in held.items()}
        return cls(measure, bend, _finite(measure(state, bend)), tolerance, records)

    def remember(self, harm: Mapping[str, float], refused: Collection[str]) -> dict[str, Tensor]:
        """The records after a round in which clients did this harm, or would have, as the server's memory has them."""
        charged = {c: self._record(c).charge(done, refused=c in refused) for c, done in harm.items()}
        after = {**self.records, **charged}
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
        reached = self._error(after)
        rest = {c: self._rest(without, c) if len(shares) > 1 else self.before for c in shares}
        idle = {c: max(shares[c] * (self.before - error), 0.0) for c, error in rest.items()}
        harm = {c: (reached - error - idle[c]) / self._scale for c, error in rest.items()}
        over = {c: self._excess(c, harm[c], idle[c] / self._scale) for c in shares}
        worst = max(over, key=lambda client: over[client])
        stats = {"public_error": reached, "max_public_harm": max(harm.values())}
        if over[worst] <= 0.0 and reached - self.before <= _TOGETHER * self.tolerance * self._scale:
            return Verdict(stats=stats, harm=harm)
        useless = over[worst] > 0.0 and self._is_useless(worst, harm[worst])
        reason = self._explain(worst, reached, rest[worst], alone=over[worst] > 0.0, useless=useless)
        return Verdict({worst: reason}, stats, {worst: harm[worst]})

    def _excess(self, client: str, harm: float, idle: float) -> float:
        """By how much its account is over what it may; at most this harm. idle: its share of the others' gain."""
        past = self._record(client)
        if past.total > self.tolerance:
            return harm
        allowed = self.tolerance if self._is_useless(client, harm) else max(idle, self.tolerance)
        return min(past.charge(harm).account - allowed, harm)

    def _is_useless(self, client: str, harm: float) -> bool:
        """Whether its rounds so far, this one included, did more harm than good; a first one says nothing."""
        return client in self.records and self._record(client).charge(harm).total > 0.0

    @property
    def _scale(self) -> float:
        return max(self.before, _LITTLE)

    def _error(self, state: State) -> float:
        return _finite(self.measure(state, self.bend))

    def _rest(self, without: Callable[[str], State], client: str) -> float:
        try:
            return self._error(without(client))
        except Exception:  # the others fail: then this one is not to blame
            return _WORST

    def _explain(self, client: str, reached: float, rest: float, *, alone: bool, useless: bool) -> str:
        what = "with its update" if alone else "the round as a whole does harm: with this update"
        past = self._record(client).account
        return (
            f"{what} the error on federation.public is {reached:.4g}, without it {rest:.4g}; before the round it was "
            f"{self.before:.4g}{f', and its earlier harm is {past:.2%}' if past else ''}"
            f"{', and it has done more harm than good' if useless else ''} (federation.public_tolerance is "
            f"{self.tolerance:g})"
        )


def _finite(error: float) -> float:
    return error if math.isfinite(error) else _WORST
