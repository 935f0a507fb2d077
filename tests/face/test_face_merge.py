"""`fedloom.merge`: what it would give, what it writes, and what it refuses."""

import pytest
import torch

import fedloom
from fedloom.adapters.folder import load_adapter
from fedloom.adapters.settings import AdapterSettings, save_adapter
from fedloom.errors import ConfigError, FedloomError
from toy import random_state

RANKS = {"a": 4, "b": 2}


@pytest.fixture
def adapters(tmp_path):
    """Two adapter folders of unequal rank, and the states in them."""
    made = {}
    for seed, (name, rank) in enumerate(RANKS.items()):
        made[tmp_path / name] = random_state(seed, rank)
        settings = AdapterSettings(r=rank, lora_alpha=2.0 * rank, target_modules=sorted(random_state(0)))
        save_adapter(made[tmp_path / name], "base", settings, tmp_path / name)
    return made


def product(state, module):
    return state[module].B @ state[module].A


def test_a_merge_is_the_weighted_sum_of_the_changes(adapters, tmp_path):
    out = fedloom.merge(adapters, weights=[1200, 800], energy=1).save(str(tmp_path / "out"))
    merged = load_adapter(out)[0]
    first, second = adapters.values()
    for module in first:
        expected = 0.6 * product(first, module) + 0.4 * product(second, module)
        torch.testing.assert_close(product(merged, module), expected, atol=1e-6, rtol=1e-5)


def test_a_preview_writes_nothing_and_says_what_would_come(adapters, tmp_path):
    merge = fedloom.merge(adapters, energy=1)
    rows = merge.preview()
    assert [row.module for row in rows] == sorted(random_state(0))
    assert all(row.ranks == (4, 2) and row.rank == 6 for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert repr(merge) == "Merge(2 adapters, shares 0.5, 0.5, 3 modules, florist)"


def test_a_rank_is_the_best_approximation_s(adapters):
    merge = fedloom.merge(adapters, rank=3)
    assert merge.recipe.method == "flexlora" and {row.rank for row in merge.preview()} == {3}


def test_a_folder_that_is_taken_is_replaced_only_where_that_is_said(adapters, tmp_path):
    merge = fedloom.merge(adapters, energy=1)
    out = merge.save(tmp_path / "out")
    with pytest.raises(ConfigError, match="out exists already"):
        merge.save(out)
    assert merge.save(out, force=True) == out
    with pytest.raises(ConfigError, match="one of the folders to be merged"):
        merge.save(tmp_path / "a", force=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": [1.0]}, "expected 2 numbers above 0"),
        ({"weights": [1.0, -2.0]}, "expected 2 numbers above 0"),
        ({"energy": 1.5}, "expected 0 < energy"),
        ({"rank": 0}, "rank is 0: expected at least 1"),
        ({"method": "fedsrd"}, "fedsrd is unknown, or its server step needs the state of earlier rounds"),
    ],
)
def test_what_cannot_be_merged_is_named(adapters, arguments, words):
    with pytest.raises(ConfigError, match=words):
        fedloom.merge(adapters, **arguments)


def test_a_folder_without_an_adapter_is_named(adapters, tmp_path):
    with pytest.raises(FedloomError, match="nothing-here"):
        fedloom.merge([*adapters, tmp_path / "nothing-here"])
    with pytest.raises(ConfigError, match="no adapter given"):
        fedloom.merge([])


def test_adapters_of_bases_of_other_names_are_merged_with_a_word(tmp_path):
    for seed, base in enumerate(("models/one", "models/other")):
        settings = AdapterSettings(r=2, lora_alpha=4.0, target_modules=sorted(random_state(0)))
        save_adapter(random_state(seed, 2), base, settings, tmp_path / str(seed))
    merge = fedloom.merge([tmp_path / "0", tmp_path / "1"], energy=1)
    assert merge.notes() == ["the adapters name different base models: models/one, models/other"]
    assert any("models/third" in note for note in merge.notes("models/third"))
    with pytest.warns(UserWarning, match="different base models: models/one, models/other"):
        merge.save(tmp_path / "out")
