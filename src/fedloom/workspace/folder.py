"""The folder of one run: settings, ledger and checkpoints while it lasts, and what it leaves behind.

out/
  config.toml      the settings as resolved
  ledger.jsonl     every payload, training, evaluation
  log.jsonl        the same rows as they happened, with the time, for log shippers
  metrics.prom     rounds, bytes, failures after each round, for Prometheus
  prediction.json  what the run was expected to send, where it was foretold
  checkpoints/     all that is needed to go on
  tracking.json    under which identifier trackers know the run, if output.report_to
  tensorboard/     event files, and wandb/ what W&B keeps, if they are among them
  payloads/        the bytes themselves, if output.keep_payloads
  adapters/        the model after some of the rounds, if output.save_every
  adapter/         the result, as a PEFT adapter, with the base model's tokenizer and a model card
  curve.png        score against rounds and against bytes
  report.html      the page: charts and tables of all that the ledger says, in one file
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedloom.errors import CheckpointError
from fedloom.records import serverlog
from fedloom.records.config import Config
from fedloom.records.configfile import dump_file
from fedloom.records.ledger import Direction, Ledger, Row, Transfer, payload_name
from fedloom.records.lock import take_lock
from fedloom.records.serverlog import ServerLog
from fedloom.records.session import End, describe_error
from fedloom.report import metrics
from fedloom.report.progress import Progress
from fedloom.wire import describe, read_header
from fedloom.workspace import checkpoint
from fedloom.workspace.checkpoint import Snapshot
from fedloom.workspace.keys import PayloadKeys
from fedloom.workspace.occupied import clear_folder, clear_start, move_aside, read_run_settings
from fedloom.workspace.pulse import MetricsFile, write_whole
from fedloom.workspace.recall import Recall
from fedloom.workspace.resumption import check_way, find_differences


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
        self._metrics = MetricsFile(path / metrics.FILE)
        self._keys = PayloadKeys()
        self._told_of = Recall(lambda payload: transfer_row(0, "", "down", payload))
        self.ledger = Ledger(path / "ledger.jsonl", self._log.row, Progress)

    @classmethod
    def open(
        cls, path: Path, config: Config, *, resume: bool = False, force: bool = False, extend: bool = True
    ) -> RunFolder:
        """Create the folder, or with `resume` take up the run in it, or with `force` move that one aside.

        A run that has not learnt anything yet makes way by itself. extend: whether the number of rounds may change.
        Raises CheckpointError where the folder holds something else, is in use, or holds nothing to resume.
        """
        held = check_way(path, config, resume=resume, force=force, extend=extend)
        path.mkdir(parents=True, exist_ok=True)
        lock, notes = take_lock(path), []
        try:
            if held:  # whoever had the lock until now may have changed it
                held = check_way(path, config, resume=resume, force=force, extend=extend)
            if held and held.rounds and not resume:
                notes.append(f"the run that was in {path} is now in {move_aside(path)}")
            elif held and not resume:
                clear_start(path)
            write_whole(path / "config.toml", dump_file(config))
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
        # What goes down goes to many; an update is described once anyway.
        known = self._told_of.of(payload) if direction == "down" else transfer_row(round, client, direction, payload)
        self.ledger.append(replace(known, round=round, client=client, version=version, delivery=delivery))
        if self.config.output.keep_payloads:
            folder = self.path / "payloads"
            folder.mkdir(exist_ok=True)
            version = read_header(payload).base_version
            (folder / f"{payload_name(round, client, direction)}-v{version}.fedloom").write_bytes(payload)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, and the metrics that go with it."""
        checkpoint.save_checkpoint(self.path / "checkpoints", snapshot, self._keys)
        self.write_metrics()

    def write_metrics(self) -> None:
        """What Prometheus reads, from the rows so far."""
        self.ledger.sync()
        self._metrics.write(metrics.progress_text(self.ledger.kept, self.path.resolve().name, time.time()))

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
        begun = self.ledger.rows > 0
        try:
            if error is not None and begun:
                self._record_end(error)
            if (self.path / metrics.FILE).exists():
                self.write_metrics()
        except (OSError, CheckpointError):
            if error is None:  # otherwise what ended the run is to be told, and not that a full disk takes no row
                raise
        finally:
            self._close(error)
            if error is not None and not begun:  # set-up failed: as if the run had never been asked for
                clear_folder(self.path)
            self._lock.close()

    def _close(self, error: BaseException | None) -> None:
        self._metrics.close()
        self._log.close()
        try:
            self.ledger.close()
        except OSError:
            if error is None:
                raise

    def _record_end(self, error: BaseException) -> None:
        """Say how the run ended where no row says so yet: it was to go on, and its set-up failed."""
        self.ledger.sync()
        newest, done = self.ledger.kept.last, self.ledger.kept.done
        status, reason = describe_error(error)
        end = newest if isinstance(newest, End) else None
        if end is None or (end.status != "finished" and status == "failed" and end.reason != reason):
            self.ledger.append(End(done, status, reason, end.seconds if end else math.nan))


def holds_settings(settings: Path, config: Config) -> bool:
    """Whether a run's settings are these, but for those that its outcome does not rest on."""
    held = read_run_settings(settings)
    return held is not None and not find_differences(held, config)


def transfer_row(round: int, client: str, direction: Direction, payload: bytes) -> Transfer:
    """The ledger's row about a payload."""
    kind, parts = describe_payload(payload)
    return Transfer(round, client, direction, kind, len(payload), parts)


def describe_payload(payload: bytes) -> tuple[str, Mapping[str, int]]:
    """(its kind, part → bytes)."""
    return read_header(payload).kind, describe(payload).parts
