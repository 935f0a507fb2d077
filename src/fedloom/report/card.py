"""README.md of an adapter folder: what a stranger should know who finds the adapter on a model hub.

It may be published, so it names no client, no domain, no path and no time: numbers only. The run's own folder has all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedloom.records.config import Config
from fedloom.records.text import to_printable
from fedloom.report.numbers import MEAN, Report, human_bytes

HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says beside report and settings. rank: the largest of the adapter's.

    examples: of every client that trained, in any order, as it said. digest: of the base model's weights.
    """

    rank: int
    examples: Sequence[int]
    digest: str = ""


def model_card(report: Report, config: Config, facts: CardFacts) -> str:
    """The whole file: a header in YAML that the Hub reads, and text in Markdown."""
    hub = hub_name(config.model.path)
    header = {
        "base_model": hub,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [*([f"base_model:adapter:{hub}"] if hub else []), "lora", "federated-learning", "fedloom"],
    }
    base = hub or Path(config.model.path).name
    rows = "".join(f"| {key} | {value} |\n" for key, value in _rows(report, config, facts, base).items())
    return (
        f"---\n{_yaml(header)}---\n\n# LoRA adapter on {_quoted(base)}, trained in a federation\n\n"
        f"{len(facts.examples)} clients trained this adapter together with fedloom {version('fedloom')}. Their "
        "examples stayed with them: what they sent is counted below.\n\n"
        f"| | |\n| --- | --- |\n{rows}\n{_scores(report, config)}\n{_use(hub)}"
    )


def hub_name(path: str) -> str | None:
    """owner/name, where the base model came from the Hub: by that name, or as a folder of its cache."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return path if HUB.fullmatch(path) and not Path(path).exists() else None


def _rows(report: Report, config: Config, facts: CardFacts, base: str) -> dict[str, str]:
    run, lora, training, sums = report.run, config.lora, config.training, report.totals
    modules = "all linear modules" if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    steps = f"{training.max_steps} steps" if training.max_steps else f"{training.num_train_epochs:g} epochs"
    chosen = "" if report.exported in (None, run.num_rounds) else f"; this is the model after round {report.exported}"
    held = facts.examples
    return {
        "base model": _quoted(base) + (f", weights of digest `{facts.digest[:8]}`" if facts.digest else ""),
        "method": _quoted(run.method),
        "rounds": f"{run.num_rounds}{chosen}",
        "adapter": f"rank {facts.rank}, on {_quoted(modules)}",
        "training": f"{steps} a client and round in batches of {training.batch}, {_quoted(training.optim)}, peak "
        f"learning rate {training.learning_rate:g}",
        "examples": f"{sum(held):,} in all, {min(held, default=0):,} to {max(held, default=0):,} a client",
        "sent": f"{human_bytes(sums.bytes_up)} up and {human_bytes(sums.bytes_down)} down, all clients and rounds",
        "seed": str(run.seed),
    }


def _scores(report: Report, config: Config) -> str:
    if not report.points:
        return "No held-out examples were scored.\n"
    first, last = report.points[0], report.points[-1]
    sets = f"mean over {len(report.domains)} sets" if len(report.domains) > 1 else "one set"
    chosen = " The round was chosen on other examples, a validation split." if config.federation.validates else ""
    if chosen and config.data.validation == config.data.heldout:
        chosen = " The round was chosen on these very examples, so that the numbers are too good."
    return (
        f"Scores on held-out examples, {sets}, of which nothing was trained on.{chosen}\n\n"
        "| | before | after |\n| --- | --- | --- |\n"
        f"| exact match | {100 * first.scores[MEAN]:.1f} % | {100 * last.scores[MEAN]:.1f} % |\n"
        f"| loss | {first.losses[MEAN]:.3f} | {last.losses[MEAN]:.3f} |\n"
    )


def _use(hub: str | None) -> str:
    base = f'"{hub}"' if hub else '"folder/of/the/base/model"'
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")\n```\n'
    )


def _yaml(header: Mapping[str, object]) -> str:
    """Names and lists of names as YAML; what is not known is left out."""
    lines = []
    for key, value in header.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {item}" for item in value)]
        elif value:
            lines.append(f"{key}: {value}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A name as Markdown shows it, whatever is in it: it must end neither its cell nor its quotes."""
    return f"`{to_printable(text, 200).replace('`', '´').replace('|', '¦')}`"
