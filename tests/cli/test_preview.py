"""`fedloom preview` says what a run would train on, of settings or of a SITE.toml, in any form and split of data."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom import testbeds
from fedloom.cli import main as cli
from fedloom.cli import preview as command
from fedloom.model.base import load_tokenizer
from fedloom.model.sources import load_examples
from fedloom.model.tokens import tokenize

MODEL = Path(testbeds.testbed_folder()) / "model"
TALK = [
    ("system", "Be [bold]brief[/bold]."),
    ("user", "hello \x1b[31m"),
    ("assistant", "hi"),
    ("user", "and?"),
    ("assistant", "bye"),
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    rows = {
        "lab": [{"messages": [{"role": role, "content": text} for role, text in TALK]}] * 2,
        "bank": [{"instruction": "Add.", "output": "3"}, {"instruction": "y" * 600, "output": "3"}],
        "mint": [{"text": "once upon a time", "topic": "a"}, {"text": "the end", "topic": "b"}],
    }
    for client, held in rows.items():
        (tmp_path / "data" / client).mkdir(parents=True)
        (tmp_path / "data" / client / "train.jsonl").write_text("\n".join(map(json.dumps, held)))
    (tmp_path / "run.toml").write_text(f'[model]\npath = "{MODEL}"\n[data]\nsource = "./data"\nmax_length = 128\n')
    (tmp_path / "SITE.toml").write_text(f'name = "lab"\nmodel = "{MODEL}"\ndata = "data/lab"\n')
    return tmp_path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    def call(*arguments: object, width: int = 80, colours: bool = False) -> tuple[int, str, str]:
        shown = io.StringIO()
        console = Console(file=shown, width=width, force_terminal=colours, color_system="standard" if colours else None)
        monkeypatch.setattr(command, "screen", console)
        result = CliRunner().invoke(cli.app, ["preview", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, shown.getvalue() + result.stdout, result.stderr

    return call


def test_clients_in_numbers_then_examples_with_what_is_learnt_marked(call, project: Path) -> None:
    code, out, err = call(project / "run.toml", "--set", "data.assistant_only_loss=true")
    assert (code, err) == (0, "") and "\x1b" not in out
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    table = {line.split()[0]: line.split()[1:] for line in lines if line.split()[:1] in (["bank"], ["lab"], ["mint"])}
    assert (table["bank"][0], table["bank"][-2:]) == ("1", ["1", "alpaca"])
    assert (table["lab"][-1], table["mint"][-1]) == ("chat", "raw")
    assert 'note: data.template = "auto": conversations are rendered by the tokenizer\'s own' in out
    assert "note: client bank: 0 examples cut and 1 dropped at data.max_length = 128" in out
    assert "│ <s>Be [bold]brief[/bold].\n│ hello \\x1b[31m\n│ ⟦hi</s>⟧and?\n│ ⟦bye</s>⟧\n" in out
    assert "│ <s>⟦once upon a time</s>⟧\n" in out
    assert "2 ⟦</s>⟧" in out


def test_on_a_terminal_colours_tell_it(call, project: Path) -> None:
    code, out, _ = call(project / "run.toml", "--client", "lab", "--examples", 1, width=120, colours=True)
    assert code == 0 and "⟦" not in out and "\x1b[1;32mbye</s>" in out and "lab, example 2" not in out
    assert "bank" not in out and "\x1b[31m" not in out


def test_json_has_the_ids_and_labels_that_training_has(call, project: Path) -> None:
    code, out, _ = call(project / "run.toml", "--json", "--set", "data.packing=true", "--examples", 9)
    told = json.loads(out)
    assert (code, told["packing"], list(told["clients"])) == (0, True, ["bank", "lab", "mint"])
    assert told["clients"]["lab"]["rows"] == 1 and told["clients"]["mint"]["templates"] == {"raw": 2}
    for client, held in told["clients"].items():
        examples = load_examples(project / "data" / client)
        data = tokenize(examples, load_tokenizer(MODEL), "auto", 128)
        assert [one["ids"] for one in held["shown"]] == [tokens.ids.tolist() for tokens in data.examples]
        assert [one["labels"] for one in held["shown"]] == [tokens.labels().tolist() for tokens in data.examples]
        assert held["max_tokens"] == max(len(tokens.ids) for tokens in data.examples)


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "natural"])
def test_every_split_of_the_data(call, project: Path, partitioner: str) -> None:
    sets = [f"data.partitioner={partitioner}", f"data.source={project}/data/mint/train.jsonl"]
    sets += ["data.id_column=topic"] if partitioner == "natural" else ["federation.num_clients=2"]
    sets += ["data.label_column=topic"] if partitioner == "dirichlet" else []
    code, out, err = call(project / "run.toml", "--json", *(part for text in sets for part in ("--set", text)))
    assert code == 0, err
    assert sum(held["examples"] for held in json.loads(out)["clients"].values()) == 2


def test_a_site_sees_its_own_examples(call, project: Path) -> None:
    code, out, _ = call(project / "SITE.toml", "--examples", 1, "--set", "data.template=turns")
    assert code == 0 and "│ ### Assistant:\n│ ⟦bye</s>⟧" in out and "bank" not in out


def test_mistakes_are_one_line(call, project: Path) -> None:
    for arguments, words in (
        (["run.toml", "--client", "labb"], "labb asks for a client without data; did you mean 'lab'"),
        (["none.toml"], "none.toml: no such file"),
        (["run.toml", "--set", "data.template=no"], "data.template 'no' is unknown: expected auto, alpaca"),
        (["run.toml", "--set", f"model.path={project}/none"], "none"),
    ):
        code, out, err = call(project / arguments[0], *arguments[1:])
        assert (code, err.count("\n")) == (2, 1) and err.startswith("error: ") and words in err, err
