"""[training.dp]: noise that protects single examples."""

from __future__ import annotations

from pydantic import Field, model_validator

from fedloom.records.sections.section import Section


class DpSettings(Section):
    """DP-SGD on the factors: every example's gradient is clipped, noise is added, examples are drawn at random.

    One of epsilon and noise_multiplier says how much noise.
    """

    epsilon: float | None = Field(
        None, gt=0, description="ε of all rounds together for one example; the noise follows from it."
    )
    noise_multiplier: float | None = Field(
        None,
        gt=0,
        description="σ: standard deviation of a step's noise as a multiple of clip_norm, in place of epsilon.",
    )
    clip_norm: float = Field(
        0.1,
        gt=0,
        description="Largest norm of one example's gradient; with Adam its size hardly matters if it is small.",
    )
    delta: float | None = Field(
        None, gt=0, lt=1, description="δ at which ε holds; 1 over the number of the client's examples if left out."
    )

    rounds: int | None = Field(
        None,
        ge=1,
        description="Rounds of one client that the noise is made for; who was asked in so many is asked in no more. "
        "All rounds of the run if left out.",
    )

    @model_validator(mode="after")
    def _one_amount(self) -> DpSettings:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("training.dp needs one of epsilon and noise_multiplier")
        return self

    def turns_of(self, num_rounds: int) -> int:
        """In how many rounds of a run of so many a client may train."""
        return num_rounds if self.rounds is None else min(self.rounds, num_rounds)

    def delta_of(self, examples: int) -> float:
        """The δ for a client with so many examples."""
        return min(1.0 / examples, 0.5) if self.delta is None else self.delta
