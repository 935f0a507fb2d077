"""Adapter folders → one adapter folder, module by module.

No more than one module of every adapter is in memory, so that many adapters of a large model fit in little of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from fedloom.adapters.base_identity import check_one_base, common_digest, metadata_of
from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge.combine import Costs, Recipe, combine_module
from fedloom.adapters.parameters import group_matrices, join_pairs, parameter_paths
from fedloom.adapters.settings import WEIGHTS_FILE, AdapterSettings, Layout, write_config
from fedloom.adapters.tensor_file import TensorFile
from fedloom.errors import ConfigError, ModelError
from fedloom.lora.pair import LoraPair

WHOLE_KEYS = ("modules_to_save", "bias", "trainable_token_indices")
"""Settings that say which whole tensors stand beside the factors."""
PLACING_KEYS = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Settings that keep an adapter from some of the modules that target_modules name."""


@dataclass(frozen=True, slots=True)
class MergedModule:
    """One module's outcome. ranks: of the adapters that have it. values: number in both factors."""

    module: str
    ranks: tuple[int, ...]
    rank: int
    values: int
    costs: Costs


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """Adapters that belong together, and their shares p_k, which sum to 1.

    layouts: module → how its factors are stored, the same in all that have it. whole: names of the tensors that are
    averaged as they are. base_models: what the adapters call their base.
    """

    adapters: tuple[AdapterFolder, ...]
    shares: tuple[float, ...]
    layouts: Mapping[str, Layout]
    whole: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Full names of all parameters that are adapted as such, those of one module in the model's order."""
        return tuple(dict.fromkeys(name for adapter in self.adapters for name in adapter.settings.target_parameters))

    @property
    def base_models(self) -> list[str]:
        """Distinct names of the base model, in order."""
        return list(dict.fromkeys(adapter.base_model for adapter in self.adapters))

    def holders(self, module: str) -> list[tuple[AdapterFolder, float]]:
        """The adapters that have the module, with their shares."""
        return [(a, p) for a, p in zip(self.adapters, self.shares, strict=True) if module in a.layouts]


def open_folders(folders: Sequence[Path], weights: Sequence[float] = (), *, any_base: bool = False) -> Inputs:
    """Open the folders; weights are numbers of examples or any other sizes, equal if left out.

    any_base: also adapters that say of themselves that they were trained on base models of different weights.

    Raises ConfigError for wrong weights, ModelError for folders that are damaged, cannot be merged, or do not belong
    to one base model.
    """
    if not folders:
        raise ConfigError("no adapter given: name one folder or more")
    if weights and (len(weights) != len(folders) or not all(w > 0 and isfinite(w) for w in weights)):
        raise ConfigError(f"--weights {list(weights)}: expected {len(folders)} numbers above 0, one an adapter")
    adapters = tuple(AdapterFolder(folder) for folder in folders)
    if not any_base:
        check_one_base(adapters, "--any-base (any_base=True)")
    sizes = list(weights) or [1.0] * len(adapters)
    shares = tuple(size / sum(sizes) for size in sizes)
    return Inputs(adapters, shares, _layouts(adapters), _whole(adapters))


def merge_folders(inputs: Inputs, recipe: Recipe, folder: Path) -> Iterator[MergedModule]:
    """Combine module by module, writing each as it is made; the folder is complete when the iterator ends.

    r and lora_alpha are both the largest rank, so that every module's scale is 1, even for readers without patterns.
    The matrices of one parameter are written together, and are the most that is in memory.
    """
    paths = parameter_paths(inputs.parameters)
    stored = {layout.parameter or module: layout for module, layout in inputs.layouts.items()}
    names = [name for place, layout in stored.items() for name in layout.names(paths.get(place, place))]
    ranks: dict[str, int] = {}
    with TensorFile(
        folder / WEIGHTS_FILE, [*names, *inputs.whole], metadata_of(common_digest(inputs.adapters))
    ) as file:
        for place, held in groupby(_combined(inputs, recipe), lambda made: _place(inputs, made[0].module)):
            pairs: dict[str, LoraPair] = {}
            for row, pair in held:
                pairs[row.module] = pair
                yield row
            layout = stored[place]
            (named,) = group_matrices(list(pairs), [place]).values() if layout.parameter else [list(pairs)]
            pair = join_pairs([pairs[name] for name in named]) if layout.parameter else pairs[place]
            ranks[place] = pair.rank // len(named)
            for name, tensor in zip(layout.names(paths.get(place, place)), layout.stored_factors(pair), strict=True):
                file.add(name, tensor)
        for name in inputs.whole:
            file.add(name, _mean(inputs, name).to(recipe.dtype))
    _describe(inputs, ranks, folder)


def _place(inputs: Inputs, module: str) -> str:
    """The parameter that a pair is a matrix of, or the module itself."""
    return inputs.layouts[module].parameter or module


def rehearse_merge(inputs: Inputs, recipe: Recipe) -> Iterator[MergedModule]:
    """The rows of `merge_folders`; nothing is written."""
    return (row for row, _ in _combined(inputs, recipe))


def _combined(inputs: Inputs, recipe: Recipe) -> Iterator[tuple[MergedModule, LoraPair]]:
    for module in inputs.layouts:
        held = inputs.holders(module)
        pairs = [adapter.pair(module) for adapter, _ in held]
        pair, costs = combine_module(recipe, module, pairs, [share for _, share in held])
        yield (
            MergedModule(module, tuple(p.rank for p in pairs), pair.rank, pair.A.numel() + pair.B.numel(), costs),
            pair,
        )


def _mean(inputs: Inputs, name: str) -> Tensor:
    """Σ p_k of a whole tensor, summed in float64."""
    terms = (
        share * adapter.tensor(name).double() for adapter, share in zip(inputs.adapters, inputs.shares, strict=True)
    )
    return sum(terms, start=torch.zeros((), dtype=torch.float64)).float()


def _describe(inputs: Inputs, ranks: Mapping[str, int], folder: Path) -> None:
    most = max(ranks.values())
    first = inputs.adapters[0]
    settings = AdapterSettings(
        r=most,
        lora_alpha=most,
        target_modules=_targets(inputs.adapters),
        target_parameters=inputs.parameters,
        alpha_pattern={module: rank for module, rank in ranks.items() if rank != most},
        fan_in_fan_out=any(adapter.settings.fan_in_fan_out for adapter in inputs.adapters),
    )
    more = {key: first.config[key] for key in WHOLE_KEYS if _setting(first, key)}
    task = first.config.get("task_type")
    write_config(folder, first.base_model, settings, ranks, {**more, "task_type": task})


def _targets(adapters: Sequence[AdapterFolder]) -> list[str]:
    """The last parts of module names where the adapters sit on all modules of such names; otherwise the full names."""
    everywhere = all(
        adapter.modules == adapters[0].modules
        and not (isinstance(adapter.settings.target_modules, str) and adapter.settings.target_modules != "all-linear")
        and not any(adapter.config.get(key) for key in (*PLACING_KEYS, "target_parameters"))
        for adapter in adapters
    )
    modules = sorted({m for adapter in adapters for m, kind in adapter.layouts.items() if not kind.parameter})
    return sorted({module.rpartition(".")[2] for module in modules}) if everywhere else modules


def _layouts(adapters: Sequence[AdapterFolder]) -> dict[str, Layout]:
    """Module → layout, by sorted name. Raises ModelError that names two adapters which differ."""
    found: dict[str, tuple[Layout, AdapterFolder]] = {}
    for adapter in adapters:
        for module, layout in adapter.layouts.items():
            known, other = found.setdefault(module, (layout, adapter))
            if layout != known:
                raise ModelError(
                    f"module {module} has {layout.outputs} out and {layout.inputs} in features in {adapter.folder}, "
                    f"{known.outputs} and {known.inputs} in {other.folder}: they belong to different base models"
                )
    return {module: found[module][0] for module in sorted(found)}


def _whole(adapters: Sequence[AdapterFolder]) -> tuple[str, ...]:
    """Names of whole tensors. Raises ModelError where an adapter lacks one: it does not say what it had instead."""
    first = adapters[0]
    for adapter in adapters[1:]:
        odd = sorted({*first.whole.items()} ^ {*adapter.whole.items()})
        if odd:
            raise ModelError(
                f"{first.folder} and {adapter.folder} differ in the whole tensor {odd[0][0]}, by shape or because one "
                "of them lacks it: whole tensors can be averaged only where every adapter has them"
            )
        for key in WHOLE_KEYS:
            if _setting(adapter, key) != _setting(first, key):
                raise ModelError(
                    f"{key} is {_setting(first, key)!r} in {first.folder}, {_setting(adapter, key)!r} in "
                    f"{adapter.folder}: such adapters cannot be merged"
                )
    return tuple(first.whole)


def _setting(adapter: AdapterFolder, key: str) -> object:
    """The value in adapter_config.json; None for PEFT's several ways to say nothing."""
    value = adapter.config.get(key)
    return None if value in ("none", [], {}) else value
