"""What a finished run leaves behind: one adapter that PEFT opens, the picture, the page and the summary."""

from __future__ import annotations

from fedloom.adapters.settings import save_adapter
from fedloom.lora.lowrank import truncate
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.records.events import RunSummary
from fedloom.records.ledger import read_rows
from fedloom.records.session import End
from fedloom.report import Report, write_report
from fedloom.report.outcome import judge_run
from fedloom.workspace.assemble import Setup
from fedloom.workspace.folder import RunFolder


def finish_run(setup: Setup, folder: RunFolder, server: State, rounds: int, seconds: float) -> RunSummary:
    """Write adapter/, curve.png and report.html into the run folder; of a run that came to nothing, no adapter.

    rounds: those that were played; seconds: what they took. The ledger says how the run ended.
    """
    ledger, lost = folder.ledger, 0.0
    ledger.sync()
    outcome = judge_run(read_rows(ledger.path), rounds)
    notes = list(outcome.notes)
    if not outcome.failure:
        state, lost = export_adapter(server, setup.config.output.max_rank)
        save_adapter(state, setup.config.model.path, setup.adapter.settings, folder.path / "adapter")
    if lost:
        notes.append(
            f"output.max_rank = {setup.config.output.max_rank}: the exported adapter lacks {100 * lost:.2g} % of the "
            "energy ‖ΔW‖² of the run's own; the scores are those of the whole"
        )
    for text in notes:
        ledger.note(rounds, text)
    ledger.append(End(rounds, "failed" if outcome.failure else "finished", outcome.failure, seconds, lost))
    ledger.sync()
    report = write_report(folder.path)
    return RunSummary(
        out=folder.path,
        method=setup.job.method.name,
        num_rounds=setup.config.federation.num_rounds,
        before=scores_at(report, 0),
        after=scores_at(report, -1),
        bytes_up=report.totals.bytes_up,
        bytes_down=report.totals.bytes_down,
        seconds=seconds,
        lost_energy=lost,
        failure=outcome.failure,
        notes=tuple(notes),
    )


def scores_at(report: Report, at: int) -> dict[str, float]:
    """Domain → exact match at the first (0) or last (-1) evaluation."""
    return {domain: report.score(domain, at) for domain in report.domains} if report.points else {}


def export_adapter(server: State, max_rank: int | None) -> tuple[LoraState, float]:
    """The server's whole change as one adapter, and the share of ‖ΔW‖² that a cap on the rank costs.

    Merged increments are folded in; no module's rank exceeds min(m, n), which loses nothing.
    """
    pairs: dict[str, LoraPair] = {}
    energy = lost = 0.0
    for module, pair in server.total.items():
        cap = min(*pair.shape, max_rank or min(pair.shape))
        if pair.rank <= cap:
            pairs[module] = pair
            continue
        cut = truncate(pair, rank=cap)
        energy, lost = energy + cut.energy, lost + cut.energy * cut.lost_energy
        pairs[module] = cut.pair
    return LoraState(pairs), lost / energy if energy else 0.0
