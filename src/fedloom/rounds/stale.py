"""An update that was trained from an older version, as it counts for the present one (asynchronous rounds).

A client began with version v of the server's adapter, and the server is at version s by now: the update's staleness is
τ = s − v. What counts is the client's change since v. It is added to what the server has now, weakened by

    w(τ) = (1 + τ)^−a,    a = federation.staleness_exponent,

which is FedBuff's 1 / √(1 + τ) for a = ½ (Nguyen et al., AISTATS 2022, arXiv 2106.06639). The shares p_k of a buffer
sum to 1 as those of a round do, so that a step is Σ p_k w(τ_k) Δ_k: where FedBuff divides by the number of updates, p_k
divides by their examples, and a buffer of stale updates makes a shorter step. A method that multiplies factors sees
those of the present version with the weakened change in them, (B + w ΔB_k)(A + w ΔA_k).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fedloom.compress.entries import Entry, dense_entry, floats, to_dense
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Entries


def weigh_staleness(staleness: int, exponent: float) -> float:
    """w(τ) = (1 + τ)^−exponent: 1 for an update of the present version, or for all where the exponent is 0."""
    return float((1.0 + staleness) ** -exponent)


@dataclass(frozen=True, eq=False, slots=True)
class Past:
    """The version that an update rests on, and what its change counts for by now.

    weight: w(τ). updates: what the client sent (`Method.updates`). base, now: the server's adapter then and now; a
    change needs neither.
    """

    staleness: int
    weight: float
    updates: str
    base: LoraState
    now: LoraState

    def bring_forward(self, entries: Entries) -> Entries:
        """The entries as a client would send them that had made this change, weakened, from the present version."""
        return _KINDS[self.updates](self, entries)


def _weaken_change(past: Past, entries: Entries) -> Entries:
    """w times the change."""
    return {name: replace(entry, values=past.weight * floats(entry.values)) for name, entry in entries.items()}


def _move_factors(past: Past, entries: Entries) -> Entries:
    """The present factors, moved by w times the change. A client of lower rank has sent their first components."""
    moved: dict[str, Entry] = {}
    for name, entry in entries.items():
        module, _, part = name.rpartition("/")
        rows, columns = entry.shape
        base, now = (state[module].part(part)[:rows, :columns] for state in (past.base, past.now))
        moved[name] = dense_entry(now + past.weight * (to_dense(entry) - base))
    return moved


_KINDS: Mapping[str, Callable[[Past, Entries], Entries]] = {"change": _weaken_change, "factors": _move_factors}
