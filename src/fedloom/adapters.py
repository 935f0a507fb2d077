"""LoRA adapters as PEFT describes and stores them: settings, and folders in and out. No base model is ever loaded.

A folder holds adapter_config.json and adapter_model.safetensors; `peft.PeftModel.from_pretrained` opens what is
written here, and what PEFT has written is read back one module at a time.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedloom.errors import ConfigError, ModelError, ShapeError
from fedloom.lora import PARTS, LoraPair, LoraState

PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights as they are."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What a LoRA adapter is, in PEFT's words. The scale of a module of rank r is alpha / r, or alpha / sqrt(r).

    target_modules: last parts of module names, or "all-linear", or one regular expression for whole names.
    rank_pattern, alpha_pattern: module name, or regular expression for its end → value that replaces r or lora_alpha.
    fan_in_fan_out is true where weights are stored transposed (GPT-2); `resolve` finds out.
    """

    r: int = 16
    lora_alpha: float = 32
    target_modules: Sequence[str] | str = "all-linear"
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **{f"rank_pattern.{key}": r for key, r in self.rank_pattern.items()}}.items():
            if rank < 1:
                raise ConfigError(f"adapter.{name} is {rank}: a LoRA rank must be at least 1")
        if not self.target_modules:
            raise ConfigError('adapter.target_modules is empty: name modules, or use "all-linear"')
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"adapter.lora_dropout is {self.lora_dropout}: expected 0 ≤ lora_dropout < 1")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not alpha > 0:
                raise ConfigError(f"the LoRA alpha of adapter.{name} is {alpha}: it must be above 0")

    def rank(self, module: str) -> int:
        """The rank that the settings give a module."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.r)

    def alpha(self, module: str) -> float:
        """The alpha that the settings give a module."""
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.lora_alpha)

    def scale(self, module: str, rank: int | None = None) -> float:
        """What multiplies B A in a module of this rank (its own by default)."""
        return lora_scale(self.alpha(module), self.rank(module) if rank is None else rank, self.use_rslora)


def lora_scale(alpha: float, rank: int, use_rslora: bool) -> float:
    """What multiplies B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732); 1 for an empty pair."""
    return alpha / (rank**0.5 if use_rslora else rank) if rank else 1.0


def pattern_key(patterns: Iterable[str], module: str) -> str:
    """The first pattern that matches the end of a module's name, at a dot, as PEFT reads them; "" if none does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), "")


def save_adapter(
    state: LoraState,
    base_model_name_or_path: str | Path,
    settings: AdapterSettings,
    out_dir: str | Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` opens; the same state gives the same bytes.

    Ranks are those of the state. PEFT has no rank 0, so an empty pair is written as rank 1 of zeros.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    state = state.map(_at_least_one)
    tensors: dict[str, Tensor] = {}
    for module, pair in state.items():
        scale = settings.scale(module, pair.rank)
        # Copies: pairs may be views of one another, which safetensors does not store.
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.A.to(dtype).clone(memory_format=torch.contiguous_format)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = (pair.B / scale).to(dtype).contiguous()
    common = Counter(state.ranks().values()).most_common(1)[0][0] if state else settings.r
    names = settings.target_modules
    if names == "all-linear":
        names = sorted({module.rpartition(".")[2] for module in state})
    config = {
        "alpha_pattern": dict(settings.alpha_pattern),
        "base_model_name_or_path": str(base_model_name_or_path),
        "bias": "none",
        "fan_in_fan_out": settings.fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": {module: rank for module, rank in state.ranks().items() if rank != common},
        "target_modules": names if isinstance(names, str) else sorted(names),
        "task_type": "CAUSAL_LM",
        "use_rslora": settings.use_rslora,
    }
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _at_least_one(pair: LoraPair) -> LoraPair:
    m, n = pair.shape
    return pair if pair.rank else LoraPair(torch.zeros(1, n), torch.zeros(m, 1))


class AdapterFolder:
    """An adapter folder opened for reading, one module at a time; only its list of tensors is held in memory.

    Raises ModelError for a folder that is none, or that holds more than a LoRA adapter of linear modules.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        self.settings = _settings(self.folder, self.config)
        self.base_model = str(self.config.get("base_model_name_or_path") or "")
        self.keys = _keys(self.folder)

    @property
    def modules(self) -> list[str]:
        """Module names, sorted."""
        return sorted({module for module, _ in self.keys})

    def pair(self, module: str) -> LoraPair:
        """One module's pair, float32, the scale folded into B."""
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            a, b = (file.get_tensor(self.keys[module, part]).float() for part in PARTS)
        try:
            pair = LoraPair(a, b)
        except ShapeError as error:
            raise ModelError(f"{self.folder}, module {module}: {error}") from None
        if pair.rank != self.settings.rank(module):
            raise ModelError(
                f"{self.folder}, module {module}: the tensors have rank {pair.rank}, {CONFIG_FILE} says "
                f"{self.settings.rank(module)}; the two files do not belong together"
            )
        return LoraPair(pair.A, pair.B * self.settings.scale(module))


def load_adapter(folder: str | Path) -> tuple[LoraState, AdapterFolder]:
    """A whole adapter, and the folder it came from with its settings and the name of its base model."""
    opened = AdapterFolder(folder)
    return LoraState({module: opened.pair(module) for module in opened.modules}), opened


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder: expected a PEFT adapter folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelError(f"{folder} holds no {CONFIG_FILE}: it is no PEFT adapter folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, expected an object with PEFT's settings")
    return config


_REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "peft_type": (("LORA",), "only LoRA adapters can be combined"),
    "use_dora": ((False, None), "DoRA rescales the base weights, so its change is not B A"),
    "modules_to_save": ((None, [], ()), "whole modules were trained beside the adapter"),
    "bias": (("none", None), "biases were trained beside the adapter"),
    "lora_bias": ((False, None), "biases were trained beside the adapter"),
    "trainable_token_indices": ((None, [], {}), "embeddings were trained beside the adapter"),
    "layer_replication": ((None, []), "it changes the layers of the base model"),
    "target_parameters": ((None, []), "adapters of bare parameters are not supported"),
    "alora_invocation_tokens": ((None, []), "the adapter is active on some tokens only"),
    "use_qalora": ((False, None), "QALoRA pools its inputs, so its change is not B A"),
    "init_lora_weights": (
        (*PLAIN_STARTS, None),
        "this start changes the weights of the base; convert it with PEFT first",
    ),
}
"""Key of adapter_config.json → values that mean a plain LoRA adapter, and what any other value means."""


def _settings(folder: Path, config: Mapping[str, Any]) -> AdapterSettings:
    for key, (plain, reason) in _REFUSED.items():
        if key in config and config[key] not in plain or key == "peft_type" and key not in config:
            raise ModelError(f"{folder} cannot be used: {key} = {config.get(key)!r}; {reason}")
    try:
        return AdapterSettings(
            r=int(config["r"]),
            lora_alpha=float(config["lora_alpha"]),
            target_modules=config.get("target_modules") or "all-linear",
            lora_dropout=float(config.get("lora_dropout") or 0.0),
            use_rslora=bool(config.get("use_rslora")),
            rank_pattern={str(key): int(rank) for key, rank in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(key): float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()},
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        )
    except KeyError as error:
        raise ModelError(f"{folder / CONFIG_FILE} lacks {error}, which every LoRA adapter has") from None
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} is not valid: {error}") from None


def _keys(folder: Path) -> dict[tuple[str, str], str]:
    """(module, part) → name of the tensor in the file."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        other = " (it holds adapter_model.bin: save it again with safe_serialization=True)"
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}{other if (folder / 'adapter_model.bin').is_file() else ''}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    keys: dict[tuple[str, str], str] = {}
    for name in names:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if not match:
            raise ModelError(
                f"{path} holds {name}, which is no LoRA factor of a linear module (embeddings, biases, magnitudes and "
                "whole modules are not supported)"
            )
        keys[match[1], match[2]] = name
    lone = sorted(module for module, part in keys if (module, "A" if part == "B" else "B") not in keys)
    if lone or not keys:
        raise ModelError(f"{path} {f'lacks one factor of {lone[0]}' if lone else 'holds no LoRA factors'}")
    return keys
