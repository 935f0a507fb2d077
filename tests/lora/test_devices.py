"""Adapters on a GPU: kernels stay there, and what a client trained there is copied out once, before it is chosen from.

A pretended device shows, on any machine, which arithmetic would mix devices or fetch values. `make check-gpu` plays the
same on CUDA, where there is a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.kernels import KERNELS
from benchmarks.workload import Client, Module, module
from rich.console import Console

from benchmarks import device
from fedloom.compress.entries import Dense, Sparse, dense_entry
from fedloom.compress.quantize import VALUE_KINDS, quantize
from fedloom.lora.lowrank import sparse
from fedloom.lora.pair import LoraPair
from fedloom.methods.method import as_given
from fedloom.methods.table import METHODS
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.records.ledger import Training, read_rows, totals
from fedloom.rounds.turns import client_turn, start
from fedloom.server.local import run_local
from fedloom.wire import Header, Message, encode
from pretended_device import Pretended, There
from small_testbed import small_testbed
from toy import built, initial, job, random_state, trainer

CASE = module("x", (48, 32), [4] * 3, seed=1)
STACKED = 12
"""Ranks of all clients of CASE."""


@pytest.fixture(autouse=True)
def one_thread():
    """A pretended device is known to the thread that asked for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cuda():
    """Put a tensor onto the GPU."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} finds no CUDA device here: nothing on a GPU was checked")
    return lambda tensor: tensor.cuda()


def moved(case, put):
    """The module with all of its tensors there."""

    def pair(held):
        return LoraPair(put(held.A), put(held.B))

    def entry(held):
        return Sparse(held.shape, put(held.positions), put(held.values))

    clients = [Client(pair(one.pair), one.weight, entry(one.delta_b), entry(one.delta_a)) for one in case.clients]
    return Module(case.name, pair(case.pair), tuple(clients))


def tensors_of(result):
    """What a kernel made."""
    if hasattr(result, "delta"):
        return [result.delta]
    pair = getattr(result, "pair", result)
    return [pair.A, pair.B]


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_stay_on_the_device_of_the_adapters(name):
    """The same bits as on the CPU without numba; values that decide go to Python, matrices never."""
    with sparse.torch_only():
        wanted = tensors_of(KERNELS[name].run(CASE))
    with Pretended() as there:
        found = tensors_of(KERNELS[name].run(moved(CASE, there.to)))
    for one, other in zip(found, wanted, strict=True):
        assert isinstance(one, There) and torch.equal(one.held, other)
    assert max(there.copies, default=0) <= STACKED


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_was_trained_on_a_device_is_copied_out_once(name):
    """Said once: RuntimeError, tensors on two devices, of every method that chooses what it sends."""
    here, put = turn_of(name), Pretended()
    with put as there:
        payload = turn_of(name, there.to)
    assert payload == here
    assert put.copies == [tensor.numel() for tensor in random_state(1).tensors().values()]


def test_what_is_rounded_from_a_device_is_encoded_to_the_same_bytes():
    with Pretended() as there:
        payload = message_of(there.to)
    assert payload == message_of()


def message_of(put=lambda tensor: tensor):
    """A payload of values of every kind, made of tensors where `put` puts them."""
    entries = {
        f"{kind}/{name}": Dense(tuple(tensor.shape), quantize(kind)(put(tensor), 1))
        for kind in VALUE_KINDS
        for name, tensor in random_state(1).tensors().items()
    }
    plain = {name: dense_entry(put(tensor)) for name, tensor in random_state(2).tensors().items()}
    return encode(Message(Header("update", "fedsrd", 1, 0, "ab" * 16), entries | plain))


def turn_of(name, put=lambda tensor: tensor):
    """The payload of a client whose step leaves the adapter where `put` puts it."""
    method = built(name)
    first = random_state(1) if method.begin is as_given else initial()
    state = start(job(method, values=method.form(None)), first)

    def train(state, round, seed):
        done = trainer(method)(state, round, seed)
        return replace(done, adapter=done.adapter.map(lambda pair: LoraPair(put(pair.A), put(pair.B))))

    return client_turn(job(method, values=method.form(None)), "ada", state, (), train, 1).payload


def test_the_device_bench_tells_seconds_of_each_stage():
    result = device.run("tinyllama", device="cpu", rank=2, layers=1, repeats=1)
    assert {row["stage"] for row in result["rows"]} >= {"copy out, factor by factor", "choose, in memory"}
    assert all(row["seconds"] > 0 for row in result["rows"])
    console = Console(record=True, width=200)
    console.print(*device.tables(result))
    assert "copy out" in console.export_text()


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_on_cuda_do_what_they_do_on_the_cpu(name, cuda):
    wanted, found = tensors_of(KERNELS[name].run(CASE)), tensors_of(KERNELS[name].run(moved(CASE, cuda)))
    if len(wanted) == 2 and name != "fedit":  # the factors of a truncation are unique up to signs
        wanted, found = [wanted[1] @ wanted[0]], [found[1] @ found[0]]
    for one, other in zip(found, wanted, strict=True):
        assert one.device.type == "cuda" and torch.allclose(one.cpu(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_was_trained_on_cuda_is_sent_with_the_same_bytes(name, cuda):
    assert turn_of(name, cuda) == turn_of(name)


@pytest.mark.gpu
def test_what_is_rounded_from_cuda_is_encoded_to_the_same_bytes(cuda):
    assert message_of(cuda) == message_of()


@pytest.mark.gpu
def test_a_run_trains_on_cuda(cuda, tmp_path):
    """Two rounds of the demo's settings, made small: every site sends, and the ledger knows all of it."""
    (tmp_path / "testbed").mkdir()
    folder = small_testbed(tmp_path / "testbed")
    settings = ["model.device=cuda", "federation.num_rounds=2", "method.name=fedsrd"]
    run_local(load_config(folder / "demo.toml", settings), tmp_path / "run", observer=Silent())
    rows = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert sum(isinstance(row, Training) for row in rows) == 8 and totals(rows).bytes_up > 0
