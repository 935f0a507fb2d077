"""Which template an example takes, what is said about it, and what a tokenizer adds of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import tokenizer_of
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from fedloom.errors import ConfigError, DataError, ModelError
from fedloom.model.examples import to_example
from fedloom.model.limits import ModelLimits, check_readable, model_limits
from fedloom.model.templates import TEMPLATES
from fedloom.model.tokens import tokenize
from fedloom.records.config import DataSettings
from fedloom.workspace.tokenized import tokenize_clients, tokenize_scored
from tiny_models import MODELS, tokenizer

ROWS = {
    "instruction": {"instruction": "Add.", "output": "3"},
    "prompt": {"prompt": "Add.", "completion": "3"},
    "messages": {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "3"}]},
    "text": {"text": "Add: 3"},
}


def rendered(form: str, setting: str, made: PreTrainedTokenizerFast) -> tuple[str, str, tuple[str, ...]]:
    """(template taken, text as the model sees it, notes)."""
    data = tokenize([to_example(ROWS[form])], made, setting, 999)
    return data[0].template, made.decode(data[0].ids), data.notes


@pytest.mark.parametrize(
    ("form", "chat", "template"),
    [
        ("instruction", True, "alpaca"),
        ("prompt", True, "alpaca"),
        ("messages", True, "chat"),
        ("messages", False, "turns"),
        ("text", True, "raw"),
    ],
)
def test_auto_takes_a_template_by_the_form(form: str, chat: bool, template: str) -> None:
    made = tokenizer(chat=chat)
    taken, text, notes = rendered(form, "auto", made)
    assert taken == template
    assert text == rendered(form, template, made)[1]
    assert len(notes) == (form == "messages") and all(f'"{template}"' in note for note in notes)


def test_every_template_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rendering.md").read_text(encoding="utf-8")
    assert [name for name in TEMPLATES if f"`{name}`" not in page] == []


def test_conversations_take_the_chat_template_by_default_and_are_told_when_they_do_not() -> None:
    made = tokenizer()
    assert rendered("messages", "auto", made)[1] == "<s><user>\nAdd.</s>\n<assistant>\n3</s>"
    assert "does not use the chat template" in rendered("messages", "alpaca", made)[2][0]
    assert not rendered("messages", "chat", made)[2]
    assert not rendered("messages", "alpaca", tokenizer(chat=False))[2]
    assert not rendered("instruction", "plain", made)[2]


def test_text_is_learnt_as_it_is_from_its_first_token() -> None:
    (tokens,) = tokenize([to_example(ROWS["text"])], tokenizer(), "auto", 999).examples
    assert tokens.spans == ((1, len(tokens.ids)),)
    assert tokenizer().decode(tokens.ids) == "<s>Add: 3</s>"


def adding() -> PreTrainedTokenizerFast:
    """It puts its start token before every text, and its end token behind."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert made("a")["input_ids"][0] == 1 and made("a")["input_ids"][-1] == 2
    return made


class Slow(PreTrainedTokenizer):
    """Of the old kind, in Python, with start and end token around every text."""

    def __init__(self) -> None:
        self.core = tokenizer()
        super().__init__(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return len(self.core)

    def get_vocab(self) -> dict[str, int]:
        return self.core.get_vocab()

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.core.convert_tokens_to_ids(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.core.convert_ids_to_tokens(index)

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        return [1, *first, 2]


@pytest.mark.parametrize("make", [adding, Slow])
@pytest.mark.parametrize("template", ["alpaca", "plain", "raw", "turns"])
def test_no_end_token_stands_between_prompt_and_answer(make: type, template: str) -> None:
    data = tokenize(
        [to_example(ROWS["instruction"]), to_example({"prompt": "", "completion": "a"})], make(), template, 999
    )
    for tokens in data.examples:
        ids = tokens.ids.tolist()
        assert (ids.count(1), ids.count(2), ids[0], ids[-1]) == (1, 1, 1, 2)
    plain = tokenize([to_example(ROWS["instruction"])], tokenizer(), template, 999)[0]
    assert data[0].ids.tolist() == [1, *plain.ids.tolist()]
    assert data[0].prompt == plain.prompt + 1


def test_what_is_scored_has_the_tokens_that_are_trained_on() -> None:
    texts, limits = (
        {"lab": [to_example(ROWS[form]) for form in ("instruction", "prompt")]},
        ModelLimits(1000, None, False),
    )
    trained = tokenize_clients(texts, DataSettings(), adding(), limits)["lab"]
    scored = tokenize_scored("held-out", texts, DataSettings(), adding(), limits)["lab"]
    for one, other in zip(trained.examples, scored.examples, strict=True):
        assert (one.ids.tolist(), one.prompt) == (other.ids.tolist(), other.prompt)
        assert other.ids[: other.prompt].tolist().count(2) == 0


def test_a_template_that_takes_no_system_role_says_what_to_do() -> None:
    turns = [("system", "Be brief."), ("user", "Add."), ("assistant", "3")]
    row = to_example({"messages": [{"role": role, "content": text} for role, text in turns]})
    with pytest.raises(DataError, match='client 1: .*: System role not supported; .*data.template = "turns"'):
        tokenize([row], tokenizer_of("gemma"), "auto", 999, "client 1")
    assert len(tokenize([row], tokenizer_of("gemma"), "turns", 999)) == 1


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    made = tokenizer()
    rows = model_limits(MODELS["llama"]()).rows
    made.add_tokens([AddedToken("elephant")])
    data = tokenize([to_example({"prompt": "an elephant", "completion": "yes"})], made, "plain", 99)
    with pytest.raises(ModelError, match=f"client 1: .*token {rows}, .* {rows} rows, for tokens 0 to {rows - 1}: take"):
        check_readable(data, model_limits(MODELS["llama"]()), "client 1")
    assert check_readable(data, ModelLimits(rows + 1, None, False), "client 1") is data


def test_a_pad_token_beyond_the_model_is_not_asked_for() -> None:
    made = tokenizer()
    made.add_special_tokens({"pad_token": "<padding>"})
    data = tokenize([to_example(ROWS["instruction"])], made, "plain", 99)
    fitting = check_readable(data, model_limits(MODELS["gpt2"]()), "client 1")
    assert data.pad == model_limits(MODELS["gpt2"]()).rows and fitting.pad == 0


def test_more_tokens_than_positions_is_refused_where_there_is_a_table_and_noted_elsewhere() -> None:
    data = tokenize([to_example({"prompt": "a" * 300, "completion": "b"})], tokenizer(), "plain", 512)
    short = tokenize([to_example(ROWS["instruction"])], tokenizer(), "plain", 512)
    with pytest.raises(
        ConfigError, match="client 1 has an example of 303 tokens, .*256 positions: set data.max_length"
    ):
        check_readable(data, model_limits(MODELS["gpt2"]()), "client 1")
    assert check_readable(short, model_limits(MODELS["gpt2"]()), "client 1") is short
    (note,) = check_readable(data, model_limits(MODELS["llama"]()), "client 1").notes
    assert "longer than the 256 positions" in note and "data.max_length = 256" in note
