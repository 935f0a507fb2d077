"""The head of a model card: what the Hub reads of it, in YAML, as `huggingface_hub` writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.report.measures import Measure

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
UNKNOWN = "unknown"
_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0
gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0
pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(_LICENSES.split())
"""What the Hub takes as `license`; any other name stands as `license_name` beside "other"."""


@dataclass(frozen=True, slots=True)
class Score:
    """One number of a card. spread: half-width of its 95 % interval over seeds, 0 where there is one seed."""

    measure: Measure
    value: float
    spread: float = 0.0


def hub_name(path: str) -> str | None:
    """owner/name, where the base model came from the Hub: by that name, or as a folder of its cache."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return path if HUB.fullmatch(path) and not Path(path).exists() else None


def write_header(
    title: str,
    base: str | None,
    *,
    tags: Sequence[str] = (),
    scores: Iterable[Score] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The metadata between its two lines of dashes. base: the base model's name on the Hub, None where it has none.

    A licence that nobody named is "unknown", which the Hub takes. datasets: names on the Hub; it would refuse others,
    which are left out.
    """
    from huggingface_hub import ModelCardData

    results = [_result(score) for score in scores if math.isfinite(score.value)]
    own = license in LICENSES if license else True
    data = ModelCardData(
        base_model=base,
        datasets=[name for name in datasets if HUB.fullmatch(name)] or None,
        library_name="peft",
        license=(license or UNKNOWN) if own else "other",
        license_name=None if own else license,
        model_name=title if results else None,
        eval_results=results or None,
        pipeline_tag="text-generation",
        tags=[*([f"base_model:adapter:{base}"] if base else []), "lora", "federated-learning", "fedloom", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _result(score: Score) -> EvalResult:
    """One row of the model index. The data set is named as what it is: examples that the federation held out."""
    from huggingface_hub import EvalResult

    args = {"interval_95": round(score.spread, 6)} if score.spread else None
    return EvalResult(
        task_type="text-generation",
        dataset_type="federation-heldout",
        dataset_name="held-out examples of the federation",
        dataset_split="test",
        metric_type=score.measure.key,
        metric_name=score.measure.name,
        metric_value=round(score.value, 6),
        metric_args=args,
    )
