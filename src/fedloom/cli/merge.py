"""`fedloom aggregate`: reads arguments, merges, prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track

from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from fedloom.adapters.merge.folders import MergedModule

DTYPES = {"": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
screen = Console()


def aggregate(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER…", help="PEFT folders of LoRA adapters.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    method: Annotated[
        str, typer.Option(help="florist if left out, flexlora with --rank; `fedloom methods` explains them.")
    ] = "",
    weights: Annotated[
        str, typer.Option(help="A weight for each adapter, such as its number of examples: 120,80. Equal if left out.")
    ] = "",
    rank: Annotated[int | None, typer.Option(help="Rank of the best approximation (flexlora).")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of Σσ² to keep (florist); 1 is exact.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Cap on every module's rank, whatever the method.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16; of the adapter, fp32 if left out.")] = "",
    base_model: Annotated[
        Path | None, typer.Option(help="Write this base model with the adapters merged in, instead of an adapter.")
    ] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Also where adapters were trained on base models of other weights.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute and print all, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the adapter or model in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge adapters of any ranks, alphas and modules into one, without loading a model."""
    import torch

    from fedloom.adapters.base_identity import check_same_base, digest_weights
    from fedloom.adapters.merge import output, table
    from fedloom.adapters.merge.base import open_base
    from fedloom.adapters.merge.combine import Recipe
    from fedloom.adapters.merge.folders import open_folders
    from fedloom.adapters.merge.places import find_places
    from fedloom.adapters.merge.save import save_merge

    output.check_free(out, [*adapters, *([base_model] if base_model else [])], force=force)
    if dtype and base_model:
        raise ConfigError(f"--dtype {dtype}: with --base-model the weights keep the type they have in the base")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown: expected fp32, fp16 or bf16")
    chosen = method or ("florist" if rank is None else "flexlora")
    recipe = Recipe(chosen, rank, energy, max_rank, getattr(torch, DTYPES[dtype]))
    inputs = open_folders(adapters, _numbers(weights), any_base=any_base)
    base = open_base(base_model) if base_model else None
    if base and not any_base:
        check_same_base(inputs.adapters, digest_weights(base.folder), f"--base-model {base.folder}", "--any-base")
    for adapter in inputs.adapters:
        if base:
            find_places(base, adapter)
    rows, merged = save_merge(inputs, recipe, base, None if dry_run else out, _progress(len(inputs.layouts)))
    place = {"out": str(out), "base": base_model and str(base_model), "written": not dry_run, "model": merged}
    told = {**table.build_record(inputs, recipe, rows, base_model), **place}
    if as_json:
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        screen.print(table.render_record(told), highlight=False)


def _progress(modules: int) -> Callable[[Iterable[MergedModule]], Iterable[MergedModule]]:
    """A bar on a terminal's stderr while rows are made."""
    console = Console(stderr=True)

    def watch(rows: Iterable[MergedModule]) -> Iterable[MergedModule]:
        return track(rows, "merging", modules, console=console, transient=True, disable=not console.is_terminal)

    return watch


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"--weights {text}: expected numbers with commas between them, such as 120,80") from None
