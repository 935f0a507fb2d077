"""The folder of one run: settings, ledger and checkpoints while it lasts, and what it leaves behind.

out/
  config.toml      the settings as resolved
  ledger.jsonl     every payload, training, evaluation
  log.jsonl        the same rows as they happened, with the time, for log shippers
  metrics.prom     rounds, bytes, failures after each round, for Prometheus
  checkpoints/     all that is needed to go on
  payloads/        the bytes themselves, if output.keep_payloads
  adapters/        the model after some of the rounds, if output.save_every
  adapter/         the result, as a PEFT adapter, with the base model's tokenizer and a model card
  curve.png        score against rounds and against bytes
  report.html      the same and the tables, in one file
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedloom.errors import CheckpointError, ConfigError
from fedloom.records import serverlog
from fedloom.records.config import Config
from fedloom.records.configfile import dump
from fedloom.records.ledger import Choice, Direction, Ledger, Row, Transfer, payload_name, read_rows
from fedloom.records.serverlog import ServerLog
from fedloom.report import metrics
from fedloom.wire import describe, read_header
from fedloom.workspace import checkpoint
from fedloom.workspace.checkpoint import Snapshot
from fedloom.workspace.occupied import (
    LOCK,
    Occupant,
    clear_folder,
    clear_start,
    find_occupant,
    move_aside,
    read_run_settings,
)
from fedloom.workspace.resumption import ROUNDS, find_differences, name_differences


class RunFolder:
    """An open run folder, locked against a second process. Use as a context manager.

    notes: what the user should know of what was there before.
    """

    def __init__(self, path: Path, config: Config, lock: IO[str], notes: Sequence[str] = ()) -> None:
        self.path = path
        self.config = config
        self.notes = tuple(notes)
        self._lock = lock
        self._log = ServerLog(path / serverlog.FILE)
        self.ledger = Ledger(path / "ledger.jsonl", self._log.row)

    @classmethod
    def open(
        cls, path: Path, config: Config, *, resume: bool = False, force: bool = False, extend: bool = True
    ) -> RunFolder:
        """Create the folder, or with `resume` take up the run in it, or with `force` move that one aside.

        A run that has not learnt anything yet makes way by itself. extend: whether the number of rounds may change.
        Raises CheckpointError where the folder holds something else, is in use, or holds nothing to resume.
        """
        if resume and force:
            raise ConfigError("--resume goes on with a run, --force replaces it: give one of the two")
        held = find_occupant(path)
        if resume and held is None:
            raise CheckpointError(f"{path} holds no run to resume; run without --resume")
        path.mkdir(parents=True, exist_ok=True)
        lock, notes = _locked(path), []
        try:
            if held and resume:
                check_resumable(held, config, extend)
            elif held and held.rounds and not force:
                raise CheckpointError(
                    f"{path} holds another run ({held.describe()}): add --resume to go on with it, --force to replace "
                    "it, or choose another --out"
                )
            elif held and held.rounds:
                notes.append(f"the run that was in {path} is now in {move_aside(path)}")
            elif held:
                clear_start(path)
            write_whole(path / "config.toml", dump(config))
        except BaseException:
            lock.close()
            raise
        return cls(path, config, lock, notes)

    def transfer(
        self,
        round: int,
        client: str,
        direction: Direction,
        payload: bytes,
        *,
        version: int | None = None,
        delivery: bool = False,
    ) -> None:
        """Record a payload, and keep it if the settings say so. version, delivery: see `ledger.Transfer`."""
        row = transfer_row(round, client, direction, payload)
        self.ledger.append(replace(row, version=version, delivery=delivery))
        if self.config.output.keep_payloads:
            folder = self.path / "payloads"
            folder.mkdir(exist_ok=True)
            version = read_header(payload).base_version
            (folder / f"{payload_name(round, client, direction)}-v{version}.fedloom").write_bytes(payload)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, and the metrics that go with it."""
        checkpoint.save_checkpoint(self.path / "checkpoints", snapshot)
        write_whole(self.path / metrics.FILE, metrics.prometheus_text(read_rows(self.ledger.path)))

    def restore(self, fingerprint: str, keep: Callable[[Sequence[Row]], Sequence[Row]]) -> Snapshot | None:
        """The newest checkpoint, with the ledger cut back to it; None if the run died before its first.

        keep(rows): of the rows after the checkpoint, those that stay in the ledger, as they are to stand there.
        """
        saved = checkpoint.list_checkpoints(self.path / "checkpoints")
        if not saved:
            self.ledger.truncate_to(0)
            return None
        snapshot = checkpoint.load_checkpoint(saved[-1])
        if snapshot.fingerprint != fingerprint:
            raise CheckpointError(
                f"{saved[-1]} was made with another base model, other data or other settings: resume with those"
            )
        self.ledger.truncate_to(snapshot.ledger_rows, keep)
        return snapshot

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ledger.close()
        self._log.close()
        if error is not None and not self.ledger.rows:  # set-up failed: as if the run had never been asked for
            clear_folder(self.path)
        self._lock.close()


def check_resumable(held: Occupant, config: Config, extend: bool) -> None:
    """Raises CheckpointError, which names the settings that differ, where a run does not go on with these."""
    settings = held.path / "config.toml"
    if held.settings is None:
        raise CheckpointError(f"{settings} is missing or not of this version of fedloom: the run cannot be resumed")
    found = find_differences(held.settings, config)
    rounds = config.federation.num_rounds
    if found.keys() == {ROUNDS} and extend:
        chosen = next((row for row in held.rows if isinstance(row, Choice)), None)
        if chosen:
            raise CheckpointError(
                f"the run in {held.path} ended after round {chosen.round} by its validation split and takes no more "
                f"rounds: begin another with model.adapter = {str(held.path / 'adapter')!r}"
            )
        if rounds < held.rounds:
            raise CheckpointError(f"{ROUNDS} is {rounds}, but {held.rounds} rounds of the run in {held.path} are over")
    elif found:
        other = "replace it with --force" if held.rounds else "begin anew without --resume (nothing is learnt yet)"
        raise CheckpointError(
            f"{settings} differs from the settings given: {name_differences(found)}. Resume with the settings of that "
            f"run, {other}, or choose another --out"
        )


def holds_settings(settings: Path, config: Config) -> bool:
    """Whether a run's settings are these, but for those that its outcome does not rest on."""
    held = read_run_settings(settings)
    return held is not None and not find_differences(held, config)


def write_whole(path: Path, text: str) -> None:
    """Replace a file by one that is whole, whenever the machine stops."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def transfer_row(round: int, client: str, direction: Direction, payload: bytes) -> Transfer:
    """The ledger's row about a payload."""
    return Transfer(round, client, direction, read_header(payload).kind, len(payload), describe(payload).parts)


def _locked(path: Path) -> IO[str]:
    """A lock that the system drops when the process ends, however it ends."""
    lock = (path / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise CheckpointError(f"another process is working in {path}: wait for it, or choose another --out") from None
    return lock
