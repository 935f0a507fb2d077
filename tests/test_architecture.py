"""The shape of the package: imports run one way, heavy libraries have one door each, files and functions stay small.

The rooms, their order and their rules are read from docs/architecture.md, so that the page and the code cannot drift.
"""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom

REPO = Path(__file__).parents[1]
ROOT = REPO / "src" / "fedloom"

ROWS = re.findall(
    r"^\| `(\w+)` \|.*\| (\w* ?)\|$", (REPO / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE
)
ORDER = [room for room, _ in ROWS]
PURE = {room for room, rule in ROWS if rule == "pure "}
LIGHT = {room for room, rule in ROWS if rule == "light "}

DOORS = {
    "peft": {"model/peft_bridge/"},
    "flwr": {"flower"},
    "ray": {"flower"},
    "matplotlib": {"report/figure.py"},
    "typer": {"cli"},
    "datasets": {"model/sources.py"},
    "re2": {"adapters/patterns.py"},
    "starlette": {"web/"},
    "uvicorn": {"web/serving.py"},
    "tensorboard": {"trackers/event_files.py"},
    "mlflow": {"trackers/mlflow_run.py"},
    "wandb": {"trackers/wandb_run.py"},
    "trackio": {"trackers/trackio_run.py"},
    "gguf": {"adapters/export/names.py"},
}
"""Library → the only files that may import it."""

IMPURE = {"io", "json", "logging", "pathlib", "random", "shutil", "tempfile", "time", "transformers", "numpy.random"}
HEAVY = {"torch", "transformers", "numba", "numpy", "pyarrow", "matplotlib"}

FILES = sorted(ROOT.rglob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(dotted):
    """fedloom.wire.codec → wire; fedloom → the face of the package itself."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


MODULES = {module_of(path): path for path in FILES}


def imports(path, *, top_level=False):
    """Dotted names of all modules that a file imports, where it says so or within functions; not for typing only."""
    pending, found = list(ast.parse(path.read_text(encoding="utf-8")).body), []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append(whole if whole in MODULES else node.module)
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending += list(ast.iter_child_nodes(node))
    return found


def own(path):
    """The modules of fedloom that a file imports."""
    return {dotted for dotted in imports(path) if dotted in MODULES} - {module_of(path)}


def test_the_page_names_every_room_and_every_file():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__"}
    assert set(ORDER) == rooms
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room, files in re.findall(r"^\| `(\w+)` \|[^|]*\| ((?:`[\w/]+`[ …]*)+)\|", text, re.MULTILINE):
        for file in re.findall(r"`([\w/]+)`", files):
            place = ROOT / room / file
            assert place.is_dir() if file.endswith("/") else place.with_suffix(".py").exists(), f"{room}/{file}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_import_runs_upward(path):
    room = room_of(module_of(path))
    if room in ("__init__", "__main__"):
        return
    for dotted in own(path):
        other = room_of(dotted)
        assert other == room or ORDER.index(other) < ORDER.index(room), f"{name_of(path)} imports {dotted}"


def test_no_modules_import_each_other():
    order = graphlib.TopologicalSorter({module: own(path) for module, path in MODULES.items()})
    order.prepare()  # CycleError names the circle


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_have_one_door(path):
    for dotted in imports(path):
        doors = DOORS.get(dotted.partition(".")[0])
        assert doors is None or any(name_of(path).startswith(door) for door in doors), f"{name_of(path)}: {dotted}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(module_of(p)) in PURE], ids=name_of)
def test_mathematics_does_no_input_or_output(path):
    assert not IMPURE & {part for dotted in imports(path) for part in (dotted, dotted.partition(".")[0])}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(module_of(p)) in LIGHT], ids=name_of)
def test_light_rooms_load_nothing_heavy(path):
    tops = {dotted.partition(".")[0] for dotted in imports(path, top_level=True)}
    assert not (HEAVY - ({"matplotlib"} if path.name == "figure.py" else set())) & tops
    for dotted in imports(path, top_level=True):
        if dotted.startswith("fedloom."):
            assert room_of(dotted) in LIGHT, f"{name_of(path)} imports {dotted}"


def test_reports_rest_on_ledgers_alone():
    for path in FILES:
        if room_of(module_of(path)) == "report":
            assert {room_of(dotted) for dotted in own(path)} <= {"errors", "records", "report"}, name_of(path)


def test_methods_see_no_bytes_and_the_wire_no_methods():
    for path in FILES:
        room, used = room_of(module_of(path)), {room_of(dotted) for dotted in own(path)}
        if room == "methods":
            assert "wire" not in used, name_of(path)
        if room == "wire":
            assert "methods" not in used, name_of(path)


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


def test_the_tests_that_the_documentation_names_are_there():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", text, re.M))
    named = set(re.findall(r"`(test_\w+)`", (REPO / "docs" / "add-a-method.md").read_text(encoding="utf-8")))
    assert len(named) > 30 and not named - defined


def loaded_by(statement):
    """Top-level names of the libraries that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_no_torch():
    assert "torch" not in loaded_by("import fedloom")


def test_the_algebra_and_the_wire_need_torch_only():
    heavy = {"transformers", "peft", "trl", "datasets", "pyarrow", "matplotlib", "flwr", "pandas"}
    names = ("METHODS", "Federation", "LoraState", "Method", "build", "decode", "describe", "encode")
    assert not heavy & loaded_by(f"import fedloom\nfor name in {names}: getattr(fedloom, name)")


def test_help_loads_no_torch():
    assert "torch" not in loaded_by("import fedloom.cli.main")


def test_the_exported_names_are_these():
    assert set(fedloom.__all__) == {name for name in dir(fedloom) if not name.startswith("_")} & set(fedloom.__all__)
