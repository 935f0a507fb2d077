"""Free generation: what the front's runs write where no answer is the only one, by its likeness to the reference.

The runs of a front are scored by the loss, which needs one pass; generating takes as long as a tenth of a run. So it is
done of complete runs, once for each adapter. chrF counts what of a reference is found more than what is written beside
it, ROUGE-L both alike: a model that never ends an answer does well by the one and badly by the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import fedloom
from experiments.front import Entry
from fedloom.model.identity import base_digest
from fedloom.report.measures import fraction
from fedloom.report.scores import over_seeds
from fedloom.studies.compare import FINISHED, Trial

METRICS = (fraction("chrf", "chrF"), fraction("rouge_l", "ROUGE-L"))
FREE = {"wordnet": "wordnet/heldout/gloss.jsonl"}
"""Testbed → the held-out examples whose answers are free text; those of its settings where it is not named."""
_LONGEST = 32  # tokens of an answer; of wordnet's meanings 94 % are no longer
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Scores:
    """Metric → score, by the digest of an adapter's file or of a base model.

    They are kept in `path`, so that nothing is generated twice.
    """

    path: Path
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Scores:
        """What is in the file; nothing where there is none."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def of(self, run: Trial, data: Path | None, *, with_adapter: bool = True) -> dict[str, float]:
        """The scores of a run's adapter, or of its base model alone."""
        weights = run.folder / "adapter" / _WEIGHTS
        key = sha256(weights.read_bytes()).hexdigest() if with_adapter else base_digest(run.config.model.path)
        if key not in self.known:
            found = fedloom.evaluate(
                run.folder,
                data=data,
                metrics=[metric.key for metric in METRICS],
                with_adapter=with_adapter,
                settings={"evaluation.max_new_tokens": _LONGEST},
            )
            self.known[key] = {metric.key: found.scores[metric.key]["mean"] for metric in METRICS}
            self.path.write_text(json.dumps(self.known, indent=1) + "\n", encoding="utf-8")
        return self.known[key]


def complete(made: Sequence[Entry]) -> list[tuple[str, list[Trial]]]:
    """(variant, its complete runs) of the entries that have one, each variant once."""
    by_variant = {entry.variant: [run for run in entry.made if (run.folder / FINISHED).exists()] for entry in made}
    return [(variant, runs) for variant, runs in by_variant.items() if runs]


def rows(found: Sequence[tuple[str, Sequence[Trial]]], scores: Scores, data: Path | None) -> list[dict[str, str]]:
    """A row a variant, the base model first: means over seeds, and differences to dense FedIT on equal seeds.

    found: dense FedIT first.
    """
    base = scores.of(found[0][1][0], data, with_adapter=False)
    table = [_row("the base", [base], [])]
    dense: Mapping[int, Mapping[str, float]] = {}
    for variant, runs in found:
        own = {run.seed: scores.of(run, data) for run in runs}
        dense = dense or own
        table.append(_row(variant, list(own.values()), [(own[seed], dense[seed]) for seed in own if seed in dense]))
    return table


def _row(
    variant: str,
    own: Sequence[Mapping[str, float]],
    pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> dict[str, str]:
    row = {"run": variant, "seeds": str(len(pairs)) if pairs else "–"}
    for metric in METRICS:
        row[f"{metric.name} %"] = over_seeds([one[metric.key] for one in own], metric)
        more = [one[metric.key] - dense[metric.key] for one, dense in pairs]
        row[f"{metric.name} against dense FedIT"] = over_seeds(more, metric, "+") if more else "–"
    return row
