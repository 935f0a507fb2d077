"""The table [policy] of SITE.toml: what a site allows, key by key, and what it counts. `policy` holds jobs to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedloom.noise.accounting import SampledNoise
from fedloom.records.config import Section
from fedloom.records.quantities import Bytes
from fedloom.site.privacy import Privacy

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class ExamplePrivacy(Section):
    """What a site asks of a job for the sake of single examples."""

    max_epsilon: float | None = Field(
        None,
        gt=0,
        description="Nothing leaves once all jobs together would pass this ε at example level.",
        examples=[8.0],
    )
    delta: float | None = Field(
        None, gt=0, lt=1, description="δ of that ε; 1 over the number of the site's examples if left out."
    )


class Policy(Section):
    """What is left out is not limited, except that error texts are withheld and the order of examples is the site's."""

    approve: Literal["auto", "ask"] = Field(
        "auto",
        description='"ask": a new job waits until a person at the site allows it; `fedloom site jobs` lists who waits.',
    )
    methods: Names | None = Field(
        None,
        description="Methods that may run here; without a list, fedloom's own. One of another package runs only where "
        'its name, "package.module:builder", is in the list: the site then imports that module.',
        examples=[["fedsrd", "fedit"]],
    )
    modules: Names | None = Field(
        None,
        description="Modules that may be trained: names, their last parts, or patterns such as *.self_attn.*.",
        examples=[["q_proj", "v_proj"]],
    )
    min_examples: int = Field(1, ge=1, description="Training examples that the site must hold to take part.")
    min_examples_update: int = Field(
        1,
        ge=1,
        description="Different examples that an update must rest on: batch · accumulation · steps, at most all.",
    )
    declared_examples: int | None = Field(
        None, ge=1, description="Number of examples told to the server in place of the true one.", examples=[1000]
    )
    max_rank: int | None = Field(
        None, ge=1, description="Largest rank in a job, those of other sites included.", examples=[64]
    )
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps in a round.", examples=[200])
    max_batch: int | None = Field(None, ge=1, description="Examples in a forward pass.", examples=[32])
    min_length: int | None = Field(None, ge=1, description="Least data.max_length of a job.", examples=[1024])
    max_length: int | None = Field(None, ge=1, description="Largest data.max_length of a job.", examples=[1024])
    optimizers: Names | None = Field(None, description="Values of training.optim.", examples=[["adamw_torch"]])
    min_learning_rate: float | None = Field(
        None, gt=0, description="Least learning rate of any step, schedule and warm-up included.", examples=[1e-6]
    )
    max_learning_rate: float | None = Field(None, gt=0, description="Largest learning rate.", examples=[1e-2])
    max_seconds_round: float | None = Field(
        None, gt=0, description="Seconds of training in a round; what takes longer is stopped.", examples=[3600.0]
    )
    max_bytes_round: Bytes | None = Field(None, description="Bytes that may leave in one round.", examples=["8MiB"])
    max_bytes_day: Bytes | None = Field(None, description="Bytes that may leave in 24 hours.", examples=["500MiB"])
    max_disk: Bytes | None = Field(None, description="Bytes that the state folder may take.", examples=["20GiB"])
    max_update_norm: float | None = Field(
        None, gt=0, description="Largest norm of a round's change of all factors together; no privacy control."
    )
    secure_aggregation: Literal["optional", "required"] = Field(
        "optional",
        description='"required": only jobs with privacy.secure_aggregation, under which the server learns sums alone.',
    )
    least_cohort: int | None = Field(
        None, ge=2, description="Sites that a secure sum with this site must be of at least.", examples=[5]
    )
    order: Literal["site", "run"] = Field(
        "site", description="Whose seed orders the examples: the site's own, or the run's, which the server chooses."
    )
    scrub_errors: bool = Field(True, description="Keep the text of errors from the server.")
    privacy: Privacy | None = Field(None, description="Noise on every update.")
    example_privacy: ExamplePrivacy | None = Field(
        None, description="Only jobs whose training protects single examples (training.dp) may run here."
    )

    @model_validator(mode="after")
    def _ranges_hold_something(self) -> Policy:
        for low, high in (("min_length", "max_length"), ("min_learning_rate", "max_learning_rate")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"policy.{low} is {least:g} and policy.{high} {most:g}: no job can keep to both")
        return self


@dataclass(frozen=True, slots=True)
class Spending:
    """What has left the site: bytes in this round of this job, bytes in the last 24 hours, μ² of all noise so far, and
    all noise on single examples.

    `audit.AuditTrail.count_spent` works it out.
    """

    bytes_round: int = 0
    bytes_day: int = 0
    mu_squared: float = 0.0
    sampled: tuple[SampledNoise, ...] = ()
