"""[training]: what one client does in one round."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from fedloom.records.quantities import MOST_COUNT, Batch, Epochs, Name, Probability, Rate, Steps
from fedloom.records.sections.dp import DpSettings
from fedloom.records.sections.section import Section


class TrainingSettings(Section):
    """One client's local training in one round, with the names of transformers.TrainingArguments."""

    learning_rate: Rate = Field(2e-4, description="Peak learning rate.")
    max_steps: Steps | None = Field(10, description="Optimiser steps of a client in a round.")
    num_train_epochs: Epochs | None = Field(
        None,
        description="Passes of a client over its own examples in a round, in place of max_steps.",
        examples=[1.0],
    )
    per_device_train_batch_size: Batch = Field(8, description="Examples in a forward pass.")
    gradient_accumulation_steps: Batch = Field(1, description="Forward passes in an optimiser step.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate over all rounds of the run."
    )
    warmup_ratio: Probability = Field(0.0, description="Share of all steps in which the learning rate rises.")
    warmup_steps: int = Field(0, ge=0, le=MOST_COUNT, description="The same as a number of steps; give one of the two.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 leaves them.")
    bf16: bool = Field(False, description="Compute in bfloat16.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    optim: Name = Field("adamw_torch", description="Optimiser; a fresh one in every round.")
    dp: DpSettings | None = Field(
        None,
        description="Noise that protects every single example, in a table of its own: docs/privacy.md.",
        examples=[{"noise_multiplier": 1.0}],
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_instead(cls, found: object) -> object:
        """The default of max_steps holds only where num_train_epochs is not given."""
        if isinstance(found, dict) and found.get("num_train_epochs") is not None:
            return {"max_steps": None, **found}
        return found

    @property
    def steps(self) -> int:
        """Optimiser steps in a round. Raises ValueError where they follow from examples: see `for_examples`."""
        if self.max_steps is None:
            raise ValueError("how many steps an epoch has follows from the number of examples")
        return self.max_steps

    @property
    def batch(self) -> int:
        """Examples that an optimiser step draws."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def for_examples(self, examples: int) -> TrainingSettings:
        """The settings of a client with so many examples, whose epochs are counted in steps."""
        if self.num_train_epochs is None:
            return self
        steps = count_steps(
            self.num_train_epochs, examples, self.per_device_train_batch_size, self.gradient_accumulation_steps
        )
        return self.model_copy(update={"max_steps": steps, "num_train_epochs": None})


def count_steps(epochs: float, examples: int, batch: int, accumulation: int = 1) -> int:
    """Optimiser steps of so many passes over the examples, at least 1. As transformers counts them: the last batch of
    a pass, and its last step, may be smaller than the others, and so every example is seen in every pass.
    """
    return max(1, math.ceil(epochs * math.ceil(math.ceil(examples / batch) / accumulation)))
