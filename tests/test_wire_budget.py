"""The byte budget: it is kept, nearly used up, and spent where it saves most error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import ConfigError
from fedloom.wire import Message, encode
from fedloom.wire.budget import Changes, fit
from wire_samples import HEADER


def tensors(seed=0, scale=(1.0, 0.01)):
    generator = torch.Generator().manual_seed(seed)
    heavy = [torch.randn(64, 300, generator=generator) * torch.randn(64, 300, generator=generator).exp() for _ in scale]
    return {f"m{number}/A": tensor * size for number, (tensor, size) in enumerate(zip(heavy, scale, strict=True))}


@pytest.mark.parametrize("budget", [600, 2000, 8000, 40000])
def test_the_budget_is_kept_and_used(budget):
    fitted = fit(tensors(), budget, HEADER)
    assert len(encode(Message(HEADER, fitted.entries))) == fitted.size <= budget
    assert fitted.size > 0.9 * budget
    assert fitted.kind == min(fitted.candidates, key=lambda candidate: candidate.error).kind


def test_bytes_go_where_they_save_error():
    fitted = fit(tensors(scale=(1.0, 0.01)), 3000, HEADER)
    assert fitted.entries["m0/A"].values.numel() > 50 * fitted.entries["m1/A"].values.numel()


def test_more_bytes_are_never_worse():
    errors = [fit(tensors(), budget, HEADER).error for budget in (1000, 3000, 9000, 27000)]
    assert errors == sorted(errors, reverse=True)


def test_no_other_threshold_of_the_size_is_better_and_the_error_is_the_slow_one():
    given_ = tensors()
    fitted = fit(given_, 5000, HEADER, kinds=("fp32",))
    every = torch.cat([tensor.flatten() for tensor in given_.values()]).double()
    kept = every.abs() >= fitted.threshold
    assert fitted.error == pytest.approx((every[~kept].norm() / every.norm()).item(), rel=1e-6)
    changes = Changes(given_, {name: tensor.abs() for name, tensor in given_.items()})
    assert len(encode(Message(HEADER, changes.select(fitted.threshold * 0.95, "fp32", 0)))) > 5000


def test_scores_decide_when_they_are_given():
    given_ = tensors(scale=(1.0, 1.0))
    scores = {"m0/A": given_["m0/A"].abs() * 1e-3, "m1/A": given_["m1/A"].abs()}
    fitted = fit(given_, 2000, HEADER, scores=scores)
    assert fitted.entries["m0/A"].values.numel() < fitted.entries["m1/A"].values.numel() / 20


def test_a_budget_for_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"wire\.budget is 50 bytes"):
        fit(tensors(), 50, HEADER)


def test_zeros_are_never_sent_however_large_the_budget():
    fitted = fit({"m/A": torch.zeros(5, 5), "m/B": torch.eye(4)}, 10**6, HEADER)
    assert fitted.entries["m/A"].values.numel() == 0
    assert fitted.entries["m/B"].positions.tolist() == [0, 5, 10, 15]


@settings(deadline=None, max_examples=25)
@given(st.integers(400, 20000), st.integers(0, 1000))
def test_any_budget_is_kept(budget, seed):
    fitted = fit(tensors(seed), budget, HEADER, seed=seed)
    assert fitted.size <= budget


def test_lost_counts_rounding_too():
    changes = Changes({"m": torch.tensor([1.0, 0.26])}, {"m": torch.tensor([1.0, 0.26])})
    assert 0 < changes.error(changes.select(0.0, "int4", 0)) < 0.1
