"""Every example runs as it stands, on the testbed made small, and says what it promises."""

import json
import re
import runpy
from pathlib import Path

import pytest
from scripts.run_notebook import play

from small_testbed import small_testbed

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "a_run.py": r"mean +\d+\.\d %\n\d+ bytes up, \d+ down, 40 payloads\nthe last payload has \d+ bytes",
    "comparison.py": r"florist:paper \['\d+\.\d', '\d+\.\d'\]",
    "own_method.py": r"\| run \|[^\n]*\n[^\n]*\n\| fedit \|[^\n]*\n\| halves \|",
    "one_round_by_hand.py": r"bytes up\nupdate of method 'fedsrd' in round 1[^?]*same bits: True\nsame payloads: True",
    "merging.py": r"Merge\(2 adapters, shares 0.6, 0.4, 4 modules, florist\)\n.*ranks=\(8, 4\), rank=12.*\nexact: True",
    "own_trainer.py": r"bank: loss \d+\.\d\d, then .*\nlab: loss .*\n\d+ bytes up",
}


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    return small_testbed(tmp_path_factory.mktemp("testbed"))


@pytest.fixture
def here(testbed, tmp_path, monkeypatch, no_picture):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedloom.face.settings.testbed_folder", lambda: testbed)
    return tmp_path


def test_every_example_is_in_the_list():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAID)
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in listed for name in [*SAID, "notebook.ipynb"])


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name", SAID)
def test_an_example_runs(name, here, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(SAID[name], capsys.readouterr().out)


@pytest.fixture(scope="module")
def notebook():
    return json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_runs_from_top_to_bottom(here, notebook):
    names = {"__name__": "notebook"}
    play(notebook, names)
    assert names["both"].scores.keys() == {"fedit", "halves"}
    assert all(len(scores) == 3 for scores in names["both"].scores.values())
    last = notebook["cells"][-1]["outputs"][0]["data"]["text/plain"]
    assert last[0].startswith("MergedModule(module='model.layers.0.mlp.down_proj', ranks=(16, 16), rank=")


def test_the_notebook_is_committed_with_its_results(notebook):
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    shown = [output["data"] for cell in code for output in cell["outputs"] if "data" in output]
    assert sum("image/png" in data for data in shown) == 2 and sum("text/html" in data for data in shown) == 2
    assert (EXAMPLES / "notebook.ipynb").stat().st_size < 450_000  # two pictures of four panels each


def test_the_notebook_shows_the_method_of_the_example(notebook):
    example = (EXAMPLES / "own_method.py").read_text(encoding="utf-8")
    builder = example.partition("def halves")[2].partition("\n\n\ndef main")[0]
    assert any(builder in "".join(cell["source"]) for cell in notebook["cells"])
