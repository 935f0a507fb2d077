"""Who does harm in a round, by what the model gets wrong of public examples that the server holds.

Each client's update is left out in turn, and what the server would broadcast then is tried: the method's own aggregate
of the others, as it would be received. A client is tried as a part of its round and not alone, so that a specialist,
who forgets the others' skills, is judged by what the round has of it. This holds with any number of liars, four sites
or two, since the error is no vote.

Whose update does nothing takes its share p of the gain that the others would have made; who trains towards the
opposite takes 2 p. So a client is refused that takes more than that, unless it is little beside the error
(`tolerance`). Where the round as a whole makes the error much larger, the client is refused without which it is best,
until that is over: liars who all do the same would otherwise hide behind one another.

A liar that does a little harm in every round is found by its account, which is max(0, account + harm) after each round
(Page's cumulative sum): who makes the model better on the whole stays at zero. What a client has done is summed up
example by example as well, for the better and for the worse. A specialist undoes some of the others' work, but makes
its own examples better by about as much. A client that lies by little, or sends nothing of use, makes hardly any
example better: that one has no share of the others' gain to take. All this is in the server's memory, and so in every
checkpoint.

It costs one aggregate and one pass over the public examples for every client of a round and one more, and as much again
less one client for everybody who is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.methods.method import State

Measure = Callable[[State], Sequence[float]]
"""What each public example adds to the share, from 0 to 1, that the model gets wrong for which a state stands."""
_OPPOSITE = 2.0
"""Shares of the others' gain that a client takes whose update is the opposite of theirs."""
_LITTLE = 0.5
"""Under this error the tolerance is a share of this: nearer to zero most of it is noise."""
_USEFUL = 1 / 3
"""Better for worse below which a client is of no use. Liars by little had 0.2 from their second round on, and honest
specialists never under 0.4 once they had done more harm than is tolerated (docs/LOG.md)."""
_ACCOUNT, _DEEDS = "account/", "deeds/"
"""Before a client's name in the server's memory."""
_TOGETHER = 4.0
"""Tolerances by which a whole round may make the error larger: honest steps overshoot now and then."""
_WORST = 1.0
"""What a model counts for that answers nothing finite."""


@dataclass(frozen=True, slots=True)
class Deeds:
    """What a client has done to the error on the public examples: the sums over those that it made better and worse."""

    better: float = 0.0
    worse: float = 0.0

    @property
    def harm(self) -> float:
        """By how much it made the error larger."""
        return self.worse - self.better

    @property
    def useless(self) -> bool:
        """Whether hardly anything was better for it."""
        return self.better < _USEFUL * self.worse

    def __add__(self, other: Deeds) -> Deeds:
        return Deeds(self.better + other.better, self.worse + other.worse)

    @classmethod
    def between(cls, without: Sequence[float], reached: Sequence[float]) -> Deeds:
        """Of a client, from the examples' errors without it and with it."""
        made = [now - held for held, now in zip(without, reached, strict=True)]
        return cls(sum(max(-one, 0.0) for one in made), sum(max(one, 0.0) for one in made))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round's trial has found. refused: the client that does most harm and why, where it is too much.

    stats: `public_error` after the round, and `max_public_harm`, by how much a client makes it larger at most. deeds:
    of each client in this round.
    """

    refused: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)
    deeds: Mapping[str, Deeds] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Trial:
    """The trials of one round.

    errors: of the examples before it; tolerance: share of it by which a client may make it larger. accounts: client →
    the harm that it has done in earlier rounds and not made good; deeds: client → all that it has done in them.
    """

    measure: Measure
    errors: Sequence[float]
    tolerance: float
    accounts: Mapping[str, float] = field(default_factory=dict)
    deeds: Mapping[str, Deeds] = field(default_factory=dict)

    @classmethod
    def begin(cls, measure: Measure, state: State, tolerance: float) -> Trial:
        """From the server's state before the round."""
        accounts = {client: float(one) for client, one in _recall(state, _ACCOUNT).items()}
        deeds = {client: Deeds(*one.tolist()) for client, one in _recall(state, _DEEDS).items()}
        return cls(measure, _finite(measure(state)), tolerance, accounts, deeds)

    def remember(self, deeds: Mapping[str, Deeds]) -> dict[str, Tensor]:
        """Accounts and deeds after a round in which clients did this, as the server's memory has them."""
        held = {**self.accounts, **{client: self._charge(client, done) for client, done in deeds.items()}}
        sums = {**self.deeds, **{client: self._sum_up(client, done) for client, done in deeds.items()}}
        return {
            **{_ACCOUNT + client: torch.tensor(held[client], dtype=torch.float64) for client in sorted(held)},
            **{
                _DEEDS + client: torch.tensor([sums[client].better, sums[client].worse], dtype=torch.float64)
                for client in sorted(sums)
            },
        }

    def _charge(self, client: str, done: Deeds) -> float:
        return max(self.accounts.get(client, 0.0) + done.harm, 0.0)

    def _is_useless(self, client: str, done: Deeds) -> bool:
        """Whether its rounds so far say so; a first one says nothing."""
        return client in self.deeds and self._sum_up(client, done).useless

    def _sum_up(self, client: str, done: Deeds) -> Deeds:
        return self.deeds.get(client, Deeds()) + done

    def judge(self, after: State, shares: Mapping[str, float], without: Callable[[str], State]) -> Verdict:
        """The round that led to `after` with these shares. without(client) is what it leads to without that client.

        Without the last client the round leads nowhere.
        """
        parts = _finite(self.measure(after))
        reached = sum(parts)
        rest = {c: self._rest(without, c) if len(shares) > 1 else self.errors for c in shares}
        deeds = {client: Deeds.between(held, parts) for client, held in rest.items()}
        over = {c: self._charge(c, done) - self._allowed(c, done, sum(rest[c]), shares[c]) for c, done in deeds.items()}
        worst = max(over, key=lambda client: over[client])
        stats = {"public_error": reached, "max_public_harm": max(done.harm for done in deeds.values())}
        if over[worst] <= 0.0 and reached - self.before <= _TOGETHER * self._little:
            return Verdict(stats=stats, deeds=deeds)
        reason = self._explain(worst, deeds[worst], reached, sum(rest[worst]), alone=over[worst] > 0.0)
        return Verdict({worst: reason}, stats, {worst: deeds[worst]})

    def _allowed(self, client: str, done: Deeds, rest: float, share: float) -> float:
        """By how much a client may make the error larger than it is without it."""
        if self._is_useless(client, done):
            return self._little
        return max(_OPPOSITE * share * (self.before - rest), self._little)

    @property
    def before(self) -> float:
        """The error before the round."""
        return sum(self.errors)

    @property
    def _little(self) -> float:
        return self.tolerance * max(self.before, _LITTLE)

    def _rest(self, without: Callable[[str], State], client: str) -> Sequence[float]:
        try:
            return _finite(self.measure(without(client)))
        except Exception:  # the others fail: then this one is not to blame
            return _spread(len(self.errors))

    def _explain(self, client: str, done: Deeds, reached: float, rest: float, *, alone: bool) -> str:
        what = "with its update" if alone else "the round as a whole does harm: with this update"
        past = self.accounts.get(client, 0.0)
        useless = alone and self._is_useless(client, done)
        return (
            f"{what} the error on federation.public is {reached:.4g}, without it {rest:.4g}; before the round it was "
            f"{self.before:.4g}{f', and its earlier harm is {past:.2g}' if past else ''}"
            f"{', and hardly any example is better for it' if useless else ''} (federation.public_tolerance is "
            f"{self.tolerance:g})"
        )


def _recall(state: State, prefix: str) -> dict[str, Tensor]:
    """Client → what the server's memory has of it under this prefix."""
    return {name.removeprefix(prefix): one for name, one in state.memory.items() if name.startswith(prefix)}


def _finite(errors: Sequence[float]) -> Sequence[float]:
    return errors if math.isfinite(sum(errors)) else _spread(len(errors))


def _spread(examples: int) -> list[float]:
    return [_WORST / examples] * examples
