"""The trackers, one row each. A new one is a file with a function that opens it, and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from fedloom.errors import ConfigError
from fedloom.records.session import EndStatus
from fedloom.trackers.points import Point


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run before its points.

    id: the run's own, which stays when it goes on. name, project: how people find it. folder: of the run. began: in
    seconds since 1970. settings: dotted key → value, without what names clients or addresses. facts: more of the kind.
    """

    id: str
    name: str
    project: str
    folder: Path
    began: float = 0.0
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ending:
    """How the run ended, or stands where its process is gone. sums: numbers of the whole run, by name."""

    status: EndStatus
    reason: str = ""
    sums: Mapping[str, float] = field(default_factory=dict)


class Sink(Protocol):
    """One tracker, open for one run. Any method may raise anything: the run does not notice.

    `send` is given the points of a run from its first one on. It may be given each again, by this process or by a later
    one, after any of them was killed at any moment. No point may then stand twice at the tracker, and none be missing.
    """

    def send(self, points: Sequence[Point]) -> None:
        """Have the tracker hold these points; where it returns they are safe there."""

    def end(self, ending: Ending) -> None:
        """Say how the run ended, and let go of the tracker. The run may go on later."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """title: its name for people. library: what must be installed. place: module and function that open a `Sink`."""

    title: str
    library: str
    place: tuple[str, str]

    @property
    def is_installed(self) -> bool:
        """Whether its library is there."""
        return find_spec(self.library) is not None

    def open(self, run: TrackedRun) -> Sink:
        """Begin to track a run, or go on with it."""
        opener: Callable[[TrackedRun], Sink] = getattr(
            import_module(f"fedloom.trackers.{self.place[0]}"), self.place[1]
        )
        return opener(run)


TRACKERS: Mapping[str, Tracker] = {
    "tensorboard": Tracker("TensorBoard", "tensorboard", ("event_files", "EventFiles")),
    "mlflow": Tracker("MLflow", "mlflow", ("mlflow_run", "MlflowRun")),
    "wandb": Tracker("Weights & Biases", "wandb", ("wandb_run", "WandbRun")),
    "trackio": Tracker("trackio", "trackio", ("trackio_run", "TrackioRun")),
}
"""Name, as in output.report_to and of the extra to install → the tracker."""


def check_trackers(names: Sequence[str], key: str = "output.report_to") -> None:
    """Raises ConfigError for a name that is none of a tracker, and for one whose library is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"{key} names {name!r}: expected some of {', '.join(TRACKERS)}")
        if not TRACKERS[name].is_installed:
            raise ConfigError(
                f'{key} names {name!r}, which is not installed here: pip install "fedloom[{name}]", or leave it out'
            )
