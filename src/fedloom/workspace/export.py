"""What a finished run leaves behind: one adapter that PEFT opens, the picture, the page and the summary."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fedloom.adapters.merge.companions import copy_tokenizer
from fedloom.adapters.settings import save_adapter
from fedloom.errors import ModelError
from fedloom.lora.lowrank import truncate
from fedloom.lora.pair import LoraPair, LoraState, stack_pairs
from fedloom.methods.method import State
from fedloom.model.identity import base_folder, weights_digest
from fedloom.model.placement import Adapter
from fedloom.records.events import RunSummary
from fedloom.records.ledger import read_rows
from fedloom.records.session import End
from fedloom.report import Report, write_report
from fedloom.report.card import CardFacts
from fedloom.report.outcome import judge_run
from fedloom.workspace.assemble import Setup
from fedloom.workspace.cards import write_card
from fedloom.workspace.folder import RunFolder


def finish_run(setup: Setup, folder: RunFolder, server: State, rounds: int, seconds: float) -> RunSummary:
    """Write adapter/, curve.png and report.html into the run folder; of a run that came to nothing, no adapter.

    rounds: those that were played; seconds: what they took. The ledger says how the run ended.
    """
    ledger, lost, state = folder.ledger, 0.0, None
    ledger.sync()
    rows = read_rows(ledger.path)
    outcome = judge_run(rows, rounds)
    notes = list(outcome.notes)
    if not outcome.failure:
        state, lost = export_adapter(server, setup.config.output.max_rank)
        save_run_adapter(state, setup.config.model.path, setup.adapter, folder.path / "adapter")
    if lost:
        notes.append(
            f"output.max_rank = {setup.config.output.max_rank}: the exported adapter lacks {100 * lost:.2g} % of the "
            "energy ‖ΔW‖² of the run's own; the scores are those of the whole"
        )
    rows += [ledger.note(rounds, text) for text in notes]
    rows.append(End(rounds, "failed" if outcome.failure else "finished", outcome.failure, seconds, lost))
    ledger.append(rows[-1])
    ledger.sync()
    report = write_report(folder.path, rows)
    if state is not None:
        write_companions(setup, folder, state)
    return RunSummary(
        out=folder.path,
        method=setup.job.method.name,
        num_rounds=report.run.num_rounds,
        before=scores_at(report, 0),
        after=scores_at(report, -1),
        bytes_up=report.totals.bytes_up,
        bytes_down=report.totals.bytes_down,
        seconds=seconds,
        lost_energy=lost,
        failure=outcome.failure,
        notes=tuple(notes),
    )


def save_run_adapter(state: LoraState, base: str, adapter: Adapter, out: Path) -> None:
    """An adapter folder that says on which base model it was trained, by name and by the digest of its weights."""
    save_adapter(state, base, adapter.settings, out, base_digest=weights_digest(base))


def write_companions(setup: Setup, folder: RunFolder, state: LoraState) -> None:
    """What adapter/ holds beside the adapter: the base model's tokenizer, and a model card."""
    out, base = folder.path / "adapter", setup.config.model.path
    with suppress(ModelError):  # the base is no longer there: a run that is over shall not fail for it
        copy_tokenizer(base_folder(base), out)
    progress = folder.ledger.kept
    facts = CardFacts(
        rank=max(state.ranks().values(), default=0),
        digest=weights_digest(base),
        round=progress.exported or progress.run.num_rounds,
        progress=progress,
        examples=folder.ledger.examples,
    )
    write_card(out, setup.config, facts)


def scores_at(report: Report, at: int) -> dict[str, float]:
    """Domain → exact match at the first (0) or last (-1) evaluation."""
    return {domain: report.score(domain, at) for domain in report.domains} if report.points else {}


def export_adapter(server: State, max_rank: int | None) -> tuple[LoraState, float]:
    """The server's whole change as one adapter, and the share of ‖ΔW‖² that a cap on the rank costs.

    Merged increments are folded in; no module's rank exceeds min(m, n), which loses nothing.
    """
    pairs: dict[str, LoraPair] = {}
    energy = lost = 0.0
    states = (server.adapter, server.frozen, server.tail)
    for module in sorted({module for state in states for module in state}):
        parts = [state[module] for state in states if module in state]
        pair = parts[0] if len(parts) == 1 else stack_pairs(parts)  # one is only read: a copy would double the state
        cap = min(*pair.shape, max_rank or min(pair.shape))
        if pair.rank <= cap:
            pairs[module] = pair
            continue
        cut = truncate(pair, rank=cap)
        energy, lost = energy + cut.energy, lost + cut.energy * cut.lost_energy
        pairs[module] = cut.pair
    return LoraState(pairs), lost / energy if energy else 0.0
