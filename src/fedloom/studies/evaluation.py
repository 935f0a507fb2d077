"""Scores of one model, with or without an adapter, outside a run: on held-out examples, and on harness tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.adapters.config import read_config
from fedloom.adapters.folder import AdapterFolder, other_base_note
from fedloom.adapters.settings import CONFIG_FILE, WEIGHTS_FILE
from fedloom.errors import ConfigError, ModelError
from fedloom.model.base import load_base, quiet_transformers
from fedloom.model.evaluate import lm_eval_tasks
from fedloom.model.foreign import raise_in_one_line
from fedloom.model.limits import model_limits
from fedloom.model.scorer import build_scorer, evaluation_row
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Evaluation
from fedloom.report.numbers import values_of
from fedloom.studies.compare import apply_overrides
from fedloom.workspace.assemble import set_threads
from fedloom.workspace.data import heldout_examples
from fedloom.workspace.tokenized import tokenize_scored


@dataclass(frozen=True, slots=True)
class Target:
    """What is scored: a base model and, unless it is None, the folder of an adapter on it; by which settings.

    The settings say where held-out examples are and how they are read.
    """

    model: str
    adapter: Path | None
    config: Config


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a model scores. rows: domain → its scores; tasks: harness task → metric → value; notes: what to know."""

    model: str
    adapter: str | None
    rows: Mapping[str, Evaluation] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Measure ("exact_match", "loss", "bits_per_byte", those of evaluation.metrics) → domain and "mean" → value."""
        return values_of(self.rows)


def find_target(
    target: str | Path,
    config: Path | Config | None = None,
    *,
    base_model: str | None = None,
    with_adapter: bool = True,
    overrides: Sequence[str] = (),
) -> Target:
    """What `target` is: the folder of a run, of a PEFT adapter or of a base model, or a base model's Hub name.

    config: settings, instead of a run's own. Raises ConfigError where it is none of these.
    """
    folder = Path(target)
    run = folder / "config.toml" if (folder / "ledger.jsonl").is_file() else None
    if isinstance(config, Config):
        settings = apply_overrides(config, overrides)
    elif path := config or run:
        settings = load_config(path, overrides)
    else:
        settings = apply_overrides(Config(), overrides)
    adapter = folder / "adapter" if run else folder
    if (adapter / CONFIG_FILE).is_file():
        named = base_model or (settings.model.path if run else _base_of(adapter))
        return Target(named, adapter if with_adapter else None, settings)
    if run:
        raise ConfigError(f"{folder} holds no adapter yet: the run is not over; go on with it, or wait")
    if folder.exists() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is nothing that can be scored: expected the folder of a run, of a PEFT adapter ({CONFIG_FILE}) "
            "or of a base model (config.json)"
        )
    if base_model:
        raise ConfigError(f"{folder} is a base model already: leave base_model {base_model!r} out")
    return Target(str(target), None, settings)


def _base_of(adapter: Path) -> str:
    named = read_config(adapter).get("base_model_name_or_path")
    if not named:
        raise ConfigError(f"{adapter / CONFIG_FILE} does not say which base model it is for: give one (--base-model)")
    return str(named)


def evaluate_target(
    target: Target,
    tasks: Sequence[str] = (),
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    confirm_run_unsafe_code: bool = False,
) -> Evaluated:
    """Score it on the held-out examples of its settings, if they name any, and on tasks of the lm-evaluation-harness.

    tasks: those of the settings if left out; include_path: a folder with tasks of one's own, likewise; limit: examples
    of a task, at most; confirm_run_unsafe_code: whether what the model writes may be executed, where a task does so.
    Raises ConfigError where there is nothing to score on, ModelError for an adapter that does not fit.
    """
    config = target.config
    own = config.evaluation
    tasks = tasks or own.tasks
    include_path = include_path or (Path(own.include_path) if own.include_path else None)
    set_threads(config)
    heldout = heldout_examples(config.data)
    if not heldout and not tasks:
        raise ConfigError("there is nothing to score on: name held-out data (data.heldout), or tasks of the harness")
    settings = config.model
    model, tokenizer = load_base(target.model, settings.dtype, settings.quantization, settings.device)
    scored = tokenize_scored("held-out", heldout, config.data, tokenizer, model_limits(model))
    scorer = build_scorer(scored, tokenizer, config.evaluation)
    if target.adapter is not None:
        _check_weights(target.adapter)
        with raise_in_one_line(ModelError, f"{target.adapter} does not fit {target.model}"), quiet_transformers():
            told = model.load_adapter(str(target.adapter.absolute()))
            odd = sorted([*told.missing_keys, *told.unexpected_keys])
        if odd:
            raise ModelError(f"{target.adapter} does not fit {target.model}: {odd[0]} is missing or left over")
    rows = {domain: evaluation_row(0, domain, scores) for domain, scores in scorer.score(model).items()}
    return Evaluated(
        model=target.model,
        adapter=None if target.adapter is None else str(target.adapter),
        rows=rows,
        tasks=lm_eval_tasks(
            model,
            tokenizer,
            tasks,
            include_path=include_path,
            limit=limit,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
        if tasks
        else {},
        notes=_notes(target),
    )


def _check_weights(adapter: Path) -> None:
    """PEFT would read a pickle in the place of the safetensors file."""
    if not (adapter / WEIGHTS_FILE).is_file():
        raise ModelError(f"{adapter} holds no {WEIGHTS_FILE}: save the adapter with safe_serialization=True")


def _notes(target: Target) -> tuple[str, ...]:
    if target.adapter is None:
        return ()
    try:
        note = other_base_note([AdapterFolder(target.adapter)], target.model)
    except ModelError:  # of a kind that fedloom neither trains nor merges, and PEFT has loaded
        note = None
    return (note,) if note else ()
