"""When a run ends before its last round, and which round's model it leaves: by scores on the validation split.

All of it follows from the ledger's rows, so that a run which goes on after a crash decides as it would have.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedloom.methods.method import State
from fedloom.records.config import FederationSettings
from fedloom.records.ledger import Choice, Evaluation, Row, Validation, read_rows

if TYPE_CHECKING:
    from fedloom.server.loop import Rounds

GAINS: Mapping[str, Callable[[Validation], float]] = {
    "loss": lambda row: -row.loss,
    "exact_match": lambda row: row.exact_match,
}
"""metric_for_best_model → what is better the larger it is."""


@dataclass(slots=True)
class Course:
    """The run's scores on the validation split so far.

    best: the round with the best score, the first of equals. stale: evaluations in a row, up to the newest, that were
    not better than the best one before them by more than early_stopping_threshold, as transformers counts.
    """

    settings: FederationSettings
    best: int = 0
    stale: int = 0
    gains: dict[int, float] = field(default_factory=dict)

    def take(self, rows: Iterable[Row]) -> None:
        """Take in rows of the ledger, in its order; those of one round, one for each domain, belong together."""
        rounds: dict[int, list[float]] = {}
        for row in rows:
            if isinstance(row, Validation):
                rounds.setdefault(row.round, []).append(GAINS[self.settings.metric_for_best_model](row))
        for round, found in rounds.items():
            self._add(round, sum(found) / len(found))

    def _add(self, round: int, gain: float) -> None:
        before = self.gains.get(self.best, -math.inf)
        self.gains[round] = gain = -math.inf if math.isnan(gain) else gain
        if gain > before:
            self.best = round
        better = gain > before and gain - before > self.settings.early_stopping_threshold
        self.stale = 0 if better else self.stale + 1

    @property
    def is_over(self) -> bool:
        """Whether the score has stood still for so long that the run ends."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.stale >= patience

    def describe(self) -> str:
        """The best score so far, in words."""
        metric = self.settings.metric_for_best_model
        gain = self.gains[self.best]
        return f"{metric.replace('_', ' ')} of {-gain if metric == 'loss' else gain:.4g} after round {self.best}"


def validate(rounds: Rounds, round: int) -> None:
    """Score the server's model on the validation split, recorded; keep it where it is the best so far."""
    rows = [
        Validation(round, domain, score.exact_match, score.loss)
        for domain, score in rounds.setup.validate(rounds.server).items()
    ]
    for row in rows:
        rounds.folder.ledger.append(row)
    rounds.course.take(rows)
    if rounds.course.best == round and rounds.setup.config.federation.load_best_model_at_end:
        rounds.best = rounds.server


def choose_model(rounds: Rounds) -> None:
    """Say how a run ends that is judged on the validation split; where the settings ask for it, with the best round's
    model in place of the last one's. Its held-out scores are recorded once more, as those of the end.
    """
    ledger, course, last = rounds.folder.ledger, rounds.course, rounds.round
    if not rounds.setup.config.federation.validates:
        return
    why = f"no better for {course.stale} evaluations" if course.is_over else "the last round"
    exported = last if rounds.best is None else course.best
    ledger.append(Choice(last, exported))
    left = f"the model of round {exported} is delivered and exported"
    ledger.note(last, f"ended after round {last}, {why}: best validation {course.describe()}; {left}")
    if rounds.best is None or exported == last:
        return
    rounds.server = go_back(rounds.server, rounds.best)
    rounds.sites.advance(rounds, rounds.full_state(), ())
    ledger.sync()
    for row in read_rows(ledger.path):
        if isinstance(row, Evaluation) and row.round == exported:
            ledger.append(replace(row, round=last))


def go_back(server: State, best: State) -> State:
    """The best round's model as the newest version: no broadcast leads there, so everybody gets the full state."""
    digest = hashlib.blake2b(f"{server.digest} back to {best.digest}".encode(), digest_size=16).hexdigest()
    return replace(best, version=server.version + 1, digest=digest)
