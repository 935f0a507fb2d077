"""[privacy]: what the server may see of a site's update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedloom.records.quantities import MOST_COUNT
from fedloom.records.sections.section import Section

MOST_IN_SUM = 1000
"""Sites of one secure sum: each seals shares for every other one (`secagg.session`)."""


class PrivacySettings(Section):
    """What the server may see of a site's update, in every round."""

    secure_aggregation: bool = Field(
        False,
        description="The server learns the sum of the sites' updates and nothing else of them: no single update, no "
        "norm, loss or number of examples. For methods whose updates add.",
    )
    least_cohort: int = Field(
        3,
        ge=2,
        le=MOST_IN_SUM,
        description="Secure aggregation: sites that a sum is of at least. A round with fewer is skipped. Of a sum of "
        "two, each knows the other's part.",
    )
    threshold: (
        Annotated[int, Field(ge=2, le=MOST_IN_SUM)] | Annotated[float, Field(gt=0.5, le=1, allow_inf_nan=False)] | None
    ) = Field(
        None,
        description="Secure aggregation: sites of a sum that must stay to the end of the round, as a number or as a "
        "share of those that began it; more than half. Otherwise more than two thirds.",
        examples=[0.8],
    )
    bits: int = Field(
        32,
        ge=4,
        le=32,
        description="Secure aggregation: bits of a value in the sum. Fewer make the payload smaller and the grid that "
        "values are rounded to coarser.",
    )
    clip: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Secure aggregation: the largest magnitude of one value of a site's change; what is beyond is cut. "
        "The grid's step is this over 2^(bits - 1), times the number of sites.",
    )
    clip_schedule: Literal["constant", "learning_rate"] = Field(
        "constant",
        description="Secure aggregation: whether clip is the same in every round, or falls with the learning rate "
        "(training.lr_scheduler_type) as changes do. With few privacy.bits, late rounds are rounded away otherwise.",
    )
    noise_multiplier: float | None = Field(
        None,
        gt=0,
        description="Noise in the sum, for whole sites: its standard deviation over clip_norm. Every site adds a "
        "share, large enough for least_cohort sites. Needs secure_aggregation and federation.weighting = 'uniform'.",
        examples=[1.0],
    )
    clip_norm: float = Field(
        1.0, gt=0, description="Noise in the sum: largest norm of a site's change; a larger one is scaled down."
    )
    most_examples: int = Field(
        10_000,
        ge=1,
        le=MOST_COUNT,
        description="Secure aggregation: examples that one site counts for at most, since nobody sees what it says. "
        "The weights of sites with far fewer are rounded more coarsely.",
    )
