"""`fedloom export`: reads arguments, writes an adapter in another form, prints."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedloom.cli.options import AsJson

screen = Console()


class Form(StrEnum):
    """What an adapter can be handed on as."""

    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    vllm = "vllm"


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, or of a PEFT adapter.")
    ],
    to: Annotated[
        Form,
        typer.Option(
            help="peft: a PEFT folder; merged: the base model with the change in it; gguf: a file for llama.cpp; vllm: "
            "a folder with one rank and one scale, as vLLM reads it."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; for gguf a file that ends in .gguf.")],
    max_rank: Annotated[int | None, typer.Option(help="Cap on every module's rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of every module's Σσ² to keep, by the least rank: 0.99.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16; a merged model keeps its base's.")] = "fp32",
    base_model: Annotated[
        str, typer.Option(help="Base model, if not the one that the adapter names: merged and gguf need it.")
    ] = "",
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Also with a base model of other weights than it was trained on.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and compute all, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hand an adapter on: to PEFT, llama.cpp or vLLM, or as a merged model; with its rank cut, if asked."""
    from fedloom.adapters.export.forms import write_export
    from fedloom.adapters.export.source import Cut, find_adapter
    from fedloom.adapters.export.table import render_export
    from fedloom.adapters.folder import AdapterFolder
    from fedloom.model.identity import base_folder

    name = base_model
    if not name and to in (Form.merged, Form.gguf):
        name = AdapterFolder(find_adapter(source)).base_model
    told = write_export(
        source,
        to.value,
        out,
        cut=Cut(max_rank, energy),
        dtype=dtype,
        base=base_folder(name) if name else None,
        any_base=any_base,
        force=force,
        rehearse=dry_run,
    )
    if as_json:
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        screen.print(render_export(told), highlight=False)
