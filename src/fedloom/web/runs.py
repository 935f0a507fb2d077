"""Which runs are shown: those in the folders that the user names, looked for again while they are served."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.records.lock import LOCK

DEPTH = 3
"""How far below a folder runs are looked for: a study's lie at STUDY/METHOD/seed-N, so runs/ has its own three down."""
MOST_FOLDERS = 2000
"""Folders that are looked into, so that naming a whole disk by mistake costs a moment and no more."""


class Runs:
    """The runs in some folders, each of which is a run's own or has runs in it.

    Raises ConfigError where one of them is neither; a folder that is empty so far, as runs/ may be, will do.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        for path in self.paths:
            _check(path)

    def find(self) -> dict[str, Path]:
        """Name → folder of every run that is there now, in the order of the paths, below each by name.

        A name is the shortest end of a folder's path that tells it from the others: demo, fedit/seed-0.
        """
        folders = dict.fromkeys(folder for path in self.paths for folder in _runs_below(path))
        return dict(zip(_short_names(list(folders)), folders, strict=True))


def is_run(folder: Path) -> bool:
    """Whether a run lies in the folder, or is being set up there."""
    return (folder / "ledger.jsonl").is_file() or ((folder / LOCK).is_file() and (folder / "config.toml").is_file())


def _check(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; expected the folder of a run, such as runs/my, or a folder of runs")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; expected the folder of a run, such as runs/my, or a folder of runs")
    if next(_runs_below(path), None) is None and any(not found.name.startswith(".") for found in path.iterdir()):
        raise ConfigError(
            f"{path} holds no run: no ledger.jsonl there or in its folders; expected a run's folder, or one of runs"
        )


def _runs_below(path: Path) -> Iterator[Path]:
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


def _short_names(folders: Sequence[Path]) -> list[str]:
    """For each folder the shortest end of its path that no other one has."""
    parts = [folder.resolve().parts for folder in folders]
    ends = [1] * len(parts)
    while True:
        names = ["/".join(path[-end:]) for path, end in zip(parts, ends, strict=True)]
        held = Counter(names)
        doubles = [place for place, name in enumerate(names) if held[name] > 1 and ends[place] < len(parts[place])]
        if not doubles:
            return names
        for place in doubles:
            ends[place] += 1
