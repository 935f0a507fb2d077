"""Examples in packed rows have the losses and gradients that they have alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import SGD, changed, client, resident, update
from torch.nn import functional
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from fedloom.errors import ConfigError
from fedloom.lora.pair import digest
from fedloom.model import packing
from fedloom.model.packing import (
    check_packs,
    collator,
    may_share,
    pack_lengths,
    share_rows,
    training_rows,
    without_mask,
)
from fedloom.model.tokens import IGNORED, TokenizedExamples, Tokens
from fedloom.workspace.tokenized import pack_examples
from tiny_models import MODELS


def losses(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every learnt token, row by row."""
    given = without_mask({name: value for name, value in batch.items() if name != "labels"})
    logits, labels = model(**given, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
    return functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED], reduction="none")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_every_token_of_a_packed_row_has_its_own_loss(name: str) -> None:
    model, data = MODELS[name](), pack_examples(client(count=9), 32)
    rows = training_rows(data)
    assert len(rows) == data.num_rows < len(data) == 9
    check_packs(model, 80)
    packed = losses(model, rows.collate([rows[place] for place in range(len(rows))]))
    order = [index for row in data.rows for index in row]
    alone = torch.cat([losses(model, data.collate([data[index]])) for index in order])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_on_all_rows_is_a_step_on_all_examples(name: str) -> None:
    plain = client(count=8)
    packed = pack_examples(plain, 32)
    model, state = resident(name)
    before, unpacked = update(model, state, plain, changed(SGD, per_device_train_batch_size=8))
    after, stats = update(model, state, packed, changed(SGD, per_device_train_batch_size=packed.num_rows))
    for module, pair in before.items():
        torch.testing.assert_close(after[module].A, pair.A, atol=2e-6, rtol=0)
        torch.testing.assert_close(after[module].B, pair.B, atol=2e-6, rtol=0)
    assert stats.loss == pytest.approx(unpacked.loss, rel=1e-5)
    assert (stats.examples, stats.tokens) == (8, unpacked.tokens), "an example weighs the same, and padding is no token"
    again, _ = update(model, state, packed, changed(SGD, per_device_train_batch_size=packed.num_rows))
    assert digest(again) == digest(after)


def test_nothing_predicts_the_first_token_of_an_example() -> None:
    data = client(count=4)
    learnt = tuple(type(one)(one.ids, one.prompt, True, ((1, len(one.ids)),)) for one in data.examples)
    packed = pack_examples(TokenizedExamples(learnt, 0), 64)
    rows = training_rows(packed)
    batch = rows.collate([rows[0]])
    starts = batch["position_ids"] == 0
    assert starts.sum() == len(packed.rows[0]) > 1
    assert (batch["labels"][starts] == IGNORED).all() and (batch["labels"][~starts] != IGNORED).all()


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_rows_hold_every_example_once_and_are_no_longer_than_asked(lengths: list[int], limit: int) -> None:
    rows = pack_lengths(lengths, limit)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert all(size <= limit for size in used)
    # No two rows would fit into one: otherwise the later one's examples had found room in the earlier one.
    assert sum(2 * size <= limit for size in used) <= 1


def test_the_fullest_row_with_room_is_taken() -> None:
    assert pack_lengths([3, 9, 5, 7, 1], 10) == ((1, 4), (3, 0), (2,))


def test_a_model_that_sees_what_stands_before_is_refused() -> None:
    torch.manual_seed(0)
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=90, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(ConfigError, match="data.packing = true does not work with this model.*set it to false"):
        check_packs(recurrent, 80)


def test_a_model_that_takes_no_positions_is_refused() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> None:
            raise AssertionError("never called with positions")

    with pytest.raises(ConfigError, match="takes no position_ids"):
        check_packs(Bare(), 80)


def of_lengths(*lengths: int) -> TokenizedExamples:
    """Made-up examples of these numbers of tokens; half of each is its prompt."""
    draw = torch.Generator().manual_seed(1)
    made = [Tokens(torch.randint(1, 80, (size,), generator=draw), size // 2, True) for size in lengths]
    return TokenizedExamples(tuple(made), 0)


MIXED = (11, 4, 5, 3, 6, 2, 10, 4)
"""45 tokens, which five rows of 11 hold."""


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_examples_that_share_a_row_of_a_batch_keep_their_losses(name: str) -> None:
    model, data = MODELS[name](), of_lengths(*MIXED)
    shared, padded = share_rows(data, data.examples), data.collate(data.examples)
    assert shared["input_ids"].shape == (5, 11) and padded["input_ids"].shape == (8, 11)
    assert shared["attention_mask"].sum() == padded["attention_mask"].sum() == sum(MIXED)
    found, alone = losses(model, shared), losses(model, padded)
    torch.testing.assert_close(found.sort().values, alone.sort().values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_the_same_whether_or_not_examples_share_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, settings = of_lengths(*MIXED), changed(SGD, per_device_train_batch_size=8)
    model, state = resident(name)
    assert may_share(model.get_base_model())
    shared, stats = update(model, state, data, settings)
    monkeypatch.setattr(packing, "SPARED", 1.0)
    padded, expected = update(model, state, data, settings)
    for module, pair in padded.items():
        torch.testing.assert_close(shared[module].A, pair.A, atol=2e-6, rtol=0)
        torch.testing.assert_close(shared[module].B, pair.B, atol=2e-6, rtol=0)
        assert not torch.equal(pair.B, state[module].B)
    assert stats.loss == pytest.approx(expected.loss, rel=1e-5) and stats.tokens == expected.tokens == sum(MIXED)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_a_batch_has_every_example_once_and_is_no_wider(lengths: list[int]) -> None:
    data = of_lengths(*lengths)
    batch = share_rows(data, data.examples)
    rows, width = batch["input_ids"].shape
    assert width == max(lengths)
    if "position_ids" not in batch:
        assert rows == len(lengths)
        return
    assert rows <= 7 / 8 * len(lengths)
    starts = ((batch["position_ids"] == 0) & (batch["attention_mask"] == 1)).flatten().nonzero().flatten().tolist()
    ids = batch["input_ids"].flatten()
    found = sorted(tuple(ids[start : start + size].tolist()) for start, size in zip(starts, sizes(batch), strict=True))
    assert found == sorted(tuple(tokens.ids.tolist()) for tokens in data.examples)


def sizes(batch: dict[str, torch.Tensor]) -> list[int]:
    """Tokens of every example of a packed batch, row by row."""
    found: list[int] = []
    for mask, positions in zip(batch["attention_mask"], batch["position_ids"], strict=True):
        used = positions[: int(mask.sum())].tolist()
        begins = [place for place, position in enumerate(used) if position == 0]
        found += [end - begin for begin, end in zip(begins, [*begins[1:], len(used)], strict=True)]
    return found


def test_a_model_that_sees_what_stands_before_has_its_examples_one_a_row() -> None:
    torch.manual_seed(0)
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=90, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    data = of_lengths(*MIXED)
    for base, rows in ((recurrent, 8), (MODELS["llama"](), 5)):
        model = SimpleNamespace(get_base_model=lambda base=base: base)
        assert collator(model, data)(data.examples)["input_ids"].shape == (rows, 11)
