"""[model] and [lora]: the base model and the adapter on it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.records.quantities import Alpha, Alphas, Name, Probability, Rank, Ranks, TargetModules, Text
from fedloom.records.sections.section import Section


class ModelSettings(Section):
    """The frozen base model."""

    path: Text = Field("./model", description="Base model: a Hugging Face folder with a causal LM, or a Hub name.")
    adapter: Text | None = Field(
        None, description="PEFT adapter folder to go on from, instead of a fresh adapter.", examples=["./adapter"]
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the base weights.")
    quantization: Literal["none", "8bit", "4bit"] = Field("none", description="Base weights in 8 or 4 bits (GPU).")
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of torch; a small model is fastest with 1. Sites of a federation have their own.",
        examples=[1],
    )
    device: Name = Field(
        "auto",
        description='"auto" (a GPU where there is one), "cpu" or "cuda"; the environment variable CUDA_VISIBLE_DEVICES '
        "chooses among several GPUs.",
    )


class LoraSettings(Section):
    """The adapter, with the names of peft.LoraConfig."""

    r: Rank = Field(16, description="Rank of the adapter.")
    lora_alpha: Alpha = Field(32.0, description="Scale of the adapter: ΔW = (lora_alpha / r) B A.")
    target_modules: TargetModules = Field(
        "all-linear", description='Modules to adapt: "all-linear", or a list such as ["q_proj", "v_proj"].'
    )
    lora_dropout: Probability = Field(0.0, description="Dropout before A, while training.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead of lora_alpha / r.")
    rank_pattern: Ranks = Field({}, description="Module name (or its end) → rank, where it is not r.")
    alpha_pattern: Alphas = Field({}, description="Module name (or its end) → alpha, where it is not lora_alpha.")


class ClientSettings(Section):
    """What one client has otherwise than [lora] says."""

    r: Rank | None = None
    lora_alpha: Alpha | None = None
    target_modules: TargetModules | None = None
    lora_dropout: Probability | None = None
    use_rslora: bool | None = None
    rank_pattern: Ranks | None = None
    alpha_pattern: Alphas | None = None
