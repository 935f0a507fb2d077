"""How the package is laid out, in numbers: `python scripts/measure_house.py src/fedloom`.

entries: files and folders at the top of the package. arrows: pairs of them of which one imports the other, within
functions too, but not for type checkers alone. circles: groups of modules that import each other. way: the files that
assembling the demo's run passes through, loops followed once. A stay is a stretch of calls within one file. The way
climbs back up where a stay begins higher in the chain of calls than the one before it. names: public functions and
classes that share their name with one in another module, and functions named by a bare participle or adjective, which
leaves open whether a call computes, checks or writes.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ASSEMBLING = "fedloom.workspace.assemble:load_setup"
BARE = """
    alone apart asking beyond between blind dense distinct done drawn due effective fresh held here holding identical
    known largest leading left literal live made missing nearest own plain printable quiet resting resumable same sent
    shorter shown spent told whole written
"""
"""Participles and adjectives that do not end in -ed."""
READING = "fedloom.records.configfile:load_config"


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


def namesakes(trees: Iterable[tuple[str, ast.Module]]) -> dict[str, list[str]]:
    """Name → the modules that define a function or class of it, of names that more than one defines.

    The face gives its names to people, and a command has the name that a terminal types: neither can choose.
    """
    homes: dict[str, list[str]] = {}
    for module, tree in trees:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                given = ".face" in module or any(is_command(decorator) for decorator in node.decorator_list)
                homes.setdefault(node.name, []).extend([] if given else [module])
    return {name: found for name, found in sorted(homes.items()) if len(found) > 1}


def is_command(decorator: ast.expr) -> bool:
    """Whether this is @app.command(), @app.main() or the like."""
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "app"


def bare(trees: Iterable[tuple[str, ast.Module]]) -> list[str]:
    """Public functions and methods, but for properties, that are named by a participle or an adjective alone."""
    return sorted(
        f"{module}.{node.name}"
        for module, tree in trees
        for home in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)))
        for node in home.body
        if isinstance(node, ast.FunctionDef)
        and (node.name in BARE.split() or re.fullmatch("[a-z]+[^e]ed", node.name))
        and not any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)
    )


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
    chosen = named or ASSEMBLING
    read, assemble = _function(READING), _function(chosen)
    config = read(next(root.rglob("demo.toml")))
    assemble(config)  # so that whatever is imported late is there
    return chosen, lambda: assemble(config)


def _function(named: str) -> Callable[..., Any]:
    module, _, name = named.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


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
    trees = [(module, ast.parse(path.read_text(encoding="utf-8"))) for module, path in modules(root).items()]
    shared, participles = namesakes(trees), bare(trees)
    print(f"names:   {len(shared)} namesakes, {len(participles)} bare participles")
    if options.list:
        print(
            *(f"  {name}: {', '.join(homes)}" for name, homes in shared.items()),
            *map("  {}".format, participles),
            sep="\n",
        )
    name, call = assembling(root, options.trace)
    stays = way(root, call)
    climbs = sum(after[1] < before[1] for before, after in zip(stays, stays[1:], strict=False))
    print(f"way:     {name}: {len(stays)} stays in {len({file for file, _ in stays})} files, back up {climbs} times")
    if options.list:
        print(*(f"  {'  ' * depth}{file}" for file, depth in stays), sep="\n")


if __name__ == "__main__":
    main()
