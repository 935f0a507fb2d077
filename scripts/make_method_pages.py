"""Writes docs/methods/*.md and docs/methods/*.svg: one page and one picture a method, and the table of all methods.

    python -m scripts.make_method_pages      # or: make pages

What code knows is read from it: facts, settings, defaults, presets, what works with what. The words are those of
docs/methods/text/<method>.md: its first paragraphs open the page, its headed parts follow the picture. Scores are taken
from the table in docs/benchmarks/methods.md. A test compares the pages with what this script writes.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from scripts.method_picture import TOY, picture

import fedloom
from fedloom.methods.method import Facts
from fedloom.methods.shared.server_optimiser import ServerOptimiser
from fedloom.methods.table import METHODS, build, method_options, server_options

DOCS = Path(__file__).parents[1] / "docs"
PAGES = DOCS / "methods"
HEAD = "<!-- Written by scripts/make_method_pages.py from the code and text/{}.md: change those, `make pages`. -->\n"
CODING = {"fp32": "fp32 (lossless)", "bf16": "bf16", "int8": "int8", "int4": "int4", "sign": "signs, one bit a value"}


def files() -> dict[str, str]:
    """File name → content of everything that the script writes."""
    made = {"index.md": index()}
    for name in METHODS:
        made[f"{name}.md"] = page(name)
        made[f"{name}.svg"] = picture(name)
    return made


def page(name: str) -> str:
    """One method's page."""
    title, opening, rest = text_of(name)
    parts = [
        HEAD.format(name),
        f"# {title}\n",
        opening,
        "\n" + table(("name in settings", f"`{name}`"), facts(name)),
        f"\n![Two rounds of {name}, element by element]({name}.svg)\n",
        "\n" + caption(name),
        rest,
        "## Settings\n",
        settings(name),
        "## On the testbed\n",
        measured(name),
        "## Run it\n",
        commands(name),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def text_of(name: str) -> tuple[str, str, str]:
    """Title, opening and headed parts of the hand-written text."""
    text = (PAGES / "text" / f"{name}.md").read_text(encoding="utf-8")
    title, _, body = text.partition("\n")
    opening, mark, rest = body.strip().partition("\n## ")
    return title.removeprefix("# ").strip(), opening, f"\n{mark.strip()} {rest}" if mark else ""


def facts(name: str) -> list[tuple[str, str]]:
    """What the method says of itself, and what works with it."""
    method = build(name)
    known = method.facts
    return [
        ("paper", paper(known.paper)),
        ("a client sends", known.sends),
        ("a client receives", known.receives),
        ("kept between rounds", known.keeps),
        ("exact: the result is Σ p s B A", "yes" if known.exact else "no"),
        ("clients of unequal rank", f"[{held(known)}](index.md#clients-of-unequal-rank)"),
        ("clients that train some modules only", yes(method.module_subsets)),
        ("[server optimiser](index.md#a-server-optimiser-over-a-method)", yes(bool(server_options(name)))),
        ("a byte limit on each update (`wire.budget`)", yes(method.takes_budget)),
        ('values under `wire.values = "auto"`', CODING[method.values]),
    ]


def yes(fact: bool) -> str:
    """Yes or no."""
    return "yes" if fact else "no"


def held(known: Facts) -> str:
    """What a client of lower rank trains on."""
    return "no" if not known.unequal_ranks else "own part" if known.own_part else "whole"


def paper(text: str) -> str:
    """The paper's name as a link to it."""
    found = re.search(r"arXiv (\d+\.\d+)", text)
    if not found:
        return text.replace("docs/loom.md", "[how it works](../loom.md)")
    return text.replace(found[0], f"[arXiv {found[1]}](https://arxiv.org/abs/{found[1]})")


def caption(name: str) -> str:
    """What the picture shows."""
    fitted = ", ".join(f"`{key} = {value!r}`".replace("'", '"') for key, value in TOY.get(name, {}).items())
    return (
        "Two rounds of two clients on one module (10 × 14, rank 3), played by fedloom itself; only the training step "
        "is made up. Every square is an element of a payload that was encoded and read back, and the bytes are those "
        f"of that payload, header included.{f' So small a module needs other settings: {fitted}.' if fitted else ''}\n"
    )


def settings(name: str) -> str:
    """The builder's keyword arguments, with every preset's values, and what the builder says of them."""
    own = method_options(name)
    if not own:
        return "None of its own.\n"
    presets = {key: dict(values) for key, values in METHODS[name].presets.items() if key != "default"}
    rows = []
    for key, default in own.items():
        others = (code(values[key]) if key in values else "" for values in presets.values())
        rows.append((f"`{key}`", kind(name, key), code(default), *others))
    head = ("setting", "values", "default", *(f"preset `{preset}`" for preset in presets))
    function = METHODS[name].builder
    described = inspect.getdoc(function.func if isinstance(function, partial) else function) or ""
    return f"{table(head, rows)}\n```text\n{described}\n```\n"


def kind(name: str, key: str) -> str:
    """The type of a setting, in words."""
    function = METHODS[name].builder
    hint = typing.get_type_hints(function.func if isinstance(function, partial) else function)[key]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(code(value) for value in typing.get_args(hint))
    names = {bool: "true, false", int: "whole number", float: "number", str: "text"}
    return " or ".join(names[part] for part in typing.get_args(hint) or (hint,))


def code(value: object) -> str:
    """A value as TOML writes it."""
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`".replace("'", '"')


def measured(name: str) -> str:
    """The method's row in the run of all methods, where it has been played there."""
    figures = (DOCS / "benchmarks" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {name} \| 3 \|(.*)\|$", figures, re.MULTILINE)
    if not rows:
        all_methods, log = "[all methods](../benchmarks/methods.md)", "[the log](../LOG.md)"
        return f"It has not been played beside {all_methods} yet; {log} has first runs.\n"
    halfway, end, up, down, share = (cell.strip() for cell in rows[-1].split("|")[:5])
    return (
        f"Default settings, value coding included: **{end} %** exact match after 20 rounds ({halfway} % after 10), "
        f"{up} up and {down} down a turn, {share} of dense fp32. [All methods](../benchmarks/methods.md) stand side by "
        "side there, with the command.\n"
    )


def commands(name: str) -> str:
    """The same method on the command line and from Python."""
    presets = [f"{name}:{key}" for key in METHODS[name].presets if key == "paper"]
    own = [
        (key, value) for key, value in method_options(name).items() if not (isinstance(value, float) and value > 1e30)
    ]
    key, value = own[0] if own else ("", "")
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    change = f" --set method.{key}={shown}" if own else ""
    given = f', {{"{key}": {value!r}}}'.replace("'", '"') if own else ""
    others = ",".join(["fedit", name, *presets]) if name != "fedit" else "fedit,fedsrd"
    return (
        "```sh\n"
        f"fedloom demo --method {name}\n"
        f"fedloom run my.toml --set method.name={name}{change}\n"
        f"fedloom compare my.toml --methods {others}\n"
        "```\n\n"
        "```python\n"
        "import fedloom\n\n"
        f'method = fedloom.build("{name}"{given})\n'
        "run = fedloom.run(fedloom.testbed(), method=method, num_rounds=2)\n"
        'print(run.scores["mean"], run.bytes_up, run.bytes_down)\n'
        "```\n"
    )


def index() -> str:
    """All methods in one table, and what they have in common."""
    rows = []
    for name in METHODS:
        method = build(name)
        known, link = method.facts, f"[{text_of(name)[0]}]({name}.md)"
        exact, unequal = yes(known.exact), held(known)
        rows.append((link, f"`{name}`", known.sends, known.receives, exact, unequal))
    head = ("method", "name", "a client sends", "a client receives", "exact", "unequal ranks")
    text = (PAGES / "text" / "index.md").read_text(encoding="utf-8")
    keys = table(("setting", "default"), server_keys())
    return HEAD.format("index") + "\n" + text.replace("{{methods}}", table(head, rows)).replace("{{server}}", keys)


def server_keys() -> list[tuple[str, str]]:
    """The settings of a server optimiser."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(ServerOptimiser).parameters
    return [
        (f"`method.{key}`", '`"fedavgm"` or `"fedadam"`' if found.default is found.empty else code(found.default))
        for key, found in parameters.items()
    ]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    """Write all of it."""
    for name, content in files().items():
        (PAGES / name).write_text(content, encoding="utf-8")
    print(f"wrote {len(METHODS)} pages and pictures to {PAGES}, with fedloom from {Path(fedloom.__file__).parent}")


if __name__ == "__main__":
    main()
