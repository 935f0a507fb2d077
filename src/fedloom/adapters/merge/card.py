"""The model card of a merged adapter: what went in, by number, and what the merge cost. Folders are not named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedloom.adapters.base_identity import common_digest
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.folders import Inputs, MergedModule
from fedloom.adapters.merge.table import build_record
from fedloom.report.card_header import hub_name, write_header
from fedloom.report.card_words import LIMITS, license_note, loading, made_by, quote, table


def merge_card(inputs: Inputs, recipe: Recipe, rows: Sequence[MergedModule]) -> str:
    """The whole file."""
    names, digest = inputs.base_models, common_digest(inputs.adapters)
    hub = hub_name(names[0]) if len(names) == 1 else None
    base = hub or (Path(names[0]).name if len(names) == 1 else "") or "a base model"
    total = build_record(inputs, recipe, rows)["total"]
    title = f"LoRA adapter on {quote(base)}, merged from {len(inputs.adapters)}"
    facts = {
        "base model": quote(base) + (f", weights of digest `{digest}`" if digest else ", weights not known by digest"),
        "method": quote(recipe.method),
        "adapter": f"rank {max((row.rank for row in rows), default=0)} at most, on {len(rows)} modules",
        "error": f"{total['error']:.3g} of ‖Σ p ΔW‖, so that {100 * total['kept_energy']:.4g} % of its energy is kept",
    }
    parts = "".join(
        f"| adapter {number} | {share:.4g} | {max(adapter.settings.r, *adapter.settings.rank_pattern.values(), 1)} "
        f"| {len(adapter.modules)} |\n"
        for number, (adapter, share) in enumerate(zip(inputs.adapters, inputs.shares, strict=True), start=1)
    )
    return "\n".join(
        [
            f"{write_header(title.replace('`', ''), hub, tags=['merge'])}\n# {title}\n",
            f"Made with {made_by()}: ΔW is the weighted mean of those of the adapters below.\n",
            table(facts),
            f"## What went in\n\n| | weight | rank | modules |\n| --- | ---: | ---: | ---: |\n{parts}",
            "## Scores\n\nNothing was scored: a merge sees no data.\n",
            "## Privacy\n\nNothing is known here of how the adapters were trained, and so no ε is claimed.\n",
            loading(hub),
            f"## Limits\n\n{LIMITS}{license_note(None)}",
        ]
    )
