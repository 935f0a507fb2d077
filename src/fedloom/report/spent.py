"""What a run's noise on single examples was worth at each client, from its ledger and its settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fedloom.errors import ConfigError
from fedloom.records.config import Config
from fedloom.records.ledger import Row, Training
from fedloom.records.noise import client_epsilon

SHOWN = 6
"""Clients that are named; of more, those that have spent most."""


def spent_by_client(rows: Iterable[Row], config: Config) -> dict[str, tuple[float, float]]:
    """Client → (ε, δ) at example level of its rounds so far; nothing where training.dp is off or no numbers are told.

    It is of the numbers of examples that clients have told. Every turn counts, whatever became of its update.
    Raises ConfigError where the extra that accounts for it is not installed.
    """
    if config.training.dp is None:
        return {}
    turns, examples = Counter[str](), dict[str, int]()
    for row in rows:
        if isinstance(row, Training):
            turns[row.client] += 1
            examples[row.client] = row.examples
    return {
        client: client_epsilon(config, client, examples[client], count)
        for client, count in turns.items()
        if examples[client] > 0
    }


def describe_spent(rows: Sequence[Row], config: Config) -> str:
    """ε at example level of every client's rounds so far, in words; "" without training.dp."""
    if config.training.dp is None:
        return ""
    try:
        spent = spent_by_client(rows, config)
    except ConfigError as error:
        return f"noise at example level: {error}"
    if not spent:
        return "noise at example level: how much of ε is spent stands in the sites' own records"
    most = sorted(spent, key=lambda client: (-spent[client][0], client))
    named = [f"{client} {spent[client][0]:.3g} (δ = {spent[client][1]:.2g})" for client in most[:SHOWN]]
    more = f" and {len(most) - SHOWN} clients with no more" if len(most) > SHOWN else ""
    return f"noise at example level, ε spent in this run: {', '.join(named)}{more}"
