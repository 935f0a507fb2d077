"""[training]: what one client does in one round."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.records.quantities import MOST_COUNT, MOST_STEPS, Name, Probability
from fedloom.records.sections.section import Section


class TrainingSettings(Section):
    """One client's local training in one round, with the names of transformers.TrainingArguments."""

    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    max_steps: int = Field(10, ge=1, le=MOST_STEPS, description="Optimiser steps of a client in a round.")
    per_device_train_batch_size: int = Field(8, ge=1, le=2**16, description="Examples in a forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=2**16, description="Forward passes in an optimiser step.")
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
