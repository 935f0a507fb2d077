"""The way back of a client that missed many rounds: missed broadcasts, full state, and the state consolidated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedloom.methods.method import State
from fedloom.records.config import Config
from fedloom.rounds.consolidation import consolidate
from fedloom.rounds.federation import Federation
from fedloom.rounds.turns import full_state
from fedloom.workspace.assemble import Setup, load_setup


def run(configs: Mapping[str, Config], energies: Sequence[float]) -> dict[str, Any]:
    """One row for each run and energy. The last client misses all rounds; the others take part in all of them.

    bytes: what the absent client is sent. rank: mean over modules of the merged increments. lost_energy: share of their
    Σσ² that the recompression drops. loss: held-out, mean over the domains, of the state that is sent.
    """
    rows: list[dict[str, Any]] = []
    for label, config in configs.items():
        setup = load_setup(config)
        server, broadcasts = played(setup)
        rounds = config.federation.num_rounds
        rows.append({"run": label, "way": "missed broadcasts", "bytes": sum(map(len, broadcasts))})
        rows.append({"run": label, "way": "full state", **facts(setup, server, rounds)})
        for energy in energies:
            after, stats = consolidate(server, energy)
            lost = stats.get("consolidated_lost_energy", 0.0)
            rows.append(
                {"run": label, "way": f"consolidated at {energy}", **facts(setup, after, rounds), "lost_energy": lost}
            )
    return {"rounds": rounds, "rows": rows}


def played(setup: Setup) -> tuple[State, list[bytes]]:
    """The server's state after all rounds without the last client, and the broadcasts."""
    present = list(setup.sites)[:-1]
    federation = Federation(setup.job, setup.initial, {client: setup.sites[client].ranks for client in present})
    steps = {client: setup.train(client) for client in present}
    broadcasts = [federation.round(steps).broadcast for _ in range(setup.config.federation.num_rounds)]
    return federation.server, broadcasts


def facts(setup: Setup, state: State, round: int) -> dict[str, float]:
    """Bytes of a full state, mean rank of its merged increments, and how good the model is that it stands for."""
    ranks = list(state.frozen.ranks().values())
    losses = [score.loss for score in setup.evaluate(state).values()]
    return {
        "bytes": len(full_state(setup.job, state, round)),
        "rank": sum(ranks) / max(len(ranks), 1),
        "loss": sum(losses) / max(len(losses), 1),
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows for a terminal."""
    table = Table(title=f"a client that missed {result['rounds']} rounds")
    for name in ("run", "what is sent", "KiB", "mean rank", "lost energy", "held-out loss"):
        table.add_column(name, justify="left" if name in ("run", "what is sent") else "right")
    for row in result["rows"]:
        table.add_row(
            row["run"],
            row["way"],
            f"{row['bytes'] / 1024:.1f}",
            f"{row['rank']:.1f}" if "rank" in row else "",
            f"{row['lost_energy']:.1e}" if "lost_energy" in row else "",
            f"{row['loss']:.4f}" if "loss" in row else "",
        )
    return [table]
