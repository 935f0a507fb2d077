"""MLflow: wherever MLFLOW_TRACKING_URI says, a run in the experiment that is called like the project.

The run is found again by a tag with fedloom's own id for it, so that one that was killed while MLflow made its run does
not end as two. What MLflow has of a run that it knows is asked for, metric by metric, before more is sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedloom.trackers.points import Point
from fedloom.trackers.sinks import Ending, TrackedRun

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

TAG = "fedloom.id"
_STATES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_USUAL = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # by itself it would try for minutes; the next look tries again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""What holds unless the environment says otherwise."""
_MOST_VALUE = 500
"""Characters of a parameter; MLflow's servers of before 2.8 took no more."""


class MlflowRun:
    """A sink."""

    def __init__(self, run: TrackedRun) -> None:
        for name, value in _USUAL.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        experiment = _experiment(self._client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.project)
        self._steps: dict[str, set[int]] = {}  # metric → rounds that MLflow holds
        self._id, self._is_new = self._find_or_create(experiment, run)
        self._tell(run)

    def _find_or_create(self, experiment: str, run: TrackedRun) -> tuple[str, bool]:
        """(the identifier of MLflow's run, whether it was made now)."""
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", order_by=["start_time ASC"])
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id), False
        began = int(1000 * run.began)
        made = self._client.create_run(experiment, start_time=began, run_name=run.name, tags={TAG: run.id})
        return str(made.info.run_id), True

    def _tell(self, run: TrackedRun) -> None:
        """The settings as parameters. Those cannot change: what did since the run began becomes a tag."""
        from mlflow.entities import Param, RunTag

        told = {_key(key): str(value)[:_MOST_VALUE] for key, value in run.settings.items()}
        held = {} if self._is_new else self._client.get_run(self._id).data.params
        tags = {**run.facts, **{f"now.{key}": told[key] for key in told if held.get(key, told[key]) != told[key]}}
        self._client.log_batch(
            self._id,
            params=[Param(key, value) for key, value in told.items() if key not in held],
            tags=[RunTag(_key(key), value) for key, value in tags.items()],
        )

    def send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for point in points:
            left = {key: value for key, value in point.values.items() if point.round not in self._held(_key(key))}
            if not left:
                continue
            when = int(1000 * point.time)
            self._client.log_batch(
                self._id, metrics=[Metric(_key(key), value, when, point.round) for key, value in left.items()]
            )
            for key in left:
                self._held(_key(key)).add(point.round)

    def _held(self, key: str) -> set[int]:
        if key not in self._steps:
            history = [] if self._is_new else self._client.get_metric_history(self._id, key)
            self._steps[key] = {metric.step for metric in history}
        return self._steps[key]

    def end(self, ending: Ending) -> None:
        told = {"fedloom.state": ending.status, "fedloom.reason": ending.reason}
        for key, value in {**told, **{f"fedloom.{name}": f"{value:g}" for name, value in ending.sums.items()}}.items():
            self._client.set_tag(self._id, _key(key), value)
        self._client.set_terminated(self._id, _STATES[ending.status])


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w. /-]", "_", name)[:250]
