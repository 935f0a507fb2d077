"""[output]: what a run leaves behind."""

from __future__ import annotations

from pydantic import Field

from fedloom.records.quantities import MOST_RANK
from fedloom.records.sections.section import Section


class OutputSettings(Section):
    """What a run leaves behind."""

    dir: str | None = Field(
        None, description="Run folder; otherwise runs/<name of this file>.", examples=["runs/first-try"]
    )
    keep_payloads: bool = Field(False, description="Keep every payload, for `fedloom inspect`.")
    max_rank: int | None = Field(
        None, ge=1, description="Rank of the exported adapter, at most; the energy lost is reported.", examples=[64]
    )
    baseline_r: int | None = Field(
        None,
        ge=1,
        le=MOST_RANK,
        description="Rank of the dense fp32 FedIT that reports compare bytes with; otherwise the largest of the run.",
        examples=[16],
    )
