"""Which runs are shown: those in the folders that the user names, looked for again while they are served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.report.folders import runs_below


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
        folders = dict.fromkeys(folder for path in self.paths for folder in runs_below(path))
        return dict(zip(_short_names(list(folders)), folders, strict=True))


def _check(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; expected the folder of a run, such as runs/my, or a folder of runs")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; expected the folder of a run, such as runs/my, or a folder of runs")
    if next(runs_below(path), None) is None and any(not found.name.startswith(".") for found in path.iterdir()):
        raise ConfigError(
            f"{path} holds no run: no ledger.jsonl there or in its folders; expected a run's folder, or one of runs"
        )


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
