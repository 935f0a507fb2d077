"""Scores agree with greedy generation, example by example."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_training import dense_loss, double, resident

from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, initial_state
from fedloom.model import peft_bridge
from fedloom.model.evaluate import exact_match_and_loss, lm_eval_tasks, mean_error
from fedloom.model.examples import Example
from fedloom.model.tokens import TokenizedExamples, tokenize
from fedloom.model.training import local_update
from fedloom.records.config import TrainingSettings
from tiny_models import MODELS, llama, placed, tokenizer

EXAMPLES = [Example(f"{'ab'[i % 2] * (1 + i % 3)}{i}?", "xy"[i % 2] * (1 + i % 3)) for i in range(24)]


def generated(model: torch.nn.Module, data: TokenizedExamples) -> list[bool]:
    """Whether greedy decoding, one example at a time, gives each completion and then ends."""
    matches = []
    for tokens in data.examples:
        prompt, wanted = tokens.ids[None, : tokens.prompt].long(), tokens.ids[tokens.prompt :].long()
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(wanted),
            do_sample=False,
            pad_token_id=0,
        )
        matches.append(torch.equal(out[0, tokens.prompt :], wanted))
    return matches


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_greedy_generation(name: str) -> None:
    model, drawn = resident(name)
    state = initial_state(drawn.shapes(), drawn.ranks(), 0)
    data = tokenize(EXAMPLES, tokenizer(), "plain", 32)
    settings = TrainingSettings(learning_rate=1e-2, max_steps=20, per_device_train_batch_size=24)
    state, _ = local_update(model, state, LoraState(), data, settings, round=1, num_rounds=1, seed=0)
    peft_bridge.write_adapter(model, state)
    matches = generated(model, data)
    assert 0 < sum(matches) < len(matches), "a half-trained model, so that both outcomes occur"
    for batch_size in (1, 5, 64):
        scores = exact_match_and_loss(model, data, batch_size)
        assert scores.exact_match == sum(matches) / len(matches)
        assert scores.loss == pytest.approx(dense_loss(name, data, double(state)).item(), rel=1e-5)
        assert scores.examples == len(matches)


@torch.no_grad()
@pytest.mark.parametrize("bend", [1.0, 0.2])
def test_the_error_is_bounded_and_counts_token_by_token(bend: float) -> None:
    model, _ = resident("llama")
    data = tokenize(EXAMPLES[:7], tokenizer(), "plain", 32)
    errors: list[float] = []
    for tokens in data.examples:
        odds = model(input_ids=tokens.ids[None].long()).logits[0].double().softmax(dim=-1)
        errors += [1.0 - float(odds[at - 1, tokens.ids[at]]) ** bend for at in range(tokens.prompt, len(tokens.ids))]
    for batch_size in (1, 3, 64):
        assert mean_error(model, data, bend, batch_size) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_a_completion_that_was_cut_is_no_match() -> None:
    model, state = resident()
    peft_bridge.write_adapter(model, state)
    whole = tokenize([Example("ab", "c" * 9)], tokenizer(), "plain", 32)
    cut = tokenize([Example("ab", "c" * 9)], tokenizer(), "plain", 5)
    likeliest = model(input_ids=whole.collate([whole[0]])["input_ids"]).logits.argmax(-1)[0]
    right = tokenize([Example("ab", tokenizer().decode(likeliest[2:3]))], tokenizer(), "plain", 4)
    assert cut.cut == 1 and exact_match_and_loss(model, cut).exact_match == 0
    assert right.cut == 1 and exact_match_and_loss(model, right).exact_match == 0
    uncut = TokenizedExamples(tuple(type(t)(t.ids, t.prompt, True) for t in right.examples), right.pad)
    assert exact_match_and_loss(model, uncut).exact_match == 1


def test_mode_and_gradients_are_left_alone() -> None:
    model, _ = resident()
    data = tokenize(EXAMPLES, tokenizer(), "plain", 32)
    for training in (True, False):
        model.train(training)
        exact_match_and_loss(model, data)
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_scoring() -> None:
    model, state = resident()
    peft_bridge.configure(model, placed(llama(), r=4, lora_alpha=12, lora_dropout=0.5))
    peft_bridge.write_adapter(model, state)
    data = tokenize(EXAMPLES, tokenizer(), "plain", 32)
    model.train()
    assert exact_match_and_loss(model, data) == exact_match_and_loss(model, data)


def test_tasks_are_handed_to_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    }
    made["lm_eval.models.huggingface"].HFLM = lambda pretrained, tokenizer, batch_size: (pretrained, batch_size)
    made["lm_eval.tasks"].TaskManager = lambda include_path: ("tasks of", include_path)
    asked = []

    def play(**given: object) -> dict[str, object]:
        random.seed(0)
        unsafe = given["confirm_run_unsafe_code"]
        asked.append((given["model"][1], given["tasks"], given["task_manager"], given["limit"], unsafe))
        return {"results": {"arc": {"alias": "arc", "acc,none": 0.5}}}

    made["lm_eval"].simple_evaluate = play
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    before, model = random.getstate(), resident()[0]
    assert lm_eval_tasks(model, tokenizer(), ("arc",)) == {"arc": {"acc,none": 0.5}}
    lm_eval_tasks(model, tokenizer(), ["arc"], 4, include_path=Path("mine"), limit=3, confirm_run_unsafe_code=True)
    assert asked == [(8, ["arc"], ("tasks of", None), None, False), (4, ["arc"], ("tasks of", "mine"), 3, True)]
    assert random.getstate() == before


def test_tasks_need_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedloom\[eval\]'"):
        lm_eval_tasks(resident()[0], tokenizer(), ["arc_easy"])
