"""Every code block of the documentation is run or checked, so that nobody copies one that does not work.

python is executed, the blocks of a page one after the other in one namespace; the testbed's data are cut to a few
examples and its training to a step. toml is parsed as settings or as a SITE.toml, json as examples. In sh the commands
of fedloom must parse, with their options, and targets of make must exist; they are not run (tests/deploy runs the
deploy page). Blocks of text, and blocks that name no language, show something.
"""

import importlib
import json
import re
import shlex
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from typer.main import get_command

from fedloom.model.examples import to_example
from fedloom.records.configfile import parse
from fedloom.site.config import SiteConfig
from small_testbed import small_testbed

REPO = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(REPO).as_posix()
    for path in [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md")]
    # The log has commands as they were on their day; the words of the methods' pages are in these pages.
    if path.name not in ("LOG.md", "CHANGELOG.md") and path.parent.name != "text"
)
APPS = {"fedloom": "fedloom.cli.main", "benchmarks": "benchmarks.commands", "experiments": "experiments.__main__"}
LANGUAGES = {"", "python", "sh", "toml", "yaml", "json", "text"}
SITE = {"name": "site", "model": "model", "data": "data"}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str


def blocks_of(page, *languages):
    text = (REPO / page).read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
    made = [Block(page, text.count("\n", 0, it.start()) + 2, it[2], textwrap.dedent(it[3])) for it in found]
    return [block for block in made if not languages or block.language in languages]


def having(*languages):
    return [page for page in PAGES if blocks_of(page, *languages)]


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    return small_testbed(tmp_path_factory.mktemp("testbed"))


@pytest.mark.parametrize("page", PAGES)
def test_a_block_says_in_which_language_it_is(page):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}"


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("page", having("python"))
def test_python_runs(page, testbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedloom.face.settings.testbed_folder", lambda: testbed)
    names = {"__name__": "page"}
    for block in blocks_of(page, "python"):
        # As many lines before it as on the page, so that a traceback names the page's own line.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, page, "exec"), names)
    assert len(names) > 2, "the page's blocks define nothing: is there anything in them?"


@pytest.mark.parametrize("page", having("toml"))
def test_toml_is_settings_or_a_site(page):
    for block in blocks_of(page, "toml"):
        tree = tomllib.loads(block.text)
        assert tree
        if tree.keys() <= SiteConfig.model_fields.keys() - {"model", "data"}:
            SiteConfig.model_validate({**SITE, **tree})
        else:
            parse(tree, f"{page}:{block.line}")


@pytest.mark.parametrize("page", having("json"))
def test_json_lines_are_examples(page):
    for block in blocks_of(page, "json"):
        assert all(to_example(json.loads(line)).output for line in block.text.splitlines())


def commands_of(text):
    """Argument lists of the simple commands of a script, without redirections."""
    joined = re.sub(r"\$\([^)]*\)", "0", re.sub(r"\\\n\s*", " ", text))  # what a shell fills in is some value
    for line in joined.splitlines():
        bare = re.sub(r"(^|\s)#.*", "", line)
        for part in re.split(r"&&|\|\||;|\||(?<!>)&(?!\d)|\b(?:do|until|then)\b(?= )", bare):
            words = shlex.split(re.sub(r"\d?>\S*\s*\S*", "", part)) if part.count('"') % 2 == 0 else []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def called(words):
    """(app, arguments) of a command of ours, or None."""
    program = words[0].rpartition("/")[2]
    if program == "fedloom":
        return "fedloom", words[1:]
    if program.startswith("python") and words[1:2] == ["-m"] and words[2] in APPS:
        return words[2], words[3:]
    return None


def check_parses(command, name, arguments):
    """Raises click's error for an unknown command or option, and for a value that an option does not take."""
    if {"--help", "-h"} & set(arguments):
        arguments = [word for word in arguments if word not in ("--help", "-h")]
        if not arguments:
            return
    if not isinstance(command, click.Group):
        # The values are those of another place: files need not be here.
        command.make_context(name, list(arguments))
        return
    context = command.make_context(name, list(arguments))
    found, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    check_parses(inner, found, rest)


def app(name):
    return get_command(importlib.import_module(APPS[name]).app)


@pytest.mark.parametrize("page", having("sh"))
def test_commands_parse(page):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    checked = 0
    for block in blocks_of(page, "sh"):
        for words in commands_of(block.text):
            ours = called(words)
            if ours:
                try:
                    check_parses(app(ours[0]), ours[0], ours[1])
                except click.ClickException as error:
                    pytest.fail(f"{page}:{block.line}: {' '.join(words)}: {error.format_message()}")
            if words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= targets, f"{page}:{block.line}"
            checked += bool(words)
    assert checked


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_exist(page):
    text = re.sub(r"^ *```.*?^ *```$", "", (REPO / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    known = app("fedloom").commands
    for first, second in re.findall(r"`fedloom ([a-z]+) ?([a-z]*)", text):
        assert first in known, f"fedloom {first}"
        assert first != "federation" or not second or second in known[first].commands, f"fedloom {first} {second}"
    measured = app("benchmarks").commands
    assert set(re.findall(r"`python -m\s+benchmarks ([a-z]+)", text)) <= set(measured)
    assert not re.findall(r"`fedloom (?:bench|front)\b", text)


def test_a_wrong_command_is_found():
    with pytest.raises(click.ClickException):
        check_parses(app("fedloom"), "fedloom", ["run", "my.toml", "--engin", "flower"])
    with pytest.raises(click.ClickException):
        check_parses(app("fedloom"), "fedloom", ["bench", "wire"])
    text = "A=1 fedloom run x \\\n  --resume > log 2>&1 &\nuntil fedloom status r; do sleep 1; done  # more"
    assert [called(words) for words in commands_of(text) if called(words)] == [
        ("fedloom", ["run", "x", "--resume"]),
        ("fedloom", ["status", "r"]),
    ]
