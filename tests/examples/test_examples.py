"""Every example runs as it stands, on the testbed made small, and says what it promises."""

import json
import re
import runpy
from pathlib import Path

import pytest

from small_testbed import small_testbed

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "a_run.py": r"mean +\d+\.\d %\n\d+ bytes up, \d+ down, 40 payloads\nthe last payload has \d+ bytes",
    "comparison.py": r"florist:paper \['\d+\.\d', '\d+\.\d'\]",
    "own_method.py": r"Run\(rows, 2 rounds[^\n]*\n\| run \|",
    "one_round_by_hand.py": r"ada sends \d+ bytes.*\nbob sends.*\nthe server broadcasts \d+ bytes\nsame bits: True",
    "own_trainer.py": r"bank: loss \d+\.\d\d, then .*\nlab: loss .*\n\d+ bytes up",
    "merge_adapters.py": r"written to merged",
}


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    return small_testbed(tmp_path_factory.mktemp("testbed"))


@pytest.fixture
def here(testbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedloom.face.settings.testbed_folder", lambda: testbed)
    return tmp_path


def test_every_example_is_in_the_list():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAID)
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in listed for name in [*SAID, "notebook.ipynb"])


@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name, here, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(SAID[name], capsys.readouterr().out)


def test_the_notebook_runs_from_top_to_bottom(here):
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept: they would be those of another day"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["both"].scores.keys() == {"fedit", "quieter"}
    assert names["run"].plot().png.startswith(b"\x89PNG")
