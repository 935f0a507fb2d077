"""The bench of real changes: every figure against its definition, and a run of two short rounds."""

from pathlib import Path

import pytest
import torch
from benchmarks.updates import Look, Looks, cosine, overlap
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import updates
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.records.configfile import load_config
from toy import RANK, SHAPES, random_state

DEMO = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds" / "demo.toml"


def look(before: LoraPair, after: LoraPair, density: float = 0.1) -> Look:
    return Look.at(before, after, density)


def test_a_look_is_what_dense_algebra_says():
    before, after = (random_state(seed)["layers.0.q_proj"] for seed in (1, 2))
    found = look(before, after)
    change = after.B @ after.A - before.B @ before.A
    energies = torch.linalg.svdvals(change.double()).square()
    assert found.rank == int((energies.cumsum(0) < 0.9 * energies.sum()).sum()) + 1
    assert found.condition == pytest.approx(torch.linalg.cond(after.B).item(), rel=1e-4)
    torch.testing.assert_close(found.product.B @ found.product.A, change)
    delta = after.A - before.A
    scores = (delta.abs() * after.B.norm(dim=0)[:, None]).flatten()
    assert set(found.supports["A"].tolist()) == set(scores.topk(round(0.1 * scores.numel())).indices.tolist())
    kept = delta.flatten()[found.supports["A"]]
    assert found.held["A"] == pytest.approx((kept.square().sum() / delta.square().sum()).item())
    centred = scores - scores.mean()
    assert found.tails["A"] == pytest.approx(
        (centred**4).mean().item() / scores.var(correction=0).item() ** 2, rel=1e-4
    )


def test_one_element_holds_all_of_a_change_of_it():
    pair = random_state(3)["layers.1.down"]
    moved = pair.B.clone()
    moved[4, 1] += 1.0
    found = look(pair, LoraPair(pair.A, moved), density=0.5)
    assert found.rank == 1 and found.held == {"A": 0.0, "B": pytest.approx(1.0)}
    assert found.supports["A"].numel() == 0 and found.supports["B"].tolist() == [4 * RANK + 1]


@given(st.sets(st.integers(0, 50)), st.sets(st.integers(0, 50)))
def test_overlap_is_that_of_sets(first, second):
    found = overlap(*(torch.tensor(sorted(one), dtype=torch.int64) for one in (first, second)))
    assert found == len(first & second) / max(min(len(first), len(second)), 1)


def test_cosine_is_that_of_the_products():
    first, second = (random_state(seed)["layers.0.k_proj"] for seed in (4, 5))
    dense = [(pair.B @ pair.A).flatten() for pair in (first, second)]
    assert cosine(first, second) == pytest.approx(torch.cosine_similarity(*dense, dim=0).item(), abs=1e-6)
    assert cosine(first, LoraPair(first.A, -first.B)) == pytest.approx(-1.0)
    assert cosine(first, LoraPair(first.A, 0.0 * first.B)) == 0.0


def test_rounds_and_clients_are_compared_in_the_components_that_all_have():
    looks = Looks(0.1, dict.fromkeys(SHAPES, 2))
    small, large = random_state(6, rank=2), random_state(6, rank=RANK)
    grown = LoraState(
        {
            m: LoraPair(torch.cat([small[m].A, large[m].A[2:]]), torch.cat([small[m].B, large[m].B[:, 2:]], 1))
            for m in SHAPES
        }
    )
    start = random_state(7)
    ahead = LoraState({m: LoraPair(start[m].A[:2], start[m].B[:, :2]) for m in SHAPES})
    looks.add(1, "ada", ahead, small)
    looks.add(1, "bob", start, grown)
    looks.add(3, "bob", start, grown)
    looks.close()
    first, second = looks.rows
    assert first.clients == {"A": 1.0, "B": 1.0} and first.cosine == pytest.approx(1.0)
    assert first.rounds["A"] is None and second.rounds == {"A": 1.0, "B": 1.0}
    assert second.cosine is None and (first.round, second.round) == (1, 3)
    assert first.rank == second.rank <= 4


def test_a_run_has_a_row_a_round():
    sets = ["training.max_steps=2", "federation.participants=['lab', 'bank']", "data.heldout=null"]
    result = updates.run(load_config(DEMO, [*sets, "federation.num_rounds=2", "method.name=fedit"]), density=0.02)
    first, second = result["rows"]
    assert first["round"] == 1 and first["rounds"]["A"] is None and 0 < second["rounds"]["A"] < 1
    assert all(0 < row["held"][part] < 0.5 and row["kurtosis"][part] > 1 for row in result["rows"] for part in "AB")
    assert 1 <= first["rank"] <= 16 and first["condition"] > 1 and -1 < first["cosine"] < 1
    cells = [str(cell) for column in next(updates.tables(result)).columns for cell in column.cells]
    assert f"{second['rounds']['A']:.2f} / {second['rounds']['B']:.2f}" in cells
