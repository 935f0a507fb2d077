"""A merge, written as an adapter or as a merged model, or only rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge import output
from fedloom.adapters.merge.base import BaseFolder
from fedloom.adapters.merge.card import merge_card
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.folders import Inputs, MergedModule, merge_folders, rehearse_merge
from fedloom.adapters.merge.model import merge_into

Watch = Callable[[Iterable[MergedModule]], Iterable[MergedModule]]


def save_merge(
    inputs: Inputs, recipe: Recipe, base: BaseFolder | None, out: Path | None, watch: Watch = iter
) -> tuple[list[MergedModule], dict[str, object] | None]:
    """The rows, and what was written of a merged model; nothing is written where `out` is None.

    watch: wraps the rows as they are made, to show how far the merge is.
    """
    if out is None:
        return list(watch(rehearse_merge(inputs, recipe))), None
    with output.replace_whole(out) as folder:
        if base is None:
            rows = list(watch(merge_folders(inputs, recipe, folder)))
            (folder / "README.md").write_text(merge_card(inputs, recipe, rows), encoding="utf-8")
            return rows, None
        with TemporaryDirectory(dir=folder) as scratch:
            rows = list(watch(merge_folders(inputs, recipe, Path(scratch))))
            return rows, asdict(merge_into(base, AdapterFolder(scratch), folder))
