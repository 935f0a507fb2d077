"""What a run tells whoever watches it. Engines call an `Observer`; the command line draws it; tests stay silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedloom.errors import RoundError
from fedloom.records.ledger import Evaluation

Scores = Mapping[str, Evaluation]
"""Domain → what its held-out examples were scored, as it stands in the ledger."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known before the first round. `first_round` is greater than 1 where a run is resumed.

    warnings: what the user should know of data and settings. together: whether clients train at the same time.
    """

    method: str
    model: str
    clients: tuple[str, ...]
    num_rounds: int
    adapter_values: int
    out: Path
    first_round: int = 1
    warnings: tuple[str, ...] = ()
    together: bool = False


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a finished run amounts to: held-out exact match (0 … 1) by domain before the first and after the last round,
    bytes, seconds, lost energy.

    `lost_energy` is the share of ‖ΔW‖² that the exported adapter lacks where its rank was capped, otherwise 0.
    failure: why the run came to nothing and left no adapter; empty where it came to something. notes: what the user
    should know of how it ended.
    """

    out: Path
    method: str
    num_rounds: int
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    lost_energy: float = 0.0
    failure: str = ""
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises RoundError where the run came to nothing."""
        if self.failure:
            raise RoundError(f"the run in {self.out} failed: {self.failure}")


class Observer(Protocol):
    """Calls in the order of a run. Bytes are sizes of payloads: of one turn, or of the whole round."""

    def run_started(self, facts: RunFacts) -> None:
        """The model is loaded and the clients are known."""

    def client_started(self, round: int, client: str) -> None:
        """A client begins its turn."""

    def client_finished(self, round: int, client: str, loss: float, bytes_up: int, bytes_down: int) -> None:
        """A client has sent its update."""

    def noted(self, round: int, text: str) -> None:
        """Something went otherwise than it should: who was refused and why, who dropped out."""

    def round_finished(
        self, round: int, num_rounds: int, scores: Scores | None, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """The server has aggregated; `scores` is None where the round was not evaluated."""

    def run_finished(self, summary: RunSummary) -> None:
        """Everything is written."""


class Silent:
    """An observer that says nothing."""

    def run_started(self, facts: RunFacts) -> None:
        """Nothing."""

    def client_started(self, round: int, client: str) -> None:
        """Nothing."""

    def client_finished(self, round: int, client: str, loss: float, bytes_up: int, bytes_down: int) -> None:
        """Nothing."""

    def noted(self, round: int, text: str) -> None:
        """Nothing."""

    def round_finished(
        self, round: int, num_rounds: int, scores: Scores | None, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """Nothing."""

    def run_finished(self, summary: RunSummary) -> None:
        """Nothing."""
