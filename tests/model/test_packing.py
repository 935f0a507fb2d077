"""Examples in packed rows have the losses and gradients that they have alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import SGD, changed, client, resident, update
from torch.nn import functional
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from fedloom.errors import ConfigError
from fedloom.lora.pair import digest
from fedloom.model.packing import check_packs, pack_lengths, training_rows, without_mask
from fedloom.model.tokens import IGNORED, TokenizedExamples
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
