"""The folder of one run: settings, ledger and checkpoints while it lasts, and what it leaves behind.

out/
  config.toml      the settings as resolved
  ledger.jsonl     every payload, training, evaluation
  log.jsonl        the same rows as they happened, with the time, for log shippers
  metrics.prom     rounds, bytes, failures after each round, for Prometheus
  checkpoints/     all that is needed to go on
  payloads/        the bytes themselves, if output.keep_payloads
  adapter/         the result, as a PEFT adapter
  curve.png        score against rounds and against bytes
  report.html      the same and the tables, in one file
"""

from __future__ import annotations

import fcntl
import os
import tomllib
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedloom.errors import CheckpointError, ConfigError
from fedloom.records import serverlog
from fedloom.records.config import Config
from fedloom.records.configfile import dump, parse
from fedloom.records.ledger import Direction, Ledger, Transfer, payload_name, read_rows
from fedloom.records.serverlog import ServerLog
from fedloom.report import metrics
from fedloom.wire import describe, read_header
from fedloom.workspace import checkpoint
from fedloom.workspace.checkpoint import Snapshot


class RunFolder:
    """An open run folder, locked against a second process. Use as a context manager."""

    def __init__(self, path: Path, config: Config, lock: IO[str]) -> None:
        self.path = path
        self.config = config
        self._lock = lock
        self._log = ServerLog(path / serverlog.FILE)
        self.ledger = Ledger(path / "ledger.jsonl", self._log.row)

    @classmethod
    def open(cls, path: Path, config: Config, *, resume: bool) -> RunFolder:
        """Create the folder, or with `resume` take up the run in it.

        Raises CheckpointError where the folder holds something else, is in use, or holds nothing to resume.
        """
        settings, text = path / "config.toml", dump(config)
        if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
            what = "another run: add --resume to go on with it, or" if settings.exists() else "other files:"
            raise CheckpointError(f"{path} holds {what} choose another --out")
        if resume and not settings.exists():
            raise CheckpointError(f"{path} holds no run to resume; run without --resume")
        if resume and not holds_settings(settings, config):
            raise CheckpointError(f"{settings} differs from the settings given: resume with the settings of that run")
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        settings.write_text(text, encoding="utf-8")
        return cls(path, config, lock)

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
        partial = self.path / f"{metrics.FILE}.partial"
        partial.write_text(metrics.prometheus_text(read_rows(self.ledger.path)), encoding="utf-8")
        os.replace(partial, self.path / metrics.FILE)

    def restore(self, fingerprint: str) -> Snapshot | None:
        """The newest checkpoint, with the ledger cut back to it; None if the run died before its first."""
        saved = checkpoint.list_checkpoints(self.path / "checkpoints")
        if not saved:
            self.ledger.truncate_to(0)
            return None
        snapshot = checkpoint.load_checkpoint(saved[-1])
        if snapshot.fingerprint != fingerprint:
            raise CheckpointError(
                f"{saved[-1]} was made with another base model, other data or other settings: resume with those"
            )
        self.ledger.truncate_to(snapshot.ledger_rows)
        return snapshot

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ledger.close()
        self._log.close()
        self._lock.close()


def holds_settings(settings: Path, config: Config) -> bool:
    """Whether a run's settings are these. [flower] and [output] may differ: the run itself is the same."""
    try:
        held = parse(tomllib.loads(settings.read_text(encoding="utf-8")), str(settings))
    except (ConfigError, tomllib.TOMLDecodeError):
        return False
    return held.model_copy(update={"flower": config.flower, "output": config.output}) == config


def transfer_row(round: int, client: str, direction: Direction, payload: bytes) -> Transfer:
    """The ledger's row about a payload."""
    return Transfer(round, client, direction, read_header(payload).kind, len(payload), describe(payload).parts)


def _locked(path: Path) -> IO[str]:
    """A lock that the system drops when the process ends, however it ends."""
    lock = (path / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise CheckpointError(f"another process is working in {path}: wait for it, or choose another --out") from None
    return lock
