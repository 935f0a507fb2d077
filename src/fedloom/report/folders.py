"""Where runs lie: in a folder, or in the folders below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedloom.records.lock import LOCK

DEPTH = 3
"""How far below a folder runs are looked for: a study's lie at STUDY/METHOD/seed-N, so runs/ has its own three down."""
MOST_FOLDERS = 2000
"""Folders that are looked into, so that naming a whole disk by mistake costs a moment and no more."""


def is_run(folder: Path) -> bool:
    """Whether a run lies in the folder, or is being set up there."""
    return (folder / "ledger.jsonl").is_file() or ((folder / LOCK).is_file() and (folder / "config.toml").is_file())


def runs_below(path: Path) -> Iterator[Path]:
    """The runs in a folder and below it. Nothing lies within a run, and what cannot be read is passed over."""
    pending, looked = [(path, 0)], 0
    while pending and looked < MOST_FOLDERS:
        folder, depth = pending.pop()
        looked += 1
        if is_run(folder):
            yield folder
        elif depth < DEPTH:
            pending += [(below, depth + 1) for below in reversed(_folders_in(folder))]


def _folders_in(folder: Path) -> list[Path]:
    """By name; links are not followed, so that none leads out of the folder or round in a circle."""
    try:
        with os.scandir(folder) as found:
            names = [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [folder / name for name in sorted(names) if not name.startswith(".")]
