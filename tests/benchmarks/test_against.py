"""Old code against new: whose code a measurement imports, which rows are paired, what is asked of the whole round."""

import re
import shlex
from pathlib import Path

import pytest
from benchmarks.output import to_markdown
from benchmarks.trees import REPOSITORY, Measured, Tree, measure, tree_of
from rich.table import Table
from typer.main import get_command

from benchmarks import against, commands, goals, page
from fedloom.errors import ConfigError


@pytest.fixture
def tree(tmp_path):
    """(name, a number) → a version of the code that has it, under one measurement."""
    measurements = tmp_path / "measurements"
    (measurements / "benchmarks").mkdir(parents=True)
    (measurements / "benchmarks" / "__main__.py").write_text(
        "import json, os, sys, fedloom\n"
        "if 'fail' in sys.argv:\n    sys.exit('╭──╮\\n│ No such thing. │\\n╰──╯')\n"
        "row = {'who': sys.argv[1], 'clients': 4, 'cost_s': fedloom.COST, 'threads': os.environ['OMP_NUM_THREADS']}\n"
        "print('a library chats')\nprint(json.dumps({'rows': [row], 'told': sys.argv[1:]}))\n"
    )

    def made(name, cost):
        (tmp_path / name / "fedloom").mkdir(parents=True)
        (tmp_path / name / "fedloom" / "__init__.py").write_text(f"COST = {cost}\n")
        return Tree(name, tmp_path / name, measurements)

    return made


def test_a_measurement_imports_the_code_of_its_tree(tree, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = [measure(tree(name, cost), ["ada"]) for name, cost in (("old", 8.0), ("new", 2.0))]
    assert [one.result["rows"][0]["cost_s"] for one in told] == [8.0, 2.0]
    assert told[0].result["told"] == ["ada", "--json"] and told[0].result["rows"][0]["threads"] == "1"
    assert min(one.peak_mib for one in told) > 1 and min(one.cpu_s for one in told) > 0


def test_what_fails_says_with_whose_code(tree):
    with pytest.raises(ConfigError, match=r"`-m benchmarks fail --json` fails with the old code: No such thing\.$"):
        measure(tree("old", 1.0), ["fail"])


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="the code is not in a repository of git")
def test_the_code_of_a_commit_is_thrown_away_again():
    with tree_of("HEAD", own=True) as then:
        assert (then.source / "fedloom" / "errors.py").is_file()
        assert (then.measurements / "benchmarks" / "__main__.py").is_file()
    assert not then.source.exists()
    with pytest.raises(ConfigError, match="git has no code of 'of-no-commit'"), tree_of("of-no-commit"):
        pass


def row(method, clients, cost, **more):
    return {"method": method, "clients": clients, "cost_s": cost, **more}


def test_rows_are_paired_by_what_names_them():
    old = [
        [row("a", 4, 8.0, bytes=10), row("a", 16, 40.0, bytes=11)],
        [row("a", 4, 10.0, bytes=10), row("a", 16, 44.0)],
    ]
    new = [[row("a", 16, 4.0, bytes=12), row("a", 4, 3.0, bytes=10), row("b", 4, 1.0)]]
    found = against.compare(old, [new[0][:2]])
    assert [one for one in found if one["number"] == "cost_s"] == [
        {"method": "a", "clients": 4, "number": "cost_s", "old": 9.0, "new": 3.0, "ratio": 3.0 / 9.0},
        {"method": "a", "clients": 16, "number": "cost_s", "old": 42.0, "new": 4.0, "ratio": 4.0 / 42.0},
    ]
    assert {one["number"] for one in found} == {"cost_s", "bytes"}
    assert {one["method"] for one in against.compare(old, new)} == {"a"}  # the old code has no b


def test_rows_without_names_are_paired_by_their_order():
    found = against.compare([[{"s": 1.0}, {"s": 2.0}]], [[{"s": 3.0}, {"s": 8.0}]])
    assert [one["ratio"] for one in found] == [3.0, 4.0]


def test_rows_may_have_names():
    told = Measured({"reached": {"loss": {"ratio": 0.25}}, "rows": []}, 1.0, 1.0)
    assert against.rows_of(told, "reached", ["buffered"]) == [{"name": "loss", "ratio": 0.25}]


def test_what_a_row_holds_by_name_is_compared_too(monkeypatch):
    told = Measured({"rows": [{"client": "ada", "stages": {"read": 2.0}}]}, 1.0, 100.0)
    monkeypatch.setattr(against, "in_turns", lambda trees, words, repeats: {"old": [told], "new": [told]})
    monkeypatch.setattr(against, "tree_of", lambda ref, own: tree_of_nothing())
    result = against.run("HEAD", ["turn"], repeats=1)
    assert [one["number"] for one in result["rows"]] == ["stages.read", "process_cpu_s", "process_peak_mib"]
    assert "| ada | stages.read | 2 | 2 | 1 |" in to_markdown(against.tables(result)[0])
    with pytest.raises(ConfigError, match="prints no rows called 'details'; it has rows"):
        against.run("HEAD", ["turn"], rows="details")


class tree_of_nothing:
    def __enter__(self):
        return Tree("old", Path())

    def __exit__(self, *error):
        pass


SERVER = [
    {"method": m, "clients": k, "cpu_s": s, "kernel_cpu_s": s / 2, "peak_adapters": p}
    for m, k, s, p in (
        ("fedsrd", 4, 2.0, 1.5),
        ("fedsrd", 16, 7.0, 3.0),
        ("florist", 4, 1.0, None),
        ("florist", 16, 4.5, 2),
    )
]


def test_numbers_of_the_goals_are_made_of_their_rows():
    assert goals.beyond_kernel(SERVER) == 1.0
    assert goals.growth(SERVER) == 4.5
    assert goals.largest("peak_adapters", clients=(16,))(SERVER) == 3.0
    assert goals.largest("cpu_s", method=("florist",))(SERVER) == 4.5
    assert len({goal.name for goal in goals.GOALS}) == len(goals.GOALS)
    assert all((goal.most is None) != (goal.least is None) for goal in goals.GOALS)


def test_a_goal_that_old_code_cannot_play_has_its_other_numbers(monkeypatch):
    def measured(tree, words):
        if tree.name == "old":
            raise ConfigError("no such measurement")
        return Measured({"rows": SERVER}, 1.0, 1.0)

    monkeypatch.setattr(goals, "measure", measured)
    growth, memory = (goal for goal in goals.GOALS if goal.command == goals.LAYER)
    told = goals.measured(goals.LAYER, [growth, memory], [Tree("old", Path()), Tree("new", Path())], 3)
    assert [(one["old"], one["new"], one["met"]) for one in told] == [(None, 4.5, True), (None, 3.0, True)]
    assert {one["remark"] for one in told} == {"old code: no such measurement"}
    assert goals.Goal("x", "x", "x", len, least=1.7).met(1.6) is False


def test_without_a_commit_todays_code_is_measured_alone(monkeypatch):
    played: list[str] = []

    def measured(tree, words):
        played.append(tree.name)
        return Measured({"rows": SERVER}, 1.0, 1.0)

    monkeypatch.setattr(goals, "measure", measured)
    monkeypatch.setattr(goals, "settle", lambda tree: None)
    said: list[str] = []
    result = goals.run("", ["growth"], repeats=1, told=said.append)
    assert played == ["new"] and said[0].startswith("1 numbers, 1 repeats of today's code: about 3 minutes")
    assert [(one["old"], one["new"], one["met"]) for one in result["rows"]] == [(None, 4.5, True)]
    assert "| – |" in to_markdown(goals.tables(result)[0])


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: goal.name)
def test_the_page_names_every_goal(goal):
    text = (REPOSITORY / "docs" / "benchmarks" / "rounds.md").read_text(encoding="utf-8")
    assert goal.command in re.sub(r"\s*\\\n\s*", " ", text) and goal.asked in text


@pytest.mark.parametrize("words", sorted({goal.command for goal in goals.GOALS}))
def test_every_goal_is_a_command_of_this_program(words):
    assert parse(words) == words.split()[0]


def test_every_table_that_is_printed_is_of_a_command():
    pages = sorted((REPOSITORY / "docs" / "benchmarks").glob("*.md"))
    tables = page.tables_of(pages)
    assert {table.page.name for table in tables} >= {"client.md", "wire.md"}
    for table in tables:
        assert parse(table.words) == table.words.split()[0]


def parse(words):
    """The command's name. Raises click's error for an unknown command or option."""
    group = get_command(commands.app)
    context = group.make_context("benchmarks", shlex.split(words))
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, rest)
    return name


def test_a_table_is_replaced_in_its_place(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(
        "before\n<!-- printed by: wan --rank 2 (8 min) -->\n| old |\n" + page.END + "\nbetween\n"
        "<!-- printed by: crowd (1 min) -->\n" + page.END + "\n"
    )
    (table,) = page.tables_of([file], "wan")
    assert (table.words, table.minutes) == ("wan --rank 2", 8)
    page.place(table, "| new |")
    page.place(table, "| newer |")
    assert file.read_text().startswith(
        "before\n<!-- printed by: wan --rank 2 (8 min) -->\n\n| newer |\n\n" + page.END + "\nbetween"
    )
    assert len(page.tables_of([file])) == 2
    with pytest.raises(ConfigError, match="expected a table printed by 'line'"):
        page.tables_of([file], "line")


def test_a_table_in_markdown():
    table = Table("who", title="left out")
    table.add_column("s", justify="right")
    table.add_row("[b]a|b", "1")
    assert to_markdown(table) == "| who | s |\n|---|---:|\n| a/b | 1 |"
