"""A run's sessions: each begins and ends with rows that say when, where, with which settings, and why it ended."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from fedloom.compress.budget import Budget
from fedloom.model.training import rate_at
from fedloom.records.config import Config
from fedloom.records.configfile import dump
from fedloom.records.ledger import Aggregation, Layers, Ledger, RunRow, read_rows
from fedloom.records.session import End, Session, describe_error
from fedloom.rounds.joint import SCALES
from fedloom.rounds.turns import ServerTurn
from fedloom.server.attendance import check_attendance
from fedloom.wire import describe

if TYPE_CHECKING:
    from fedloom.server.loop import Rounds

LIBRARIES = ("fedloom", "torch", "transformers", "peft")
"""Whose versions a run's numbers may depend on."""


def begin_session(rounds: Rounds) -> tuple[str, ...]:
    """Record that a run begins or goes on; what is to be said where it was given another number of rounds."""
    check_attendance(rounds.setup.config, len(tuple(rounds.sites)))
    ledger, planned = rounds.folder.ledger, rounds.setup.config.federation.num_rounds
    held = [row for row in read_rows(ledger.path) if isinstance(row, RunRow)]
    if not held or held[-1].num_rounds != planned:
        ledger.append(rounds.setup.describe())
    extension: tuple[str, ...] = ()
    if held and held[-1].num_rounds != planned:
        extension = (describe_extension(rounds.setup.config, held[-1].num_rounds, rounds.round),)
        ledger.note(rounds.round, extension[0])
    ledger.append(
        Session(
            round=rounds.round,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=dump(rounds.setup.config),
            versions={"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}},
            machine=name_hardware(),
            seconds=rounds.before,
            certificates=dict(rounds.certificates),
        )
    )
    rounds.folder.write_metrics()
    return extension


def name_hardware() -> dict[str, str]:
    """The hardware that a run's seconds depend on, in words."""
    facts = {"system": f"{platform.system()} {platform.machine()}", "cpus": f"{os.cpu_count() or 'unknown'} CPUs"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        facts["gpus"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return facts


def describe_extension(config: Config, before: int, round: int) -> str:
    """That a run has another number of rounds from `round` + 1 on, and what that does to the learning rate."""
    training, now = config.training.for_examples(1), config.federation.num_rounds
    text = f"federation.num_rounds was {before} and is {now} from round {round + 1} on"
    if not 0 < round < now:
        return text
    last = training.steps - 1
    old, new = rate_at(training, round, before, last), rate_at(training, round + 1, now, 0)
    whole = rate_at(training, round, now, last)
    if old == whole:
        return text
    return (
        f"{text}; the learning rate goes on as in a run of {now} rounds: {new:.3g} in round {round + 1}, after "
        f"{old:.3g} in round {round}. A run of {now} rounds from the start ends otherwise"
    )


def describe_spending(payload: bytes, budget: Budget) -> str:
    """What a byte budget was spent on, in words."""
    # Scales that travel as a tensor of their own are no values of the adapter.
    tensors = [tensor for tensor in describe(payload).tensors if tensor.name != SCALES]
    share = sum(t.values for t in tensors) / max(sum(math.prod(t.shape) for t in tensors), 1)
    kinds = ", ".join(sorted({t.coding for t in tensors}))
    return f"wire.budget of {budget}: {100 * share:.2f} % of the values as {kinds} in {len(payload)} bytes"


def record_end(rounds: Rounds, error: BaseException) -> None:
    """Record that a run was interrupted, by whoever ends this process, or failed and why."""
    status, reason = describe_error(error)
    rounds.folder.ledger.append(End(rounds.round, status, reason, rounds.seconds))
    rounds.folder.ledger.sync()


def record_turn(ledger: Ledger[Any], round: int, turn: ServerTurn, stats: Mapping[str, float], seconds: float) -> None:
    """The server's turn, and in some rounds what every module was sent."""
    told, version = turn.facts, turn.state.version
    ledger.append(Aggregation(round, stats, seconds, version, told.stages, told.norms, told.agreement))
    if told.modules is not None:
        one = told.modules
        ledger.append(
            Layers(
                round, tuple(one.modules), tuple(one.ranks), _short(one.densities), _short(one.norms), _short(one.kept)
            )
        )


def _short(values: Sequence[float]) -> tuple[float, ...]:
    """In six digits: a row has one for every module."""
    return tuple(float(f"{value:.6g}") for value in values)
