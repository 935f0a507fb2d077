"""What a run costs a client beside bytes: examples that went through the model, and seconds.

A forward pass and a backward pass are counted by the example. They follow from the settings: steps of all turns times
the examples of a step, once forward and once backward; a method of forward passes alone has two of them a direction
that it tries. Recomputed activations are not counted. Seconds are those that a run's training rows say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fedloom.errors import FedloomError
from fedloom.methods.table import build
from fedloom.records.config import Config
from fedloom.report.numbers import Report
from fedloom.workspace.data import sources_by_client

BACKWARD = 2.0
"""Forward passes that a backward pass takes as long as: gradients of inputs and of what they are multiplied with."""


@dataclass(frozen=True, slots=True)
class Work:
    """Of one client over a whole run, the mean over clients and seeds; NaN what is not known.

    forward, backward: passes of an example. seconds: of its training. walls: seconds of the whole run, from start to
    end, over each of `points.LINKS`.
    """

    forward: float = math.nan
    backward: float = math.nan
    seconds: float = math.nan
    walls: tuple[float, ...] = ()

    @property
    def passes(self) -> float:
        """All passes, as so many forward ones."""
        return self.forward + BACKWARD * self.backward


def count_passes(config: Config) -> tuple[float, float]:
    """(forward, backward) passes of an example, of one client over a run, the mean over all; NaN where steps follow
    from epochs, or where the clients' data are not there to be counted.
    """
    training, federation = config.training, config.federation
    try:
        clients = federation.num_clients or len(sources_by_client(config.data.source))
    except FedloomError:
        clients = 0
    if not clients or training.max_steps is None:
        return math.nan, math.nan
    turns = federation.num_rounds * federation.clients_per_round(clients) / clients
    drawn = turns * training.max_steps * training.batch
    forward = build(config.method.name, config.method.settings).forward
    return (2 * forward.perturbations * drawn, 0.0) if forward else (drawn, drawn)


def measure_seconds(runs: Sequence[Report]) -> float:
    """Seconds that a client's training took over a run."""
    return fmean(run.train_seconds / len(run.run.clients) for run in runs)
