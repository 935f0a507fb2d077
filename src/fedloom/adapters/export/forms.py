"""An adapter in the form that is asked for, and what was written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedloom.adapters.base_identity import check_same_base, digest_weights
from fedloom.adapters.export.gguf import write_gguf
from fedloom.adapters.export.source import Cut, cut_adapter, find_adapter, require_linear
from fedloom.adapters.export.vllm import describe_fit, server_rank, suiting_pairs, write_suiting
from fedloom.adapters.folder import AdapterFolder, other_base_note
from fedloom.adapters.json_file import read_json
from fedloom.adapters.merge import output
from fedloom.adapters.merge.base import open_base
from fedloom.adapters.merge.companions import copy_tokenizer
from fedloom.adapters.merge.folders import MergedModule
from fedloom.adapters.merge.model import merge_into
from fedloom.adapters.merge.places import find_places
from fedloom.errors import ConfigError, ModelError
from fedloom.lora.lowrank import frobenius_norm

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ExportedModule:
    """One module. before, rank: its rank in the adapter and in what was written.

    change: ‖ΔW‖_F. cut, rounding: Frobenius norms of what the cut of its rank and the type of its values changed.
    """

    module: str
    before: int
    rank: int
    values: int
    change: float
    cut: float = 0.0
    rounding: float = 0.0


@dataclass(frozen=True, slots=True)
class Made:
    """What a form wrote. ranks: module → (rank, values, norm of what rounding changed). load: how to open it."""

    ranks: Mapping[str, tuple[int, int, float]]
    load: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be written of an adapter whose ranks are cut already. out: None for a rehearsal.

    base: folder of the base model, where the form needs one or the user names one; name: how people call the base.
    """

    adapter: AdapterFolder
    out: Path | None
    final: Path
    dtype: torch.dtype
    base: Path | None
    name: str


def write_export(
    source: Path,
    form: str,
    out: Path,
    *,
    cut: Cut | None = None,
    dtype: str = "fp32",
    base: Path | None = None,
    any_base: bool = False,
    force: bool = False,
    rehearse: bool = False,
) -> dict[str, Any]:
    """Write the adapter of a run or a folder in a form, and return what was written as plain JSON values.

    form: one of `FORMS`. base: the base model's folder; "merged" and "gguf" need it. any_base: also where that has
    other weights than the adapter was trained on. rehearse: nothing is written. Raises ModelError for what has no place
    in the form, ConfigError for settings that do not go together or an `out` that is taken.
    """
    if form not in FORMS:
        raise ConfigError(f"--to {form} is unknown: expected {', '.join(FORMS)}")
    if dtype not in DTYPES or (form == "merged" and dtype != "fp32"):
        raise ConfigError(
            f"--dtype {dtype}: expected {', '.join(DTYPES)}; a merged model keeps the type of its base, without --dtype"
        )
    folder, cut = find_adapter(source), cut or Cut()
    check_free(out, form, [folder, *([base] if base else [])], force=force)
    with TemporaryDirectory(prefix="fedloom-export-") as scratch:
        whole = AdapterFolder(folder)
        if base and not any_base:
            check_same_base([whole], digest_weights(base), f"--base-model {base}", "--any-base")
        rows = None if cut.is_none else cut_adapter(folder, cut, Path(scratch))
        adapter = whole if rows is None else AdapterFolder(scratch)
        with _place(None if rehearse else out, form) as place:
            name = str(base or whole.base_model or "BASE")
            made = FORMS[form](Order(adapter, place, out, DTYPES[dtype], base, name))
            if place is not None and form != "gguf":
                copy_tokenizer(folder, place)
                made.notes.extend(_copy_card(folder, place, form, is_cut=rows is not None))
    modules = _modules(whole, rows, made)
    note = other_base_note([whole], base) if base and not whole.base_digest else None
    return {
        "source": str(folder),
        "to": form,
        "out": str(out),
        "written": not rehearse,
        "dtype": dtype,
        "modules": [asdict(row) for row in modules],
        "bytes": None if rehearse else sum(file.stat().st_size for file in _files(out)),
        "load": made.load,
        "notes": [*made.notes, *([note] if note else [])],
    }


def _copy_card(folder: Path, out: Path, form: str, *, is_cut: bool) -> list[str]:
    """Copy the adapter's model card beside its factors; what to know of it, in words."""
    if form == "merged" or not (folder / "README.md").is_file():  # a merged model has its base's
        return []
    shutil.copyfile(folder / "README.md", out / "README.md")
    return ["README.md is that of the whole adapter: its rank and scores are those before the cut"] if is_cut else []


def _modules(whole: AdapterFolder, rows: list[MergedModule] | None, made: Made) -> list[ExportedModule]:
    """Every module's row: ranks before and after, and what it cost."""
    cuts = {row.module: (row.costs.exact, row.costs.error) for row in rows or ()}
    found = []
    for module in whole.modules:
        change, lost = cuts[module] if rows else (frobenius_norm(whole.pair(module)), 0.0)
        rank, values, rounding = made.ranks[module]
        found.append(ExportedModule(module, whole.settings.rank(module), rank, values, change, lost, rounding))
    return found


def check_free(out: Path, form: str, inputs: list[Path], *, force: bool) -> None:
    """Raise ConfigError where `out` is taken, or is or holds what is read."""
    if form != "gguf":
        output.check_free(out, inputs, force=force)
        return
    if out.is_dir() or out.suffix != ".gguf":
        raise ConfigError(f"--out {out}: expected the name of a file that ends in .gguf")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already: choose another file, or replace it with --force")


@contextmanager
def _place(out: Path | None, form: str) -> Iterator[Path | None]:
    """Where to write: a folder or file that takes the place of `out` when it is whole; None for a rehearsal."""
    if out is None:
        yield None
    elif form != "gguf":
        with output.replace_whole(out) as folder:
            yield folder
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        try:
            yield partial
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


def _files(out: Path) -> list[Path]:
    return [file for file in out.rglob("*") if file.is_file()] if out.is_dir() else [out]


def _to_peft(order: Order) -> Made:
    """A PEFT folder, all scales 1."""
    with TemporaryDirectory(prefix="fedloom-export-") as scratch:
        rows = cut_adapter(order.adapter.folder, Cut(), order.out or Path(scratch), order.dtype)
    ranks = {row.module: (row.rank, row.values, row.costs.rounding) for row in rows}
    load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{order.name}"), "{order.final}")'
    return Made(ranks, load)


def _to_merged(order: Order) -> Made:
    """The base model with the change added to its weights, in their own type."""
    base = open_base(_needed(order, "merged"))
    find_places(base, order.adapter)
    notes = []
    if order.out is not None:
        model = merge_into(base, order.adapter, order.out)
        notes.append(f"rounding to the base's own type is {model.rounding:.1e} of the change")
        if model.left_out:
            notes.append(f"not copied from the base: {', '.join(model.left_out)}")
    return Made(_plain_ranks(order.adapter), f'AutoModelForCausalLM.from_pretrained("{order.final}")', notes)


def _to_gguf(order: Order) -> Made:
    """A file for llama.cpp."""
    require_linear(order.adapter, "a GGUF adapter")
    base = _needed(order, "gguf")
    if not (base / "config.json").is_file():
        raise ModelError(f"--base-model {base} holds no config.json: expected a folder with a model of transformers")
    rows = write_gguf(order.adapter, read_json(base / "config.json"), order.name, order.out, order.dtype)
    ranks = {row.module: (row.rank, row.values, row.rounding) for row in rows}
    return Made(ranks, f"llama-cli -m BASE.gguf --lora {order.final}, BASE.gguf made of {order.name}")


def _to_vllm(order: Order) -> Made:
    """A folder for vLLM."""
    notes = describe_fit(order.adapter) or ["the adapter suits vLLM as it is: this is a copy, with a scale of 1"]
    pairs, rounding = suiting_pairs(order.adapter, order.dtype)
    if order.out is not None:
        write_suiting(order.adapter, pairs, order.out, order.dtype)
    ranks = {name: (pair.rank, pair.A.numel() + pair.B.numel(), rounding[name]) for name, pair in pairs.items()}
    most = max(pairs.ranks().values())
    if order.dtype == torch.float32:
        notes.append(
            "vLLM rounds the factors to the base model's type when it reads them, unless --lora-dtype says not"
        )
    load = (
        f"vllm serve {order.name} --enable-lora --max-lora-rank {server_rank(most)} "
        f"--lora-modules {order.final.name}={order.final}"
    )
    return Made(ranks, load, notes)


def _plain_ranks(adapter: AdapterFolder) -> dict[str, tuple[int, int, float]]:
    found = {}
    for module in adapter.modules:
        pair = adapter.pair(module)
        found[module] = pair.rank, pair.A.numel() + pair.B.numel(), 0.0
    return found


def _needed(order: Order, form: str) -> Path:
    if order.base is None:
        raise ConfigError(f"--to {form} needs the base model's folder: name it with --base-model")
    return order.base


FORMS: Mapping[str, Callable[[Order], Made]] = {
    "peft": _to_peft,
    "merged": _to_merged,
    "gguf": _to_gguf,
    "vllm": _to_vllm,
}
"""Name → what writes it."""
