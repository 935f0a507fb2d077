"""What a run's noise on single examples was worth at each client, from its ledger and its settings."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.errors import ConfigError
from fedloom.records.config import Config
from fedloom.records.ledger import Row, Training
from fedloom.records.noise import client_epsilon

SHOWN = 6
"""Clients that are named; of more, those that have spent most."""


def describe_spent(rows: Sequence[Row], config: Config) -> str:
    """ε at example level of every client's rounds so far, in words; "" without training.dp.

    It is of the numbers of examples that clients have told. Every turn counts, whatever became of its update.
    """
    if config.training.dp is None:
        return ""
    turns = [row for row in rows if isinstance(row, Training)]
    counts = {row.client: (row.examples, sum(other.client == row.client for other in turns)) for row in turns}
    told = {client: held for client, held in counts.items() if held[0] > 0}
    if not told:
        return "noise at example level: how much of ε is spent stands in the sites' own records"
    try:
        spent = {client: client_epsilon(config, client, *held) for client, held in told.items()}
    except ConfigError as error:
        return f"noise at example level: {error}"
    most = sorted(spent, key=lambda client: (-spent[client][0], client))
    named = [f"{client} {spent[client][0]:.3g} (δ = {spent[client][1]:.2g})" for client in most[:SHOWN]]
    more = f" and {len(most) - SHOWN} clients with no more" if len(most) > SHOWN else ""
    return f"noise at example level, ε spent in this run: {', '.join(named)}{more}"
