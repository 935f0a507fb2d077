"""Worker processes: the bits and rows of one client after another, whatever happens to a worker. One pool for all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_tasks import Ending, Failing, Number, Waiting

import fedloom
from fedloom.errors import ConfigError, PolicyRefusal, RoundError
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.records.ledger import Aggregation, Note, read_rows
from fedloom.server import local, workers
from fedloom.server.nursery import Order
from fedloom.server.nursery_process import Nursery
from fedloom.server.pool import Pool, Ticket
from fedloom.server.workers import find_devices, thread_notes
from fedloom.studies.attack.plan import write_public
from small_testbed import small_testbed

SETTINGS = [
    *("federation.num_rounds=2", "federation.eval_every=1", "output.keep_payloads=true"),
    "federation.load_best_model_at_end=true",
    *("clients.clinic.learning_rate=1e30", "clients.clinic.max_steps=2"),  # one diverges
    "federation.drop_out=0.2",
    "federation.seed=5",
]
OWN = ("seconds", "stages", "time", "settings")
pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = small_testbed(tmp_path_factory.mktemp("bed"))
    public = write_public(load_config(folder / "demo.toml"), folder, 2)
    return load_config(folder / "demo.toml", [*SETTINGS, f"federation.public={json.dumps(str(public))}"])


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """The one process of this file that workers come from: what takes seconds is to import the libraries."""
    with Nursery(crowded=False) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def shared(config: Config, nursery: Nursery) -> Pool:
    return Pool(nursery, Order(config, None, 1, shared=True), 3, ("cpu",))


@pytest.fixture
def pool(shared: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Runs that ask for workers have those of the one pool."""

    def lend(nursery: object, order: Order, count: int, devices: tuple[str, ...]) -> Pool:
        assert (order.threads, order.shared, devices) == (1, True, ("cpu",))
        monkeypatch.setattr(shared, "_count", count)
        return shared

    monkeypatch.setattr(workers, "Pool", lend)
    return shared


def with_workers(config: Config, count: int) -> Config:
    return config.model_copy(update={"local": config.local.model_copy(update={"workers": count})})


def left(out: Path) -> tuple[bytes, dict[str, bytes], list[object]]:
    """What must not depend on workers: the adapter, every payload, every row but for its seconds."""
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    payloads = {path.name: path.read_bytes() for path in (out / "payloads").iterdir()}
    kept = [{key: value for key, value in row.items() if key not in OWN} for row in rows if row["row"] != "session"]
    return (out / "adapter/adapter_model.safetensors").read_bytes(), payloads, kept


@pytest.fixture(scope="module")
def alone(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, one client after another."""
    patch = pytest.MonkeyPatch()
    patch.setattr("fedloom.report.figure.draw_curve", lambda *arguments: None)
    out = tmp_path_factory.mktemp("alone") / "run"
    local.run_local(config, out)
    patch.undo()
    return out


def test_the_run_tells_of_everything_that_workers_might_get_wrong(alone: Path):
    notes = [row.text for row in read_rows(alone / "ledger.jsonl") if isinstance(row, Note)]
    assert any("not finite after training" in text for text in notes)
    assert any("dropped out" in text for text in notes)
    first, second = (row.stats for row in read_rows(alone / "ledger.jsonl") if isinstance(row, Aggregation))
    assert 0.0 < first["public_error"] < 1.0 and 0.0 < second["public_error"] < 1.0


@pytest.mark.parametrize("count", [2, 3])
def test_side_by_side_every_bit_and_row_is_as_one_after_another(
    count: int, config: Config, alone: Path, nursery: Nursery, pool: Pool, tmp_path: Path
):
    local.run_local(with_workers(config, count), tmp_path / "run", nursery=nursery)
    assert left(tmp_path / "run") == left(alone)


def test_asynchronous_rounds_have_the_same_bits_with_workers(config: Config, pool: Pool, tmp_path: Path):
    """One client diverges, one is slow, some drop out."""
    asked = {"mode": "buffered", "buffer_size": 2, "pace": {"bank": 3.0}}
    buffered = config.model_copy(update={"federation": config.federation.model_copy(update=asked)})
    for count in (0, 2):
        local.run_local(with_workers(buffered, count), tmp_path / str(count))
    assert left(tmp_path / "0") == left(tmp_path / "2")


class Killed(Silent):
    """Ends the run amid a round, with tasks under way."""

    def client_finished(self, round: int, client: str, loss: float, bytes_up: int, bytes_down: int) -> None:
        if round == 2:
            raise KeyboardInterrupt


def test_a_run_goes_on_with_another_number_of_workers(
    config: Config, alone: Path, nursery: Nursery, pool: Pool, tmp_path: Path
):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        local.run_local(with_workers(config, 3), out, observer=Killed(), nursery=nursery)
    local.run_local(with_workers(config, 2), out, resume=True, nursery=nursery)
    assert left(out) == left(alone)


def test_a_client_with_a_step_of_its_own_trains_in_this_process(
    config: Config, nursery: Nursery, pool: Pool, tmp_path: Path
):
    seen = []

    def still(state: State, round: int, seed: int) -> fedloom.Trained:
        seen.append(os.getpid())
        return fedloom.Trained(state.adapter, num_examples=3, loss=0.5)

    once = config.model_copy(update={"federation": config.federation.model_copy(update={"num_rounds": 1})})
    local.run_local(once, tmp_path / "0", trainers={"lab": still})
    local.run_local(with_workers(once, 2), tmp_path / "1", trainers={"lab": still}, nursery=nursery)
    assert left(tmp_path / "1") == left(tmp_path / "0")
    assert set(seen) == {os.getpid()}


def test_what_a_killed_worker_did_is_done_anew_once(shared: Pool, tmp_path: Path):
    once, always = Ending(tmp_path / "once", 1), Ending(tmp_path / "always", 9)
    first, second, third = shared.run([once, always, Number(7)])
    assert len(set(first.result())) == 2 and third.result() == 7
    told = "client lab, round 3: the process that worked on it was ended 2 times, the last time by the signal SIGKILL"
    with pytest.raises(RoundError, match=told):
        second.result()
    assert [ticket.result() for ticket in shared.run(Number(n) for n in range(20))] == list(range(20))


def test_an_error_comes_back_as_what_it_is_with_the_way_it_came(shared: Pool):
    known, odd = shared.run([Number(-1), Failing()])
    with pytest.raises(PolicyRefusal, match="why") as caught:
        known.result()
    assert "in do" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="UnknownKeyError: no such key"):
        odd.result()


def test_a_method_that_only_this_process_has_is_refused(config: Config, tmp_path: Path):
    method = fedloom.replace(build("fedit", {}), name="mine", receive=lambda state, entries, context: state)
    with pytest.raises(ConfigError, match="name it, as package.module:builder, or leave local.workers out"):
        local.run_local(with_workers(config, 2), tmp_path / "run", method=method)


@pytest.mark.parametrize(
    ("devices", "said"), [(("cpu", "cuda:0"), "do not give the same bits"), (("cuda:7",), "'cuda:7'; here are cpu")]
)
def test_devices_that_there_are_not(config: Config, devices: tuple[str, ...], said: str, tmp_path: Path):
    own = config.local.model_copy(update={"devices": devices})
    with pytest.raises(ConfigError, match=said):
        local.run_local(config.model_copy(update={"local": own}), tmp_path / "run")


def test_gpus_are_used_whole(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a,6")
    auto = config.model_copy(update={"model": config.model.model_copy(update={"device": "auto"})})
    assert find_devices(auto) == ("4", "GPU-a", "6") and find_devices(config) == ("cpu",)
    some = auto.local.model_copy(update={"devices": ("cuda:2", "cuda:1")})
    assert find_devices(auto.model_copy(update={"local": some})) == ("6", "GPU-a")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert find_devices(auto) == ("0", "1", "2")


def test_threads_that_share_cpus_are_told_of(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert thread_notes(with_workers(config, 4)) == []
    free = config.model_copy(update={"model": config.model.model_copy(update={"threads": None})})
    assert "with model.threads = 2 they would not have to share 8 CPUs" in thread_notes(with_workers(free, 4))[0]


def test_when_the_runs_process_is_gone_so_are_its_workers(nursery: Nursery, shared: Pool, tmp_path: Path):
    """The last test here: it ends the pool. The system closes a killed process's pipes, as is done here."""
    notes = tmp_path / "number"
    shared._hand_out(Ticket(Waiting(notes)), shared._idle.pop() if shared._idle else shared._begin())
    while not (notes.exists() and notes.read_text()):
        time.sleep(0.01)
    worker = int(notes.read_text())
    nursery.pipe.close()
    assert nursery._process.wait(30) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    with pytest.raises(RoundError, match="was ended with exit code 0: go on with --resume"):
        list(shared.run([Number(1), Number(2), Number(3)]))
