"""[evaluation]: what held-out answers are scored by, and which score decides."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from fedloom.records.quantities import Name, Text
from fedloom.records.sections.section import Section

MOST_METRICS = 16
MOST_TASKS = 1024
Metrics: TypeAlias = Annotated[tuple[Name, ...], Field(strict=False, max_length=MOST_METRICS)]

Tasks: TypeAlias = Annotated[tuple[Name, ...], Field(strict=False, max_length=MOST_TASKS)]


class EvaluationSettings(Section):
    """What held-out answers are scored by. Exact match and the loss, which need no generation, are always taken."""

    metrics: Metrics = Field(
        (),
        description="Scores of freely generated answers, beside exact match and loss: chrf, rouge_l, token_f1, or your "
        'own function as "package.module:function" (texts of predictions, texts of references → a score from 0 to 1 '
        "for each). Every evaluation then generates an answer to every held-out example.",
        examples=[["chrf"]],
    )
    metric: Name = Field(
        "auto",
        description="Score that decides where a setting is chosen, as by `fedloom tune`: exact_match, loss, or one of "
        "evaluation.metrics; auto is exact match where it tells the trials apart, otherwise the loss.",
    )
    max_new_tokens: int = Field(128, ge=1, le=2**16, description="Tokens of a generated answer, at most.")
    batch_size: int = Field(64, ge=1, le=2**16, description="Held-out examples in a forward pass.")
    tasks: Tasks = Field(
        (),
        description="Tasks of the lm-evaluation-harness that `fedloom evaluate` plays where its --tasks is left out; a "
        "run itself plays none.",
        examples=[["gsm8k"]],
    )
    include_path: Text | None = Field(
        None, description="Folder with harness tasks of your own (YAML).", examples=["./tasks"]
    )
