"""`--engine flower-sim`: Flower's Simulation Runtime with Ray, on the shipped model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from desks import TESTBED

from fedloom.configfile import load
from fedloom.engines.flower.settings import installed
from fedloom.engines.local import run
from fedloom.errors import CheckpointError, ConfigError, FedloomError

pytestmark = pytest.mark.flower
needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="the extra `simulation` is not installed: pip install 'fedloom[simulation]'"
)

SITES = ("bank", "lab")
SHORT = [
    "federation.num_rounds=2",
    "training.max_steps=2",
    "federation.eval_every=0",
    f"federation.participants={list(SITES)}",
    "data.heldout=null",
    "output.keep_payloads=true",
]
FILE = "adapter/adapter_model.safetensors"


def fedloom(out: Path, *more: str) -> subprocess.Popen[str]:
    sets = [part for text in SHORT for part in ("--set", text)]
    command = [sys.executable, "-m", "fedloom", "run", str(TESTBED / "demo.toml"), *sets, "--engine", "flower-sim"]
    return subprocess.Popen(
        [*command, "--out", str(out), *more],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said on stderr."""
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def interrupted_in_round_1(out: Path) -> list[psutil.Process]:
    """Ctrl-C when the first update is on disk; the processes that were there then."""
    process = fedloom(out)
    until = time.monotonic() + 60
    while not list(out.glob("sites/*/jobs/*/round-00001.safetensors")):
        assert process.poll() is None and time.monotonic() < until, ended(process)
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    listening = [c.laddr.ip for child in children for c in child.net_connections() if c.status == psutil.CONN_LISTEN]
    process.send_signal(signal.SIGINT)
    code, err = ended(process)
    assert code == 130 and err.startswith("interrupted; go on with: fedloom run") and err.count("\n") == 1, err
    assert listening and set(listening) <= {"127.0.0.1", "::1"}
    return children


@needs_ray
def test_interrupted_and_resumed_it_ends_with_the_local_engines_bytes(tmp_path: Path):
    config = load(TESTBED / "demo.toml", SHORT)
    run(config, tmp_path / "local")
    children = interrupted_in_round_1(tmp_path / "flower")
    _, left = psutil.wait_procs(children, timeout=10)
    assert len(children) > len(SITES) and not left
    assert ended(fedloom(tmp_path / "flower", "--resume")) == (0, "")
    assert (tmp_path / "flower" / FILE).read_bytes() == (tmp_path / "local" / FILE).read_bytes()
    kept = [{p.name: p.read_bytes() for p in (tmp_path / out / "payloads").iterdir()} for out in ("flower", "local")]
    assert kept[0] == kept[1]
    delivered = list((tmp_path / "flower" / "sites").glob(f"*/jobs/*/{FILE}"))
    assert len(delivered) == len(SITES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federation.participants=['bank', 'nobody']"], "'nobody', which has no data"),
        (["federation.participants=['bank']"], "min_replies is 2"),
        (["federation.drop_out=0.5"], "drop_out is for simulations"),
        (["clients.nobody.r=3"], "nobody"),
        (
            ["data.partitioner=natural", "data.id_column=instruction", "data.source=./bank.jsonl"],
            "is no name; expected",
        ),
    ],
)
def test_a_mistake_is_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides, message):
    from fedloom.engines.flower import simulation

    (tmp_path / "b.jsonl").write_text('{"instruction": "a b", "output": "b"}\n{"instruction": "b", "output": "b"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simulation, "serve", lambda *arguments, **more: pytest.fail("it began"))
    with pytest.raises(FedloomError, match=message):
        simulation.run(load(TESTBED / "demo.toml", overrides), tmp_path / "run")


def test_a_folder_that_is_taken_and_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fedloom.engines.flower import simulation

    (tmp_path / "other").write_text("")
    with pytest.raises(CheckpointError, match="other files"):
        simulation.run(load(TESTBED / "demo.toml"), tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load(TESTBED / "demo.toml", ["flower.sim_gpus=0.5", "model.device=cuda"])
    with pytest.raises(ConfigError, match="sim_gpus is 0.5, but torch finds no GPU"):
        simulation.gpu_share(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert simulation.gpu_share(config) == 0.5
    assert [simulation.gpu_share(load(TESTBED / "demo.toml", [f"model.device={d}"])) for d in ("cpu", "auto")] == [0, 1]


def test_without_ray_the_extra_is_named():
    with pytest.raises(ConfigError, match=r'needs no_ray, .*: pip install "fedloom\[simulation\]"'):
        installed("simulation", "json", "no_ray")
