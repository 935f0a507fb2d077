"""What lies in a folder that a run is to go into, and how it makes way. Files that fedloom did not write stay."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from fedloom.errors import CheckpointError, ConfigError
from fedloom.records.config import Config
from fedloom.records.configfile import parse
from fedloom.records.ledger import Aggregation, Row, RunRow, read_rows
from fedloom.records.lock import LOCK
from fedloom.records.session import End

WRITTEN = (
    *("checkpoints", "payloads", "sites", "adapter", "adapters", "curve.png", "report.html"),
    *("tensorboard", "wandb", "tracking.json", ".tracking.lock", "prediction.json", "metrics.prom", "split.json", "job"),
    *("noise.key", "flower-run", "log.jsonl", "ledger.jsonl", "config.toml"),
)
"""All that runs write into their folder, beside the lock. The settings come last: by them a run is known."""


@dataclass(frozen=True, eq=False, slots=True)
class Occupant:
    """A run that lies in a folder. settings: None where config.toml cannot be read; rows: of its ledger."""

    path: Path
    settings: Config | None
    rows: tuple[Row, ...]

    @property
    def rounds(self) -> int:
        """The last round in which updates were averaged; 0 where nothing was learnt yet."""
        return max((row.round for row in self.rows if isinstance(row, Aggregation)), default=0)

    def describe(self) -> str:
        """How it stands, in words."""
        planned = next((row.num_rounds for row in reversed(self.rows) if isinstance(row, RunRow)), 0)
        end = self.rows[-1].status if self.rows and isinstance(self.rows[-1], End) else "not over"
        return f"{self.rounds} of {planned} rounds, {end}"


def find_occupant(path: Path) -> Occupant | None:
    """The run in a folder; None where the folder is empty or not there.

    Raises CheckpointError where it holds something else, or is no folder.
    """
    if not path.exists() or (path.is_dir() and all(found.name == LOCK for found in path.iterdir())):
        return None
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file, where a run needs a folder: choose another --out")
    settings = read_run_settings(path / "config.toml")
    try:
        rows = tuple(read_rows(path / "ledger.jsonl"))
    except CheckpointError:
        if settings is None or not (path / LOCK).exists():
            raise CheckpointError(f"{path} holds other files: choose another --out") from None
        rows = ()
    if settings is None and not any(isinstance(row, RunRow) for row in rows):
        raise CheckpointError(f"{path} holds other files: choose another --out")
    return Occupant(path, settings, rows)


def read_run_settings(path: Path) -> Config | None:
    """The settings of a run; None where there are none that this version of fedloom reads."""
    try:
        return parse(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError, ConfigError, tomllib.TOMLDecodeError):
        return None


def move_aside(path: Path) -> Path:
    """Move all that a run wrote from its folder into a new one beside it, which is returned; other files stay."""
    whole = path.resolve()
    beside = next(free for free in _names_beside(whole) if not free.exists())
    beside.mkdir()
    for name in WRITTEN:
        if (whole / name).exists():
            shutil.move(whole / name, beside / name)
    return beside


def clear_start(path: Path) -> None:
    """Remove what a run wrote that has not learnt anything yet, but for its settings and what its sites keep."""
    for folder, pattern in (("checkpoints", "round-*"), ("payloads", "*.fedloom")):
        for file in (path / folder).glob(pattern):
            file.unlink()
        if (path / folder).is_dir() and not any((path / folder).iterdir()):
            (path / folder).rmdir()
    for name in ("tensorboard", "wandb"):
        shutil.rmtree(path / name, ignore_errors=True)
    for name in (
        *(".tracking.lock", "tracking.json", "prediction.json", "metrics.prom", "split.json", "noise.key", "job"),
        *("flower-run", "curve.png", "report.html", "ledger.jsonl"),
    ):
        (path / name).unlink(missing_ok=True)


def clear_folder(path: Path) -> None:
    """Remove a run that was not begun, and its folder with it where nothing else is there."""
    clear_start(path)
    for name in ("config.toml", "log.jsonl", LOCK):
        (path / name).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _names_beside(path: Path) -> Iterator[Path]:
    yield path.with_name(f"{path.name}-old")
    yield from (path.with_name(f"{path.name}-old-{number}") for number in count(2))
