"""Adapters that a run saves on its way: adapters/round-00010/ and so on in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedloom.methods.method import State
from fedloom.model.identity import weights_digest
from fedloom.report.card import CardFacts
from fedloom.workspace.assemble import Setup
from fedloom.workspace.cards import write_card
from fedloom.workspace.export import export_adapter, save_run_adapter
from fedloom.workspace.folder import RunFolder


def save_milestone(setup: Setup, folder: RunFolder, server: State, round: int) -> Path | None:
    """Save the model after this round as a PEFT adapter, where output.save_every says so, and drop the oldest ones.

    Call it before the round's checkpoint: a round that is played again after a crash then writes the same bytes again.
    """
    output = setup.config.output
    if not output.save_every or round % output.save_every:
        return None
    place = folder.path / "adapters" / f"round-{round:05d}"
    partial = place.with_name(f".{place.name}.partial")
    for old in (partial, place):  # of a round that was cut off
        shutil.rmtree(old, ignore_errors=True)
    state, _ = export_adapter(server, output.max_rank)
    save_run_adapter(state, setup.config.model.path, setup.adapter, partial)
    rank, digest = max(state.ranks().values(), default=0), weights_digest(setup.config.model.path)
    facts = CardFacts(rank, digest, round, folder.ledger.kept, folder.ledger.examples)
    write_card(partial, setup.config, facts)
    partial.rename(place)
    kept = sorted(place.parent.glob("round-*"))
    for old in kept[: -output.save_total_limit] if output.save_total_limit else ():
        shutil.rmtree(old)
    return place
