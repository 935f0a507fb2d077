"""Scores of a model on held-out examples."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedloom.errors import ConfigError
from fedloom.model.foreign import raise_in_one_line
from fedloom.model.tokens import IGNORED, TokenizedExamples


@dataclass(frozen=True, slots=True)
class Scores:
    """How well held-out examples are answered.

    exact_match: fraction of them that greedy decoding answers token for token, the end included. loss: mean over all
    completion tokens, in nats. tokens: how many these are; bytes: of the answers' text in UTF-8, 0 where it is not
    known. metrics: further scores of generated answers, from 0 to 1.
    """

    exact_match: float
    loss: float
    examples: int
    tokens: int = 0
    bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


def exact_match_and_loss(model: nn.Module, data: TokenizedExamples, batch_size: int = 64) -> Scores:
    """Score every example with one forward pass a batch.

    Greedy decoding gives the completion exactly if, with the completion given, every one of its tokens is the likeliest
    at its place: until the first error both see the same prefix. An example that was cut counts as wrong.
    """
    matches, loss, tokens = 0, 0.0, 0
    for whole, chosen, wanted, rows in _predictions(model, data, batch_size):
        right = torch.tensor(whole, device=chosen.device)
        right[rows[chosen.argmax(dim=-1) != wanted]] = False
        matches += int(right.sum())
        loss += float(functional.cross_entropy(chosen, wanted, reduction="none").double().sum())
        tokens += len(wanted)
    return Scores(matches / len(data), loss / tokens, len(data), tokens)


def mean_error(model: nn.Module, data: TokenizedExamples, bend: float = 1.0, batch_size: int = 64) -> float:
    """The mean over all completion tokens of 1 − p^bend, p the probability of the right one (from 0 to 1).

    This is the generalised cross-entropy times its exponent (Zhang & Sabuncu, NeurIPS 2018, arXiv 1805.07836), between
    1 − p at 1 and the logarithm towards 0. It is bounded, so that what a model cannot do at all counts about the same
    however sure it is of its errors: their logarithms would drown what it has learnt. The smaller the exponent, the
    better it tells one thousandth from one millionth.
    """
    total, tokens = 0.0, 0
    for _, chosen, wanted, _ in _predictions(model, data, batch_size):
        found = functional.cross_entropy(chosen, wanted, reduction="none").neg().exp()
        total += float((1.0 - found.double().pow(bend)).sum())
        tokens += len(wanted)
    return total / tokens


@torch.no_grad()
def _predictions(
    model: nn.Module, data: TokenizedExamples, batch_size: int
) -> Iterator[tuple[list[bool], Tensor, Tensor, Tensor]]:
    """Batch by batch: (which examples are whole, logits of all completion tokens, these tokens, their examples)."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(data)), key=lambda index: len(data[index].ids))
    for start in range(0, len(order), batch_size):
        examples = [data[index] for index in order[start : start + batch_size]]
        batch = {name: tensor.to(device) for name, tensor in data.collate(examples).items()}
        labels = batch.pop("labels")[:, 1:]
        counted = labels != IGNORED
        places = counted.any(dim=0).nonzero().squeeze(1)
        logits = model(**batch, logits_to_keep=places, use_cache=False).logits
        labels, counted = labels[:, places], counted[:, places]
        yield [one.whole for one in examples], logits[counted].float(), labels[counted], counted.nonzero()[:, 0]
    model.train(training)


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int = 8,
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Mapping[str, float]]:
    """Task → its metrics, by the lm-evaluation-harness.

    include_path: a folder with tasks of one's own (YAML); limit: examples of a task, at most; confirm_run_unsafe_code:
    whether tasks that execute what the model writes may do so. Raises ConfigError where the harness is not installed,
    does not know a task or fails at it.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("evaluation tasks need the lm-evaluation-harness: pip install 'fedloom[eval]'") from None
    failed = f"the lm-evaluation-harness cannot play {', '.join(tasks)}"
    with raise_in_one_line(ConfigError, failed), _kept_random_states(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the harness and what it loads warn of themselves
        known = TaskManager(include_path=None if include_path is None else str(include_path))
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=known,
            limit=limit,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )["results"]
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found.items()
    }


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """The harness seeds every generator of the process."""
    own, numpys = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(range(min(torch.cuda.device_count(), 1))):
        try:
            yield
        finally:
            random.setstate(own)
            numpy.random.set_state(numpys)
