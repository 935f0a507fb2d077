"""What closes a run on the terminal: its tables, and the line that says where everything is."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType

from fedloom.records.text import cell

LEFT = {
    "adapter": "adapter/ (for PEFT)",
    "report.html": "report.html",
    "curve.png": "curve.png",
    "ledger.jsonl": "ledger.jsonl (every payload)",
    "payloads": "payloads/",
}
"""What a person looks for in a run's folder → how the last line names it."""


def run_tables(folder: Path) -> RenderableType:
    """The closing tables of a run folder, what was predicted of it, and what its noise was worth."""
    from fedloom.records.configfile import load_config
    from fedloom.records.ledger import read_rows
    from fedloom.report import summarise
    from fedloom.report.prediction import compare_rows, prediction_table, read_prediction
    from fedloom.report.spent import describe_spent
    from fedloom.report.tables import closing_tables

    ledger, settings = folder / "ledger.jsonl", folder / "config.toml"
    told, rows = read_prediction(folder), read_rows(ledger)
    parts: list[RenderableType] = [closing_tables(summarise(rows, str(ledger)))]
    if told and (found := compare_rows(told, rows)):
        parts.append(prediction_table(told, found))
    if settings.exists() and (spent := describe_spent(rows, load_config(settings))):
        parts += [cell(spent), ""]
    return Group(*parts)


def print_folder(folder: Path, console: Console) -> None:
    """The line that names the folder of a run and what is in it."""
    held = ", ".join(words for name, words in LEFT.items() if (folder / name).exists())
    console.print(f"in {folder}: {held}", markup=False, highlight=False, soft_wrap=True)
