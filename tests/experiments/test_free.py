"""Free generation of the front's runs: one pass an adapter, means over seeds, differences on equal seeds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from experiments.front import Entry
from typer.testing import CliRunner

import fedloom
from experiments import __main__ as command
from experiments import free
from fedloom.records.config import Config
from fedloom.studies.compare import FINISHED, Trial

SAID = {"dense": {300: 20.0, 301: 24.0}, "thin": {300: 18.0, 301: 21.0}}
"""Variant → seed → chrF of its run; ROUGE-L is half of it."""


@pytest.fixture
def runs(tmp_path: Path) -> list[Entry]:
    """Two entries of two seeds; the third run of the second one is not over."""
    made = []
    for variant, by_seed in SAID.items():
        trials = [Trial(variant, seed, Config(), tmp_path / variant / f"seed-{seed}") for seed in (*by_seed, 302)]
        for trial in trials[: len(by_seed)]:
            (trial.folder / "adapter").mkdir(parents=True)
            (trial.folder / "adapter" / "adapter_model.safetensors").write_bytes(f"{variant} {trial.seed}".encode())
            (trial.folder / FINISHED).write_text("")
        made.append(Entry("wordnet", "1%", variant, tuple(trials), "share_of_gain"))
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """(run, with its adapter?) of every evaluation."""
    seen: list[tuple[Path, bool]] = []

    def evaluate(run: Path, *, with_adapter: bool, data: Path | None, metrics: list[str], settings: object) -> object:
        seen.append((run, with_adapter))
        assert metrics == ["chrf", "rouge_l"] and data == Path("gloss.jsonl")
        value = SAID[run.parent.name][int(run.name.removeprefix("seed-"))] if with_adapter else 10.0
        return SimpleNamespace(scores={"chrf": {"mean": value / 100}, "rouge_l": {"mean": value / 200}})

    monkeypatch.setattr(fedloom, "evaluate", evaluate)
    monkeypatch.setattr(free, "base_digest", lambda path: f"digest of {path}")
    return seen


def test_rows_are_means_over_seeds_and_nothing_is_generated_twice(
    runs: list[Entry], asked: list[tuple[Path, bool]], tmp_path: Path
) -> None:
    found = free.complete([*runs, runs[0]])
    assert [(variant, len(trials)) for variant, trials in found] == [("dense", 2), ("thin", 2)]
    path = tmp_path / "wordnet-free.json"
    base, dense, thin = free.rows(found, free.Scores.read(path), Path("gloss.jsonl"))
    assert (base["run"], base["seeds"], base["chrF %"], base["chrF against dense FedIT"]) == (
        "the base",
        "–",
        "10.0",
        "–",
    )
    assert (dense["seeds"], dense["chrF against dense FedIT"]) == ("2", "+0.0 ± 0.0")
    # Of 18 and 21 the mean, and of −2 and −3; Student's t of one degree of freedom, 12.706.
    assert (thin["chrF %"], thin["ROUGE-L %"]) == ("19.5 ± 19.1", "9.8 ± 9.5")
    assert thin["chrF against dense FedIT"] == "-2.5 ± 6.4"
    assert len(asked) == 5 and sum(with_adapter for _, with_adapter in asked) == 4
    assert free.rows(found, free.Scores.read(path), Path("gloss.jsonl"))[2] == thin and len(asked) == 5
    (found[1][1][0].folder / "adapter" / "adapter_model.safetensors").write_bytes(b"played again")
    free.rows(found, free.Scores.read(path), Path("gloss.jsonl"))
    assert len(asked) == 6


def test_without_dense_fedit_the_command_says_what_to_do(tmp_path: Path) -> None:
    told = CliRunner().invoke(command.app, ["free", "--out", str(tmp_path)])
    assert told.exit_code == 2
    assert "has no complete run of dense FedIT, which the others are compared with: play it with" in " ".join(
        told.stderr.split()
    )
