"""The shape of the package: imports run one way, heavy libraries have one door each, files and functions stay small."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom

ROOT = Path(__file__).parents[1] / "src" / "fedloom"

LAYERS = """
    errors text events testbed foreign
    masks tensors lora sparsify budget lowrank
    wire method methods caps cohort consolidation job checks rounds federation catchup checkpoint
    config configfile ledger serverlog report
    json_file model_size tensor_file patterns adapters adapter_config adapter_folder
    data templates partition tokens base_model placement peft_bridge training evaluate
    runs clients setup export merge site engines pace compare tune front deploy bench estimate studies progress status
    inspection cli __main__
"""
ORDER = list(LAYERS.split())
"""A module may import those before it, and those of its own package."""

DOORS = {
    "peft": {"peft_bridge.py"},
    "flwr": {"engines/flower"},
    "ray": {"engines/flower"},
    "re2": {"patterns.py"},
    "matplotlib": {"report/figure.py"},
    "typer": {"cli.py", "bench/commands.py", "deploy/commands.py", "merge/command.py", "studies/commands.py"},
    "datasets": {"data.py"},
}
"""Library → the only files that may import it."""

PURE = ("masks", "tensors", "lora", "sparsify", "budget", "lowrank", "method", "methods")
IMPURE = {
    "io",
    "json",
    "logging",
    "pathlib",
    "random",
    "shutil",
    "tempfile",
    "time",
    "transformers",
    "peft",
    "numpy.random",
}
LIGHT = (
    *("errors", "text", "events", "testbed", "config", "configfile", "ledger", "serverlog"),
    *("report", "progress", "status", "inspection", "cli"),
)
"""Modules that must not load torch when imported, so that `fedloom --help` answers at once."""

FILES = sorted(ROOT.rglob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def unit(dotted):
    """fedloom.wire.codec → wire; fedloom → the package itself."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def own_unit(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path, *, top_level=False):
    """Dotted names of all modules that a file imports, where it says so or within functions; not for typing only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending, found = list(tree.body), []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            plain = node.module == "fedloom"
            found += [f"fedloom.{alias.name}" for alias in node.names] if plain else [node.module]
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending += list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_import_runs_upward(path):
    own = own_unit(path)
    if own == "__init__":
        return
    assert own in ORDER, f"{own} is new: give it a place in ORDER"
    for dotted in imports(path):
        if dotted.partition(".")[0] == "fedloom":
            other = unit(dotted)
            assert other == own or ORDER.index(other) < ORDER.index(own), f"{name_of(path)} imports {dotted}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_have_one_door(path):
    for dotted in imports(path):
        doors = DOORS.get(dotted.partition(".")[0])
        assert doors is None or any(name_of(path).startswith(door) for door in doors), f"{name_of(path)}: {dotted}"


@pytest.mark.parametrize("path", [p for p in FILES if own_unit(p) in PURE], ids=name_of)
def test_mathematics_does_no_input_or_output(path):
    assert not IMPURE & {part for dotted in imports(path) for part in (dotted, dotted.partition(".")[0])}


@pytest.mark.parametrize("path", [p for p in FILES if own_unit(p) in LIGHT], ids=name_of)
def test_light_modules_load_nothing_heavy(path):
    heavy = {
        "torch",
        "transformers",
        "numba",
        "numpy",
        "pyarrow",
        *(["matplotlib"] if "figure" not in path.name else []),
    }
    tops = {dotted.partition(".")[0] for dotted in imports(path, top_level=True)}
    assert not heavy & tops
    for dotted in imports(path, top_level=True):
        if dotted.startswith("fedloom.") and not dotted.endswith((".command", ".commands")):
            assert unit(dotted) in LIGHT, f"{name_of(path)} imports {dotted}"


def test_reports_rest_on_ledgers_alone():
    for path in FILES:
        if own_unit(path) == "report":
            used = {unit(dotted) for dotted in imports(path) if dotted.startswith("fedloom")}
            assert used <= {"errors", "text", "ledger", "report"}, name_of(path)


def test_methods_see_no_bytes_and_the_wire_no_methods():
    for path in FILES:
        used = {unit(dotted) for dotted in imports(path) if dotted.startswith("fedloom")}
        if own_unit(path) in ("method", "methods"):
            assert not used & {"wire", "rounds", "engines"}, name_of(path)
        if own_unit(path) == "wire":
            assert not used & {"method", "methods"}, name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350, f"{name_of(path)} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{name_of(path)}: {node.name} has {length} lines"
            public = not node.name.startswith("_")
            assert not (public and node.args.kwarg), f"{name_of(path)}: {node.name} takes **{node.args.kwarg}"


def test_the_public_face_is_small_and_true():
    assert list(fedloom.__all__) == sorted(fedloom.__all__)
    assert len(fedloom.__all__) <= 15
    for name in fedloom.__all__:
        assert getattr(fedloom, name) is not None
    assert set(fedloom.__all__) <= set(dir(fedloom))


def test_the_tests_that_the_documentation_names_are_there():
    tests = Path(__file__).parent
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in tests.glob("test_*.py")), re.M))
    named = set(re.findall(r"`(test_\w+)`", (tests.parent / "docs" / "add-a-method.md").read_text()))
    assert len(named) > 30 and not named - defined


def loaded_by(statement):
    """Top-level names of the libraries that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_package_needs_torch_only():
    heavy = {"transformers", "peft", "trl", "datasets", "pyarrow", "matplotlib", "flwr", "pandas"}
    assert not heavy & loaded_by("import fedloom\nfor name in fedloom.__all__: getattr(fedloom, name)")


def test_help_loads_no_torch():
    assert "torch" not in loaded_by("import fedloom.cli.main")
