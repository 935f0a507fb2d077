"""How the package is laid out, in numbers: `python scripts/measure_house.py src/fedloom`.

entries: files and folders at the top of the package. arrows: pairs of them of which one imports the other, within
functions too, but not for type checkers alone. circles: groups of modules that import each other. way: the files that
assembling the demo's run passes through, loops followed once. A stay is a stretch of calls within one file. The way
climbs back up where a stay begins higher in the chain of calls than the one before it.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, util
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ASSEMBLING = (
    "fedloom.workspace.assemble:load_setup",
    "fedloom.run.assemble:prepare",
    "fedloom.workspace.assemble:load_setup",
)
READING = ("fedloom.records.configfile", "fedloom.records.configfile")


def modules(root: Path) -> dict[str, Path]:
    """Dotted name → file, of every module of the package; a package's own name stands for its __init__.py."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of what is imported; the name is empty for a plain import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
        yield from imports(node)


def arrows(found: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module → those of the package that it imports."""
    made: dict[str, set[str]] = {}
    for module, path in found.items():
        pairs = imports(ast.parse(path.read_text(encoding="utf-8")))
        named = {f"{home}.{name}" if f"{home}.{name}" in found else home for home, name in pairs}
        made[module] = {name for name in named if name in found and name != module}
    return made


def unit(module: str) -> str:
    """The entry at the top of the package that a module belongs to."""
    return ".".join(module.split(".")[:2])


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules, each of which reaches every other by imports."""
    reach = {module: _reached(graph, module) for module in graph}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = list(graph[start])
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            pending += graph[module]
    return seen


def way(root: Path, call: Callable[[], object]) -> list[tuple[str, int]]:
    """(file, depth of its first call) of every stay. A function that calls another again is followed once."""
    stays: list[tuple[str, int]] = []
    stack: list[CodeType] = []
    seen: set[tuple[CodeType | None, CodeType]] = set()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # A module's own frame is an import, and no part of the way.
        if not code.co_filename.startswith(f"{root}/") or code.co_name == "<module>":
            return
        if event == "return" and stack:
            stack.pop()
        elif event == "call":
            step = (stack[-1] if stack else None, code)
            stack.append(code)
            name = Path(code.co_filename).relative_to(root).as_posix()
            if step not in seen and (not stays or stays[-1][0] != name):
                stays.append((name, len(stack)))
            seen.add(step)

    sys.setprofile(watch)
    call()
    sys.setprofile(None)
    return stays


def assembling(root: Path, named: str | None) -> tuple[str, Callable[[], object]]:
    """What assembles a run, by name, and a call of it on the demo's settings."""
    demo = next(root.rglob("demo.toml"))
    reading = import_module(next(name for name in READING if _exists(name)))
    chosen = named or next(name for name in ASSEMBLING if _exists(name.partition(":")[0]))
    module, _, function = chosen.partition(":")
    config = reading.load(demo)
    assemble = getattr(import_module(module), function)
    assemble(config)  # so that whatever is imported late is there
    return chosen, lambda: assemble(config)


def _exists(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path, nargs="?", default=Path("src/fedloom"), help="folder of the package")
    parser.add_argument("--trace", metavar="MODULE:FUNCTION", help="what assembles a run, where it is found by no name")
    parser.add_argument("--list", action="store_true", help="name the circles, and the stays in their order")
    options = parser.parse_args()
    root = options.root.resolve()
    sys.path.insert(0, str(root.parent))
    entries = [path for path in root.iterdir() if not path.name.startswith(("_", ".")) or path.suffix == ".py"]
    graph = arrows(modules(root))
    pairs = {(unit(a), unit(b)) for a, others in graph.items() for b in others if unit(a) != unit(b)}
    found, folders = circles(graph), sum(path.is_dir() for path in entries)
    print(f"entries: {len(entries)} ({len(entries) - folders} files, {folders} folders)")
    print(f"arrows:  {len(pairs)} between them")
    print(f"circles: {len(found)}", *([" ↔ ".join(group) for group in found] if options.list else []), sep="\n  ")
    name, call = assembling(root, options.trace)
    stays = way(root, call)
    climbs = sum(after[1] < before[1] for before, after in zip(stays, stays[1:], strict=False))
    print(f"way:     {name}: {len(stays)} stays in {len({file for file, _ in stays})} files, back up {climbs} times")
    if options.list:
        print(*(f"  {'  ' * depth}{file}" for file, depth in stays), sep="\n")


if __name__ == "__main__":
    main()
