"""What can be known to be wrong with the runs of a study before the first of them is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError, FedloomError
from fedloom.studies.compare import Trial, client_names

if TYPE_CHECKING:
    from fedloom.model.placement import LinearModule

Modules = Callable[[str], "Mapping[str, LinearModule]"]


def check_trials(made: Sequence[Trial]) -> None:
    """Raise ConfigError that names every variant which cannot be played, and why.

    Looked at: the method and its settings, ranks and modules of all clients on the model's shapes, metrics. No weights
    are read, and nothing is trained.
    """
    modules, clients = cache(_linear), {}
    wrong: dict[str, str] = {}
    for trial in {trial.label: trial for trial in made}.values():
        data, federation = trial.config.data, trial.config.federation
        held = (data.model_dump_json(), federation.num_clients, federation.participants)
        try:
            if held not in clients:
                clients[held] = client_names(trial.config)
            _check(trial, modules(trial.config.model.path), clients[held])
        except FedloomError as error:
            wrong[trial.label] = str(error)
    labels = len({trial.label for trial in made})
    if len(wrong) == 1 == labels:
        raise ConfigError(next(iter(wrong.values())))
    if wrong:
        lines = [f"{label}: {reason}" for label, reason in wrong.items()]
        raise ConfigError(
            "\n  ".join([f"{len(wrong)} of {labels} variants cannot be played, so none was begun:", *lines])
        )


def _linear(path: str) -> Mapping[str, LinearModule]:
    from fedloom.model.base import empty_base
    from fedloom.model.peft_bridge import linear_modules

    return linear_modules(empty_base(path))


def _check(trial: Trial, modules: Mapping[str, LinearModule], clients: Sequence[str]) -> None:
    from fedloom.model.metrics import find_metrics
    from fedloom.workspace.plan import choose_method, plan_job

    plan_job(modules, trial.config, clients, choose_method(trial.config, trial.method))
    find_metrics(trial.config.evaluation.metrics)
