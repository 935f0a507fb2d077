"""Where there are many elements, loom learns from a sample of its tensors what a payload costs this time."""

import pytest
import torch

from fedloom.compress.budget import COST, LEAST, SAMPLE, SAMPLED, Budget
from fedloom.compress.quantize import quantize
from fedloom.lora.pair import LoraPair, LoraState, initial_state
from fedloom.methods.method import Context, State
from fedloom.methods.shared import listed
from fedloom.methods.table import build
from fedloom.rounds.draft import Draft
from fedloom.wire import Header, Message, encode

SHAPES = {f"layers.{layer}.{kind}_proj": (96, 128) for layer in range(11) for kind in "qkvo"}
HEADER = Header("update", "loom", 1, 0, "", num_examples=1)
BEFORE = initial_state(SHAPES, dict.fromkeys(SHAPES, 8), 0)
BUDGET = 6000


def moved(uneven: float, seed: int) -> LoraState:
    """The start and a heavy-tailed change; the more uneven, the more of it is in some rows and columns."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        own = torch.randn(tensor.shape, generator=generator) ** 3
        lines = [torch.randn(size, generator=generator).mul(uneven).exp() for size in tensor.shape]
        return own * lines[0][:, None] * lines[1]

    return LoraState({m: LoraPair(p.A + noise(p.A), p.B + noise(p.B)) for m, p in BEFORE.items()})


def turn(after: LoraState, memory: dict) -> tuple[dict, int, list[int]]:
    """What is remembered, the payload's bytes, and how many tensors each encoding had."""
    tried: list[int] = []

    draft = Draft(HEADER)

    def size(entries: dict) -> int:
        tried.append(len(entries))
        return draft.size(entries)

    context = Context(1, 5, quantize("sign"), Budget(size=BUDGET), size=size)
    remembered, entries = build("loom", {"upload_share": 0.5}).compress(State(BEFORE, memory=memory), after, context)
    kept, payload = draft.encoded, encode(Message(HEADER, entries))
    # Where hardly anything fits, elements are left out one by one, and the payload is encoded once more at the end.
    assert kept == payload or BUDGET < 1000, "measuring the sample does not take the payload's place"
    assert draft.payload(entries) == payload
    return dict(remembered), len(payload), tried


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed, "SAMPLED", 1)


def test_a_sample_spares_an_encoding_where_the_change_is_of_another_kind(sampling: None):
    """The first payload shows what a tensor takes at least, and what a sample costs beside all of them."""
    memory, _, tried = turn(moved(0.1, 0), {})
    assert SAMPLE in memory and tried[-1] == 8, "four modules of 44"
    memory, _, _ = turn(moved(1.5, 1), memory)
    memory, size, tried = turn(moved(0.3, 2), memory)
    assert tried == [8, 88, 8] and 0.95 * BUDGET < size <= BUDGET


def test_without_a_sample_all_are_encoded_twice_there():
    """And so they are in small adapters, whose payloads stay as they have always been."""
    assert sum(p.A.numel() + p.B.numel() for p in BEFORE.values()) < SAMPLED
    memory: dict = {}
    for number, uneven in enumerate((0.1, 1.5, 0.3)):
        memory, size, tried = turn(moved(uneven, number), memory)
    assert set(memory) == {COST, LEAST} and tried == [88, 88] and size <= BUDGET


@pytest.mark.parametrize("seed", range(6))
def test_the_budget_is_kept_and_used_whatever_the_sample_says(sampling: None, seed: int):
    memory: dict = {}
    for number, uneven in enumerate((0.0, 1.0, 0.3, 2.0)):
        memory, size, tried = turn(moved(uneven, 10 * seed + number), memory)
        assert 0.95 * BUDGET < size <= BUDGET and tried.count(88) <= 3


def test_a_budget_that_holds_hardly_anything(sampling: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("test_loom_sample.BUDGET", 700)
    memory: dict = {}
    for number in range(3):
        memory, size, _ = turn(moved(1.0, number), memory)
        assert size <= 700
