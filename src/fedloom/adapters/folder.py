"""PEFT adapter folders, read one module at a time. A folder whose change is not B A is refused with the reason.

No base model is ever loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedloom.adapters.base_identity import read_digest
from fedloom.adapters.config import REFUSED, WHOLE, read_config, read_settings, refuse_other_kinds
from fedloom.adapters.parameters import index_matrices, parameter_stem, resolve_parameters, split_pair
from fedloom.adapters.settings import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Layout
from fedloom.errors import ConfigError, ModelError
from fedloom.lora.pair import PARTS, LoraPair, LoraState

SPARE_RANK = 1024
"""A rank that any module may have. Beyond, four times its width is the most: more changes nothing, and what is computed
from the squares of ranks would take memory out of proportion to the file."""
LONGEST_NAME = 512
"""Characters of a tensor's name; the longest in use have about a hundred."""
_FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(.+)\.(?:lora_([AB])(?:\.default)?\.weight|lora_embedding_([AB])(?:\.default)?)"
)


class AdapterFolder:
    """An adapter folder opened for reading, one module at a time; only its list of tensors is held in memory.

    layouts: module → how its factors are stored, by sorted names. whole: name → shape of the tensors that are stored as
    they are, not as a change (modules_to_save, biases, trained tokens). base_digest: of the base model's weights, where
    fedloom wrote the adapter, else empty. Raises ModelError for another kind of folder,
    for files that do not fit together, and for a change that is not B A.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        refuse_other_kinds(self.folder, self.config, REFUSED)
        self.settings = read_settings(self.folder, self.config)
        self.base_model = str(self.config.get("base_model_name_or_path") or "")
        shapes, metadata = _shapes(self.folder)
        self.base_digest = read_digest(metadata)
        self._keys = _keys(self.folder / WEIGHTS_FILE, shapes)
        factors = set(self._keys.values())
        self.whole = {name: shape for name, shape in shapes.items() if name not in factors}
        paths = dict.fromkeys(path for path, _ in self._keys)
        try:
            named = resolve_parameters(paths, self.settings.target_modules, self.settings.target_parameters)
        except (ModelError, ConfigError) as error:
            raise ModelError(f"{self.folder} cannot be used: {error}") from None
        self.settings = replace(self.settings, target_parameters=tuple(named.values()))
        counts = {parameter: self._count(path, parameter, shapes) for path, parameter in named.items()}
        self._matrices = index_matrices(counts)
        self._paths = {parameter: path for path, parameter in named.items()}
        self._joined: tuple[str, list[LoraPair]] = ("", [])
        single = {path: self._layout(path, shapes) for path in paths if path not in named}
        inside = {
            name: self._layout(self._paths[parameter], shapes, parameter, counts[parameter])
            for name, (parameter, _) in self._matrices.items()
        }
        self.layouts = dict(sorted({**single, **inside}.items()))

    @property
    def modules(self) -> list[str]:
        """Module names, sorted."""
        return list(self.layouts)

    def pair(self, module: str) -> LoraPair:
        """One module's pair, float32, the scale folded into B. Raises ModelError where it holds NaN or infinity."""
        if module in self._matrices:
            parameter, place = self._matrices[module]
            pair = self._matrices_of(parameter)[place]
            return LoraPair(pair.A.clone(), pair.B * self.settings.scale(module))
        a, b = self._read([self._keys[module, part] for part in PARTS])
        return LoraPair(a.flatten(1), b.flatten(1) * self.settings.scale(module))

    def _matrices_of(self, parameter: str) -> list[LoraPair]:
        """The pairs of all matrices of a parameter, as stored; the last ones read are kept, since they are asked for
        one after another.
        """
        if self._joined[0] != parameter:
            a, b = self._read([self._keys[self._paths[parameter], part] for part in PARTS])
            count = a.shape[0] // self.settings.rank(parameter_stem(parameter))
            self._joined = parameter, split_pair(LoraPair(a, b), count)
        return self._joined[1]

    def tensor(self, name: str) -> Tensor:
        """One of the `whole` tensors, float32. Raises ModelError where it holds NaN or infinity."""
        return self._read([name])[0]

    def require_plain(self) -> None:
        """Raise ModelError where the adapter is more than factors of linear modules."""
        refuse_other_kinds(self.folder, self.config, WHOLE)
        odd = [
            *self.whole,
            *(self._keys[m, "A"] for m, kind in self.layouts.items() if kind.embedding or len(kind.inputs) > 1),
        ]
        if odd:
            raise ModelError(
                f"{self.folder / WEIGHTS_FILE} holds {odd[0]}, not a LoRA factor of a linear module (embeddings, "
                "convolutions, biases and whole modules can be merged, but not trained on)"
            )

    def _read(self, names: Sequence[str]) -> list[Tensor]:
        # Opened anew each time: what has been read stays in memory for as long as the file is open.
        try:
            with safe_open(self.folder / WEIGHTS_FILE, framework="pt") as file:
                tensors = [file.get_tensor(name).float() for name in names]
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
            # A type that safetensors knows and this torch lacks, or cannot turn into float32; a file that has changed.
            told = ascii(str(error))[1:-1][:200]
            raise ModelError(f"{self.folder / WEIGHTS_FILE}: {names[0]} cannot be read: {told}") from None
        for name, tensor in zip(names, tensors, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{self.folder / WEIGHTS_FILE}: {name} holds NaN or infinity; leave this adapter out")
        return tensors

    def _count(self, path: str, parameter: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many matrices a parameter has: rows of A over the rank that the settings say. 1 where that is no
        whole number, for `_layout` to complain about.
        """
        rows, rank = shapes[self._keys[path, "A"]][0], self.settings.rank(parameter_stem(parameter))
        return rows // rank if rows and rows % rank == 0 else 1

    def _layout(
        self, module: str, shapes: Mapping[str, tuple[int, ...]], parameter: str = "", count: int = 1
    ) -> Layout:
        """How a module's factors are stored, or those of one of `count` matrices of a parameter."""
        names = [self._keys[module, part] for part in PARTS]
        a, b = (shapes[name] for name in names)
        embedding = [".lora_embedding_" in name for name in names]
        where = f"{self.folder / WEIGHTS_FILE}, module {module}"
        if embedding[0] != embedding[1] or len(a) != len(b) or len(a) < 2 or a[0] != b[1] or set(b[2:]) > {1}:
            raise ModelError(
                f"{where}: A of shape {a} and B of shape {b} do not make a LoRA pair: expected (r, n) and (m, r)"
            )
        if 0 in (*a, *b):
            raise ModelError(f"{where}: A of shape {a} or B of shape {b} is empty: expected at least one value")
        told = self.settings.rank(parameter_stem(parameter) or module)
        if a[0] != told * count:
            raise ModelError(
                f"{where}: the tensors have rank {a[0]}, {CONFIG_FILE} says {told}: they do not belong together"
            )
        most = max(SPARE_RANK, 4 * min(b[0], prod(a[1:])))
        if told > most:
            raise ModelError(f"{where}: rank {told:,} adds nothing to a module of shape {b[0]} × {prod(a[1:])}")
        return Layout(b[0], a[1:], embedding[0], parameter)


def load_adapter(folder: str | Path) -> tuple[LoraState, AdapterFolder]:
    """A whole adapter, and the folder it came from with its settings and the name of its base model."""
    opened = AdapterFolder(folder)
    opened.require_plain()
    return LoraState({module: opened.pair(module) for module in opened.modules}), opened


def other_base_note(adapters: Sequence[AdapterFolder], base: str | Path) -> str | None:
    """A note for the user where adapters name another base model than `base` (a folder or Hub name); else None.

    A model is known by its name alone: owner/name, a folder name, and the Hub cache's models--owner--name are one. The
    same shapes are no proof, since models of one family share them.
    """
    named = dict.fromkeys(adapter.base_model for adapter in adapters if adapter.base_model)
    others = [name for name in named if _base_name(name) != _base_name(str(base))]
    if not others:
        return None
    return (
        f"the adapter was trained on {' or '.join(others)}, by its {CONFIG_FILE}, and is used with {base}: if these "
        "are different models, the result is worthless"
    )


def _base_name(path: str) -> str:
    """The last part of a model's name or place, in small letters."""
    parts = Path(path).absolute().parts if Path(path).exists() else Path(path).parts
    cached = [part for part in parts if part.startswith("models--")]
    return (cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else "").lower()


def _shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str] | None]:
    """Name of every tensor in the file → its shape; and the file's metadata."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        other = " (it holds adapter_model.bin: save it again with safe_serialization=True)"
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}{other if (folder / 'adapter_model.bin').is_file() else ''}")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {ascii(str(error))[1:-1][:300]}") from None
    for name in shapes:
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise ModelError(
                f"{path} holds a tensor called {ascii(name)[:80]}: expected at most {LONGEST_NAME} printable characters"
            )
    return shapes, metadata


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
            raise ModelError(f"{path} holds {name}, which is not a LoRA factor (DoRA's magnitudes are not supported)")
    lone = sorted(module for module, part in keys if (module, "A" if part == "B" else "B") not in keys)
    if lone or not keys:
        raise ModelError(f"{path} {f'lacks one factor of {lone[0]}' if lone else 'holds no LoRA factors'}")
    return keys
