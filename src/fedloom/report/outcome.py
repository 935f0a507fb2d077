"""What came of a run, from its ledger alone: whether it came to nothing, and what its user should know of its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.records.ledger import Aggregation, Evaluation, Note, Row


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
    return Outcome(notes=tuple(text for text in (lost if empty else "", describe_decline(rows)) if text))


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
