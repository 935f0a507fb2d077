"""All held-out examples of a run, and what a model scores on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedloom.model.evaluate import Scores, exact_match_and_loss
from fedloom.model.generation import generate_answers, reference_texts
from fedloom.model.metrics import Metric, find_metrics, mean_of
from fedloom.model.tokens import TokenizedExamples
from fedloom.records.config import EvaluationSettings
from fedloom.records.ledger import Evaluation


@dataclass(frozen=True, eq=False, slots=True)
class Scorer:
    """domain → its examples in tokens, and the texts of their answers; metrics are taken of generated answers."""

    data: Mapping[str, TokenizedExamples] = field(default_factory=dict)
    answers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    settings: EvaluationSettings = EvaluationSettings()

    def score(self, model: nn.Module) -> dict[str, Scores]:
        """Every domain's scores. Nothing is generated unless a metric asks for it."""
        return {domain: self._score(model, domain) for domain in self.data}

    def _score(self, model: nn.Module, domain: str) -> Scores:
        data, answers, settings = self.data[domain], self.answers[domain], self.settings
        scores = exact_match_and_loss(model, data, settings.batch_size)
        size = sum(len(answer.encode("utf-8", "replace")) for answer in answers)
        given: dict[str, float] = {}
        if self.metrics and self.tokenizer is not None:
            said = generate_answers(model, self.tokenizer, data, settings.max_new_tokens, settings.batch_size)
            given = {name: mean_of(metric(said, answers)) for name, metric in self.metrics.items()}
        return replace(scores, bytes=size, metrics=given)


def build_scorer(
    heldout: Mapping[str, TokenizedExamples], tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings
) -> Scorer:
    """Raises ConfigError for a metric that there is not. Where nothing is held out, no metric is looked for.

    So a site, which scores nothing, imports nothing that a run names.
    """
    return Scorer(
        data=heldout,
        answers={domain: reference_texts(tokenizer, data) for domain, data in heldout.items()},
        metrics=find_metrics(settings.metrics) if heldout else {},
        tokenizer=tokenizer,
        settings=settings,
    )


def evaluation_row(round: int, domain: str, scores: Scores) -> Evaluation:
    """One domain's scores as the ledger has them."""
    return Evaluation(
        round,
        domain,
        scores.exact_match,
        scores.loss,
        examples=scores.examples,
        tokens=scores.tokens,
        bytes=scores.bytes,
        metrics=scores.metrics,
    )
