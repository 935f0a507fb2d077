"""A head on the learnt tokens alone: the same loss and the same step, and models whose loss is their own keep it."""

from __future__ import annotations

import pytest
import torch
from test_training import SGD, changed, client, resident, update
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedloom.lora.pair import LoraState, digest
from fedloom.model import head, peft_bridge, training
from fedloom.model.head import learnt_alone, narrow_head
from fedloom.model.packing import training_rows, without_mask
from fedloom.model.tokens import IGNORED, TokenizedExamples
from fedloom.workspace.tokenized import pack_examples
from tiny_models import MODELS, llama, placed


class OwnLoss(LlamaForCausalLM):
    """Its loss is of the probabilities, and takes no targets but its own."""

    def forward(self, input_ids=None, labels=None, **others):
        others.pop("shift_labels", None)
        found = super().forward(input_ids=input_ids, **others)
        if labels is None:
            return found
        chosen = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        right = found.logits.softmax(-1).gather(-1, chosen.clamp(min=0)[..., None])[..., 0]
        return CausalLMOutputWithPast(loss=1.0 - right[chosen != IGNORED].mean(), logits=found.logits)


def own_loss() -> tuple[torch.nn.Module, LoraState]:
    plain = llama()
    base = OwnLoss(plain.config)
    base.load_state_dict(plain.state_dict())
    adapter = placed(base.eval(), r=4, lora_alpha=12)
    return peft_bridge.attach(base, adapter), resident()[1]


def rows_seen(model: torch.nn.Module, data: TokenizedExamples) -> tuple[int, int, int]:
    """(positions in a batch of all rows, learnt tokens of it, positions that the head saw of it)."""
    rows = training_rows(data)
    batch = rows.collate([rows[place] for place in range(len(rows))])
    part, seen = model.get_base_model().get_output_embeddings(), []
    hook = part.register_forward_hook(lambda _, given, output: seen.append(output.shape[:-1].numel()))
    with learnt_alone(narrow_head(model), without_mask(batch)) as fed:
        model(**fed)
    hook.remove()
    return batch["labels"].numel(), int((batch["labels"] != IGNORED).sum()), seen[-1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_what_it_is_with_all_logits(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack_examples(client(count=8), 32) if packed else client(count=8)
    settings = changed(SGD, per_device_train_batch_size=data.num_rows)
    model, state = resident(name)
    positions, learnt, seen = rows_seen(model, data)
    assert seen == learnt < positions
    narrow, stats = update(model, state, data, settings)
    monkeypatch.setattr(training, "narrow_head", lambda _: None)
    whole, unchanged = update(model, state, data, settings)
    assert stats.loss == pytest.approx(unchanged.loss, rel=1e-5) and stats.tokens == unchanged.tokens
    for module, pair in whole.items():
        torch.testing.assert_close(narrow[module].A, pair.A, atol=2e-6, rtol=0)
        torch.testing.assert_close(narrow[module].B, pair.B, atol=2e-6, rtol=0)


def test_an_adapter_on_the_head_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    base = MODELS["qwen2"]()
    adapter = placed(base, r=4, lora_alpha=12, target_modules=["q_proj", "lm_head"])
    model, data = peft_bridge.attach(base, adapter), client(count=8)
    state = peft_bridge.read_adapter(model)
    assert rows_seen(model, data)[1] == rows_seen(model, data)[2]
    narrow, _ = update(model, state, data, SGD)
    monkeypatch.setattr(training, "narrow_head", lambda _: None)
    whole, _ = update(model, state, data, SGD)
    moved = whole["lm_head"].B - state["lm_head"].B
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(narrow["lm_head"].B, whole["lm_head"].B, atol=2e-6, rtol=0)


def test_a_loss_of_a_models_own_sees_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = own_loss()
    data = client(count=8)
    assert narrow_head(model) is None and narrow_head(resident()[0]) is not None
    positions, learnt, seen = rows_seen(model, data)
    assert seen == positions > learnt
    before, stats = update(model, state, data, SGD)
    monkeypatch.setattr(training, "narrow_head", lambda _: None)
    assert digest(update(model, state, data, SGD)[0]) == digest(before)
    assert 0.0 < stats.loss < 1.0


def test_a_model_is_tried_once_and_nothing_stays_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, real = [], head._loses_nothing
    monkeypatch.setattr(head, "_loses_nothing", lambda *given: tried.append(given) or real(*given))
    model, state = resident()
    for _ in range(3):
        update(model, state, client(), changed(SGD, max_steps=2))
    part = model.get_base_model().get_output_embeddings()
    assert len(tried) == 1 and not part._forward_pre_hooks and not model.training

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    stopped = model.get_base_model().model.norm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        update(model, state, client(), SGD)
    stopped.remove()
    assert not part._forward_pre_hooks
