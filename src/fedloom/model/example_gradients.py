"""The gradient of every single example, of the factors that are trained.

PEFT computes A x and B (A x) with two linear maps. The gradient of such a map's weight for one example is the sum over
its tokens of (gradient of the output) ⊗ (input), both of which a backward pass over a whole batch has in hand: one pass
gives the gradients of all examples (Goodfellow, arXiv 1510.01799). That is right only where examples do not meet
inside the model and where a layer's input is (examples, tokens, features). Mixtures group the tokens of all examples by
expert, and factors of a parameter are no maps at all. So a model is tried out with two made-up examples; where their
gradients together are not those of each alone, examples go through it one at a time, which is right for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedloom.model import peft_bridge
from fedloom.model.tokens import IGNORED

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]
Gradients = dict[nn.Parameter, Tensor]
"""Parameter → (examples, *its shape), float32."""
AGREE = {True: 1e-3, False: 5e-2}
"""Float32? → difference of a made-up example's gradient with and without company, over its norm, that is rounding."""


class _MixedError(Exception):
    """The input of a layer does not tell one example from another."""


def mean_losses(model: nn.Module, inputs: Batch) -> Tensor:
    """(examples,): the mean loss over the tokens of each that are learnt."""
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits, targets = model(**rest).logits[:, :-1].float(), inputs["labels"][:, 1:]
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape).sum(1) / (targets != IGNORED).sum(1).clamp(min=1)


def one_by_one(model: nn.Module, inputs: Batch) -> Gradients:
    """The gradients of a batch's examples, each alone in the model."""
    trained = _trained(model)
    found: dict[nn.Parameter, list[Tensor]] = {parameter: [] for parameter in trained}
    for place in range(len(inputs["input_ids"])):
        alone = _without_padding({name: value[place : place + 1] for name, value in inputs.items()})
        for parameter in trained:
            parameter.grad = None
        mean_losses(model, alone).sum().backward()  # type: ignore[no-untyped-call]
        for parameter, held in found.items():
            held.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    for parameter in trained:
        parameter.grad = None
    return {parameter: torch.stack(held).float() for parameter, held in found.items()}


def all_at_once(model: peft.PeftModel, inputs: Batch) -> Gradients:
    """The same from one pass over the batch. Raises an error of its own where a layer mixes the examples."""
    examples, found = len(inputs["input_ids"]), Gradients()
    with _watched(model, examples, found):
        mean_losses(model, inputs).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in _trained(model):
        parameter.grad = None
        found.setdefault(parameter, torch.zeros(examples, *parameter.shape, device=parameter.device))
    return found


def choose_way(model: peft.PeftModel, pad: int) -> Callable[[peft.PeftModel, Batch], Gradients]:
    """`all_at_once` where it is right for this model, else `one_by_one`. Two made-up examples are tried."""
    if any(held.parameter for held in peft_bridge.lora_layers(model)):
        return one_by_one
    device, training = next(model.parameters()).device, model.training
    words = int(cast("PreTrainedModel", model.get_base_model()).config.get_text_config().vocab_size)
    ids = torch.randint(words, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:], ids[1, 8:] = 0, pad
    labels = torch.where(mask == 1, ids, IGNORED)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
    model.eval()  # dropout would differ
    try:
        together, alone = all_at_once(model, inputs), one_by_one(model, inputs)
    except _MixedError:
        return one_by_one
    finally:
        model.train(training)
    exact = model.dtype in (torch.float32, torch.float64)
    return all_at_once if _agree(together, alone, AGREE[exact]) else one_by_one


def squared_norms(gradients: Gradients) -> Tensor:
    """(examples,): the squared norm of all of an example's gradients together."""
    return torch.stack([held.flatten(1).square().sum(1) for held in gradients.values()]).sum(0)


def clipped_sums(gradients: Gradients, norm: float) -> Gradients:
    """The sum over examples of their gradients, scaled to this norm at most; what is not finite counts as 0."""
    sizes = squared_norms(gradients).sqrt()
    finite = sizes.isfinite()
    factors = torch.where(finite, norm / sizes.clamp(min=norm), 0.0)
    sums = Gradients()
    for parameter, held in gradients.items():
        if not bool(finite.all()):
            held[~finite] = 0.0  # 0 · NaN is NaN
        sums[parameter] = torch.einsum("e,e...->...", factors, held)
    return sums


def _agree(together: Gradients, alone: Gradients, most: float) -> bool:
    apart = {parameter: together[parameter] - held for parameter, held in alone.items()}
    return bool((squared_norms(apart).sqrt() <= most * squared_norms(alone).sqrt()).all())


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _without_padding(inputs: Batch) -> Batch:
    """One example without its padding, which is on the right."""
    length = int(inputs["attention_mask"].sum())
    return {name: value[:, :length] for name, value in inputs.items()}


@dataclass(frozen=True, eq=False, slots=True)
class _Map:
    """A linear map whose weight is trained: R where the weight is R V, with `rows` V; else the weight itself."""

    linear: nn.Linear
    parameter: nn.Parameter
    rows: Tensor | None


def _maps(model: peft.PeftModel) -> Iterator[_Map]:
    for linear, rows in peft_bridge.factor_maps(model):
        parameter = linear.weight if rows is None else linear.parametrizations.weight.original  # type: ignore[union-attr]
        if parameter.requires_grad:
            yield _Map(linear, cast(nn.Parameter, parameter), rows)


@contextmanager
def _watched(model: peft.PeftModel, examples: int, found: Gradients) -> Iterator[None]:
    """While it lasts, backward passes put the examples' gradients into `found`. Recomputed activations change nothing:
    the gradient reaches the outputs of the first pass alone.
    """

    def note(held: _Map, module: nn.Module, args: Sequence[Tensor], output: Tensor) -> None:
        given = args[0].detach()
        if given.dim() != 3 or len(given) != examples:
            raise _MixedError
        if output.requires_grad:
            output.register_hook(partial(add, held, given))  # type: ignore[no-untyped-call]

    def add(held: _Map, given: Tensor, gradient: Tensor) -> None:
        given = given.float() if held.rows is None else given.float() @ held.rows.float().T
        own = torch.einsum("etm,etn->emn", gradient.float(), given)
        found[held.parameter] = found[held.parameter] + own if held.parameter in found else own

    hooks = [held.linear.register_forward_hook(partial(note, held)) for held in _maps(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
