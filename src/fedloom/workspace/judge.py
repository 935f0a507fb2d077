"""Who scores a run's model, where the process that plays the rounds has no weights."""

from __future__ import annotations

from typing import Protocol

from fedloom.methods.method import State
from fedloom.model.answers import Answered
from fedloom.model.evaluate import Scores


class Judge(Protocol):
    """Who plays the model that a state stands for, in place of the process that has the set-up."""

    def evaluate(self, state: State) -> dict[str, Scores]:
        """See `Setup.evaluate`."""

    def validate(self, state: State) -> dict[str, Scores]:
        """See `Setup.validate`."""

    def answer(self, state: State) -> list[Answered]:
        """See `Setup.answer`."""
