"""Whom Ray's processes play."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cast:
    """The sites of a simulation: `names` in the order of Flower's partitions.

    settings: what a run tells its sites; model, device: what every site has; folder: where their states are.
    """

    names: tuple[str, ...]
    settings: str
    model: str
    device: str
    folder: str
