"""`python -m benchmarks merge`: `fedloom aggregate` against PEFT's add_weighted_adapter, from folders to a folder.

Both read the same folders and write one. PEFT needs the base model in memory; it is built beforehand, and neither its
time nor its memory is counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, cast

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.workload import module
from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.folders import merge_folders, open_folders
from fedloom.adapters.settings import AdapterSettings, save_adapter
from fedloom.errors import ConfigError, ModelError
from fedloom.lora.lowrank import frobenius_norm, relative_error
from fedloom.lora.pair import LoraPair, LoraState, stack_pairs
from fedloom.model import peft_bridge
from fedloom.studies.estimate import machine
from fedloom.studies.estimate.presets import Preset, preset_named, preset_shapes

ALPHA = 16
AGAINST = ("svd", "cat", "linear")
"""Combinations of PEFT's."""
_HEAD = 64


@dataclass(frozen=True, eq=False, slots=True)
class Case:
    """Adapter folders with weights that sum to 1, and the base model that they are for."""

    folders: tuple[Path, ...]
    weights: tuple[float, ...]
    base: PreTrainedModel | None
    top: int
    """The largest rank."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to merge. error: ‖result − Σ p_k ΔW_k‖_F / ‖Σ p_k ΔW_k‖_F over all modules, in float64.

    seconds: by the clock; cpu_seconds: of all threads, which other work on the machine hardly changes. rank: the
    largest that came out. All but `way` are None where the way refuses these adapters.
    """

    way: str
    seconds: float | None = None
    cpu_seconds: float | None = None
    extra_bytes: int | None = None
    rank: int | None = None
    error: float | None = None


Way = Callable[[Case, Path], Path]


def _ours(recipe: Callable[[Case], Recipe]) -> Way:
    def run(case: Case, out: Path) -> Path:
        for _ in merge_folders(open_folders(case.folders, case.weights), recipe(case), out):
            pass
        return out

    return run


def _peft(combination: str) -> Way:
    def run(case: Case, out: Path) -> Path:
        assert case.base is not None
        peft_bridge.add_weighted(case.base, case.folders, case.weights, out, combination, None)
        return out / "merged"

    return run


OURS: Mapping[str, Way] = {
    "florist, energy 1": _ours(lambda case: Recipe("florist", energy=1.0)),
    "florist, energy 0.99": _ours(lambda case: Recipe("florist", energy=0.99)),
    "flora": _ours(lambda case: Recipe("flora")),
    "flexlora, the largest rank": _ours(lambda case: Recipe("flexlora", rank=case.top)),
    "fedit": _ours(lambda case: Recipe("fedit")),
}


def run(
    *,
    preset: str = "tinyllama",
    ranks: Sequence[int] = (16, 16, 16, 16),
    modules: Sequence[str] | None = None,
    against: Sequence[str] = AGAINST,
    repeats: int = 1,
    seed: int = 0,
) -> dict[str, object]:
    """Merge synthetic adapters of one layer of a preset, our ways and PEFT's combinations `against`.

    Returns {"case", "rows"}, plain JSON values; times are medians. No base model is built where `against` is empty.
    Raises ConfigError for an unknown preset, module or combination.
    """
    if not ranks or min(ranks) < 1 or repeats < 1 or set(against) - set(AGAINST):
        raise ConfigError(
            f"ranks {list(ranks)}, repeats {repeats}, against {list(against)}: expected one rank or more, all of 1 or "
            f"more, and combinations among {', '.join(AGAINST)}"
        )
    chosen = preset_named(preset)
    layout = preset_shapes(chosen, modules, layers=1)
    ways = {**OURS, **{f"PEFT {combination}": _peft(combination) for combination in against}}
    with TemporaryDirectory() as scratch:
        case = _case(chosen, layout, ranks, seed, Path(scratch), with_base=bool(against))
        for warm in ("fedit", *(f"PEFT {combination}" for combination in against if combination == "cat")):
            ways[warm](case, Path(mkdtemp(dir=scratch)))
        rows = [_row(name, way, case, scratch, repeats) for name, way in ways.items()]
    described = {"preset": preset, "modules": len(layout), "ranks": list(ranks), "threads": torch.get_num_threads()}
    return {"case": described, "rows": [asdict(row) for row in rows]}


def _case(
    preset: Preset,
    layout: Mapping[str, tuple[int, int]],
    ranks: Sequence[int],
    seed: int,
    folder: Path,
    *,
    with_base: bool,
) -> Case:
    cases = {_full_name(name): module(name, shape, ranks, seed) for name, shape in layout.items()}
    folders = []
    for k, rank in enumerate(ranks):
        folders.append(folder / f"adapter{k}")
        state = LoraState({name: case.clients[k].pair for name, case in cases.items()})
        save_adapter(state, preset.name, AdapterSettings(r=rank, lora_alpha=ALPHA), folders[-1])
    weights = next(iter(cases.values())).weights()
    shares = tuple(weight / sum(weights) for weight in weights)  # to the last bit, which PEFT does not see to
    return Case(tuple(folders), shares, _base(preset) if with_base else None, max(ranks))


def _full_name(name: str) -> str:
    """layers.0.q_proj → the module's name in a Llama of transformers."""
    layer, _, kind = name.rpartition(".")
    block = "self_attn" if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.{layer}.{block}.{kind}"


def _base(preset: Preset) -> PreTrainedModel:
    """A Llama of one layer with the preset's shapes and hardly any vocabulary."""
    key_value, hidden = preset.modules["k_proj"]
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=preset.modules["gate_proj"][0],
        num_hidden_layers=1,
        num_attention_heads=hidden // _HEAD,
        num_key_value_heads=key_value // _HEAD,
    )
    return LlamaForCausalLM(config)


def _row(name: str, way: Way, case: Case, scratch: str, repeats: int) -> Row:
    written: list[Path] = []
    trials = []
    try:
        for _ in range(repeats):
            out = Path(mkdtemp(dir=scratch))
            trials.append(_measured(lambda folder=out: written.append(way(case, folder))))  # type: ignore[misc]
    except ModelError:
        return Row(name)
    result = AdapterFolder(written[-1])
    rank = max(result.settings.rank(own) for own in result.modules)
    seconds, cpu, peaks = zip(*trials, strict=True)
    peak = max((peak for peak in peaks if peak is not None), default=None)
    return Row(name, statistics.median(seconds), statistics.median(cpu), peak, rank, _error(result, case))


def _measured(call: Callable[[], object]) -> tuple[float, float, int | None]:
    """Seconds, CPU seconds and extra bytes of one call."""
    taken: list[tuple[float, float]] = []

    def timed() -> None:
        before = time.process_time()
        seconds = machine.time_call(call)
        taken.append((seconds, time.process_time() - before))

    peak = machine.extra_bytes(timed)
    if not taken:
        timed()
    return *taken[0], peak


def _error(result: AdapterFolder, case: Case) -> float:
    adapters = [AdapterFolder(folder) for folder in case.folders]
    squares = sizes = 0.0
    for name in result.modules:
        pairs = [adapter.pair(name) for adapter in adapters]
        terms = [LoraPair(p.A, p.B.double() * w) for p, w in zip(pairs, case.weights, strict=True)]
        size = frobenius_norm(stack_pairs(terms)) ** 2
        squares += size * relative_error(result.pair(name), pairs, case.weights) ** 2
        sizes += size
    return float((squares / sizes) ** 0.5)


def tables(result: Mapping[str, object]) -> list[Table]:
    """The rows for a terminal; a dash where a way refuses such adapters."""
    case, rows = cast(dict[str, Any], result["case"]), cast(list[dict[str, Any]], result["rows"])
    ranks = ", ".join(map(str, case["ranks"]))
    table = Table(title=f"{case['preset']}, {case['modules']} modules, adapters of rank {ranks}")
    table.add_column("way")
    for name in ("seconds", "CPU s", "extra MiB", "rank", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        mib = row["extra_bytes"] and row["extra_bytes"] / 2**20
        cells = (row["seconds"], row["cpu_seconds"], mib, row["rank"], row["error"])
        table.add_row(row["way"], *map(_cell, cells, (".2f", ".2f", ".0f", "d", ".1e")))
    return [table]


def _cell(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)
