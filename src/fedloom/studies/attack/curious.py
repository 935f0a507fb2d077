"""What an honest but curious server can read from one site's payload, method by method.

The server plays by the rules and looks at what it is sent. It knows the base model, the settings and its own state. The
site's payload is made by the same turn as in a run and decoded as the server decodes it, so that what a method
leaves out or rounds away is not there to be read. It is attacked in the second round, when B is no longer zero.

Text: in the worst case an update rests on one optimiser step on few examples (`examples`). The server is told how
many different tokens the batch has, and guesses which (`spans`). Chance is the same guess held against another site's
text: what anybody would say of that language.

Membership: of a turn as the settings have it, which examples was it trained on? Each is scored by how far the update
brings its loss down. AUC is the share of pairs, one trained on and one not, that are ordered rightly; 0.5 is a coin.
Both kinds are from the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, stack
from fedloom.methods.method import Entries, State
from fedloom.model.tokens import IGNORED, TokenizedExamples
from fedloom.records.config import Config
from fedloom.rounds.decoded import read_update
from fedloom.rounds.federation import Federation
from fedloom.rounds.geometry import find_change
from fedloom.studies.attack.readings import Reading
from fedloom.studies.attack.spans import best, read_inputs, rouge_1, standing_out, steps_of
from fedloom.studies.compare import apply_overrides
from fedloom.workspace.assemble import Setup, load_setup
from fedloom.workspace.clients import LocalClient

ROUND = 2
"""The round that is attacked: the first is an ordinary one of all sites that are looked at."""


@dataclass(frozen=True, eq=False, slots=True)
class Guess:
    """What was read of one site, and what was there. named, labels: tokens."""

    size: int
    named: list[int]
    text: list[int]
    labels: float


def read_variant(
    config: Config, variant: str, sets: Sequence[str], examples: Sequence[int], sites: int, say: Callable[[str], None]
) -> list[Reading]:
    """What can be read of the payloads of the first `sites` sites. Raises ConfigError for fewer than two of them.

    sets: what the variant sets over `config`. examples: for each number of them an update that rests on so many.
    """
    usual = load_setup(apply_overrides(config, [*sets, *_OVER]))
    names = list(usual.sites)[:sites]
    if len(names) < 2:
        raise ConfigError(f"--sites {sites}: expected 2 at least, since each is held against another one's text")
    federation = Federation(usual.job, usual.initial, {name: usual.sites[name].ranks for name in names})
    federation.round({name: usual.train(name) for name in names})
    member = fmean(_membership(usual, federation, name) for name in names)
    say(f"{variant}: membership {member:.3f}")
    found = []
    for count in examples:
        asked = [*sets, *_OVER, "training.max_steps=1", f"training.per_device_train_batch_size={count}"]
        single = load_setup(apply_overrides(config, [*asked, "training.gradient_accumulation_steps=1"]))
        guesses = [_guess(replace(single, job=federation.job), federation, name, count) for name in names]
        others = [*guesses[1:], guesses[0]]
        reading = Reading(
            variant,
            max(usual.initial.ranks().values()),
            config.training.optim,
            count,
            fmean(one.size for one in guesses),
            fmean(rouge_1(one.named, one.text) for one in guesses),
            fmean(rouge_1(one.named, other.text) for one, other in zip(guesses, others, strict=True)),
            fmean(one.labels for one in guesses),
            member,
        )
        found.append(reading)
        say(f"{variant}, {count} examples: {reading.text:.3f} of the text, {reading.chance:.3f} by chance")
    return found


_OVER = ("federation.eval_every=0", "output.answers=0", "local.workers=null", "local.devices=[]")


def _guess(setup: Setup, federation: Federation, name: str, count: int) -> Guess:
    """One step on the first examples of a site, and what its payload says of them."""
    held = setup.sites[name].data
    data = _first(held, count)
    sent, size = _overhear(_with_data(setup, name, data), federation, name)
    entries = setup.job.method.plain(sent)
    text = [int(token) for one in data.examples for token in one.ids]
    labels = {int(token) for one in data.examples for token in one.labels() if token != IGNORED}
    readers, writers = _ends(setup, federation.server)
    seen = torch.zeros(0)
    for module, inputs in readers.items():
        pair = federation.server.adapter[module]
        read = read_inputs(inputs, pair, steps_of(pair, entries, module, setup.job.method.updates))
        seen = read if not len(seen) else seen + read
    named = best(seen, len(set(text))) if len(seen) and seen.any() else []
    return Guess(size, named, text, _labels_named(setup, federation.server, entries, writers, labels))


def _labels_named(setup: Setup, state: State, entries: Entries, modules: Sequence[str], labels: set[int]) -> float:
    """Share of the labels among as many tokens that the steps of B at the end of the model point to."""
    model: Any = setup.model.get_base_model()
    weight = model.get_output_embeddings().weight.detach().float()
    seen = torch.zeros(len(weight))
    for module in modules:
        steps = steps_of(state.adapter[module], entries, module, setup.job.method.updates)
        if "B" in steps:
            seen += standing_out(steps["B"].T, weight)
    return len(labels & set(best(seen, len(labels)))) / len(labels) if seen.any() else 0.0


def _overhear(setup: Setup, federation: Federation, name: str) -> tuple[Entries, int]:
    """(what the server decodes of a site's turn, the bytes that it was); the site is as it was before."""
    kept, federation.number = federation.clients[name], ROUND
    payload = federation.client_turn(name, setup.train(name))
    federation.clients[name] = kept
    return read_update(payload, federation.server).entries, len(payload)


def _with_data(setup: Setup, name: str, data: TokenizedExamples) -> Setup:
    site = setup.sites[name]
    return replace(setup, sites={**setup.sites, name: LocalClient(site.adapter, data)})


def _first(data: TokenizedExamples, count: int, skip: int = 0) -> TokenizedExamples:
    return replace(data, examples=data.examples[skip : skip + count], rows=())


@contextmanager
def _watched(model: nn.Module, calls: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
    """Every adapted layer says its name, its input and its output of the last call."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            calls.append((name, given[0].detach(), made.detach()))

        return hook

    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _ends(setup: Setup, state: State) -> tuple[dict[str, Tensor], list[str]]:
    """(module that reads the first layer's input → what each token of the vocabulary is to it, modules that write to
    the residual stream last). Every token is shown alone.
    """
    model = setup.model_of(state).eval()
    size, width = model.get_input_embeddings().weight.shape
    pieces: dict[str, list[Tensor]] = {}
    writers: list[str] = []
    for tokens in torch.split(torch.arange(size), 1024):
        calls: list[tuple[str, Tensor, Tensor]] = []
        with _watched(model, calls):
            model(input_ids=tokens[:, None], use_cache=False, logits_to_keep=1)
        first = calls[0][1]
        for name, given, _ in calls:
            if given.shape == first.shape and given.equal(first):
                pieces.setdefault(_module(name, state.adapter), []).append(given[:, 0].float())
        writers = [_module(name, state.adapter) for name, _, made in calls if made.shape[-1] == width][-1:]
    return {module: torch.cat(parts) for module, parts in pieces.items()}, writers


def _module(name: str, adapter: LoraState) -> str:
    """The adapter's name of a layer of PEFT's model."""
    return next(module for module in adapter if name == module or name.endswith(f".{module}"))


def _membership(setup: Setup, federation: Federation, name: str) -> float:
    """AUC over a site's examples of one turn and as many that it was not trained on."""
    training = setup.config.training_of(name)
    held = setup.sites[name].data
    count = min(training.steps * training.batch, len(held) // 2)
    inside, outside = _first(held, count), _first(held, count, skip=count)
    entries, _ = _overhear(_with_data(setup, name, inside), federation, name)
    state = federation.server
    changed = replace(state, frozen=stack([state.frozen, find_change(setup.job.method, state, entries)]))
    fallen = []
    for data in (inside, outside):
        before, after = (_losses(setup.model_of(one), data) for one in (state, changed))
        fallen.append(before - after)
    return auc(*fallen)


def auc(inside: Tensor, outside: Tensor) -> float:
    """Share of the pairs in which the first is larger; ties count half."""
    pairs = inside[:, None] - outside[None, :]
    return float((pairs > 0).double().mean() + 0.5 * (pairs == 0).double().mean())


@torch.no_grad()
def _losses(model: nn.Module, data: TokenizedExamples, batch: int = 32) -> Tensor:
    """Mean loss of every example's answer."""
    model.eval()
    found = []
    for start in range(0, len(data), batch):
        fed = data.collate([data[i] for i in range(start, min(start + batch, len(data)))])
        labels = fed.pop("labels")[:, 1:]
        logits = model(**fed, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        found.append(losses.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp_min(1))
    return torch.cat(found).double()
