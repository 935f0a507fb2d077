"""Parameters of E matrices, such as the experts of a mixture: a pair for every matrix, and PEFT's layout of them.

PEFT adapts a parameter (E, out, in) by A of shape (E·r, in), one matrix's rows after another's, and B of shape
(out, r·E), in which the columns of one matrix lie E apart. It wraps the module that holds the parameter. A second
parameter of that module is adapted by a wrapper around the first one, and a path in the file says how deep a wrapper
lies: "experts.base_layer" is the first parameter's, "experts" the second's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedloom.adapters.patterns import matching_name
from fedloom.errors import ModelError
from fedloom.lora.pair import LoraPair

WRAPPED = ".base_layer"
"""What PEFT inserts into the path of a module that another wrapper is around."""
_LAST = ("down", "w2", "output", "out_")
"""Parts of names of an expert's second matrix, which every architecture declares after the first."""


def parameter_stem(parameter: str) -> str:
    """What the pairs of a parameter are named by: its own name, or its module's where it is that module's weight."""
    return parameter.removesuffix(".weight")


def matrix_names(parameter: str, count: int) -> list[str]:
    """A name for each of a parameter's matrices: experts.down_proj.0 …; one matrix alone needs no number."""
    stem = parameter_stem(parameter)
    return [stem] if count == 1 else [f"{stem}.{place}" for place in range(count)]


def bundle_of(name: str, parameter: str) -> bool:
    """Whether a name is that of one matrix of several."""
    return bool(parameter) and name != parameter_stem(parameter)


def parameter_paths(parameters: Sequence[str]) -> dict[str, str]:
    """Parameter → the path of its wrapper in an adapter file; of one module's parameters the first lies deepest."""
    left = Counter(parameter.rpartition(".")[0] for parameter in parameters)
    paths = {}
    for parameter in parameters:
        module = parameter.rpartition(".")[0]
        left[module] -= 1
        paths[parameter] = module + WRAPPED * left[module]
    return paths


def resolve_parameters(
    paths: Iterable[str], target_modules: Sequence[str] | str, target_parameters: Sequence[str]
) -> dict[str, str]:
    """Path in an adapter file → the full name of the parameter that it adapts; paths of plain modules are left out.

    Settings name parameters by their ends, and in any order. Raises ModelError where a path fits none of them.
    """
    depths: dict[str, set[int]] = defaultdict(set)
    for path in paths if target_parameters else ():
        module = path
        while module.endswith(WRAPPED):
            module = module.removesuffix(WRAPPED)
        depths[module].add((len(path) - len(module)) // len(WRAPPED))
    found: dict[str, str] = {}
    for module, held in depths.items():
        fitting = _parameters_of(module, target_parameters)
        if held == {0} and (not fitting or _is_module(module, target_modules)):
            continue
        if held != set(range(len(fitting))):
            raise ModelError(
                f"module {module} carries {len(held)} parameters with factors, and target_parameters names "
                f"{len(fitting)} there ({', '.join(fitting) or 'none'}): these files do not belong together"
            )
        order = sorted(fitting, key=lambda name: any(part in name.rpartition(".")[2] for part in _LAST))
        found |= {path: parameter for parameter, path in parameter_paths(order).items()}
    if target_parameters and not found:
        raise ModelError(
            f"target_parameters names {target_parameters[0]}, and no tensor is a factor of such a parameter"
        )
    return found


def _parameters_of(module: str, targets: Sequence[str]) -> list[str]:
    """The parameters of a module that these targets name, in their order."""
    names = (f"{module}.{target.rpartition('.')[2]}" for target in targets)
    fits = (name for name, target in zip(names, targets, strict=True) if name == target or name.endswith(f".{target}"))
    return list(dict.fromkeys(fits))


def _is_module(name: str, targets: Sequence[str] | str) -> bool:
    if isinstance(targets, str):
        return targets != "all-linear" and bool(matching_name(targets, [name], "target_modules"))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def join_pairs(pairs: Sequence[LoraPair]) -> LoraPair:
    """The pairs of E matrices as PEFT stores them: A (E·r, n) and B (m, r·E), r the largest rank and at least 1.

    A pair of lower rank gets components of zeros.
    """
    rank = max(1, *(pair.rank for pair in pairs))
    down = torch.cat([_pad(pair.A, rank) for pair in pairs])
    up = torch.stack([_pad(pair.B.T, rank).T for pair in pairs], dim=-1)
    return LoraPair(down, up.flatten(1))


def split_pair(pair: LoraPair, count: int) -> list[LoraPair]:
    """The inverse of `join_pairs`: views on A and B, all of one rank."""
    up = pair.B.reshape(pair.B.shape[0], -1, count)
    return [LoraPair(down, up[:, :, place]) for place, down in enumerate(pair.A.chunk(count))]


def _pad(rows: Tensor, count: int) -> Tensor:
    """With rows of zeros up to `count`."""
    missing = count - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows


def index_matrices(counts: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Matrix name → its parameter's name and its place there. counts: parameter → number of matrices."""
    return {
        name: (parameter, place)
        for parameter, count in counts.items()
        for place, name in enumerate(matrix_names(parameter, count))
    }


def group_matrices(names: Collection[str], parameters: Sequence[str]) -> dict[str, list[str]]:
    """Parameter → those of the names that are its matrices, in the order of their places."""
    stems = {parameter_stem(parameter): parameter for parameter in parameters}
    groups: dict[str, list[str]] = {parameter: [] for parameter in parameters}
    for name in names:
        stem, _, place = name.rpartition(".")
        parameter = stems.get(name) or (stems.get(stem) if place.isdigit() else None)
        if parameter:
            groups[parameter].append(name)
    # By length first, since places are numbers without leading zeros.
    return {parameter: sorted(held, key=lambda name: (len(name), name)) for parameter, held in groups.items() if held}
