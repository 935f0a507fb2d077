"""Metrics of generated answers: generated is what greedy decoding gives, and own functions are held to [0, 1]."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import resident

from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, initial_state
from fedloom.model import peft_bridge
from fedloom.model.examples import Example
from fedloom.model.generation import generate_answers, reference_texts
from fedloom.model.metrics import find_metrics
from fedloom.model.scorer import build_scorer
from fedloom.model.tokens import tokenize
from fedloom.model.training import local_update
from fedloom.records.config import EvaluationSettings, TrainingSettings
from tiny_models import tokenizer

EXAMPLES = [Example(f"{'ab'[i % 2] * (1 + i % 3)}{i}?", "xy"[i % 2] * (1 + i % 3)) for i in range(12)]
WORDS = st.lists(st.sampled_from(["cat", "Dog", "fish", "9"]), max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def trained():
    """A half-trained model, which answers some examples and not others, and its examples."""
    model, drawn = resident("llama")
    data = tokenize(EXAMPLES, tokenizer(), "plain", 32)
    state = initial_state(drawn.shapes(), drawn.ranks(), 0)
    settings = TrainingSettings(learning_rate=1e-2, max_steps=20, per_device_train_batch_size=12)
    state, _ = local_update(model, state, LoraState(), data, settings, round=1, num_rounds=1, seed=0)
    peft_bridge.write_adapter(model, state)
    return model, data


def test_answers_are_those_of_greedy_decoding_one_at_a_time_whatever_the_batch(trained):
    model, data = trained
    wanted = []
    for tokens in data.examples:
        ids = tokens.ids[None, : tokens.prompt].long()
        for _ in range(7):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer().eos_token_id:
                break
        wanted.append(tokenizer().decode(ids[0, tokens.prompt :], skip_special_tokens=True))
    for batch_size in (1, 5, 64):
        assert generate_answers(model, tokenizer(), data, 7, batch_size) == wanted
    assert reference_texts(tokenizer(), data) == tuple(example.output for example in EXAMPLES)
    assert len(set(wanted)) > 2


def test_a_model_s_own_habits_of_generation_do_not_count_and_stay(trained):
    model, data = trained
    plain, inner = generate_answers(model, tokenizer(), data, 7), model.get_base_model()
    before = inner.generation_config
    inner.generation_config = type(before)(repetition_penalty=9.0, do_sample=True, temperature=7.0, max_length=1)
    try:
        held = inner.generation_config
        model.train()
        assert generate_answers(model, tokenizer(), data, 7) == plain
        assert inner.generation_config is held and model.training
    finally:
        inner.generation_config = before
        model.eval()


def test_an_answer_never_runs_over_the_last_position(trained):
    model, _ = trained
    data = tokenize([Example("a" * 250, "b"), Example("a" * 300, "b")], tokenizer(), "plain", 400)
    near, beyond = generate_answers(model, tokenizer(), data, 50, 1)  # 256 positions, of which prompts take 251 and 301
    assert len(near) <= 5 and beyond == ""


def test_a_scorer_knows_the_bytes_of_the_answers_and_takes_metrics_of_what_is_generated(trained):
    model, data = trained
    odd = tokenize([Example("a", "xéx")], tokenizer(), "plain", 32)  # é is no token of this tokenizer
    scorer = build_scorer({"lab": data, "odd": odd}, tokenizer(), EvaluationSettings(metrics=("token_f1",)))
    scores = scorer.score(model)
    assert scores["lab"].bytes == sum(len(example.output) for example in EXAMPLES)
    assert scores["lab"].tokens == scores["lab"].bytes + len(EXAMPLES)  # one token a character, and the end of each
    said = generate_answers(model, tokenizer(), data, 128)
    whole = [float(text == example.output) for text, example in zip(said, EXAMPLES, strict=True)]
    assert scores["lab"].metrics["token_f1"] == sum(whole) / len(whole)  # one word each: all of it, or nothing
    assert build_scorer({"lab": data}, tokenizer(), EvaluationSettings()).score(model)["lab"].metrics == {}


def test_where_nothing_is_held_out_no_metric_is_looked_for():
    settings = EvaluationSettings(metrics=("nowhere:function",))
    assert build_scorer({}, tokenizer(), settings).score(None) == {}


@given(WORDS, WORDS)
def test_token_f1_is_symmetric_bounded_and_1_for_the_same_words(one, other):
    f1 = find_metrics(["token_f1"])["token_f1"]
    forth, back, same = f1([one, other, one], [other, one, f"{one.upper()}!"])
    assert forth == back and 0 <= forth <= 1 and same == 1
    assert (forth > 0) == bool(set(one.lower().split()) & set(other.lower().split())) or one == other == ""


@pytest.mark.parametrize(
    ("name", "library"), [("chrf", "sacrebleu.metrics.chrf"), ("rouge_l", "rouge_score.rouge_scorer")]
)
def test_a_metric_of_a_library_is_that_of_the_library_and_says_what_to_install(name, library, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, library, None)
        with pytest.raises(ConfigError, match=r"pip install 'fedloom\[eval\]'"):
            find_metrics([name])
    pytest.importorskip(library)
    same, none, part = find_metrics([name])[name](
        ["the cat sat", "xyz", "the cat"], ["the cat sat", "the cat", "the cat sat"]
    )
    assert same == pytest.approx(1) and none == 0 and 0.5 < part < 1


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module of the user's."""
    (tmp_path / "myscores.py").write_text(
        "def length(predictions, references):\n"
        "    return [1.0 if len(p) == len(r) else 0 for p, r in zip(predictions, references)]\n"
        "def big(predictions, references):\n    return [2.0] * len(predictions)\n"
        "def few(predictions, references):\n    return [0.5]\n"
        "def none(predictions, references):\n    return [float('nan')] * len(predictions)\n"
        "def broken(predictions, references):\n    return predictions[99]\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("myscores", None)


def test_a_function_of_one_s_own_is_a_metric(outside):
    metric = find_metrics(["exact_match", "loss", "myscores:length"])
    assert list(metric) == ["myscores:length"]
    assert metric["myscores:length"](["ab", "c"], ["xy", "zz"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bleu", r"has 'bleu': expected chrf, rouge_l, token_f1, or a function"),
        ("my scores:length", r"expected \"package\.module:function\""),
        ("nowhere.at_all:length", r"there is no module 'nowhere'.*PYTHONPATH"),
        ("myscores:width", r"module myscores has no function 'width'"),
        ("myscores:number", r"no function 'number'"),
        ("myscores:big", r"gave 2\.0: expected scores from 0 to 1"),
        ("myscores:none", r"gave nan: expected scores from 0 to 1"),
        ("myscores:few", r"gave 1 scores for 2 answers"),
        ("myscores:broken", r"failed: IndexError"),
    ],
)
def test_a_wrong_metric_is_told_in_one_line(outside, name, message):
    with pytest.raises(ConfigError, match=message):
        find_metrics([name])[name](["a", "b"], ["a", "b"])
