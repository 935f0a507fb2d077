"""Modules run side by side where one of them is worth it, and give the same bits in any case."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fedloom.compress.entries import dense_entry
from fedloom.lora.lowrank import ProductChange, map_modules, truncate_all, truncation_cost
from fedloom.lora.lowrank.parallel import WORTH
from fedloom.lora.pair import LoraPair


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_only_large_modules_leave_the_calling_thread_and_each_has_one_thread_of_its_own() -> None:
    met = threading.Barrier(3, timeout=20)

    def look(number: int, wait: bool) -> tuple[int, int, int]:
        if wait:
            met.wait()  # passes only where three calls run at the same time
        return number, threading.get_ident(), torch.get_num_threads()

    small = map_modules(lambda number: look(number, False), range(6), 6 * [0.99 * WORTH])
    large = map_modules(lambda number: look(number, True), range(6), [0.0, 2 * WORTH] * 3)
    assert [number for number, _, _ in small] == [number for number, _, _ in large] == list(range(6))
    assert {thread for _, thread, _ in small} == {threading.get_ident()}
    assert len({thread for _, thread, _ in large}) == 3
    assert {threads for _, _, threads in (*small, *large)} == {1}, "no call splits its sums"
    assert torch.get_num_threads() == 3
    unsaid = map_modules(lambda number: look(number, False), range(6))
    assert {thread for _, thread, _ in unsaid} == {threading.get_ident()}


@pytest.mark.usefixtures("three_threads")
def test_the_bits_are_the_same_whichever_way(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = {
        f"m{number}": LoraPair(torch.randn(24, 90, generator=draw), torch.randn(80, 24, generator=draw))
        for number in range(6)
    }
    alone = truncate_all(pairs, rank=5)
    monkeypatch.setattr("fedloom.lora.lowrank.parallel.WORTH", 0.0)
    together = truncate_all(pairs, rank=5)
    for module in pairs:
        for part in ("A", "B"):
            assert torch.equal(alone[module].pair.part(part), together[module].pair.part(part))


def test_what_a_module_costs_grows_with_its_rank_and_with_clients() -> None:
    demo, wide = truncation_cost((128, 128), 4 * 16), truncation_cost((3072, 8192), 4 * 64)
    assert demo < WORTH < wide
    # Products with a stack of 64 components on 256 rows, and the eigenvalues of its core.
    assert demo == 2 * 256 * 64**2 + 20 * 64**3
    pair = LoraPair(torch.zeros(4, 30), torch.zeros(20, 4))
    change, one = ProductChange(pair, "B", rank=4), torch.zeros(4, 30)
    alone = change.cost
    change.add(dense_entry(torch.zeros(20, 4)), dense_entry(one), 0.5)
    change.add(dense_entry(torch.zeros(20, 4)), dense_entry(one), 0.5)
    assert alone == 6 * 4**2 * 50 and change.cost == alone + 20 * 8**3
    summed = ProductChange(pair, "B")
    summed.add(dense_entry(torch.zeros(20, 4)), dense_entry(one), 1.0)
    assert summed.cost == alone
