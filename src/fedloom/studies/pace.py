"""How long a run will take, from its first two rounds, played for real in a folder that is thrown away."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fedloom.methods.method import Method
from fedloom.records.config import Config
from fedloom.records.events import Scores, Silent
from fedloom.server import local

TRIED = 2
"""Rounds that are tried: merging methods are slower from the second on."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a run's parts: loading and what else is around; one evaluation; one round without one."""

    around_s: float
    evaluation_s: float
    round_s: float

    def seconds(self, config: Config) -> float:
        """Seconds of a whole run with these settings."""
        rounds = config.federation.num_rounds
        return self.around_s + count_evaluations(config) * self.evaluation_s + rounds * self.round_s


class _Enough(Exception):
    """Raised to end a trial: the rounds to be timed are over."""


class Watch(Silent):
    """Keeps the seconds of each round, and ends the run after `TRIED`; number 0 is the evaluation before the first."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def round_finished(
        self, round: int, num_rounds: int, scores: Scores | None, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """Remember. Raises _Enough when that was the last one of interest."""
        self.seconds[round] = seconds
        if round == TRIED:
            raise _Enough


def count_evaluations(config: Config) -> int:
    """How often a run is evaluated: before the first round, every eval_every rounds, and after the last one."""
    rounds, every = config.federation.num_rounds, config.federation.eval_every
    return 1 + (-(-rounds // every) if every else 1)


def measure_pace(config: Config, method: Method | None = None) -> Pace:
    """Play a run up to its second round, without evaluations on the way. Raises what the run itself would raise.

    method: takes the place of the one that the settings name.
    """
    rounds = max(TRIED + 1, config.federation.num_rounds)  # the last round would be evaluated
    some = config.federation.model_copy(update={"num_rounds": rounds, "eval_every": 0})
    watch, began = Watch(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedloom-") as folder, contextlib.suppress(_Enough):
        untold = config.output.model_copy(update={"report_to": ()})  # a trial is no run that anybody looks for
        short = config.model_copy(update={"federation": some, "output": untold})
        local.run_local(short, Path(folder) / "run", observer=watch, method=method)
    around = time.perf_counter() - began - sum(watch.seconds.values())
    return Pace(around, watch.seconds[0], watch.seconds[TRIED])
