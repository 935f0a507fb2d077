"""LoRA adapters as PEFT describes and stores them: settings, and folders that it opens. No base model is ever loaded.

A folder holds adapter_config.json and adapter_model.safetensors; `adapter_folder` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from fedloom.adapters.base_identity import metadata_of
from fedloom.adapters.parameters import group_matrices, join_pairs, parameter_paths, parameter_stem
from fedloom.adapters.patterns import Patterns, spell_out
from fedloom.adapters.tensor_file import TensorFile
from fedloom.errors import ConfigError
from fedloom.lora.pair import PARTS, LoraPair, LoraState

PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What a LoRA adapter is, in PEFT's words. The scale of a module of rank r is alpha / r, or alpha / sqrt(r).

    target_modules: last parts of module names, or "all-linear", or one regular expression for whole names.
    target_parameters: full names of the parameters that are adapted as such, those of one module in the model's order.
    rank_pattern, alpha_pattern: module name, or regular expression for its end → value that replaces r or lora_alpha;
    `patterns` says which expressions are taken.
    fan_in_fan_out is true where weights are stored transposed (GPT-2); `placement` finds out.
    """

    r: int
    lora_alpha: float
    target_modules: Sequence[str] | str = "all-linear"
    target_parameters: Sequence[str] = ()
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    _stems: Mapping[str, str] = field(init=False, repr=False, compare=False)
    _rank_keys: Patterns = field(init=False, repr=False, compare=False)
    _alpha_keys: Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, rank in {"r": self.r, **{f"rank_pattern.{key}": r for key, r in self.rank_pattern.items()}}.items():
            if rank < 1:
                raise ConfigError(f"adapter.{name} is {rank}: a LoRA rank must be at least 1")
        if not self.target_modules and not self.target_parameters:
            raise ConfigError('adapter.target_modules is empty: name modules, or use "all-linear"')
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"adapter.lora_dropout is {self.lora_dropout}: expected 0 ≤ lora_dropout < 1")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not (alpha > 0 and isfinite(alpha)):
                raise ConfigError(f"the LoRA alpha of adapter.{name} is {alpha}: it must be above 0, and finite")
        # The class is frozen, so that these three can be made here alone.
        object.__setattr__(self, "_stems", {parameter_stem(name): name for name in self.target_parameters})
        object.__setattr__(self, "_rank_keys", Patterns(self.rank_pattern, "rank_pattern"))
        object.__setattr__(self, "_alpha_keys", Patterns(self.alpha_pattern, "alpha_pattern"))

    def place(self, module: str) -> str:
        """What PEFT calls the place of a pair: the module, or the parameter that the pair is one matrix of."""
        if not self._stems:
            return module
        stem, _, number = module.rpartition(".")
        return self._stems.get(module) or (self._stems.get(stem, module) if number.isdigit() else module)

    def rank(self, module: str) -> int:
        """The rank that the settings give a module."""
        key = self._rank_keys.key(self.place(module))
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, module: str) -> float:
        """The alpha that the settings give a module."""
        key = self._alpha_keys.key(self.place(module))
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scale(self, module: str, rank: int | None = None) -> float:
        """What multiplies B A in a module of this rank (its own by default)."""
        return lora_scale(self.alpha(module), self.rank(module) if rank is None else rank, self.use_rslora)


def lora_scale(alpha: float, rank: int, use_rslora: bool) -> float:
    """What multiplies B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732); 1 for an empty pair."""
    return alpha / (rank**0.5 if use_rslora else rank) if rank else 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """How one module's factors are stored: those of a linear layer, a convolution, an embedding or a parameter.

    outputs: m. inputs: sizes of A behind its rank, (n,) or, for a convolution, (in channels, height, width), whose
    product is n. An embedding's factors have names of their own; its ΔW is stored transposed, n entries of m values.
    parameter: full name of the parameter that the pair is one matrix of; `parameters` says how those are stored.
    """

    outputs: int
    inputs: tuple[int, ...]
    embedding: bool = False
    parameter: str = ""

    def names(self, module: str) -> tuple[str, str]:
        """Names of A and B in the file."""
        a, b = (
            f"{PREFIX}{module}.lora_embedding_{p}" if self.embedding else f"{PREFIX}{module}.lora_{p}.weight"
            for p in PARTS
        )
        return a, b

    def stored_factors(self, pair: LoraPair) -> tuple[Tensor, Tensor]:
        """A and B in the shapes of the file."""
        ones = [1] * (len(self.inputs) - 1)
        return pair.A.reshape(-1, *self.inputs), pair.B.reshape(self.outputs, -1, *ones)


def save_adapter(
    state: LoraState,
    base_model_name_or_path: str | Path,
    settings: AdapterSettings,
    out_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    base_digest: str = "",
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` opens; the same state gives the same bytes.

    Ranks are those of the state. PEFT has no rank 0, so an empty pair is written as rank 1 of zeros.
    base_digest: of the base model's weights (`base_identity.digest_weights`), where it is known.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stored = _stored_pairs(state, settings)
    ranks = {settings.place(module): 0 for module in state}
    for module, pair in state.items():
        ranks[settings.place(module)] = max(1, pair.rank, ranks[settings.place(module)])
    layouts = {path: Layout(pair.shape[0], (pair.shape[1],)) for path, pair in stored.items()}
    names = [name for path, layout in layouts.items() for name in layout.names(path)]
    with TensorFile(folder / WEIGHTS_FILE, names, metadata_of(base_digest)) as file:
        for path, pair in stored.items():
            for name, tensor in zip(layouts[path].names(path), layouts[path].stored_factors(pair), strict=True):
                file.add(name, tensor.to(dtype))
    write_config(folder, str(base_model_name_or_path), settings, ranks)


def _stored_pairs(state: LoraState, settings: AdapterSettings) -> dict[str, LoraPair]:
    """Path in the file → the pair stored there, without its scale: of a module, or of all matrices of a parameter."""
    groups = group_matrices(list(state), settings.target_parameters)
    paths = parameter_paths([name for name in settings.target_parameters if name in groups])
    joined = {paths[parameter]: join_pairs([state[name] for name in names]) for parameter, names in groups.items()}
    ranks = {paths[parameter]: joined[paths[parameter]].rank // len(names) for parameter, names in groups.items()}
    inside = {name for names in groups.values() for name in names}
    single = {module: pad_to_rank_one(pair) for module, pair in state.items() if module not in inside}
    scales = {module: settings.scale(module, pair.rank) for module, pair in single.items()}
    scales |= {
        paths[parameter]: settings.scale(names[0], ranks[paths[parameter]]) for parameter, names in groups.items()
    }
    return {path: LoraPair(pair.A, pair.B / scales[path]) for path, pair in sorted({**single, **joined}.items())}


def write_config(
    folder: Path,
    base_model: str,
    settings: AdapterSettings,
    ranks: Mapping[str, int],
    more: Mapping[str, object] | None = None,
) -> None:
    """Write adapter_config.json for modules and parameters of these ranks; `more` holds further keys of PEFT's.

    Patterns that are more than names are replaced by the names that they match.
    """
    most = max(ranks.values(), default=settings.r)
    named = ranks.keys() & set(settings.target_parameters)
    config = {
        "alpha_pattern": spell_out(settings.alpha_pattern, ranks),
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": settings.fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "peft_type": "LORA",
        "r": most,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != most},
        "target_modules": _target_names(settings.target_modules, ranks.keys() - set(settings.target_parameters)),
        "task_type": "CAUSAL_LM",
        "use_rslora": settings.use_rslora,
        **({"target_parameters": [name for name in settings.target_parameters if name in ranks]} if named else {}),
        **(more or {}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _target_names(wanted: Sequence[str] | str, modules: Collection[str]) -> list[str]:
    """target_modules as a list of names: whoever opens the folder shall run no expression of somebody else's."""
    if wanted == "all-linear":
        return sorted({module.rpartition(".")[2] for module in modules})
    return sorted(modules) if isinstance(wanted, str) else sorted(wanted)


def pad_to_rank_one(pair: LoraPair) -> LoraPair:
    """The pair, or rank 1 of zeros in place of an empty one."""
    m, n = pair.shape
    return pair if pair.rank else LoraPair(torch.zeros(1, n), torch.zeros(m, 1))
