"""Scores of generated answers by name: chrF, ROUGE-L, token F1, or a function of the user's own.

A metric takes the texts of predictions and of references and gives one score from 0 to 1 for each pair. chrF and
ROUGE-L are those of sacrebleu and rouge-score, which the extra `eval` brings.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from fedloom.errors import ConfigError
from fedloom.methods.foreign import import_named
from fedloom.model.foreign import error_reason

Metric: TypeAlias = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
ALWAYS = ("exact_match", "loss")
"""Measures that need no generated answer; naming them among the metrics asks for nothing more."""


def find_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Name → metric. Raises ConfigError for a name that leads nowhere, and where a library is missing."""
    return {name: _find(name) for name in names if name not in ALWAYS}


def _find(name: str) -> Metric:
    if ":" in name:
        return _own_metric(name)
    if name not in METRICS:
        raise ConfigError(
            f"evaluation.metrics has {name!r}: expected {', '.join(METRICS)}, or a function of your own as "
            '"package.module:function"'
        )
    return METRICS[name]()


def _chrf() -> Metric:
    """Character n-gram F-score (Popović, 2015), with sacrebleu's defaults: n up to 6, β = 2."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise _missing("chrf", "sacrebleu") from None
    scorer = CHRF()
    return lambda predictions, references: [
        scorer.sentence_score(prediction, [reference]).score / 100
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def _rouge_l() -> Metric:
    """F-measure of the longest common subsequence of words (Lin, 2004), by rouge-score, without stemming."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing("rouge_l", "rouge-score") from None
    scorer = RougeScorer(["rougeL"])
    return lambda predictions, references: [
        float(scorer.score(reference, prediction)["rougeL"].fmeasure)
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def _missing(name: str, library: str) -> ConfigError:
    return ConfigError(f"the metric {name!r} needs {library}: pip install 'fedloom[eval]'")


def _token_f1() -> Metric:
    """F1 of the words that both have, as question answering is scored: in small letters, without punctuation."""
    return lambda predictions, references: [_word_f1(*pair) for pair in zip(predictions, references, strict=True)]


def _word_f1(prediction: str, reference: str) -> float:
    said, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, reference))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


METRICS: Mapping[str, Callable[[], Metric]] = {"chrf": _chrf, "rouge_l": _rouge_l, "token_f1": _token_f1}


def _own_metric(name: str) -> Metric:
    """The function "package.module:function", and around it a check of what it returns."""
    where = f"evaluation.metrics has {name!r}"
    path, _, attribute = name.partition(":")
    if not (attribute.isidentifier() and all(part.isidentifier() for part in path.split("."))):
        raise ConfigError(f'{where}: expected "package.module:function", such as "mypackage.scores:overlap"')
    function = getattr(import_named(path, where), attribute, None)
    if not callable(function):
        raise ConfigError(f"{where}, but module {path} has no function {attribute!r}")

    def score(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        try:
            given = [float(value) for value in function(list(predictions), list(references))]
        except Exception as error:  # whatever a user's function does
            raise ConfigError(f"{where}, which failed: {type(error).__name__}: {error_reason(error)}") from error
        if len(given) != len(predictions):
            raise ConfigError(
                f"{where}, which gave {len(given)} scores for {len(predictions)} answers: expected one each"
            )
        odd = next((value for value in given if not 0 <= value <= 1), None)
        if odd is not None:
            raise ConfigError(f"{where}, which gave {odd}: expected scores from 0 to 1, of which more is better")
        return given

    return score


def mean_of(scores: Sequence[float]) -> float:
    """Their mean, whatever their order."""
    return math.fsum(scores) / len(scores)
