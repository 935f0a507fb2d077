"""Adapters merged offline from Python: open, look, save. No base model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedloom.adapters.base_identity import check_same_base, digest_weights
from fedloom.adapters.merge import output
from fedloom.adapters.merge.base import open_base
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.folders import Inputs, MergedModule, open_folders, rehearse_merge
from fedloom.adapters.merge.save import save_merge
from fedloom.adapters.merge.table import note_inputs


def merge(
    adapters: Iterable[str | Path],
    weights: Sequence[float] = (),
    *,
    method: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    any_base: bool = False,
) -> Merge:
    """Open PEFT adapter folders of any ranks, alphas and modules, to be merged into one.

    weights: a number for each adapter, such as its examples; equal if left out. method: florist, or flexlora where a
    rank is given. rank: of the best approximation (flexlora). energy: share of Σσ² to keep (florist); 1 is exact.
    max_rank: cap on every module's rank. any_base: also where adapters were trained on base models of other weights
    than each other's, or than the one that they are merged into. Raises ConfigError or ModelError for folders that
    cannot be merged.
    """
    chosen = method or ("florist" if rank is None else "flexlora")
    inputs = open_folders([Path(folder) for folder in adapters], weights, any_base=any_base)
    return Merge(inputs, Recipe(chosen, rank, energy, max_rank), any_base)


class Merge:
    """Adapters that belong together, and how they will be combined; nothing is written before `save`."""

    def __init__(self, inputs: Inputs, recipe: Recipe, any_base: bool = False) -> None:
        self.inputs = inputs
        self.recipe = recipe
        self.any_base = any_base

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.3g}" for share in self.inputs.shares)
        modules = len(self.inputs.layouts)
        return f"Merge({len(self.inputs.adapters)} adapters, shares {shares}, {modules} modules, {self.recipe.method})"

    def notes(self, base_model: str | Path | None = None) -> list[str]:
        """What is worth knowing before the result is trusted; base_model: what the adapters will be merged into."""
        return note_inputs(self.inputs, Path(base_model) if base_model else None)

    def preview(self) -> list[MergedModule]:
        """What the merge would give, module by module; nothing is written."""
        return list(rehearse_merge(self.inputs, self.recipe))

    def save(self, out: str | Path, *, base_model: str | Path | None = None, force: bool = False) -> Path:
        """Write the merged adapter, or with `base_model` that model with the adapters merged in. Returns the folder.

        What `notes` says is given as a warning, such as that an adapter names another base model.
        Raises ConfigError where `out` is taken, unless `force` says to replace the adapter or model in it, and
        ModelError for a base model that an adapter was not trained on.
        """
        folder, base = Path(out), open_base(Path(base_model)) if base_model else None
        read = [adapter.folder for adapter in self.inputs.adapters] + ([Path(base_model)] if base_model else [])
        if base and not self.any_base:
            check_same_base(self.inputs.adapters, digest_weights(base.folder), str(base_model), "any_base=True")
        output.check_free(folder, read, force=force)
        for note in self.notes(base_model):
            warnings.warn(note, stacklevel=2)
        save_merge(self.inputs, self.recipe, base, folder)
        return folder
