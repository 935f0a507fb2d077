"""What a curious server reads of an update: all of it where a gradient's span is proper, less where it is blurred."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli.main import app
from fedloom.compress.entries import dense_entry
from fedloom.lora.pair import LoraPair
from fedloom.studies.attack import spans
from fedloom.studies.attack.curious import auc
from fedloom.studies.attack.readings import reading_tables
from small_testbed import small_testbed

WORDS, WIDTH, OUT, RANK = 400, 48, 40, 8
HELD = [3, 17, 60, 200, 399]


@pytest.fixture
def layer():
    """(what the layer is given for each token, its pair, the gradient of its weight over the tokens in HELD)."""
    noise = torch.Generator().manual_seed(5)
    inputs = torch.randn(WORDS, WIDTH, generator=noise)
    pair = LoraPair(torch.randn(RANK, WIDTH, generator=noise), torch.randn(OUT, RANK, generator=noise))
    gradient = torch.randn(OUT, len(HELD), generator=noise) @ inputs[HELD]
    return inputs, pair, gradient


def after(pair, gradient, part):
    """The pair after one step of plain descent on one factor."""
    step = pair.B.T @ gradient if part == "A" else gradient @ pair.A.T
    return {f"layer/{part}": dense_entry((pair.A if part == "A" else pair.B) - 0.1 * step)}


@pytest.mark.parametrize("part", ["A", "B"])
def test_one_step_on_fewer_tokens_than_the_rank_names_them_all(layer, part):
    inputs, pair, gradient = layer
    steps = spans.steps_of(pair, after(pair, gradient, part), "layer", "factors")
    assert set(steps) == {part}
    assert sorted(spans.best(spans.read_inputs(inputs, pair, steps), len(HELD))) == HELD


def test_a_change_and_the_factor_that_it_leads_to_are_the_same_step(layer):
    _, pair, gradient = layer
    step = -0.1 * pair.B.T @ gradient
    told = spans.steps_of(pair, {"layer/A": dense_entry(step)}, "layer", "change")["A"]
    seen = spans.steps_of(pair, after(pair, gradient, "A"), "layer", "")["A"]
    assert torch.allclose(told, seen, atol=1e-4)


def test_signs_of_few_elements_blur_the_span(layer):
    inputs, pair, gradient = layer
    step = pair.B.T @ gradient
    kept = step.abs() >= step.abs().flatten().kthvalue(int(0.95 * step.numel())).values
    seen = spans.read_inputs(inputs, pair, {"A": step.sign() * kept})
    assert len(set(spans.best(seen, len(HELD))) & set(HELD)) < len(HELD)


def test_a_core_is_read_between_the_factors(layer):
    inputs, pair, gradient = layer
    right = torch.linalg.svd(pair.A, full_matrices=False).Vh
    core = pair.B.T @ gradient @ right.T
    seen = spans.read_inputs(inputs, pair, {"R": core})
    assert sorted(spans.best(seen, len(HELD))) == HELD


def test_what_has_not_moved_says_nothing(layer):
    inputs, pair, _ = layer
    assert not spans.steps_of(pair, {"layer/A": dense_entry(pair.A)}, "layer", "")
    assert not spans.steps_of(pair, {"other/A": dense_entry(pair.A)}, "layer", "")
    assert not spans.read_inputs(inputs, pair, {}).any()


def test_rouge_counts_a_token_as_often_as_both_have_it():
    assert spans.rouge_1([1, 2, 3], [1, 1, 2]) == pytest.approx(2 * 2 / 6)
    assert spans.rouge_1([1, 1, 2], [1, 1, 2]) == 1.0
    assert spans.rouge_1([], []) == 0.0 == spans.rouge_1([4], [5])


def test_auc_is_the_share_of_pairs_in_order():
    assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0])) == pytest.approx(3.5 / 4)


def test_one_plain_step_of_high_rank_is_read_and_few_signs_of_it_are_not(tmp_path):
    """The whole study, on the demo's model: one example, descent without momentum, a rank above its tokens."""
    bed = small_testbed(tmp_path) / "demo.toml"
    sets = ["training.optim=sgd", "training.learning_rate=0.1", "training.max_steps=2", "training.max_grad_norm=0"]
    words = ["attack", str(bed), "--as", "server", "--sites", "2", "--examples", "1", "--ranks", "64", "--json"]
    words += ["--methods", "fedit:wire.values=fp32,loom", *(word for one in sets for word in ("--set", one))]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    dense, coded = json.loads(said.stdout)["rows"]
    assert dense["text"] > dense["chance"] + 0.15, (dense, coded)  # a token that stands twice is named once
    assert coded["text"] < dense["text"] and coded["bytes"] < dense["bytes"] / 20
    assert all(0 <= row[key] <= 1 for row in (dense, coded) for key in ("labels", "membership"))
    table = Console(width=160, file=io.StringIO())
    table.print(*reading_tables(json.loads(said.stdout)))
    assert "membership, AUC" in table.file.getvalue() and "loom" in table.file.getvalue()
