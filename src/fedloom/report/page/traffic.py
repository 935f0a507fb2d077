"""What was sent: by direction, round, client, part of the payload; against dense FedIT; and what it takes in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedloom.records.ledger import Totals
from fedloom.records.text import to_printable
from fedloom.report.facts import LINES, human_seconds
from fedloom.report.measures import TRAINING_LOSS, list_measures
from fedloom.report.numbers import MEAN, Report, human_bytes
from fedloom.report.page.charts import Axis, Chart, Series, number
from fedloom.report.page.model import Block, Section, Table
from fedloom.report.page.run import Variant
from fedloom.report.prediction import ComparedRow
from fedloom.report.sampling import MOST, sample, say_sampled
from fedloom.report.tables import cost_sentence

MOST_BARS = 40
"""Clients with a bar of their own: the first by name, the others in one bar."""
_SIZE = Axis("bytes", "bytes", low=0)


def describe_traffic(report: Report, compared: Sequence[ComparedRow]) -> Section:
    """Charts and tables of one run's bytes."""
    blocks: list[Block] = [*_rounds(report), _clients(report), _parts(report), *_regions(report)]
    blocks += [_client_table(report), *_predicted(compared), *_durations(report), _round_table(report)]
    return Section("bytes", "Bytes", blocks, cost_sentence(report))


def _rounds(report: Report) -> list[Block]:
    """Up and down by round, on the mean over rounds where there are many."""
    rounds = sample(list(report.totals.by_round.items()))
    series = [
        Series(name, [(round, sizes[way]) for round, sizes in rounds], way)
        for way, name in enumerate(("up, from clients", "down, to clients"))
    ]
    note = say_sampled("rounds", len(report.totals.by_round))
    return [Chart("bytes-rounds", "lines", "Bytes by round", Axis("round", whole=True), _SIZE, series, note)]


def _clients(report: Report) -> Chart:
    """Up and down by client."""
    held = list(report.totals.by_client.items())
    rows = [(to_printable(client), sizes) for client, sizes in held[:MOST_BARS]]
    rest = [sizes for _, sizes in held[MOST_BARS:]]
    if rest:
        rows.append((f"{len(rest):,} others", (sum(up for up, _ in rest), sum(down for _, down in rest))))
    names = [name for name, _ in rows]
    series = [
        Series(name, [(sizes[way], place) for place, (_, sizes) in enumerate(rows)], way)
        for way, name in enumerate(("up, from clients", "down, to clients"))
    ]
    return Chart("bytes-clients", "bars", "Bytes by client", _SIZE, Axis("client", names=names), series)


def _parts(report: Report) -> Chart:
    """What payloads spend their bytes on."""
    parts = sorted(report.totals.by_part.items(), key=lambda part: -part[1])
    series = [Series("bytes", [(size, place) for place, (_, size) in enumerate(parts)], 2)]
    names = [to_printable(part) for part, _ in parts]
    return Chart("bytes-parts", "bars", "Bytes by part of the payload", _SIZE, Axis("part", names=names), series)


def _regions(report: Report) -> list[Block]:
    regions = list(report.totals.by_region.items())
    rows = [(region, human_bytes(up), human_bytes(down)) for region, (up, down) in regions[:MOST]]
    head = ("region", "up", "down")
    return [Table("regions", "Between regional servers and the root", head, rows)] if rows else []


def _client_table(report: Report) -> Table:
    examples, sums = report.facts.examples, report.totals
    lines = [
        (client, examples.get(client, 0), len(report.losses.get(client, [])), up, down, report.delivered.get(client, 0))
        for client, (up, down) in list(sums.by_client.items())[:MOST]
    ]
    given = sum(report.delivered.values())
    lines.append(("all", sum(examples.values()), report.turns, sums.bytes_up, sums.bytes_down, given))
    rows = [
        (
            client,
            f"{held:,}" if held else "–",
            str(turns),
            *(human_bytes(size) for size in (up, down - given, given, up + down)),
        )
        for client, held, turns, up, down, given in lines
    ]
    head = ("client", "examples", "turns", "up", "down", "delivery", "in all")
    note = say_sampled("clients", len(sums.by_client), "by name")
    return Table("clients", "Bytes sent, by client", head, rows, note, total=True)


def _predicted(compared: Sequence[ComparedRow]) -> list[Block]:
    """What `fedloom estimate` said of the run, beside what came."""
    if not compared:
        return []
    rows = [
        (
            row.what,
            *(human_bytes(v) if row.unit == "bytes" else human_seconds(v) for v in (row.predicted, row.measured)),
            "–" if row.ratio is None else f"{100 * (row.ratio - 1):+.1f} %",
        )
        for row in compared
    ]
    head = ("", "predicted", "measured", "difference")
    note = "Up to the last round that was played. The prediction was made before the first, from shapes and settings."
    return [Table("predicted", "Predicted beside measured", head, rows, note)]


def _durations(report: Report) -> list[Block]:
    """What the bytes mean on a line, in time: of one turn on the mean, and of the whole run of the busiest client."""
    turns, clients = report.turns, report.totals.by_client
    if not turns or not clients:
        return []
    most = max(up + down for up, down in clients.values())
    sizes = (report.totals.bytes_up / turns, report.totals.bytes_down / turns, most)
    rows = [(line, *(human_seconds(8 * size / speed) for size in sizes)) for line, speed in LINES.items()]
    head = ("a line of", "up, a turn", "down, a turn", "a client's whole run, at most")
    return [Table("lines", "Time that the bytes take", head, rows, "Payloads alone, at the full speed.")]


def _round_table(report: Report) -> Table:
    """Bytes by round, beside them the mean of every measure, or the training loss where nothing was held out."""
    measures = list_measures([report]) or [TRAINING_LOSS]
    points = {point.round: point for point in (report.points or report.training)}
    rows = [
        (
            str(round),
            human_bytes(up),
            human_bytes(down),
            *(
                m.show(points[round].values.get(m.key, {}).get(MEAN, float("nan"))) if round in points else "–"
                for m in measures
            ),
        )
        for round, (up, down) in sample(list(report.totals.by_round.items()))
    ]
    head = ("round", "up", "down", *(measure.title for measure in measures))
    note = say_sampled("rounds", len(report.totals.by_round))
    return Table("rounds", "Bytes sent, by round", head, rows, note, folded=True)


def compare_traffic(variants: Sequence[Variant]) -> Section:
    """The bytes of several variants side by side, on the mean over seeds."""

    def bars(name: str, sizes: Sequence[float], slot: int) -> Series:
        return Series(name, [(number(size), place) for place, size in enumerate(sizes)], slot)

    def mean(variant: Variant, read: Callable[[Totals], int]) -> float:
        return sum(read(report.totals) for report in variant.reports) / len(variant.runs)

    names = [variant.name for variant in variants]
    ways = [
        bars("up, from clients", [mean(variant, lambda t: t.bytes_up) for variant in variants], 0),
        bars("down, to clients", [mean(variant, lambda t: t.bytes_down) for variant in variants], 1),
    ]
    parts = dict.fromkeys(part for variant in variants for r in variant.reports for part in r.totals.by_part)
    spent = [
        bars(to_printable(part), [mean(variant, lambda t, p=part: t.by_part.get(p, 0)) for variant in variants], slot)  # type: ignore[misc]
        for slot, part in enumerate(parts)
    ]
    axis = Axis("run", names=names)
    return Section(
        "bytes",
        "Bytes",
        [
            Chart("bytes-ways", "bars", "Bytes by direction", _SIZE, axis, ways),
            Chart("bytes-parts", "bars", "Bytes by part of the payload", _SIZE, axis, spent),
        ],
        "Of a whole run, on the mean over seeds.",
    )
