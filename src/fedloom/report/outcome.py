"""What came of a run, from its ledger alone: whether it came to nothing, and what its user should know of its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.records.ledger import Aggregation, Evaluation, Note, Row

GAIN, UNDONE = "step_gain", "max_step_undone"
"""The numbers of `methods/shared/guard`, whose file would bring torch along."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """failure: why nothing was learnt in any round, or empty. notes: what went worse than it should."""

    failure: str = ""
    notes: tuple[str, ...] = ()


def judge_run(rows: Sequence[Row], rounds: int) -> Outcome:
    """What came of a run of so many rounds."""
    combined = {row.round for row in rows if isinstance(row, Aggregation)}
    empty = [round for round in range(1, rounds + 1) if round not in combined]
    causes = [row for row in rows if isinstance(row, Note) and row.round in empty]
    first = next((note for note in causes if note.about), causes[0] if causes else None)
    reason = f" ({first.text})" if first else ""
    if rounds and not combined:
        played = "its round" if rounds == 1 else f"any of its {rounds} rounds"
        return Outcome(f"no update could be averaged in {played}, so nothing was learnt and no adapter is left{reason}")
    lost = f"nothing was learnt in {len(empty)} of {rounds} rounds: {name_rounds(empty)}{reason}"
    notes = (lost if empty else "", describe_guard(rows), describe_decline(rows))
    return Outcome(notes=tuple(text for text in notes if text))


def describe_guard(rows: Sequence[Row]) -> str:
    """How far the method's guard shortened the server's steps, in words; empty where it did not, or hardly."""
    combined = {row.round: row.stats for row in rows if isinstance(row, Aggregation)}
    gains = {round: float(stats[GAIN]) for round, stats in combined.items() if GAIN in stats}
    # A step that is a tenth shorter than it would have been shows in no score.
    short = [round for round, gain in gains.items() if gain < 0.9]
    undone = [round for round, stats in combined.items() if stats.get(UNDONE)]
    if not short:
        return ""
    taken = f"; in round {name_rounds(undone)} it took the step before back" if undone else ""
    return (
        f"the method's guard (method.step_guard) shortened the server's steps in {len(short)} of {len(combined)} "
        f"rounds, to {min(gains.values()):.2g} of their length at the least{taken}: clients undid what was broadcast, "
        "so a lower training.learning_rate may end lower"
    )


def describe_decline(rows: Sequence[Row]) -> str:
    """That the held-out loss ended above where it began, in words; empty where it did not, or was not measured."""
    scored: dict[int, dict[str, Evaluation]] = {}
    for row in rows:
        if isinstance(row, Evaluation):
            scored.setdefault(row.round, {})[row.domain] = row
    if len(scored) < 2:
        return ""
    before, after = scored[min(scored)].values(), scored[max(scored)].values()
    first, last = (sum(row.loss for row in found) / len(found) for found in (before, after))
    if not math.isfinite(first) or last <= first:
        return ""
    matches = [sum(row.exact_match for row in found) / len(found) for found in (before, after)]
    end = f"rose from {first:.3f} to {last:.3f}{' although exact match rose' if matches[1] > matches[0] else ''}"
    if not math.isfinite(last):
        end = f"was {first:.3f} and is not finite"
    advice = "lower training.learning_rate, or take fewer steps or rounds"
    return f"the run ended worse than it began: held-out loss {end}; {advice}"


def name_rounds(rounds: Sequence[int]) -> str:
    """Rounds in words: "3 to 5, 9"; the first few stretches of many."""
    stretches: list[list[int]] = []
    for round in rounds:
        if stretches and round == stretches[-1][1] + 1:
            stretches[-1][1] = round
        else:
            stretches.append([round, round])
    named = [str(first) if first == last else f"{first} to {last}" for first, last in stretches]
    return ", ".join([*named[:4], "…"] if len(named) > 4 else named)
