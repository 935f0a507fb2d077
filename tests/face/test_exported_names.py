"""What `import fedloom` gives: exactly these names, as their own types, from a package that ships them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import fedloom

REPO = Path(__file__).parents[2]

NAMES = [
    "Adopt",
    "Aggregate",
    "Comparison",
    "Compress",
    "Config",
    "Context",
    "Dense",
    "Description",
    "Entries",
    "Evaluated",
    "Facts",
    "Federation",
    "FedloomError",
    "Header",
    "Job",
    "LoraPair",
    "LoraState",
    "METHODS",
    "Merge",
    "Message",
    "Method",
    "Picture",
    "Receive",
    "Reduce",
    "RoundResult",
    "Run",
    "Seeded",
    "Sparse",
    "State",
    "Train",
    "Trained",
    "Update",
    "accept",
    "build",
    "client_turn",
    "compare",
    "decode",
    "describe",
    "encode",
    "evaluate",
    "initial_state",
    "load",
    "merge",
    "patch",
    "quantize",
    "replace",
    "run",
    "serve_site",
    "server_turn",
    "start",
    "testbed",
    "to_dense",
]


def test_these_names_are_exported():
    assert sorted(fedloom.__all__) == NAMES
    assert set(NAMES) <= set(dir(fedloom))


def test_every_name_is_there():
    assert [name for name in NAMES if getattr(fedloom, name, None) is None] == []


def test_the_stub_lists_every_name_as_an_export_once():
    lines = (REPO / "src" / "fedloom" / "__init__.pyi").read_text(encoding="utf-8").splitlines()
    exports = [line.rpartition(" import ")[2].split(" as ") for line in lines if line.startswith("from ")]
    assert all(name == alias for name, alias in exports)  # "X as X", or a type checker takes X for private
    assert sorted(name for name, _ in exports) == NAMES


def test_an_unknown_name_is_an_attribute_error():
    code = "import fedloom\ntry:\n    fedloom.nothing\nexcept AttributeError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nothing" in done.stdout


def test_the_wheel_has_the_stub_and_neither_benchmarks_nor_experiments():
    build = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["src/fedloom"]}  # all files of that folder, and no others
    package = REPO / "src" / "fedloom"
    assert all((package / name).is_file() for name in ("__init__.pyi", "py.typed", "testbeds/demo.toml"))
    assert not {path.name for path in package.iterdir()} & {"benchmarks", "experiments", "bench", "examples"}


def test_what_the_package_imports_is_among_its_dependencies():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (REPO / "constraints.txt").read_text(encoding="utf-8").lower()
    for name in ("google-re2", "jinja2", "lazy-loader"):
        assert any(dependency.startswith(name) for dependency in project["dependencies"])
        assert f"\n{name}==" in pinned
