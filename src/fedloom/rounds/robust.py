"""What the clients of a round count for where one of them may lie: shares bent by a rule, with every method.

Nothing here refuses an honest specialist for being one: the usual rule, clip, leaves directions alone and bounds how
far one client can move the model. Who does harm is found by what it gets wrong of public examples (`trial`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedloom.methods.method import State
from fedloom.rounds.caps import FEWEST, cap_shares, share_out
from fedloom.rounds.checks import UpdateFacts
from fedloom.rounds.cohort import Cohort
from fedloom.rounds.geometry import gram_matrix
from fedloom.rounds.job import Job
from fedloom.rounds.rules import RULES, change_norms, clip_factors, most_faults


@dataclass(frozen=True, slots=True)
class Weighed:
    """The cohort with its shares. notes: what was bounded; aside: whom the rule has left out, and why."""

    cohort: Cohort
    notes: Sequence[str] = ()
    aside: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Scales:
    """Weighs the clients of one round; looks at what they sent once, however often some of them are weighed anew.

    blank: the cohort of all, without shares.
    """

    job: Job
    state: State
    blank: Cohort
    clients: tuple[str, ...] = ()
    gram: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def weigh(self, passed: Mapping[str, UpdateFacts], gone: int = 0) -> Weighed:
        """Shares of these clients. gone: how many were refused in this round as liars already."""
        examples = {client: one.examples for client, one in passed.items()}
        shares, notes = share_out(examples, self.job.weighting, self.job.caps)
        aside: dict[str, str] = {}
        if self.job.robust.rule != "none" and len(shares) >= FEWEST:
            shares, bent, aside = self._bend(shares, passed, gone)
            notes += bent
        return Weighed(replace(self.blank, weights=shares, facts=passed), notes, aside)

    def _bend(
        self, shares: Mapping[str, float], passed: Mapping[str, UpdateFacts], gone: int
    ) -> tuple[dict[str, float], list[str], dict[str, str]]:
        """(shares by the rule, what was cut in words, who is left out and why)."""
        rule, clients = self.job.robust, tuple(shares)
        gram = self._gram_of(clients, passed)
        norms = change_norms(gram)
        changes, values = (clip_factors(each, rule.clip_ratio) for each in (norms, [passed[c].norm for c in clients]))
        factors = torch.tensor([min(pair) for pair in zip(changes, values, strict=True)], dtype=torch.float64)
        masses = torch.tensor([shares[client] for client in clients], dtype=torch.float64)
        notes = [
            f"client {client} counts for {factor**2:.1%} of its share: its change has norm {norm:.3g} "
            f"(federation.clip_ratio is {rule.clip_ratio:g})"
            for client, factor, norm in zip(clients, factors.tolist(), norms, strict=True)
            if factor < 1.0
        ]
        faults = self._faults(len(clients), gone)
        if faults > 0:
            # Distances are of clipped updates: one that is huge would otherwise be the only thing that they see.
            masses = RULES[rule.rule](factors[:, None] * gram * factors[None, :], masses, faults)
        elif not notes:
            return dict(shares), [], {}  # to the bit what they are without a rule
        masses = masses * factors.square()
        found = dict(zip(clients, (masses / masses.sum()).tolist(), strict=True))
        kept = {client: share for client, share in found.items() if share > 0}
        why = f"it lies farthest from the others of the round (federation.robust is {rule.rule!r})"
        # What a rule takes from some goes to the others: none of them may have too much by that.
        return cap_shares(kept, self.job.caps.max_share), notes, {c: why for c in found if c not in kept}

    def _faults(self, clients: int, gone: int) -> int:
        """Liars that the rule has still to reckon with; 0 where it only clips."""
        rule = self.job.robust
        if rule.rule not in RULES:
            return 0
        return min(rule.faults(clients + gone) - gone, most_faults(rule.rule, clients))

    def _gram_of(self, clients: Sequence[str], passed: Mapping[str, UpdateFacts]) -> Tensor:
        if not set(clients) <= set(self.clients):
            whole = replace(self.blank, weights=dict.fromkeys(clients, 0.0), facts=passed)
            self.clients = tuple(clients)
            self.gram = gram_matrix(self.job.method, self.state, whole, clients)
        places = [self.clients.index(client) for client in clients]
        return self.gram[places][:, places]
