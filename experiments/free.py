"""Free generation: what the front's runs write where no answer is the only one, by its likeness to the reference.

The runs of a front are scored by the loss, which needs one pass; generating takes as long as a tenth of a run. So it is
done of complete runs, once for each adapter. chrF asks for the reference's letters above all, ROUGE-L as much for
nothing else: a model that never ends an answer does well by the one and badly by the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import fedloom
from experiments.front import Entry
from fedloom.report.numbers import interval
from fedloom.studies.compare import FINISHED, Trial

METRICS = {"chrf": "chrF %", "rouge_l": "ROUGE-L %"}
"""Metric → how a table calls it."""
FREE = {"wordnet": "wordnet/heldout/gloss.jsonl"}
"""Testbed → the held-out examples whose answers are free text; those of its settings where it is not named."""
_LONGEST = 32  # tokens of an answer; of wordnet's meanings 94 % are no longer
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Scores:
    """Metric → per cent, by the digest of an adapter's file; kept in `path`, so that nothing is generated twice."""

    path: Path
    known: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Scores:
        """What is in the file; nothing where there is none."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})

    def of(self, run: Path, data: Path | None, *, with_adapter: bool = True) -> dict[str, float]:
        """The scores of a run's adapter, or of its base model alone."""
        key = sha256((run / "adapter" / _WEIGHTS).read_bytes()).hexdigest() if with_adapter else "base"
        if key not in self.known:
            found = fedloom.evaluate(
                run,
                data=data,
                metrics=list(METRICS),
                with_adapter=with_adapter,
                settings={"evaluation.max_new_tokens": _LONGEST},
            )
            self.known[key] = {metric: 100 * found.scores[metric]["mean"] for metric in METRICS}
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
    base = scores.of(found[0][1][0].folder, data, with_adapter=False)
    table = [_row("the base", [base], [])]
    dense: Mapping[int, Mapping[str, float]] = {}
    for variant, runs in found:
        own = {run.seed: scores.of(run.folder, data) for run in runs}
        dense = dense or own
        table.append(_row(variant, list(own.values()), [(own[seed], dense[seed]) for seed in own if seed in dense]))
    return table


def _row(
    variant: str,
    own: Sequence[Mapping[str, float]],
    pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
) -> dict[str, str]:
    row = {"run": variant, "seeds": str(len(pairs)) if pairs else "–"}
    for metric, title in METRICS.items():
        row[title] = spread([one[metric] for one in own], "")
        more = [one[metric] - dense[metric] for one, dense in pairs]
        row[f"{title.removesuffix(' %')} against dense FedIT"] = spread(more, "+") if more else "–"
    return row


def spread(values: Sequence[float], sign: str) -> str:
    """Mean and 95 % interval, one digit; the mean alone of a single value."""
    mean, half = interval(values)
    return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")
