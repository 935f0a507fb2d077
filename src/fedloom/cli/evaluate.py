"""`fedloom evaluate`: read arguments, call the library, print."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fedloom.cli.options import AsJson, Set, split_words
from fedloom.records.text import LONG, cell

if TYPE_CHECKING:
    from fedloom.studies.evaluation import Evaluated

screen = Console()


def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="Folder of a run, of a PEFT adapter, or a base model.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="Settings whose held-out data, template and metrics are used; a run has its own."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Held-out data instead of the settings': a file, or one a domain with {client} in its path."),
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model, if not the one that the adapter names.")] = None,
    without_adapter: Annotated[
        bool, typer.Option("--without-adapter", help="Score the base model alone, to compare with.")
    ] = False,
    metrics: Annotated[
        str, typer.Option(help="Further scores: chrf, rouge_l, token_f1, package.module:function; joined by commas.")
    ] = "",
    tasks: Annotated[
        str, typer.Option(help="Tasks of the lm-evaluation-harness, joined by commas; the settings' if left out.")
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own (YAML).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of a task, at most.")] = None,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Tasks that execute what the model writes, such as humaneval, may."
        ),
    ] = False,
    sets: Set = None,
    as_json: AsJson = False,
) -> None:
    """Score a run, an adapter or a base model on held-out data, and on tasks of the lm-evaluation-harness."""
    from fedloom.studies.evaluation import evaluate_target, find_target

    words = split_words(metrics)
    own = {"data.heldout": data and json.dumps(data), "evaluation.metrics": json.dumps(words) if words else None}
    overrides = [*(sets or []), *(f"{key}={value}" for key, value in own.items() if value is not None)]
    found = find_target(target, config, base_model=base_model, with_adapter=not without_adapter, overrides=overrides)
    result = evaluate_target(
        found,
        split_words(tasks),
        include_path=include_path,
        limit=limit,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    if as_json:
        print(json.dumps(as_tree(result), indent=2, ensure_ascii=False))
        return
    screen.print(cell(f"{result.model}, {'no adapter' if result.adapter is None else result.adapter}", "bold", LONG))
    for note in result.notes:
        screen.print(cell(f"note: {note}", "yellow", LONG))
    for table in (_score_table(result), _task_table(result)):
        if table.row_count:
            screen.print(table)


def as_tree(result: Evaluated) -> dict[str, Any]:
    """The result as JSON has it; what is not a finite number becomes null."""
    counts = {
        domain: {"examples": row.examples, "tokens": row.tokens, "bytes": row.bytes}
        for domain, row in result.rows.items()
    }
    tree = {**asdict(result), "scores": result.scores, "counts": counts, "notes": list(result.notes)}
    del tree["rows"]
    whole = _finite(tree)
    assert isinstance(whole, dict)
    return whole


def _finite(tree: object) -> object:
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _score_table(result: Evaluated) -> Table:
    from fedloom.report.measures import order_measures
    from fedloom.report.numbers import MEAN, Point

    table = Table(box=box.SIMPLE_HEAD, title="Held-out scores", title_justify="left", title_style="bold")
    measures = order_measures([Point(0, result.scores, 0)]) if result.rows else []
    table.add_column("domain")
    for name in ("examples", *(measure.title for measure in measures)):
        table.add_column(cell(name), justify="right")
    for domain in [*sorted(result.rows), MEAN] if result.rows else []:
        count = f"{result.rows[domain].examples:,}" if domain in result.rows else ""
        values = [measure.show(result.scores[measure.key].get(domain, math.nan)) for measure in measures]
        table.add_row(cell(domain), count, *values, style="bold" if domain == MEAN else "")
    return table


def _task_table(result: Evaluated) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="lm-evaluation-harness", title_justify="left", title_style="bold")
    for name in ("task", "metric"):
        table.add_column(name)
    table.add_column("value", justify="right")
    for task, found in sorted(result.tasks.items()):
        for metric, value in found.items():
            table.add_row(cell(task), cell(metric), f"{value:.4f}")
    return table
