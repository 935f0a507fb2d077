"""README.md of an adapter folder: what a stranger should know who finds the adapter on a model hub.

It may be published, so it names no site, no domain, no path and no time unless the settings say so: sites are numbered
in the order of their examples, so that nothing in a number follows from a name. The run's own folder has all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.records.config import Config
from fedloom.report.answers import Answers
from fedloom.report.card_header import Score, hub_name, write_header
from fedloom.report.card_privacy import describe_privacy
from fedloom.report.card_words import LIMITS, license_note, loading, made_by, quote, table
from fedloom.report.measures import Measure, order_measures
from fedloom.report.numbers import MEAN, Point, Report, human_bytes, interval
from fedloom.report.progress import Progress

MOST_SITES = 50
"""Sites that have a row of their own."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says beside the settings. rank: the largest of the adapter's; digest: of the base model's weights.

    round: after which this is the model. progress: what the ledger tells, None where there is none, as at a site.
    examples: site → examples, as it said. peers: finished runs of the same settings, one a seed, this one among them.
    """

    rank: int
    digest: str = ""
    round: int = 0
    progress: Progress | None = None
    examples: Mapping[str, int] = field(default_factory=dict)
    peers: Sequence[Report] = ()


def model_card(config: Config, facts: CardFacts) -> str:
    """The whole file: a header in YAML that the Hub reads, and text in Markdown."""
    hub, output = hub_name(config.model.path), config.output
    base = hub or Path(config.model.path).name
    points = facts.progress.points if facts.progress else ()
    scores = _final_scores(points, facts)
    title = f"LoRA adapter on {quote(base)}, trained in a federation"
    header = write_header(title.replace("`", ""), hub, scores=scores, license=output.license, datasets=output.datasets)
    return "\n".join(
        [
            f"{header}\n# {title}\n",
            _intro(facts),
            table(_rows(config, facts, base)),
            _sites(config, facts),
            _scores(config, facts, points, scores),
            describe_privacy(config),
            loading(hub),
            f"## Limits\n\n{LIMITS}{license_note(output.license)}",
        ]
    )


def _intro(facts: CardFacts) -> str:
    if facts.progress is None:
        return f"A site of a federation received this adapter, made with {made_by()}.\n"
    count = len(facts.progress.run.clients)
    return (
        f"{count} {'site' if count == 1 else 'sites'} trained this adapter together with {made_by()}. Their examples "
        "stayed with them: what they sent is counted below, byte for byte.\n"
    )


def _rows(config: Config, facts: CardFacts, base: str) -> dict[str, str]:
    lora, training, method = config.lora, config.training, config.method
    modules = "all linear modules" if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    count = training.max_steps
    steps = f"{count} {'step' if count == 1 else 'steps'}" if count else f"{training.num_train_epochs:g} epochs"
    settings = ", ".join(f"{key} = {value}" for key, value in method.settings.items())
    run = facts.progress.run if facts.progress else None
    rows = {
        "base model": quote(base) + (f", weights of digest `{facts.digest}`" if facts.digest else ""),
        "method": quote(run.method if run else method.name) + (f" with {quote(settings)}" if settings else ""),
        "rounds": _rounds(config, facts),
        "adapter": f"rank {facts.rank}, alpha {lora.lora_alpha:g} in training, on {quote(modules)}",
        "training": f"{steps} a client and round in batches of {training.batch}, {quote(training.optim)}, peak "
        f"learning rate {training.learning_rate:g}, {training.lr_scheduler_type}",
    }
    held = [count for count in facts.examples.values() if count]
    if held:
        rows["examples"] = f"{sum(held):,} in all, {min(held):,} to {max(held):,} a client"
    if facts.progress:
        up, down = human_bytes(facts.progress.bytes_up), human_bytes(facts.progress.bytes_down)
        rows["sent"] = f"{up} up and {down} down, all clients and rounds until then"
    return {**rows, "values on the wire": quote(config.wire.values), "seed": str(config.federation.seed)}


def _rounds(config: Config, facts: CardFacts) -> str:
    if facts.progress is None:
        return str(facts.round or config.federation.num_rounds)
    played = facts.progress.run.num_rounds
    return f"{played}" if facts.round in (0, played) else f"{played}; this is the model after round {facts.round}"


def _sites(config: Config, facts: CardFacts) -> str:
    """A row a site, under a number unless the settings allow names. The order is that of what stands in the row."""
    if facts.progress is None:
        return ""
    answers, sent = facts.progress.answers.counts(), facts.progress.sent
    rows = [
        (facts.examples.get(name, 0), answers.get(name, Answers()), sent.get(name, [0, 0]), name)
        for name in facts.progress.run.clients
    ]
    rows.sort(key=lambda row: (-row[0], -row[1].answered, row[1].missed, [-size for size in row[2]]))
    named = config.output.name_sites
    lines = [
        f"| {quote(name) if named else f'site {number}'} | {examples or '–'} | {answer.answered} | {answer.missed} "
        f"| {human_bytes(up)} | {human_bytes(down)} |\n"
        for number, (examples, answer, (up, down), name) in enumerate(rows[:MOST_SITES], start=1)
    ]
    more = f"\nand {len(rows) - MOST_SITES:,} more with no more examples\n" if len(rows) > MOST_SITES else ""
    how = "" if named else "Sites have numbers in place of names, most examples first.\n\n"
    return (
        f"## Who took part\n\n{how}| | examples | rounds attended | missed | sent | received |\n"
        f"| --- | ---: | ---: | ---: | ---: | ---: |\n{''.join(lines)}{more}"
    )


def _final_scores(points: Sequence[Point], facts: CardFacts) -> list[Score]:
    """Every measure at the end, the leading one first: over the seeds that are known, or of this run alone."""
    if not points:
        return []
    found = []
    for measure in order_measures(points):
        values = [report.value(measure.key) for report in facts.peers] or [_mean(points[-1], measure)]
        found.append(Score(measure, *interval(values)))
    return found


def _scores(config: Config, facts: CardFacts, points: Sequence[Point], scores: Sequence[Score]) -> str:
    if not scores:
        return "## Scores\n\nNo held-out examples were scored.\n"
    domains = len(points[-1].scores) - 1
    sets = f"mean over {domains} sets" if domains > 1 else "one set"
    chosen = " The round was chosen on other examples, a validation split." if config.federation.validates else ""
    if chosen and config.data.validation == config.data.heldout:
        chosen = " The round was chosen on these very examples, so that the numbers are too good."
    seeds = len(facts.peers)
    over = (
        f"Means over {seeds} runs that differ in their seed alone, ± the half-width of a 95 % interval (Student's t); "
        "this adapter is of one of them."
        if seeds > 1
        else "One run of one seed: how far another seed would differ is not known from it."
    )
    rows = "".join(
        f"| {score.measure.title} | {score.measure.show(_before(score, points, facts))} | {_shown(score)} |\n"
        for score in scores
    )
    return (
        f"## Scores\n\nOn held-out examples, {sets}, of which nothing was trained on.{chosen} {over}\n\n"
        f"| | before | after |\n| --- | ---: | ---: |\n{rows}"
    )


def _before(score: Score, points: Sequence[Point], facts: CardFacts) -> float:
    key = score.measure.key
    return interval([report.value(key, at=0) for report in facts.peers] or [_mean(points[0], score.measure)])[0]


def _shown(score: Score) -> str:
    shown = score.measure.show(score.value)
    return f"{shown} ± {score.measure.show(score.spread)}" if score.spread else shown


def _mean(point: Point, measure: Measure) -> float:
    return point.values.get(measure.key, {}).get(MEAN, float("nan"))
