"""The kernel benchmark: true shapes, the promised keys, and kernels that do what the dense computations do."""

import json
import time
import weakref

import pytest
import torch
from benchmarks.kernels import Kernel
from benchmarks.workload import module

from benchmarks import accuracy, aggregate, kernels
from fedloom.errors import ConfigError, NumericError
from fedloom.lora.lowrank import relative_error, sparse
from fedloom.studies.estimate import machine
from fedloom.studies.estimate.presets import PRESETS, Preset, preset_shapes

STREAMING = aggregate.streaming  # before the tests replace it
KEYS = {"method", "modules", "seconds", "reference_seconds", "ratio", "extra_bytes", "excess", "error"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", 2, {"q_proj": (48, 32), "k_proj": (16, 32)}, rank=4))
    monkeypatch.setattr(aggregate, "streaming", lambda: [{"clients": 10, "extra_bytes": None}])
    monkeypatch.setattr(accuracy, "hard_cases", lambda rank, clients: [{"case": "flat", "method": "x", "error": 0.0}])


def test_presets_have_the_shapes_of_the_models():
    llama = preset_shapes(PRESETS["llama-3.2-3b"])
    assert len(llama) == 196
    assert llama["layers.27.k_proj"] == (1024, 3072)
    assert llama["layers.0.down_proj"] == (3072, 8192)
    assert sum(64 * (m + n) for m, n in llama.values()) == 97_255_424
    assert preset_shapes(PRESETS["qwen2-7b"], ["v_proj"])["layers.3.v_proj"] == (512, 3584)
    assert len(preset_shapes(PRESETS["tinyllama"], ["q_proj", "v_proj"])) == 44
    assert PRESETS["llama-2-7b"].modules["k_proj"] == (4096, 4096)


def test_the_result_has_the_promised_keys_and_is_plain_json():
    result = aggregate.run(preset="tiny", clients=3, all_modules=True, reference=True, repeats=1)
    rows = {row["method"]: row for row in json.loads(json.dumps(result))["rows"]}
    assert set(rows) == {*aggregate.DEFAULT_METHODS, "florist as published"}
    for row in rows.values():
        assert set(row) >= KEYS
        assert row["modules"] == 4
        assert row["seconds"] > 0
    for method in ("fedsrd", "fedsrd-e", "florist", "flexlora"):
        assert rows[method]["ratio"] == pytest.approx(rows[method]["reference_seconds"] / rows[method]["seconds"])
        assert rows[method]["error"] < 1e-5
    assert abs(rows["flexlora"]["excess"]) < 1e-6
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert len(aggregate.tables(result)) == 3


def test_unequal_ranks_leave_out_the_methods_that_cannot_use_them():
    result = aggregate.run(preset="tiny", ranks=[4, 2, 1], repeats=1)
    assert [row["method"] for row in result["rows"]] == ["fedit", "florist", "flexlora"]
    assert {row["ratio"] for row in result["rows"]} == {None}


def test_a_dense_reference_that_does_not_converge_is_told_in_words(monkeypatch):
    def fails(case):
        raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")

    monkeypatch.setattr(aggregate, "two_svds", fails)
    with pytest.raises(NumericError, match="failed to converge.*leave --reference out"):
        aggregate.run(preset="tiny", methods=["florist"], reference=True, repeats=1)


def test_the_kernels_do_what_their_dense_references_do():
    case = module("x", (48, 32), [4] * 3, seed=1)
    for rank, dense in ((4, kernels.dense_fedsrd(case)), (None, kernels.dense_fedsrd_e(case))):
        assert torch.allclose(accuracy.change(case, rank).delta, dense, atol=1e-4)
    b, a = kernels.dense_truncation(case)
    assert torch.allclose(kernels.flexlora(case).singular_values[:4].float(), b.norm(dim=0)[:4], rtol=1e-4)
    b, a = kernels.two_svds(case)
    cut = kernels.florist(case)
    assert torch.allclose(cut.pair.B @ cut.pair.A, b @ a, atol=1e-5)
    assert relative_error(cut.pair, case.pairs(), case.weights()) ** 2 == pytest.approx(cut.lost_energy, rel=1e-4)


def test_bad_options_are_named():
    for wrong, text in (
        ({"preset": "llama"}, "known: llama-2-7b"),
        ({"preset": "tiny", "methods": ["fedavg"]}, "fedavg"),
        ({"preset": "tiny", "modules": ["up_proj"]}, "q_proj, k_proj"),
        ({"preset": "tiny", "ranks": [4, 0]}, "ranks"),
        ({"preset": "tiny", "ranks": [4, 2], "methods": ["fedsrd"]}, "equal"),
    ):
        with pytest.raises(ConfigError, match=text):
            aggregate.run(**wrong)


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, text in (("quantum", "cpu, cuda or"), ("cpu:1", "cpu, cuda or"), ("cuda:1", "finds 1 CUDA")):
        with pytest.raises(ConfigError, match=text):
            aggregate.run(preset="tiny", device=device)


def test_torch_only_hides_the_compiled_kernels_for_the_time_of_the_run(monkeypatch):
    seen = []
    spied = Kernel(lambda case: seen.append(sparse.compiled_for(case.pair.A)), kernels.work_fedit)
    monkeypatch.setitem(kernels.KERNELS, "fedit", spied)
    before = sparse.compiled_for(torch.ones(1))
    aggregate.run(preset="tiny", methods=["fedit"], repeats=1, torch_only=True)
    assert set(seen) == {None}
    assert sparse.compiled_for(torch.ones(1)) is before


def test_processor_time_does_not_count_waiting():
    with machine.processor_time():
        assert machine.time_call(lambda: time.sleep(0.2)) < 0.1
    assert machine.time_call(lambda: time.sleep(0.2)) >= 0.2
    assert aggregate.run(preset="tiny", methods=["fedit"], repeats=1, cpu_time=True)["rows"]


@pytest.mark.parametrize("keep", [True, False])
def test_results_of_all_modules_are_held_only_where_asked_for(monkeypatch, keep):
    made: list[weakref.ref] = []
    alive = []

    def call(case):
        alive.append(sum(one() is not None for one in made))
        result = torch.ones(3)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setitem(kernels.KERNELS, "fedit", Kernel(call, kernels.work_fedit))
    aggregate.run(preset="tiny", methods=["fedit"], all_modules=True, repeats=1, keep_results=keep)
    assert max(alive) >= 3 if keep else max(alive) <= 1  # of four modules, by two threads at most


def test_live_tensors_are_counted_until_they_are_freed():
    def call() -> None:
        kept = torch.ones(1000)
        for _ in range(5):
            kept = kept + torch.ones(1000)  # at most three at a time
        assert kept[0] == 6

    assert machine.tensor_bytes(lambda: None) == 0
    assert machine.tensor_bytes(call) == pytest.approx(3 * 4000, abs=64)


def test_a_capped_sum_holds_no_more_of_many_clients_than_of_ten():
    ten, hundred = STREAMING(shape=(300, 200), counts=(10, 100))
    assert hundred["tensor_bytes"] == ten["tensor_bytes"] > 0
