"""What pip installs without extras is enough for a simulation, its page and what is done with its adapter."""

import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from small_testbed import small_testbed

PLAY = """
import sys
blocked = set(sys.argv[1].split(","))

class WithoutExtras:
    # It does not see what is not installed, be it looked for or imported.

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [WithoutExtras(finder) for finder in sys.meta_path]
from typer.testing import CliRunner
from fedloom.cli.main import app

for words in sys.argv[2:]:
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, (words, result.output, result.exception)
import fedloom.web.serving, fedloom.studies.compare, fedloom.face.run
"""


def core():
    """Names of the distributions that fedloom needs without extras, and that these need."""
    found, waiting = set(), ["fedloom"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            told = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        needs = (Requirement(text) for text in told)
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_a_simulation_needs_no_extra(tmp_path):
    held = core()
    blocked = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not held.intersection(map(canonicalize_name, owners)) and module not in ("__pycache__", "fedloom")
    ]
    assert {"flwr", "datasets", "numba", "pytest"} <= set(blocked) and "torch" not in blocked
    bed, run = small_testbed(tmp_path), tmp_path / "run"
    play = [
        f"run {bed / 'demo.toml'} --out {run} --set federation.num_rounds=1 --set output.answers=0",
        f"inspect {run}",
        f"report {run} --out {tmp_path / 'page.html'}",
        f"export {run} --to vllm --out {tmp_path / 'adapter'}",
    ]
    done = subprocess.run([sys.executable, "-c", PLAY, ",".join(blocked), *play], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
