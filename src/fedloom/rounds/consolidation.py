"""Consolidation: the merged increments of all rounds so far, recompressed, as a common new point to go on from.

A client that was away for many rounds is sent the full state, which grows with every merge. If it were recompressed
only for that client, its bits would differ from everybody else's. So the server recompresses its own state at fixed
rounds and counts the result as a version of its own, to which no broadcast leads. Every client, present or not, then
receives the full state, and all are bit-identical again. Clients run no factorisation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedloom.lora.lowrank import truncate_all
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State


@dataclass(frozen=True, slots=True)
class Consolidation:
    """every: rounds between two consolidations, 0 for none; energy: share of Σσ² of every module that is kept.

    At energy 1 nothing is lost but rounding: the rank falls to what the sum of the increments truly has.
    """

    every: int = 0
    energy: float = 1.0

    def is_due(self, round: int) -> bool:
        """Whether the server consolidates after this round."""
        return self.every > 0 and round % self.every == 0


def consolidate(state: State, energy: float) -> tuple[State, Mapping[str, float]]:
    """The server's state with its increments recompressed, one version on, and what that cost.

    Where no rank falls in sum, the state is returned as it is: nothing would be gained by a new version.
    """
    cuts = truncate_all(state.frozen, energy=energy)
    frozen = LoraState({m: LoraPair(cut.pair.A.contiguous(), cut.pair.B.contiguous()) for m, cut in cuts.items()})
    before, after = (sum(held.ranks().values()) for held in (state.frozen, frozen))
    if after >= before:
        return state, {}
    sizes = {module: cut.energy for module, cut in cuts.items()}
    lost = sum(sizes[module] * cut.lost_energy for module, cut in cuts.items())
    stats = {
        "consolidated_rank": after / len(frozen),
        "consolidated_from_rank": before / len(frozen),
        "consolidated_lost_energy": lost / max(sum(sizes.values()), 1e-30),  # increments of zeros lose nothing
    }
    digest = hashlib.blake2b(f"{state.digest} consolidated".encode(), digest_size=16).hexdigest()
    return replace(state, frozen=frozen, version=state.version + 1, digest=digest), stats
