"""[method] and [wire]: how updates are combined and in how few bytes they travel."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedloom.records.quantities import BudgetText, ClientBudgetText, Name, Scalar
from fedloom.records.sections.section import Section


class MethodSettings(BaseModel):
    """The federated method. Keys beyond these two are the method's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    __pydantic_extra__: dict[str, Scalar] = Field(init=False)

    name: Name = Field(
        "fedsrd",
        description="Method; `fedloom methods` lists them with their settings. One of another package is called "
        '"package.module:builder".',
    )
    preset: Name | None = Field(None, description="Named group of its settings.", examples=["paper"])

    @property
    def settings(self) -> dict[str, Scalar]:
        """What `build` takes beside the name: the method's own keys, and the preset if one is named."""
        named: dict[str, Scalar] = {} if self.preset is None else {"preset": self.preset}
        return named | (self.__pydantic_extra__ or {})


Values = Literal["auto", "fp32", "bf16", "fp16", "int8", "int4", "sign", "int8-stochastic", "int4-stochastic"]


class WireSettings(Section):
    """How values travel."""

    values: Values = Field(
        "auto",
        description="Form of values in payloads: fp32 loses nothing; auto is the smallest that costs the method less "
        "than a point (docs/benchmarks/methods.md).",
    )
    budget: BudgetText | None = Field(
        None,
        description="What one client's payload of a round may take, for methods that choose how much they send: bytes, "
        'or a share of the dense fp32 update such as "1%". loom keeps to it on the mean of both ways.',
        examples=["8MiB"],
    )
    client_budget: ClientBudgetText | None = Field(
        None,
        description="What one client may take in the whole run, both ways, on the mean: bytes, a share of what dense "
        'fp32 takes at lora.r ("0.3%"), or of what its own examples take compressed ("80% of data"). '
        "The method chooses rank, scale, bits and what goes down; lora.r is the largest rank that it may choose.",
        examples=["15KB"],
    )
