"""One model scored from Python: a run, an adapter, or a base model alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedloom.face.run import Run
from fedloom.face.settings import Settings, as_overrides
from fedloom.records.config import Config
from fedloom.studies.evaluation import Evaluated, evaluate_target, find_target


def evaluate(
    target: Run | str | Path,
    config: Config | str | Path | None = None,
    *,
    data: str | Path | None = None,
    base_model: str | Path | None = None,
    with_adapter: bool = True,
    metrics: Sequence[str] | None = None,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    confirm_run_unsafe_code: bool = False,
    settings: Settings | None = None,
) -> Evaluated:
    """Score a model on held-out data, and on tasks of the lm-evaluation-harness (the extra `eval`).

    target: a `Run`, or the folder of a run, of any PEFT adapter or of a base model. config: the settings whose held-out
    data, template and metrics are used, instead of the run's own; data, metrics and settings (dotted keys) change them.
    base_model: if not the one that the adapter names; with_adapter=False scores the base model alone.
    tasks: names of the harness's tasks, and of your own in the folder include_path; those of the settings if left out.
    limit: examples of each, at most; confirm_run_unsafe_code: tasks that execute what the model writes may do so.
    Raises ConfigError where there is nothing to score on or a library is missing, ModelError for an adapter that does
    not fit the base model.
    """
    own: dict[str, object] = dict(settings or {})
    if data is not None:
        own["data.heldout"] = str(data)
    if metrics is not None:
        own["evaluation.metrics"] = list(metrics)
    found = find_target(
        target.folder if isinstance(target, Run) else target,
        config if isinstance(config, Config) or config is None else Path(config),
        base_model=None if base_model is None else str(base_model),
        with_adapter=with_adapter,
        overrides=as_overrides(own),
    )
    return evaluate_target(
        found,
        tasks,
        include_path=None if include_path is None else Path(include_path),
        limit=limit,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
