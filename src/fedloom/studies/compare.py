"""Several methods side by side: the same data, model, rounds and seeds, every run with a ledger of its own.

A variant is a method ("fedsrd"; "package.module:builder" for one of another package), a method with a preset
("fedsrd:paper") or with settings ("florist:tau=1.0,client_init=warm"; a key with a dot is of another table than the
method's, and a table's name means all of it: clients=null). "alone" trains every client by itself, "pooled" trains on
all data in one place.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError, RoundError
from fedloom.methods.fingerprint import fingerprint
from fedloom.methods.foreign import is_foreign
from fedloom.methods.method import Method
from fedloom.methods.table import METHODS, method_name
from fedloom.records.config import Config
from fedloom.records.configfile import merge_trees, override, parse
from fedloom.records.ledger import read_rows
from fedloom.records.text import file_name
from fedloom.report.numbers import Report, summarise
from fedloom.workspace.folder import holds_settings

if TYPE_CHECKING:
    from fedloom.studies.pace import Pace

FINISHED = "report.html"
"""The last file that a run writes: where it is, the run is complete."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One run that a study makes: its variant, seed, settings and folder.

    method: takes the place of the one in the settings. player(the run, whether it goes on) makes it where that is more
    than the settings say; last: the last file that it writes then.
    """

    label: str
    seed: int
    config: Config
    folder: Path
    method: Method | None = None
    player: Callable[[Trial, bool], None] | None = None
    last: str = FINISHED


def parse_variants(texts: Sequence[str]) -> list[str]:
    """Variants named by one or several texts, joined by commas; "all" stands for every method.

    A part such as "tau=1.0" belongs to the variant before it.
    """
    found: list[str] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        if "=" in part and ":" not in part and found:
            found[-1] += f",{part}"
        elif part:
            found += list(METHODS) if part == "all" else [part]
    return list(dict.fromkeys(found))


def plan_runs(config: Config, variants: Sequence[str | Method], seeds: Sequence[int], out: Path) -> list[Trial]:
    """Every variant with every seed; a variant that is several runs ("alone") has several labels.

    Raises ConfigError where two variants have one label.
    """
    made: list[Trial] = []
    for variant in variants:
        value = variant if isinstance(variant, Method) else None
        base = config if value is None else with_method(config, value)
        labels = expand_variant(config, variant) if isinstance(variant, str) else {variant.name: []}
        for label, overrides in labels.items():
            if any(trial.label == label for trial in made):
                raise ConfigError(
                    f"two of the methods are called {label!r}, and their runs would share a folder: name one of them "
                    "otherwise, such as with fedloom.replace(method, name=…)"
                )
            for seed in seeds:
                settings = apply_overrides(base, [*overrides, f"federation.seed={seed}"])
                made.append(Trial(label, seed, settings, out / file_name(label) / f"seed-{seed}", value))
    return made


def with_method(config: Config, method: Method) -> Config:
    """The settings of a run that is played with a `Method` value; they name it and tell it from others of its name."""
    settings = {"name": method.name, "fingerprint": fingerprint(method)}
    return parse({**config.model_dump(exclude_none=True), "method": settings}, "the settings of a Method")


def expand_variant(config: Config, variant: str) -> dict[str, list[str]]:
    """Label → overrides of the settings that make the variant."""
    special = {"alone": _alone, "pooled": _pooled}
    name = split_variant(variant)[0]
    return special[name](config) if name in special else {variant: variant_overrides(variant)}


def variant_overrides(variant: str) -> list[str]:
    """The overrides that a variant of a single method stands for."""
    name, rest = split_variant(variant)
    pairs = [part if "=" in part else f"preset={part}" for part in rest.split(",") if part]
    return [f"method.name={name}", *(_placed(pair) for pair in pairs)]


def split_variant(variant: str) -> tuple[str, str]:
    """(method, what follows it after a colon). "package.module:builder" is the method's name as a whole."""
    text, _, rest = variant.partition(":")
    head = method_name(text)
    builder, _, settings = rest.partition(":")
    known = head in METHODS or head in ("alone", "pooled")
    foreign = not known and is_foreign(variant) and builder.isidentifier()
    return (f"{head}:{builder}", settings) if foreign else (head, rest)


def _placed(pair: str) -> str:
    """The pair with its full key: a method's own key gets "method." in front, a section's name stays as it is."""
    key = pair.partition("=")[0]
    return pair if "." in key or key in Config.model_fields else f"method.{pair}"


def _alone(config: Config) -> dict[str, list[str]]:
    """FedIT with a single participant is that client training alone."""
    return {
        f"alone:{client}": ["method.name=fedit", f"federation.participants={_toml([client])}"]
        for client in client_names(config)
    }


def _toml(value: Sequence[str]) -> str:
    """A list as TOML writes it: as JSON does, but for one character more that is escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")


def _pooled(config: Config) -> dict[str, list[str]]:
    """One client that holds everything and takes as many steps as all clients together."""
    split = ["data.partitioner=iid", "federation.num_clients=1", "federation.participants=null"]
    if config.training.max_steps is not None:  # epochs over all examples are as many steps by themselves
        split.append(f"training.max_steps={config.training.max_steps * len(client_names(config))}")
    return {"pooled": ["method.name=fedit", *split]}


def client_names(config: Config) -> list[str]:
    """Names of the clients that the settings describe."""
    from fedloom.workspace.data import client_examples
    from fedloom.workspace.participants import select_participants

    return list(select_participants(client_examples(config)[0], config.federation.participants))


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """The settings with overrides; a new method name drops the old method's own settings."""
    tree = config.model_dump(exclude_none=True)
    if any(text.startswith("method.name=") for text in overrides):
        tree["method"] = {}
    for text in overrides:
        merge_trees(tree, override(text))
    return parse(tree, "the settings of a variant")


def runs_left(todo: Sequence[Trial]) -> list[Trial]:
    """The runs that are not complete yet. Raises ConfigError where a complete one has other settings."""
    return [run for run in todo if not _complete(run)]


def _complete(run: Trial) -> bool:
    """Whether the run is there, whole. A run of other settings is not taken for it."""
    settings = run.folder / "config.toml"
    found = (run.folder / run.last).exists()
    if settings.exists() and not holds_settings(settings, run.config):
        raise ConfigError(
            f"{run.folder} holds a {'complete ' if found else ''}run with other settings or another method: choose "
            "another folder, or remove it"
        )
    return found


def variant_of(run: Trial) -> str:
    """What runs that take about as long have in common, unless a study knows better: their variant."""
    return run.label


def expected_seconds(todo: Sequence[Trial], jobs: int, alike: Callable[[Trial], str] = variant_of) -> float:
    """Seconds that the runs which are left will take, from a short trial of one of each kind, `jobs` at a time.

    alike: the kind of a run; those of one kind take about as long.
    """
    samples = {alike(run): run for run in runs_left(todo)}
    with _pool(jobs) as pool:
        paces = dict(zip(samples, pool.map(_pace, samples.values()), strict=True))
    seconds = [paces[alike(run)].seconds(run.config) for run in runs_left(todo)]
    return max(sum(seconds) / jobs, max(seconds, default=0.0))


def play_runs(todo: Sequence[Trial], jobs: int, finished: Callable[[Trial, float], None]) -> None:
    """Make the runs that are not complete yet, `jobs` at a time, each in a process of its own with its share of cores.

    An interrupted run is resumed. `finished(run, seconds)` is called as each one ends. After a run that fails
    those still waiting for a process are not begun. Raises RoundError where a process is killed.
    """
    try:
        with _pool(jobs) as pool:
            futures = {pool.submit(_play, run): run for run in runs_left(todo)}
            try:
                for future in as_completed(futures):
                    finished(futures[future], future.result())
            finally:
                pool.shutdown(cancel_futures=True)
        compare_seeds(todo)
    except BrokenProcessPool:
        raise RoundError(
            "the process of a run was ended from outside, perhaps for lack of memory: complete runs are kept, so give "
            "the same command again, with fewer --jobs if memory is short"
        ) from None


def play_here(todo: Sequence[Trial], finished: Callable[[Trial, float], None]) -> None:
    """Make the runs that are not complete yet, one after the other in this process."""
    for run in runs_left(todo):
        finished(run, _play(run))
    compare_seeds(todo)


def compare_seeds(todo: Sequence[Trial]) -> None:
    """Tell the model cards of runs that differ in their seed alone what all of them scored."""
    from fedloom.workspace.cards import tell_seeds

    for label, reports in read_reports(todo).items():
        if len(reports) > 1:
            tell_seeds([run.folder for run in todo if run.label == label], reports)


def _pool(jobs: int) -> ProcessPoolExecutor:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare, initargs=(threads,))


def _pace(run: Trial) -> Pace:
    from fedloom.studies.pace import measure_pace

    return measure_pace(run.config, run.method)


def _prepare(threads: int) -> None:
    """In a worker: so many threads for torch, and an end with the parent, whichever way that ends."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A run that is cut off here is resumed next time."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _play(run: Trial) -> float:
    began = time.perf_counter()
    begun = (run.folder / "config.toml").exists()
    (run.player or _play_plainly)(run, begun)
    return time.perf_counter() - began


def _play_plainly(run: Trial, begun: bool) -> None:
    from fedloom.server import local

    local.run_local(run.config, run.folder, resume=begun, method=run.method)


def read_reports(made: Sequence[Trial]) -> dict[str, list[Report]]:
    """Label → the reports of its complete runs, one a seed."""
    grouped: dict[str, list[Report]] = {}
    for run in made:
        if (run.folder / FINISHED).exists():
            grouped.setdefault(run.label, []).append(summarise(read_rows(run.folder / "ledger.jsonl"), str(run.folder)))
    return grouped
