"""Whether the sizes in a base model's config.json are those of a model, before one is built from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fedloom.adapters.json_file import read_json
from fedloom.errors import ModelError

CEILINGS = {
    "layer": 1_000,
    "block": 65_536,
    "expert": 4_096,
    "codebook": 4_096,
    "head": 65_536,
    "stage": 4_096,
    "depth": 65_536,
}
"""Word in a key → the largest number it may have: modules are built one by one for each of these. The deepest models in
use have some 130 layers, the widest some 400 experts a layer and 128 heads."""
MOST_MODULES = 2**16
"""Layers × experts; the largest models have some 25,000."""
LARGEST = 2**40
"""Any other whole number: with sizes beyond it even the count of elements overflows."""
BITS = 8
"""Parameters that one byte of weights can hold at most: one bit each."""


def check_config(path: str | Path) -> None:
    """Raise ModelError where config.json asks for so many modules that building them would not end.

    Nothing is checked for a Hub name, whose config.json is not here yet.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        return
    pending: list[object] = [read_json(file)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            _check_numbers(file, value)
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _check_numbers(file: Path, table: dict[str, object]) -> None:
    most = dict.fromkeys(("layer", "expert"), 1)
    for key, value in table.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        words = [word for word in CEILINGS if word in key.lower() and not key.lower().endswith(("size", "dim", "_id"))]
        ceiling = min((CEILINGS[word] for word in words), default=LARGEST)
        if abs(value) > ceiling:
            raise ModelError(f"{file}: {ascii(key)[1:-1][:80]} is {str(value)[:40]}: expected at most {ceiling:,}")
        for word in most.keys() & words:
            most[word] = max(most[word], value)
    if most["layer"] * most["expert"] > MOST_MODULES:
        raise ModelError(
            f"{file} asks for {most['layer']:,} layers of {most['expert']:,} experts: expected at most "
            f"{MOST_MODULES:,} experts in all"
        )


def check_parameters(path: str | Path, sizes: Iterable[int], weights: Sequence[str]) -> None:
    """Raise ModelError where a model of parameters of these sizes cannot be what the files of weights hold.

    weights: patterns of the files' names. Weights that are in no file would be made up, in memory that there is not.
    Nothing is checked for a Hub name.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    held = sum(file.stat().st_size for file in {found for pattern in weights for found in folder.glob(pattern)})
    asked = sum(sizes)
    if asked > BITS * held:
        raise ModelError(
            f"{path} cannot be loaded as a causal language model: its config.json describes {asked:,} parameters, and "
            f"its files of weights have {held:,} bytes: they do not belong together"
        )
