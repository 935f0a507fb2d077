"""What a worker is asked to do: a client's turn, the scores of one domain, answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.model.answers import Answered
from fedloom.model.evaluate import Scores
from fedloom.rounds.turns import ClientTurn, client_turn
from fedloom.workspace.assemble import Setup


class Task(Protocol):
    """A piece of work that depends on the run's set-up and on itself alone, so that it can be done anew anywhere."""

    def do(self, setup: Setup) -> Any:  # noqa: ANN401 (each task has a result of its own)
        """The result."""

    def describe(self) -> str:
        """What it is about, for messages."""


@dataclass(frozen=True, eq=False, slots=True)
class Turn:
    """A client's turn from a state that is in step with the server. secret: of the run's noise (`Setup.secret`)."""

    client: str
    state: State
    round: int
    secret: bytes = field(default=b"", repr=False)

    def do(self, setup: Setup) -> ClientTurn:
        """The turn, without the tensors that whoever asks has already or does not need."""
        train = replace(setup, secret=self.secret).train(self.client) if self.secret else setup.train(self.client)
        turn = client_turn(setup.job, self.client, self.state, [], train, self.round)
        nothing = LoraState()
        state = replace(turn.state, adapter=nothing, frozen=nothing, tail=nothing, curvature=nothing)
        return replace(turn, state=state, trained=replace(turn.trained, adapter=nothing))

    def describe(self) -> str:
        return f"client {self.client}, round {self.round}"


@dataclass(frozen=True, eq=False, slots=True)
class Score:
    """Scores on one domain's held-out examples."""

    state: State
    domain: str

    def do(self, setup: Setup) -> dict[str, Scores]:
        """Domain → scores."""
        one = replace(setup.scorer, data={self.domain: setup.scorer.data[self.domain]})
        return replace(setup, scorer=one).evaluate(self.state)

    def describe(self) -> str:
        return f"the scores on {self.domain}"


@dataclass(frozen=True, eq=False, slots=True)
class Validate:
    """Scores on one domain's validation examples."""

    state: State
    domain: str

    def do(self, setup: Setup) -> dict[str, Scores]:
        """Domain → scores."""
        return replace(setup, validation={self.domain: setup.validation[self.domain]}).validate(self.state)

    def describe(self) -> str:
        return f"the scores on the validation set {self.domain}"


@dataclass(frozen=True, eq=False, slots=True)
class Public:
    """The error on the server's public examples, as `evaluate.mean_error` bends it."""

    state: State
    bend: float

    def do(self, setup: Setup) -> float:
        """The error."""
        return setup.public_error(self.state, self.bend)

    def describe(self) -> str:
        return "the error on federation.public"


@dataclass(frozen=True, eq=False, slots=True)
class Ask:
    """Answers to a few held-out examples."""

    state: State

    def do(self, setup: Setup) -> list[Answered]:
        """The answers."""
        return setup.answer(self.state)

    def describe(self) -> str:
        return "the answers to held-out examples"
