"""`--engine flower-sim`: Flower's Simulation Runtime with Ray, on the shipped model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import psutil
import pytest
from desks import TESTBED

from fedloom.errors import CheckpointError, ConfigError, FedloomError, RoundError
from fedloom.flower.settings import check_installed, shared_settings
from fedloom.flower.simulated import actors, simulation
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.server import local
from fedloom.workspace.assemble import load_setup

pytestmark = pytest.mark.flower
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="the extra `simulation` is not installed: pip install 'fedloom[simulation]'"
)

SITES = ("bank", "lab")
SHORT = (
    "federation.num_rounds=2",
    "training.max_steps=2",
    "federation.eval_every=0",
    "data.heldout=null",
    "output.keep_payloads=true",
)
ADAPTER = "adapter/adapter_model.safetensors"


def overrides(folder: Path) -> list[str]:
    """A short run on a few examples of two sites; nobody is named, so that everybody takes part."""
    for name in SITES:
        (folder / "data" / name).mkdir(parents=True)
        with (TESTBED / "data" / name / "train.jsonl").open() as lines:
            (folder / "data" / name / "train.jsonl").write_text("".join(islice(lines, 40)))
    return [*SHORT, f"data.source={folder}/data/{{client}}"]


def same_bytes(one: Path, other: Path) -> bool:
    kept = [{path.name: path.read_bytes() for path in (out / "payloads").iterdir()} for out in (one, other)]
    return kept[0] == kept[1] and (one / ADAPTER).read_bytes() == (other / ADAPTER).read_bytes()


class Witness(Silent):
    """Notes at the end of each round which processes there are, and where they listen."""

    def __init__(self) -> None:
        self.before = set(psutil.Process().children(recursive=True))  # of other tests in this process
        self.processes: set[psutil.Process] = set()
        self.addresses: set[str] = set()

    def round_finished(self, *facts: object) -> None:
        children = set(psutil.Process().children(recursive=True)) - self.before
        opened = [connection for child in children for connection in child.net_connections()]
        self.processes.update(children)
        self.addresses |= {connection.laddr.ip for connection in opened if connection.status == psutil.CONN_LISTEN}


@needs_ray
def test_the_simulated_federation_ends_with_the_local_engines_bytes(tmp_path: Path):
    config, witness = load_config(TESTBED / "demo.toml", overrides(tmp_path)), Witness()
    local.run_local(config, tmp_path / "local")
    simulation.run_simulated(config, tmp_path / "flower", observer=witness)
    _, left = psutil.wait_procs(witness.processes, timeout=10)
    assert same_bytes(tmp_path / "flower", tmp_path / "local")
    assert len(list((tmp_path / "flower" / "sites").glob(f"*/jobs/*/{ADAPTER}"))) == len(SITES)
    assert witness.addresses and witness.addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert len(witness.processes) > len(SITES) and not left


def fedloom(config: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # as not in the background
    command = [sys.executable, "-c", f"{heeds}; from fedloom.cli.main import main; main()", "run", str(config)]
    return subprocess.Popen(
        [*command, "--engine", "flower-sim", "--out", str(out), *more],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said on stderr."""
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_stopped_leaves_no_process_and_is_resumed(tmp_path: Path, number: signal.Signals):
    sets = [part for text in overrides(tmp_path) for part in ("--set", text)]
    out = tmp_path / "flower"
    process = fedloom(TESTBED / "demo.toml", out, *sets)
    until = time.monotonic() + 300
    while not list(out.glob("sites/*/jobs/*/round-00001.safetensors")):
        assert process.poll() is None and time.monotonic() < until, ended(process)
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    code, err = ended(process)
    if number == signal.SIGINT:
        assert code == 130 and err.startswith("interrupted; go on with: fedloom run") and err.count("\n") == 1, err
    _, left = psutil.wait_procs(children, timeout=30)
    assert children and not left
    assert ended(fedloom(out / "config.toml", out, "--resume")) == (0, "")
    local.run_local(load_config(out / "config.toml"), tmp_path / "local")
    assert same_bytes(out, tmp_path / "local")


@needs_ray
@pytest.mark.slow
def test_what_keeps_ray_from_starting_is_told(tmp_path: Path):
    config = simulation.with_participants(load_config(TESTBED / "demo.toml", overrides(tmp_path)))
    backend = {"init_args": {"nonsense": 1}}
    with (
        pytest.raises(RoundError, match=r"Simulation Runtime has ended: .*nonsense"),
        simulation.Runtime(simulation.build_cast(config, tmp_path, 0.0), backend) as runtime,
    ):
        while True:
            runtime.get_nodes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["federation.participants=['bank', 'nobody']"], "'nobody', which has no data"),
        (["federation.participants=['bank']"], "min_replies is 2"),
        (["federation.drop_out=0.5"], "drop_out is for simulations"),
        (["clients.nobody.r=3"], "nobody"),
        (
            ["data.partitioner=natural", "data.id_column=instruction", "data.source=./b.jsonl", "data.heldout=null"],
            "expected up to 64 letters",
        ),
    ],
)
def test_a_mistake_is_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong, message):
    (tmp_path / "b.jsonl").write_text('{"instruction": "a b", "output": "b"}\n{"instruction": "b", "output": "b"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simulation, "run_federation", lambda *arguments, **more: pytest.fail("it began"))
    with pytest.raises(FedloomError, match=message):
        simulation.run_simulated(load_config(TESTBED / "demo.toml", wrong), tmp_path / "run")


def test_every_process_splits_one_source_as_the_local_engine_does():
    split = ["data.partitioner=iid", "federation.num_clients=3", f"data.source={TESTBED}/data/lab/validation.jsonl"]
    config = simulation.with_participants(load_config(TESTBED / "demo.toml", [*split, "data.heldout=null"]))
    assert config.federation.participants == ("client-00", "client-01", "client-02")
    assert actors.load_everybody(shared_settings(config)).fingerprint == load_setup(config).fingerprint


def test_a_folder_that_is_taken(tmp_path: Path):
    (tmp_path / "other").write_text("")
    with pytest.raises(CheckpointError, match="other files"):
        simulation.run_simulated(load_config(TESTBED / "demo.toml"), tmp_path)


def test_gpus_are_shared_as_the_settings_say(monkeypatch: pytest.MonkeyPatch):
    def settings(*given: str) -> Config:
        return load_config(TESTBED / "demo.toml", given)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [simulation.gpu_share(settings(f"model.device={device}")) for device in ("cpu", "auto", "cuda")] == [0, 1, 1]
    shared = settings("model.device=cuda", "flower.sim_gpus=0.5", "flower.sim_cpus=3")
    started = simulation.ray_backend(shared, 4, simulation.gpu_share(shared))
    assert (started["init_args"]["num_cpus"], started["init_args"]["num_gpus"]) == (3, 2)
    assert started["client_resources"]["num_gpus"] == 0.5
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="sim_gpus is 0.5, but torch finds no GPU"):
        simulation.gpu_share(shared)


def test_without_ray_the_extra_is_named():
    with pytest.raises(ConfigError, match=r'needs no_ray, .*: pip install "fedloom\[simulation\]"'):
        check_installed("simulation", "json", "no_ray")
