"""[model] and [lora]: the base model and the adapter on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedloom.records.quantities import (
    Alpha,
    Alphas,
    Batch,
    Epochs,
    Name,
    Patterns,
    Probability,
    Rank,
    Ranks,
    Rate,
    Steps,
    TargetModules,
    Text,
)
from fedloom.records.sections.section import Section


def _refuse_float16(value: object) -> object:
    """Say why there is no float16: it is what many checkpoints are stored in, and is tried first."""
    if value in ("float16", "fp16"):
        raise ValueError(
            "expected 'bfloat16', which is as small (in float16 gradients vanish without loss scaling, which leaves "
            "out steps by chance), or 'float32'"
        )
    return value


class ModelSettings(Section):
    """The frozen base model."""

    path: Text = Field("./model", description="Base model: a Hugging Face folder with a causal LM, or a Hub name.")
    adapter: Text | None = Field(
        None, description="PEFT adapter folder to go on from, instead of a fresh adapter.", examples=["./adapter"]
    )
    any_base: bool = Field(False, description="Take model.adapter even if it was trained on another base model.")
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(_refuse_float16)] = Field(
        "float32", description="Type of the base weights."
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="Base weights in 8 or 4 bits, with the extra `quantized`."
    )
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
        "all-linear",
        description='Modules to adapt: "all-linear", a list of ends of names such as ["q_proj", "v_proj"], or a text: '
        "a regular expression for whole names.",
    )
    target_parameters: Patterns = Field(
        (),
        description="Parameters to adapt, by ends of names: the experts of a mixture, each with a pair of its own.",
        examples=[["experts.gate_up_proj", "experts.down_proj"]],
    )
    lora_dropout: Probability = Field(0.0, description="Dropout before A, while training.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead of lora_alpha / r.")
    rank_pattern: Ranks = Field({}, description="Module name (or its end) → rank, where it is not r.")
    alpha_pattern: Alphas = Field({}, description="Module name (or its end) → alpha, where it is not lora_alpha.")


class ClientSettings(Section):
    """What one client has otherwise than [lora] and [training] say."""

    r: Rank | None = None
    lora_alpha: Alpha | None = None
    target_modules: TargetModules | None = None
    target_parameters: Patterns | None = None
    lora_dropout: Probability | None = None
    use_rslora: bool | None = None
    rank_pattern: Ranks | None = None
    alpha_pattern: Alphas | None = None
    learning_rate: Rate | None = None
    max_steps: Steps | None = None
    num_train_epochs: Epochs | None = None
    per_device_train_batch_size: Batch | None = None
    gradient_accumulation_steps: Batch | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0)] | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
