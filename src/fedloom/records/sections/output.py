"""[output]: what a run leaves behind."""

from __future__ import annotations

from pydantic import Field

from fedloom.records.quantities import MOST_COUNT, MOST_RANK
from fedloom.records.sections.section import Section


class OutputSettings(Section):
    """What a run leaves behind."""

    dir: str | None = Field(
        None, description="Run folder; otherwise runs/<name of this file>.", examples=["runs/first-try"]
    )
    keep_payloads: bool = Field(False, description="Keep every payload, for `fedloom inspect`.")
    answers: int = Field(
        3,
        ge=0,
        le=100,
        description="Held-out examples whose answers before the first and after the last round are kept in the ledger "
        "and shown in the report; 0 for none.",
    )
    save_every: int = Field(
        0, ge=0, le=MOST_COUNT, description="Rounds between adapters saved in adapters/ on the way; 0 for none."
    )
    save_total_limit: int | None = Field(
        None, ge=1, le=MOST_COUNT, description="So many of them are kept, the newest; otherwise all.", examples=[3]
    )
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
