"""Base models of strangers: sizes that cannot be, templates that do not end, and what libraries raise."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import fedloom
from fedloom.adapters.settings import save_adapter
from fedloom.errors import DataError, FedloomError, ModelError, NumericError
from fedloom.model.base import empty_base, load_base
from fedloom.model.chat import LONGEST_TEMPLATE
from fedloom.model.examples import Example
from fedloom.model.foreign import LONGEST, MOST_STEPS, limit_steps, raise_in_one_line
from fedloom.model.templates import TEMPLATES
from fedloom.model.tokens import tokenize
from fedloom.records.configfile import load_config
from fedloom.workspace.assemble import load_setup as set_up
from tiny_models import CHAT, llama, tokenizer

TESTBED = Path(fedloom.__file__).parent / "testbeds"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "base"))


def change(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 10**400},
        {"num_hidden_layers": -(10**7)},
        {"hidden_size": 2**62},
        {"text_config": {"num_hidden_layers": 10**7}},
        {"list": [{"n_layer": 10**9}]},
        {"num_hidden_layers": 900, "num_experts": 900},
    ],
)
def test_numbers_that_no_model_has_are_refused_before_anything_is_built(folder: Path, keys: dict[str, object]) -> None:
    change(folder, **keys)
    for load in (load_base, empty_base):
        with pytest.raises(ModelError, match="expected at most") as caught:
            load(folder)
        assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [{"intermediate_size": 10**7}, {"vocab_size": 10**9}, {"num_hidden_layers": 200}])
def test_a_model_larger_than_its_files_is_refused(folder: Path, keys: dict[str, object]) -> None:
    change(folder, **keys)
    with pytest.raises(ModelError, match="describes .* parameters, and its files of weights have .* bytes"):
        load_base(folder)


def test_nested_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ModelError, match="nested too deeply"):
        load_base(folder)


def test_a_base_config_with_infinity_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"rope_theta": Infinity}')
    with pytest.raises(ModelError, match="Infinity is not a JSON number"):
        load_base(folder)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", f"{MOST_STEPS:,} steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 10 ** 10 ** 10 }}", "powers"),
        ("{{ 'x' * 10000000000 }}", "the number 10000000000"),
        ("{{ 'x' * 1_000_000_000_000 }}", "the number 1_000_000_000_000"),
        ("{{ 'x' * 0xffffffffff }}", "the number 0xffffffffff"),
        (
            "{% set n = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "builds a text",
        ),
        (
            "{% macro grow(x, k) %}{% set y = x ~ x %}{% if k %}{{ grow(y, k - 1) }}{% endif %}{% endmacro %}"
            "{{ grow('abcdefgh', 60) }}",
            "builds a text",
        ),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ range(10 * 1000000) }}", "range"),
        ("{% if %}", "[Ee]xpected"),
        ("{{ missing.field.field }}", "undefined"),
        ("{{ raise_exception('no\\x1b[2J roles') }}", r"no\\x1b\[2J roles"),
        ("x" * (LONGEST_TEMPLATE + 1), "characters"),
    ],
)
def test_a_chat_template_that_harms_is_one_line(template: str, reason: str) -> None:
    made = tokenizer()
    made.chat_template = template
    with pytest.raises(DataError, match=reason) as caught:
        tokenize([Example("add", "3")], made, "chat", 64, "client 'lab'")
    text = str(caught.value)
    assert text.startswith("client 'lab': the tokenizer's chat template cannot be used: ") and text.isprintable()
    assert sys.gettrace() is None or not text


def test_a_long_conversation_in_a_plain_template_is_rendered() -> None:
    made = tokenizer()
    turns = tuple(("user" if k % 2 else "assistant", "words " * 50) for k in range(500))
    prompt, answer = TEMPLATES["chat"].text(Example("add", "three", "x" * (2 * LONGEST), history=turns), made)
    assert prompt.count("words") == 25_000 and answer == "three" and made.chat_template == CHAT


class Panic(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize("error", [Panic("index\nout of\x1b bounds"), MemoryError(), RecursionError("deep"), OSError()])
def test_whatever_a_library_raises_becomes_one_line(error: BaseException) -> None:
    with pytest.raises(ModelError) as caught, raise_in_one_line(ModelError, "m"):
        raise error
    assert str(caught.value).startswith("m: ") and str(caught.value).isprintable() and len(str(caught.value)) > 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, DataError])
def test_interrupts_and_own_errors_pass(error: type[BaseException]) -> None:
    with pytest.raises(error), raise_in_one_line(ModelError, "m"):
        raise error


def test_a_tokenizer_that_panics_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer()

    def panics(*_: object, **__: object) -> None:
        raise Panic("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(type(made), "__call__", panics)
    with pytest.raises(FedloomError, match="client 'lab': the tokenizer fails: called"):
        tokenize([Example("add", "3")], made, "plain", 64, "client 'lab'")


def test_steps_of_other_files_are_free_and_the_trace_is_put_back() -> None:
    before = sys.gettrace()
    with limit_steps("<elsewhere>", 0):
        assert sum(1 for _ in "ab") == 2 and sum(range(MOST_STEPS * 2)) > 0
    assert sys.gettrace() is before
    code = compile("while True:\n    x = 1", "<here>", "exec")
    with pytest.raises(NumericError, match="steps"), limit_steps("<here>", 0):
        exec(code)
    assert sys.gettrace() is before


def test_a_start_on_another_base_is_noted(tmp_path: Path) -> None:
    first = set_up(load_config(TESTBED / "demo.toml", []))
    assert not [note for note in first.warnings() if "trained on" in note]
    save_adapter(first.initial, "some/other-base", first.adapter.settings, tmp_path)
    again = set_up(load_config(TESTBED / "demo.toml", [f"model.adapter={tmp_path}"]))
    notes = [note for note in again.warnings() if "trained on some/other-base" in note]
    assert len(notes) == 1 and again.config.model.path in notes[0]
