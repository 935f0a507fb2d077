"""adapter_config.json as a stranger may have written it: read within bounds, checked, and turned into settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedloom.adapters.json_file import read_json
from fedloom.adapters.settings import CONFIG_FILE, WEIGHTS_FILE, AdapterSettings
from fedloom.errors import ConfigError, ModelError, begin_small

HIGHEST = 2**16
"""Ranks above it are taken for a mistake: beyond the width of a layer a rank adds nothing."""
LARGEST = 1e9
"""Alphas above it, and below its inverse, are taken for a mistake."""
Rank = Annotated[int, Field(ge=1, le=HIGHEST)]
Alpha = Annotated[float, Field(ge=1 / LARGEST, le=LARGEST)]
Name = Annotated[str, Field(max_length=4096)]
ModuleName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*$", max_length=512)]
"""PEFT reads modules_to_save as expressions, and a merged adapter hands them on, so that they must be plain names."""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights as they are."""


class AdapterConfig(BaseModel):
    """The keys of PEFT's LoraConfig that matter here, of the types that PEFT writes; other keys are left alone.

    Where PEFT takes null for "not set", it is taken here too.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    r: Rank
    lora_alpha: Alpha
    base_model_name_or_path: Name | None = None
    target_modules: list[Name] | Name | None = None
    target_parameters: list[ModuleName] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    use_rslora: bool | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    fan_in_fan_out: bool | None = None
    bias: Name | None = None
    modules_to_save: list[ModuleName] | None = None
    task_type: Name | None = None
    trainable_token_indices: list[int] | dict[ModuleName, list[int]] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[Name] | Name | None = None
    exclude_modules: list[Name] | Name | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as it is. Raises ModelError where there is none, or it is not a JSON object."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder: expected a PEFT adapter folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelError(f"{folder} holds no {CONFIG_FILE}: it is not a PEFT adapter folder")
    return read_json(path)


def read_settings(folder: Path, config: Mapping[str, Any]) -> AdapterSettings:
    """What the configuration says of ranks, scales and places. Raises ModelError that names the file and the key."""
    path = folder / CONFIG_FILE
    try:
        told = AdapterConfig.model_validate(dict(config))
        return AdapterSettings(
            r=told.r,
            lora_alpha=told.lora_alpha,
            target_modules=told.target_modules or (() if told.target_parameters else "all-linear"),
            target_parameters=tuple(told.target_parameters or ()),
            lora_dropout=told.lora_dropout or 0.0,
            use_rslora=bool(told.use_rslora),
            rank_pattern=told.rank_pattern or {},
            alpha_pattern=told.alpha_pattern or {},
            fan_in_fan_out=bool(told.fan_in_fan_out),
        )
    except ValidationError as error:
        raise ModelError(f"{path} {_complaint(error)}") from None
    except ConfigError as error:
        raise ModelError(f"{path} is not valid: {error}") from None


def _complaint(error: ValidationError) -> str:
    """The first complaint, in one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ascii(".".join(str(part) for part in first["loc"]))[1:-1][:120]
    if first["type"] == "missing":
        return f"lacks {key!r}, which every LoRA adapter has"
    return f"is not valid: {key} is {ascii(first['input'])[:80]}: {begin_small(first['msg'])}"


Plain = Mapping[str, tuple[tuple[object, ...], str]]
REFUSED: Plain = {
    "peft_type": (("LORA",), "only LoRA adapters can be combined"),
    "use_dora": (
        (False, None),
        "DoRA rescales the base weights, so its change is not B A: train with use_dora = False, or merge it into its "
        "base with PEFT and start from that model",
    ),
    "lora_bias": ((False, None), "B has a bias of its own, so its change is not B A"),
    "layer_replication": ((None, []), "it changes the layers of the base model"),
    "alora_invocation_tokens": ((None, []), "the adapter is active on some tokens only"),
    "use_qalora": ((False, None), "QALoRA pools its inputs, so its change is not B A"),
    "use_bdlora": ((None, False), "its factors are block-diagonal and stored in parts"),
    "kasa_config": ((None,), "KaSA puts a diagonal between B and A and cuts the base weights"),
    "monteclora_config": ((None,), "MonteCLoRA samples its change, so it is not B A"),
    "arrow_config": ((None,), "Arrow routes every token to adapters of its own"),
    "init_lora_weights": (
        (*PLAIN_STARTS, None),
        "this start changes the weights of the base; convert it with PEFT first",
    ),
}
"""Key of adapter_config.json → values that mean a plain LoRA adapter, and what any other value means."""
WHOLE: Plain = {
    "modules_to_save": ((None, [], ()), "whole modules were trained beside the adapter"),
    "bias": (("none", None), "biases were trained beside the adapter"),
    "trainable_token_indices": ((None, [], {}), "embeddings were trained beside the adapter"),
}
"""The same, of what is stored beside the factors as whole tensors."""


def refuse_other_kinds(folder: Path | str, config: Mapping[str, Any], table: Plain) -> None:
    """Raise ModelError where a key of the table has a value that is not plain; `folder` names the adapter."""
    for key, (plain, reason) in table.items():
        if key in config and config[key] not in plain or key == "peft_type" and key not in config:
            raise ModelError(f"{folder} cannot be used: {key} = {ascii(config.get(key))[:120]}; {reason}")
