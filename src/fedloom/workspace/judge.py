"""Who plays the model that a state stands for, where that is not the process with the set-up."""

from __future__ import annotations

from typing import Protocol

from fedloom.methods.method import State
from fedloom.model.answers import Answered
from fedloom.model.evaluate import Scores


class Judge(Protocol):
    """Who plays the model that a state stands for, in place of the process that has the set-up."""

    def evaluate(self, state: State) -> dict[str, Scores]:
        """See `assemble.Setup.evaluate`."""

    def validate(self, state: State) -> dict[str, Scores]:
        """See `assemble.Setup.validate`."""

    def public_error(self, state: State, bend: float) -> float:
        """See `assemble.Setup.public_error`."""

    def answer(self, state: State) -> list[Answered]:
        """See `assemble.Setup.answer`."""
