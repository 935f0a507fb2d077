"""[local]: how the local engine uses this machine."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedloom.records.quantities import MOST_WORKERS, Name
from fedloom.records.sections.section import Section


class LocalSettings(Section):
    """How the local engine uses this machine; nothing of a run's outcome rests on it."""

    workers: int | None = Field(
        None,
        ge=1,
        le=MOST_WORKERS,
        description="Processes that train a round's clients side by side; otherwise one for each of `devices`, or none "
        "and the run's own process trains the clients one after another.",
        examples=[4],
    )
    devices: Annotated[tuple[Name, ...], Field(strict=False, max_length=MOST_WORKERS)] = Field(
        (),
        description='Where they train, in turn: "cpu", or GPUs such as "cuda:0"; otherwise what model.device says, and '
        "where that is a GPU, all of them.",
        examples=[["cuda:0", "cuda:1"]],
    )

    @property
    def count(self) -> int:
        """How many processes train; 0 where the run's own does."""
        if self.workers is None:
            return len(self.devices)
        return self.workers if self.workers > 1 or self.devices else 0
