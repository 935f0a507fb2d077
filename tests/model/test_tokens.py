"""Templates, the boundary between prompt and completion, and which tokens count."""

from __future__ import annotations

import pytest
import torch

from fedloom.errors import ConfigError, DataError
from fedloom.model.examples import Example
from fedloom.model.templates import TEMPLATES
from fedloom.model.tokens import IGNORED, tokenize
from tiny_models import tokenizer

TOKENIZER = tokenizer()
PLAIN = Example("Add.", "3")
PAIRED = Example("Add.", "3", "1 2")
TURNS = Example("and 2?", "4", history=(("system", "Be brief."), ("user", "1?"), ("assistant", "2")))


def text(example: Example, template: str) -> tuple[str, str]:
    return TEMPLATES[template].text(example, TOKENIZER)


def test_the_texts() -> None:
    assert text(PLAIN, "plain") == ("Add.\n", "3")
    assert text(PAIRED, "plain") == ("Add.\n1 2\n", "3")
    assert text(PLAIN, "raw") == ("Add.", "3")
    assert text(PLAIN, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n",
        "3",
    )
    assert text(PAIRED, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "3",
    )
    assert text(Example("{instruction} {0}", "%s"), "alpaca")[0].count("{instruction} {0}") == 1
    assert text(PAIRED, "chat") == ("<s><user>\nAdd.\n1 2</s>\n<assistant>\n", "3")
    prompt = "<s><system>\nBe brief.</s>\n<user>\n1?</s>\n<assistant>\n2</s>\n<user>\nand 2?</s>\n<assistant>\n"
    assert text(TURNS, "chat") == (prompt, "4")


def test_templates_without_a_place() -> None:
    for template in ("alpaca", "plain", "raw"):
        with pytest.raises(DataError, match='client 1: .*template = "chat"'):
            tokenize([TURNS], TOKENIZER, template, 99, "client 1")
    with pytest.raises(DataError, match="no chat template"):
        tokenize([PLAIN], tokenizer(chat=False), "chat", 99)
    with pytest.raises(ConfigError, match="'vicuna' is unknown: expected auto, alpaca, chat, turns, plain, raw"):
        tokenize([PLAIN], TOKENIZER, "vicuna", 99)


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_completion_and_one_end(template: str) -> None:
    (tokens,) = tokenize([PAIRED], TOKENIZER, template, 999).examples
    prompt, completion = text(PAIRED, template)
    assert TOKENIZER.decode(tokens.ids[: tokens.prompt]) == prompt
    assert TOKENIZER.decode(tokens.ids[tokens.prompt :]) == completion + "</s>"
    assert (tokens.ids[tokens.prompt :] == 2).sum() == 1


def test_the_boundary_is_where_generation_starts() -> None:
    """A tokenizer that merges across the boundary must not see both texts at once."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    made = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>")
    (tokens,) = tokenize([Example("a", "b")], made, "raw", 9).examples
    assert (tokens.ids.tolist(), tokens.prompt) == ([0, 1, 3], 1)


def test_labels_and_padding() -> None:
    data = tokenize([Example("ab", "c"), Example("a", "bcd")], TOKENIZER, "plain", 99)
    batch = data.collate([data[0], data[1]])
    a, b, c, d, line = (TOKENIZER.convert_tokens_to_ids(token) for token in "abcd\n")
    assert batch["input_ids"].tolist() == [[a, b, line, c, 2, 0], [a, line, b, c, d, 2]]
    assert batch["labels"].tolist() == [[IGNORED] * 3 + [c, 2, IGNORED], [IGNORED] * 2 + [b, c, d, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0], [1] * 6]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_padding_without_a_token_of_its_own_hides_no_end(pad: str | None) -> None:
    made, rows = tokenizer(), [Example("ab", "c"), Example("a", "bcd")]
    expected = tokenize(rows, made, "plain", 99)
    made.pad_token = pad
    data = tokenize(rows, made, "plain", 99)
    batch, usual = data.collate([data[0], data[1]]), expected.collate([expected[0], expected[1]])
    assert all(torch.equal(batch[key], usual[key]) for key in ("labels", "attention_mask"))
    assert (batch["labels"] == 2).sum() == 2


def test_what_is_too_long_is_counted() -> None:
    examples = [Example("x" * 4, "12"), Example("x" * 4, "123"), Example("x" * 7, "1"), Example("x" * 8, "1")]
    data = tokenize(examples, TOKENIZER, "plain", 8)
    assert (len(data), data.cut, data.dropped) == (3 - 1, 1, 2)
    assert [tokens.whole for tokens in data.examples] == [True, False]
    assert all(len(tokens.ids) == 8 for tokens in data.examples)
    with pytest.raises(DataError, match="bob: no example has room.*9 tokens long; raise data.max_length .now 8"):
        tokenize(examples[3:], TOKENIZER, "plain", 8, "bob")
    with pytest.raises(DataError, match="bob has no examples"):
        tokenize([], TOKENIZER, "plain", 8, "bob")


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(DataError, match="client 1: the tokenizer has no end-of-sequence token"):
        tokenize([PLAIN], made, "plain", 99, "client 1")


def test_an_empty_prompt_still_has_a_start() -> None:
    (tokens,) = tokenize([Example("", "a")], TOKENIZER, "raw", 8).examples
    assert (tokens.ids[0].item(), tokens.prompt) == (1, 1)


def test_an_empty_completion_teaches_to_stop() -> None:
    (tokens,) = tokenize([Example("a", "")], TOKENIZER, "raw", 8).examples
    assert tokens.ids[tokens.prompt :].tolist() == [2]
