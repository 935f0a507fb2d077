"""Logits of the tokens that are learnt, and of no others.

A model's head has a row for every word of its vocabulary. It is a tenth to a third of a small model, its logits are the
largest tensor of a training step, and most tokens of a batch stand in prompts or are padding, whose logits nobody asks
for. So the head is given the rows of the learnt tokens alone, and the model's own loss the targets that belong to them:
loss and gradients are what they were, but for the order in which they are summed up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedloom.model.settled import set_mode
from fedloom.model.tokens import IGNORED

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

PROBE = (2, 12)
"""Rows and tokens of the batch on which a model is tried; the first half of each row is its prompt."""
MOST_MOVED = {True: 1e-4, False: 2e-2}
"""Float32? → share of a loss that is rounding."""
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Base model → whether it can be trained so, once it was tried."""


@contextmanager
def learnt_alone(head: nn.Module | None, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A batch as the model takes it while `head` sees the learnt tokens alone; without a head the batch as it is.

    inputs: with labels, int64, (rows, tokens). The model has to hand `shift_labels` to transformers' loss for causal
    models: see `narrow_head`.
    """
    if head is None:
        yield inputs
        return
    targets = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    places = (targets != IGNORED).nonzero().squeeze(1)

    def choose(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = given
        return hidden.flatten(0, 1).index_select(0, places.to(hidden.device))[None], *others

    hook = head.register_forward_pre_hook(choose)
    try:
        yield {**inputs, "shift_labels": targets[places][None]}
    finally:
        hook.remove()


def narrow_head(model: peft.PeftModel) -> nn.Module | None:
    """The module whose input `learnt_alone` may narrow; None where the model's loss would not be the same.

    A model is tried once, on a made-up batch: some compute their loss in a way of their own.
    """
    base = cast("PreTrainedModel", model.get_base_model())
    head = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        return None
    if base not in _KNOWN:
        training = model.training
        set_mode(model, False)
        try:
            _KNOWN[base] = _loses_nothing(base, head)
        finally:
            set_mode(model, training)
    return head if _KNOWN[base] else None


@torch.no_grad()
def _loses_nothing(base: PreTrainedModel, head: nn.Module) -> bool:
    """Whether the loss of a made-up batch is the same with its head on the learnt tokens alone."""
    words = int(base.config.get_text_config().vocab_size)
    ids = torch.randint(words, PROBE, generator=torch.Generator().manual_seed(0)).to(base.device)
    labels = ids.clone()
    labels[:, : PROBE[1] // 2] = IGNORED
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    try:
        whole = base(**inputs, use_cache=False).loss.float()
        with learnt_alone(head, inputs) as narrowed:
            found = base(**narrowed, use_cache=False)
    except Exception:  # a loss of its own stumbles over what it does not know, each in its way
        return False
    exact = base.dtype in (torch.float32, torch.float64)
    narrow = found.logits.shape[:-1] == (1, PROBE[0] * PROBE[1] // 2)
    return narrow and bool((found.loss.float() - whole).abs() <= MOST_MOVED[exact] * whole.abs())
