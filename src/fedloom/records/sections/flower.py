"""[flower]: a federation across machines."""

from __future__ import annotations

from pydantic import Field

from fedloom.records.sections.section import Section


class FlowerSettings(Section):
    """A federation on Flower (`fedloom run --engine flower` or `flower-sim`). Every time is in seconds."""

    superlink: str = Field("127.0.0.1:8000", description="Address of the SuperLink.")
    root_certificates: str | None = Field(
        None, description="Certificate of the CA that signed the SuperLink's own.", examples=["./ca.crt"]
    )
    insecure: bool = Field(False, description="Connect without TLS; for trials on one machine only.")
    min_replies: int = Field(2, ge=1, description="Updates that a round needs.")
    deadline: float = Field(
        3600.0,
        gt=0,
        description="How long a round, or one try of it, waits for updates, and the end of a run for sites that take "
        "the result.",
    )
    grace: float | None = Field(
        None,
        ge=0,
        description="How long it waits for the rest once min_replies are in; otherwise until the deadline.",
        examples=[60.0],
    )
    retries: int = Field(2, ge=0, description="How often the missing are asked again before a run stops.")
    sim_cpus: int | None = Field(
        None,
        ge=1,
        description="flower-sim: processes that play sites, each on one CPU with a base model of its own; otherwise "
        "as many as there are CPUs.",
        examples=[4],
    )
    sim_gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="flower-sim: share of a GPU that each of these processes gets, 0 to train on the CPU; otherwise 1 "
        "where model.device means a GPU.",
        examples=[0.25],
    )
