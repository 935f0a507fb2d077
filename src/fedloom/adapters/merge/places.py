"""Where the changes of an adapter go in the files of its base model.

Files may hold a model in another form than memory: under older names, or with one tensor an expert where memory has one
parameter for all. Transformers' own table of conversions says how, and is read where a name is not found as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge.base import BaseFolder
from fedloom.adapters.parameters import group_matrices
from fedloom.adapters.settings import PREFIX
from fedloom.errors import ModelError

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightTransform

TRANSPOSED = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")
"""Types of models whose experts are (experts, in, out). Asked of square matrices alone: others show it by shape."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one pair adds to a tensor of the base: B A, or its rows from one to another, or the transpose, to the tensor
    or to the matrix at one place of its first dimension.
    """

    module: str
    rows: tuple[int, int] | None = None
    at: int | None = None
    transposed: bool = False


def find_places(base: BaseFolder, adapter: AdapterFolder) -> tuple[dict[str, list[Change]], dict[str, str]]:
    """Name of a weight in the base → what is added to it; and → the adapter's whole tensor that replaces it.

    Raises ModelError where one of them has no place in the base, another shape, or a second use there.
    """
    search = _Search(base, adapter)
    changes: dict[str, list[Change]] = defaultdict(list)
    for module, layout in adapter.layouts.items():
        for tensor, change in search.module(module) if not layout.parameter else ():
            changes[tensor].append(change)
    groups = group_matrices(list(adapter.layouts), adapter.settings.target_parameters)
    for parameter, names in groups.items():
        for tensor, held in search.matrices(parameter, names).items():
            changes[tensor] += held
    whole = {search.place(name.removeprefix(PREFIX).replace(".base_layer.", ".")): name for name in adapter.whole}
    for tensor, held in changes.items():
        search.check(tensor, held)
    for tensor, name in whole.items():
        search.check_shape(tensor, adapter.whole[name])
    return dict(changes), whole


class _Search:
    """The tensors of a base model, looked through for an adapter."""

    def __init__(self, base: BaseFolder, adapter: AdapterFolder) -> None:
        self.base, self.adapter = base, adapter
        self.shapes = base.shapes()
        self.vocabulary = [name for name, shape in self.shapes.items() if shape[:1] == (base.vocab_size,)]

    def turned(self, module: str) -> bool:
        """Whether the base stores a module's weight transposed."""
        layout = self.adapter.layouts[module]
        return layout.embedding or self.adapter.settings.fan_in_fan_out and len(layout.inputs) == 1

    def find(self, name: str) -> str | None:
        """The tensor of this name; it is shorter where the base was saved without its language-model head."""
        if name in self.shapes:
            return name
        fits = [known for known in self.shapes if name.endswith(f".{known}")]
        return fits[0] if len(fits) == 1 else None

    def module(self, module: str) -> list[tuple[str, Change]]:
        """The tensors of a module's weight, and what is added to each: where there are several, the next rows."""
        pieces = self._pieces(f"{module}.weight") if self.find(f"{module}.weight") is None else {}
        if len(pieces) < 2 or any(len(held) != 1 for held in pieces.values()):
            return [(self.place(f"{module}.weight"), Change(module, transposed=self.turned(module)))]
        names = [held[0] for held in pieces.values()]
        return [(name, Change(module, rows)) for name, rows in zip(names, self._rows(names), strict=True)]

    def _rows(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """From which row to which each tensor has, where they are laid upon each other."""
        ends = list(accumulate(self.shapes[name][0] for name in names))
        return list(zip([0, *ends], ends, strict=False))

    def place(self, name: str) -> str:
        """`find`, or the one tensor that becomes it when the base is loaded."""
        found = self.find(name) or self._renamed(name)
        if found is not None:
            return found
        raise ModelError(
            f"{self.base.folder} holds no tensor {name}, which the adapters change: their base is another, or the "
            "weight is shared with another module's or stored in another form there"
        )

    def _renamed(self, name: str) -> str | None:
        held = [tensor for tensors in self._pieces(name).values() for tensor in tensors]
        return held[0] if len(held) == 1 else None

    def matrices(self, parameter: str, names: Sequence[str]) -> dict[str, list[Change]]:
        """Tensor → its changes, for a parameter of which `names` are the matrices."""
        found = self.find(parameter) or self._renamed(parameter)
        if found is None:
            return self._divided(parameter, names)
        if len(self.shapes[found]) == 2:
            return {found: [Change(names[0])]}
        layout = self.adapter.layouts[names[0]]
        stored, straight = self.shapes[found][1:], (layout.outputs, *layout.inputs)
        square = stored == straight == straight[::-1]
        turned = self.base.config.get("model_type") in TRANSPOSED if square else stored != straight
        return {found: [Change(name, at=place, transposed=turned) for place, name in enumerate(names)]}

    def _divided(self, parameter: str, names: Sequence[str]) -> dict[str, list[Change]]:
        """The same where each matrix has tensors of its own, with its first rows in one and the next in another."""
        pieces = self._pieces(parameter)
        complete = pieces and all(len(held) == len(names) for held in pieces.values())
        if not complete:
            raise ModelError(
                f"{self.base.folder} holds no tensor {parameter}, nor {len(names)} that are made into it: the "
                "adapters' base is another, or is stored in a form that adapters cannot be merged into"
            )
        rows = self._rows([held[0] for held in pieces.values()])
        return {
            tensor: [Change(name, part if len(pieces) > 1 else None)]
            for part, held in zip(rows, pieces.values(), strict=True)
            for name, tensor in zip(names, held, strict=True)
        }

    def _pieces(self, name: str) -> dict[str, list[str]]:
        """Transformers' patterns, in the order in which they are put together, → the tensors that become `name`."""
        exact = self._conversions.get(name)
        if exact is not None:
            return exact
        fits = [known for known in self._conversions if name.endswith(f".{known}")]
        return self._conversions[fits[0]] if len(fits) == 1 else {}

    @cached_property
    def _conversions(self) -> Mapping[str, dict[str, list[str]]]:
        return _conversions(self.base)

    def check(self, tensor: str, held: Sequence[Change]) -> None:
        """Raise ModelError where a tensor has not the shape that its changes have, or has a second use."""
        layout = self.adapter.layouts[held[0].module]
        first, last = held[0].rows or (0, layout.outputs)
        straight: tuple[int, ...] = (last - first, *layout.inputs)
        shape = straight[::-1] if held[0].transposed else straight
        self.check_shape(tensor, shape if held[0].at is None else (len(held), *shape))

    def check_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        """The same of a shape."""
        if self.shapes[tensor] != shape:
            raise ModelError(
                f"{tensor} has shape {self.shapes[tensor]} in {self.base.folder}, and {shape} in the adapters: their "
                "base is another"
            )
        if self.vocabulary == [tensor]:
            raise ModelError(
                f"{tensor} is also the output layer of {self.base.folder}, which the adapters do not change"
            )


def _conversions(base: BaseFolder) -> dict[str, dict[str, list[str]]]:
    """Name in memory → transformers' patterns, in the order in which they are put together, → the base's tensors.

    Only what is renamed, or made of whole matrices laid upon each other by rows.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    config = base.config
    text = config.get("text_config")
    kinds = [*(config.get("architectures") or ()), config.get("model_type")]
    kinds += [text.get("model_type")] if isinstance(text, dict) else []
    kinds += ["legacy"]  # what transformers does with every model's names, after all else
    rules: list[WeightTransform] = []
    for kind in dict.fromkeys(kinds):
        rules += (get_checkpoint_conversion_mapping(kind) or ()) if isinstance(kind, str) else ()  # type: ignore[no-untyped-call]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    made: dict[str, dict[str, list[str]]] = {}
    for name in sorted(base.names(), key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            made.setdefault(target, {}).setdefault("", []).append(name)
        elif _lies_by_rows(by_pattern[pattern]):
            order = by_pattern[pattern].source_patterns
            made.setdefault(target, {key: [] for key in order})[pattern].append(name)
    return made


def _lies_by_rows(rule: WeightConverter) -> bool:
    """Whether a conversion collects matrices and lays them upon each other by rows: no more is known to be undone."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    merge, join, alone = ("MergeModulelist", 0), ("Concatenate", 1), ("Concatenate", 0)
    return len(rule.target_patterns) == 1 and steps in ([merge], [merge, join], [alone])
