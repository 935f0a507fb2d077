"""A worker confined as in its container, with this machine's Python in place of an image's."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.loopback import until

from fedloom.deploy import alive
from fedloom.deploy.federation import FederationPlan, write_federation
from fedloom.flower.relay import call_worker
from fedloom.flower.simulated.direct import DirectGrid
from fedloom.flower.sites import run_federation
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Training, read_rows

REPO = Path(__file__).parents[2]
TESTBED = REPO / "src" / "fedloom" / "testbeds"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_a_worker_trains_with_a_read_only_root_without_a_network_as_another_user(tmp_path_factory):
    place = tmp_path_factory.mktemp("w")  # short: a socket's path has 107 bytes
    plan = FederationPlan(
        address="h:9443", listen="127.0.0.1:8000", model=str(TESTBED / "model"), data=str(TESTBED / "data" / "{site}")
    )
    write_federation(place / "fed", plan, ["bank"])
    site = place / "fed" / "sites" / "bank"
    around = ["bwrap", "--unshare-all", "--uid", "10001", "--gid", "10001", "--die-with-parent", "--ro-bind", "/", "/"]
    around += ["--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--bind", str(site), str(site)]
    around += ["--setenv", "NUMBA_CACHE_DIR", "/tmp", "--setenv", "HOME", "/tmp", "--setenv", "OMP_NUM_THREADS", "1"]

    def inside(code: str) -> str:
        return subprocess.run([*around, sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()

    assert inside("import os, socket; print(os.getuid(), *socket.if_nameindex())") == "10001 (1, 'lo')"
    assert "Read-only" in inside(f"try: open({str(REPO / 'x')!r}, 'w')\nexcept OSError as error: print(error)")
    command = [*around, sys.executable, "-m", "fedloom", "worker", str(site / "SITE.toml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as worker:
        try:
            until(lambda: alive.main([str(site)]) == 0, "the worker")
            asks = {"bank": lambda parcel, _: call_worker(parcel, site / "worker.sock", site / "worker.token")}
            own = [
                "federation.participants=['bank']", "federation.num_rounds=1", "federation.eval_every=0",
                "training.max_steps=1", "flower.min_replies=1", "data.heldout=null",
            ]  # fmt: skip
            config = load_config(TESTBED / "demo.toml", own)
            run_federation(DirectGrid(config, asks), config, place / "run")
        finally:
            worker.terminate()
    assert [row.client for row in read_rows(place / "run" / "ledger.jsonl") if isinstance(row, Training)] == ["bank"]
