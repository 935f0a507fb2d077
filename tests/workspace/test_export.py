"""What a run leaves: one adapter, within the rank that was asked for, and what the cap on it cost."""

from __future__ import annotations

import pytest
import torch

from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.workspace.export import export_adapter


def stacked(seed: int, rank: int, shape: tuple[int, int], fall: float = 0.95) -> LoraPair:
    """Components each of which is smaller than the one before."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    sizes = fall ** torch.arange(rank)
    a, b = torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
    return LoraPair(a, b * sizes)


@pytest.mark.parametrize("cap", [1, 4, 12])
def test_a_cap_says_what_it_costs_of_the_whole_change(cap: int):
    """Modules that lose unequal shares, stacked far beyond the cap: few of their components are computed at all."""
    state = LoraState({"flat": stacked(0, 96, (160, 120)), "steep": stacked(1, 64, (90, 200), 0.6)})
    adapter, lost = export_adapter(State(state), cap)
    whole = left = 0.0
    for module, pair in state.items():
        exact = pair.B.double() @ pair.A.double()
        whole += float(exact.square().sum())
        left += float((exact - adapter[module].B.double() @ adapter[module].A.double()).square().sum())
        assert adapter[module].rank == cap
    assert lost == pytest.approx(left / whole, rel=1e-5)


def test_without_a_cap_nothing_is_lost():
    state = LoraState({"flat": stacked(0, 96, (160, 120))})
    adapter, lost = export_adapter(State(state), None)
    assert torch.equal(adapter["flat"].B, state["flat"].B) and lost == 0.0
