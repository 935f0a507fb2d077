"""The model cards of a run: in its adapter, in those that it saves on its way, and anew once other seeds are known."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedloom.adapters.folder import AdapterFolder
from fedloom.errors import FedloomError
from fedloom.records.config import Config
from fedloom.records.ledger import Training, read_rows
from fedloom.report.card import CardFacts, model_card
from fedloom.report.numbers import Report
from fedloom.report.progress import Progress
from fedloom.workspace.occupied import read_run_settings

CARD = "README.md"


def write_card(adapter: Path, config: Config, facts: CardFacts) -> None:
    """Write the card of the adapter in this folder."""
    (adapter / CARD).write_text(model_card(config, facts), encoding="utf-8")


def tell_seeds(runs: Sequence[Path], peers: Sequence[Report]) -> None:
    """Write the cards of finished runs that differ in their seed alone anew, with intervals over all of them.

    A run whose adapter or settings are no longer there keeps what it has.
    """
    for run in runs:
        with suppress(FedloomError, OSError):
            config = read_run_settings(run / "config.toml")
            if config is None or not (run / "adapter" / CARD).is_file():
                continue
            rows, adapter = read_rows(run / "ledger.jsonl"), AdapterFolder(run / "adapter")
            settings = adapter.settings
            progress = Progress.of(rows)
            facts = CardFacts(
                rank=max(settings.r, *settings.rank_pattern.values(), 1),
                digest=adapter.base_digest,
                round=progress.exported or progress.run.num_rounds,
                progress=progress,
                examples={row.client: row.examples for row in rows if isinstance(row, Training)},
                peers=peers,
            )
            write_card(run / "adapter", config, facts)
