"""The adapter to hand on: where a run or a folder has it, and its ranks cut where that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.folders import MergedModule, merge_folders, open_folders
from fedloom.adapters.settings import CONFIG_FILE
from fedloom.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class Cut:
    """How far the rank of every module falls: to `max_rank`, and to the least that keeps `energy` of its Σσ².

    Both are None where nothing is cut.
    """

    max_rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise ConfigError(f"--max-rank is {self.max_rank}: expected at least 1")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ConfigError(f"--energy is {self.energy}: expected 0 < energy ≤ 1")

    @property
    def is_none(self) -> bool:
        """Whether every module stays as it is."""
        return self.max_rank is None and self.energy is None

    def recipe(self, dtype: torch.dtype) -> Recipe:
        """The cut as a merge of one adapter: factors stay as they are where no energy is asked for."""
        method = Recipe("flora") if self.energy is None else Recipe("florist", energy=self.energy)
        return replace(method, max_rank=self.max_rank, dtype=dtype)


def find_adapter(source: Path) -> Path:
    """The adapter's folder: `source` itself, or the one that a finished run left. Raises ModelError where none is."""
    if (source / CONFIG_FILE).is_file() or not (source / "ledger.jsonl").is_file():
        return source  # whatever it is, opening it says what is wrong with it
    if not (source / "adapter" / CONFIG_FILE).is_file():
        raise ModelError(
            f"{source} is a run that has left no adapter yet: wait for its end, or name one of {source / 'adapters'}"
        )
    return source / "adapter"


def cut_adapter(folder: Path, cut: Cut, out: Path, dtype: torch.dtype = torch.float32) -> list[MergedModule]:
    """Write the adapter with its ranks cut, and return what became of every module. Scales are 1 in what is written."""
    return list(merge_folders(open_folders([folder]), cut.recipe(dtype), out))


def require_linear(adapter: AdapterFolder, form: str) -> None:
    """Raise ModelError where the adapter is more than factors of linear modules: `form` has no place for it."""
    experts = sorted({layout.parameter for layout in adapter.layouts.values() if layout.parameter})
    if experts:
        raise ModelError(
            f"{adapter.folder} adapts the parameter {experts[0]}, a stack of matrices, for which {form} has no place: "
            "use --to merged"
        )
    try:
        adapter.require_plain()
    except ModelError as error:
        raise ModelError(f"{error}: {form} has no place for it; use --to merged") from None


def ranks_of(adapter: AdapterFolder, modules: Sequence[str]) -> dict[str, int]:
    """Module → its rank, as the settings say; opening the folder has held the tensors to that."""
    return {module: adapter.settings.rank(module) for module in modules}
