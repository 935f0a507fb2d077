"""PEFT adapter folders read one module at a time, and refused with the reason where they hold no change B A.

No base model is ever loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedloom.adapters import CONFIG_FILE, PREFIX, WEIGHTS_FILE, AdapterSettings, Layout
from fedloom.errors import ConfigError, ModelError
from fedloom.lora import PARTS, LoraPair, LoraState

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights as they are."""
_FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(.+)\.(?:lora_([AB])(?:\.default)?\.weight|lora_embedding_([AB])(?:\.default)?)"
)


class AdapterFolder:
    """An adapter folder opened for reading, one module at a time; only its list of tensors is held in memory.

    layouts: module → how its factors are stored, by sorted names. whole: name → shape of the tensors that are stored as
    they are, not as a change (modules_to_save, biases, trained tokens). Raises ModelError for a folder that is none,
    whose files do not fit together, or whose change is not B A.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        _refuse(self.folder, self.config, _REFUSED)
        self.settings = _settings(self.folder, self.config)
        self.base_model = str(self.config.get("base_model_name_or_path") or "")
        shapes = _shapes(self.folder)
        self._keys = _keys(self.folder / WEIGHTS_FILE, shapes)
        factors = set(self._keys.values())
        self.whole = {name: shape for name, shape in shapes.items() if name not in factors}
        modules = sorted({module for module, _ in self._keys})
        self.layouts = {module: self._layout(module, shapes) for module in modules}

    @property
    def modules(self) -> list[str]:
        """Module names, sorted."""
        return list(self.layouts)

    def pair(self, module: str) -> LoraPair:
        """One module's pair, float32, the scale folded into B. Raises ModelError where it holds NaN or infinity."""
        a, b = self._read([self._keys[module, part] for part in PARTS])
        return LoraPair(a.flatten(1), b.flatten(1) * self.settings.scale(module))

    def tensor(self, name: str) -> Tensor:
        """One of the `whole` tensors, float32. Raises ModelError where it holds NaN or infinity."""
        return self._read([name])[0]

    def require_plain(self) -> None:
        """Raise ModelError where the adapter is more than factors of linear modules."""
        _refuse(self.folder, self.config, _WHOLE)
        odd = [
            *self.whole,
            *(self._keys[m, "A"] for m, kind in self.layouts.items() if kind.embedding or kind.inputs[1:]),
        ]
        if odd:
            raise ModelError(
                f"{self.folder / WEIGHTS_FILE} holds {odd[0]}, which is no LoRA factor of a linear module (embeddings, "
                "convolutions, biases and whole modules can be merged, but not trained on)"
            )

    def _read(self, names: Sequence[str]) -> list[Tensor]:
        # Opened anew each time: what has been read stays in memory for as long as the file is open.
        with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = [file.get_tensor(name).float() for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{self.folder / WEIGHTS_FILE}: {name} holds NaN or infinity; leave this adapter out")
        return tensors

    def _layout(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        names = [self._keys[module, part] for part in PARTS]
        a, b = (shapes[name] for name in names)
        embedding = [".lora_embedding_" in name for name in names]
        where = f"{self.folder / WEIGHTS_FILE}, module {module}"
        if embedding[0] != embedding[1] or len(a) != len(b) or len(a) < 2 or a[0] != b[1] or set(b[2:]) > {1}:
            raise ModelError(f"{where}: A of shape {a} and B of shape {b} are no LoRA pair: expected (r, n) and (m, r)")
        told = self.settings.rank(module)
        if a[0] != told:
            raise ModelError(
                f"{where}: the tensors have rank {a[0]}, {CONFIG_FILE} says {told}: they do not belong together"
            )
        return Layout(b[0], a[1:], embedding[0])


def load_adapter(folder: str | Path) -> tuple[LoraState, AdapterFolder]:
    """A whole adapter, and the folder it came from with its settings and the name of its base model."""
    opened = AdapterFolder(folder)
    opened.require_plain()
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


Plain = Mapping[str, tuple[tuple[object, ...], str]]
_REFUSED: Plain = {
    "peft_type": (("LORA",), "only LoRA adapters can be combined"),
    "use_dora": ((False, None), "DoRA rescales the base weights, so its change is not B A"),
    "lora_bias": ((False, None), "B has a bias of its own, so its change is not B A"),
    "layer_replication": ((None, []), "it changes the layers of the base model"),
    "target_parameters": ((None, []), "adapters of bare parameters are not supported"),
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
_WHOLE: Plain = {
    "modules_to_save": ((None, [], ()), "whole modules were trained beside the adapter"),
    "bias": (("none", None), "biases were trained beside the adapter"),
    "trainable_token_indices": ((None, [], {}), "embeddings were trained beside the adapter"),
}
"""The same, of what is stored beside the factors as whole tensors."""


def _refuse(folder: Path, config: Mapping[str, Any], table: Plain) -> None:
    for key, (plain, reason) in table.items():
        if key in config and config[key] not in plain or key == "peft_type" and key not in config:
            raise ModelError(f"{folder} cannot be used: {key} = {config.get(key)!r}; {reason}")


def _settings(folder: Path, config: Mapping[str, Any]) -> AdapterSettings:
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


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of every tensor in the file → its shape."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        other = " (it holds adapter_model.bin: save it again with safe_serialization=True)"
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}{other if (folder / 'adapter_model.bin').is_file() else ''}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def _keys(path: Path, names: Iterable[str]) -> dict[tuple[str, str], str]:
    """(module, part) → name of the tensor in the file, of all that are factors."""
    keys: dict[tuple[str, str], str] = {}
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match:
            own = match[1], match[2] or match[3]
            if own in keys:
                raise ModelError(f"{path} holds both {keys[own]} and {name}: which of them is meant?")
            keys[own] = name
        elif ".lora_" in name or not name.startswith(PREFIX):
            raise ModelError(f"{path} holds {name}, which is no LoRA factor (DoRA's magnitudes are not supported)")
    lone = sorted(module for module, part in keys if (module, "A" if part == "B" else "B") not in keys)
    if lone or not keys:
        raise ModelError(f"{path} {f'lacks one factor of {lone[0]}' if lone else 'holds no LoRA factors'}")
    return keys
