"""LoraPair and LoraState: order, shapes, stacking, seeds."""

from __future__ import annotations

import pytest
import torch

from fedloom.compress.seeds import derived_seed
from fedloom.errors import ShapeError
from fedloom.lora.pair import LoraPair, LoraState, digest, from_tensors, initial_state, narrow, stack
from toy import SHAPES, delta, initial, random_state


def test_a_pair_of_unequal_ranks_is_refused():
    with pytest.raises(ShapeError, match=r"\(3, 5\).*\(4, 2\)"):
        LoraPair(torch.zeros(3, 5), torch.zeros(4, 2))


def test_order_of_insertion_is_forgotten():
    state = random_state(1)
    backwards = LoraState(dict(reversed(list(state.items()))))
    assert list(backwards) == sorted(SHAPES)
    assert digest(backwards) == digest(state)


def test_tensors_round_trip_under_every_prefix():
    state = random_state(1)
    both = state.tensors() | random_state(2).tensors("frozen_")
    assert digest(from_tensors(both)) == digest(state)
    assert digest(from_tensors(both, "frozen_")) == digest(random_state(2))


def test_a_missing_factor_is_named():
    tensors = random_state(1).tensors()
    del tensors["layers.1.down/B"]
    with pytest.raises(ShapeError, match="layers.1.down/B"):
        from_tensors(tensors)


def test_digest_sees_one_bit_a_name_and_a_shape():
    state = random_state(1)
    flipped = state.map(lambda pair: LoraPair(pair.A.clone(), pair.B))
    flipped["layers.1.down"].A.view(torch.int32)[0, 0] ^= 1
    renamed = LoraState({f"x{module}": pair for module, pair in state.items()})
    assert len({digest(state), digest(flipped), digest(renamed), digest(narrow(state, dict.fromkeys(SHAPES, 2)))}) == 4


def test_stack_adds_products_and_ranks():
    one, two = random_state(1, 3), random_state(2, 5)
    both = stack([one, two])
    assert set(both.ranks().values()) == {8}
    for module, total in delta(both).items():
        torch.testing.assert_close(total, delta(one)[module] + delta(two)[module])


def test_stack_refuses_other_shapes():
    other = LoraState({"layers.0.k_proj": LoraPair(torch.zeros(1, 9), torch.zeros(6, 1))})
    with pytest.raises(ShapeError, match="must agree"):
        stack([random_state(1), other])


def test_initial_state_changes_nothing_and_nests():
    large, small = initial(5), initial(2)
    assert all(pair.B.abs().max() == 0 for pair in large.values())
    for module, (_, n) in SHAPES.items():
        assert torch.equal(large[module].A[:2], small[module].A)
        assert 0.5 / n**0.5 < large[module].A.abs().max() <= 1 / n**0.5


def test_initial_state_depends_on_seed_and_module_alone():
    reordered = dict(reversed(list(SHAPES.items())))
    assert digest(initial_state(reordered, dict.fromkeys(SHAPES, 4), 3)) == digest(initial(4, 3))
    assert digest(initial(4, 4)) != digest(initial(4, 3))


def test_derived_seeds_do_not_collide_on_joined_labels():
    assert derived_seed(1, "ab", "c") != derived_seed(1, "a", "bc")
    assert 0 <= derived_seed(1, "x") < 2**63
