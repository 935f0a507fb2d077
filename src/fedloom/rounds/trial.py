"""Who does harm in a round, by the loss on public examples that the server holds.

Each client's update is left out in turn, and what the server would broadcast then is tried: the method's own aggregate
of the others, as it would be received. A client is tried as a part of its round and not alone, so that a specialist,
who forgets the others' skills, is judged by what the round has of it. This holds with any number of liars, four sites
or two, since the loss is no vote.

It costs one aggregate and one pass over the public examples for every client of a round and one more, and as much again
less one client for everybody who is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedloom.methods.method import State

Loss = Callable[[State], float]
"""The mean loss on the public examples of the model that a state stands for, in nats a token."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round's trial has found. refused: the client that does most harm and why, where it is too much."""

    refused: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Trial:
    """The trials of one round. tolerance: share of the loss before the round by which a client may make it worse."""

    loss: Loss
    before: float
    tolerance: float

    @classmethod
    def begin(cls, loss: Loss, state: State, tolerance: float) -> Trial:
        """From the server's state before the round."""
        return cls(loss, loss(state), tolerance)

    def judge(self, after: State, clients: Collection[str], without: Callable[[str], State]) -> Verdict:
        """The round that led to `after`. without(client) is what it leads to without that client.

        Without the last client the round leads nowhere.
        """
        reached = _finite(self.loss(after))
        rest = {c: self._rest(without, c) if len(clients) > 1 else _finite(self.before) for c in clients}
        worst = min(rest, key=lambda client: rest[client])
        allowed = self.tolerance * _finite(self.before)
        harm = reached - rest[worst]
        stats = {"public_loss": reached, "max_public_harm": harm}
        stats |= {f"harm_{c}": reached - rest[c] for c in rest} | {"public_before": self.before}
        if harm <= allowed and reached <= _finite(self.before) * (1 + self.collective):
            return Verdict({}, stats)
        return Verdict({worst: self._explain(reached, rest[worst])}, stats)

    collective = 10.0

    def _rest(self, without: Callable[[str], State], client: str) -> float:
        try:
            return _finite(self.loss(without(client)))
        except Exception:  # the others fail: then this one is not to blame
            return math.inf

    def _explain(self, reached: float, rest: float) -> str:
        return (
            f"with its update the loss on federation.public is {reached:.4g}, without it {rest:.4g}; before the round "
            f"it was {self.before:.4g} (federation.public_tolerance is {self.tolerance:g})"
        )


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else 1e9
