"""[output]: what a run leaves behind."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from fedloom.records.quantities import MOST_COUNT, MOST_RANK, Name
from fedloom.records.sections.section import Section

TrackerName: TypeAlias = Literal["tensorboard", "mlflow", "wandb", "trackio"]


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
    report_to: Annotated[tuple[TrackerName, ...], Field(strict=False, max_length=4)] = Field(
        (),
        description="Trackers that are sent the numbers of every round; each is an extra to install. They take further "
        "settings from their own environment variables.",
        examples=[["tensorboard", "mlflow"]],
    )
    project: Name = Field(
        "fedloom",
        min_length=1,
        description="Under which trackers file the run: a project, or MLflow's experiment.",
    )
    run_name: Name | None = Field(
        None, min_length=1, description="The run's name there; otherwise that of its folder.", examples=["first-try"]
    )
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.\-]{0,63}$")] | None = Field(
        None,
        description="The adapter's licence, for its model card, as the Hub abbreviates it.",
        examples=["apache-2.0"],
    )
    datasets: Annotated[tuple[Name, ...], Field(strict=False, max_length=64)] = Field(
        (), description="Data sets that the model card names; by itself it names none.", examples=[["owner/name"]]
    )
    name_sites: bool = Field(
        False, description="Whether the model card names the sites. Otherwise they are numbered, most examples first."
    )
