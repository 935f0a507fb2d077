"""What is learnt of a conversation, held to what transformers says the assistant said, in five chat templates."""

from __future__ import annotations

import pytest
from chat_templates import MARKED, tokenizer_of

from fedloom.errors import DataError
from fedloom.model.examples import Example
from fedloom.model.limits import ModelLimits
from fedloom.model.tokens import IGNORED, TokenizedExamples, Tokens, tokenize
from fedloom.records.config import DataSettings
from fedloom.workspace.tokenized import tokenize_clients, tokenize_scored
from tiny_models import tokenizer

HISTORY = (("user", "1+1?"), ("assistant", "Two."), ("user", "sure?"), ("assistant", "Yes: user."))
TALK = Example("and 2?", "4", history=HISTORY, form="messages")
MESSAGES = [{"role": role, "content": text} for role, text in (*HISTORY, ("user", "and 2?"), ("assistant", "4"))]
LIMITS = ModelLimits(1000, None, False)


def learnt_tokens(tokens: Tokens) -> list[int]:
    return [int(label) for label in tokens.labels() if label != IGNORED]


@pytest.mark.parametrize("family", MARKED)
def test_every_turn_of_the_assistant_is_learnt_with_its_end(family: str) -> None:
    marked, made = tokenizer_of(family, marked=True), tokenizer_of(family)
    told = marked.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    (tokens,) = tokenize([TALK], made, "chat", 999, learnt="answers").examples
    wanted = [token for token, said in zip(told["input_ids"], told["assistant_masks"], strict=True) if said]
    found = learnt_tokens(tokens)
    # What closes the row stands outside the template's marks: a line break perhaps, and the end token once.
    assert found[: len(wanted)] == wanted
    tail = made.decode(found[len(wanted) :])
    assert tail.strip() in ("</s>", "") and found.count(2) == (3 if family == "llama2" else 1)
    assert made.decode(tokens.ids).count("<think>") == (family == "thinking")


@pytest.mark.parametrize("family", [*MARKED, "turns"])
def test_the_tokens_are_the_same_whatever_is_learnt(family: str) -> None:
    made, template = (tokenizer(chat=False), "turns") if family == "turns" else (tokenizer_of(family), "chat")
    last, every, all_of_it = (
        tokenize([TALK], made, template, 999, learnt=learnt)[0] for learnt in ("answer", "answers", "everything")
    )
    assert last.ids.tolist() == every.ids.tolist() == all_of_it.ids.tolist()
    assert last.prompt == every.prompt == all_of_it.prompt
    assert every.spans[-1:] == last.spans and len(every.spans) == 3
    assert all_of_it.spans == ((1, len(all_of_it.ids)),)


def test_turns_in_plain_text() -> None:
    made = tokenizer(chat=False)
    (tokens,) = tokenize([TALK], made, "auto", 999, learnt="answers").examples
    assert made.decode(tokens.ids) == (
        "### User:\n1+1?\n\n### Assistant:\nTwo.</s>\n\n### User:\nsure?\n\n### Assistant:\nYes: user.</s>\n\n"
        "### User:\nand 2?\n\n### Assistant:\n4</s>"
    )
    assert made.decode(learnt_tokens(tokens)) == "Two.</s>Yes: user.</s>4</s>"


def test_an_answer_that_a_template_tells_otherwise_later_is_not_guessed() -> None:
    made = tokenizer()
    made.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    with pytest.raises(DataError, match="client 1: .*changes earlier turns.*assistant_only_loss = false"):
        tokenize([TALK], made, "chat", 999, "client 1", "answers")
    assert len(tokenize([TALK], made, "chat", 999)) == 1


def test_a_conversation_that_is_cut_keeps_the_answers_that_fit() -> None:
    made = tokenizer(chat=False)
    (whole,) = tokenize([TALK], made, "turns", 999, learnt="answers").examples
    (first, second, _), length = whole.spans, whole.spans[1][0] + 2
    data = tokenize([TALK], made, "turns", length, learnt="answers")
    assert (data[0].spans, data[0].whole, data.cut, data.dropped) == ((first, (second[0], length)), False, 1, 0)
    with pytest.raises(DataError, match="no example has room"):
        tokenize([TALK], made, "turns", first[0], learnt="answers")


def settings(**keys: object) -> DataSettings:
    return DataSettings(template="turns", **keys)


def spans_under(**keys: object) -> tuple[int, TokenizedExamples]:
    held = {"lab": [TALK]}
    made = tokenizer(chat=False)
    trained = tokenize_clients(held, settings(**keys), made, LIMITS)["lab"]
    return len(trained[0].spans), tokenize_scored("held-out", held, settings(**keys), made, LIMITS)["lab"]


def test_settings_say_what_is_learnt_and_scores_stay_with_the_last_answer() -> None:
    scored = []
    for keys, count in (
        ({}, 1),
        ({"assistant_only_loss": True}, 3),
        ({"completion_only_loss": False}, 1),
        ({"completion_only_loss": False, "assistant_only_loss": True}, 3),
    ):
        found, heldout = spans_under(**keys)
        assert found == count, keys
        scored.append((heldout[0].spans, heldout[0].ids.tolist()))
    assert all(one == scored[0] for one in scored)
    made = tokenizer(chat=False)
    everything = tokenize_clients({"lab": [TALK]}, settings(completion_only_loss=False), made, LIMITS)["lab"][0]
    assert everything.spans == ((1, len(everything.ids)),)
