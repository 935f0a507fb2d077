"""`python -m experiments`: the runs behind a figure of the docs, and what they are made with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedloom.cli.funnel import Funnel, run_app
from fedloom.cli.options import Jobs, Set, split_words
from fedloom.cli.studies import play_all
from fedloom.errors import ConfigError
from fedloom.records.text import cell
from fedloom.testbeds import testbed_folder

if TYPE_CHECKING:
    from experiments.points import Point

app = typer.Typer(cls=Funnel, pretty_exceptions_enable=False, help="Experiments that make a figure of the docs.")
screen = Console()

TESTBEDS = Path(__file__).with_name("testbeds")
"""The real-text testbeds: settings, and what of their data and model is shipped."""


@app.callback()
def group() -> None:
    """Experiments that make a figure of the docs."""


@app.command()
def front(
    testbeds: Annotated[str, typer.Option(help="Testbeds: demo,many,wordnet,docstrings.")] = "demo,many",
    only: Annotated[
        str, typer.Option(help="Play the entries of these methods or budgets alone (loom,1%), and the references.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of every entry.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first; not one that settings were chosen with.")] = 300,
    jobs: Jobs = 1,
    sets: Set = None,
    keep: Annotated[
        Path, typer.Option(help="A front.csv: rows of it that are not made anew stay in the new one.")
    ] = Path("docs/front.csv"),
    out: Annotated[
        Path, typer.Option(help="Folder of the runs, table and picture; complete runs in it are kept.")
    ] = Path("runs/front"),
) -> None:
    """Score against bytes at several budgets, the variants of front.toml; a table, a CSV and a picture.

    Table and picture have every entry that is complete, played now or before.
    """
    from experiments import figures, front
    from experiments.points import above
    from fedloom.report import tables as table

    tried, names = range(first_seed, first_seed + seeds), split_words(testbeds)
    made = front.entries([testbed_folder(), TESTBEDS], names, tried, out, sets or [])
    play_all(front.distinct(front.selected(made, split_words(only))), jobs, front.kind)
    old = figures.read_csv(keep) if keep.exists() else []
    new = figures.merge(old, front.points(made), [entry.key for entry in made])
    merged = front.with_passes(new, made)
    found = [point for point in merged if point.testbed in names]
    leave(found, out, merged)
    for page in figures.pages(found):
        screen.print(table.comparison_table(page))
    for point in above(found):
        screen.print(cell(f"above loom at {point.budget} on {point.testbed}: {point.variant}"))


@app.command()
def work(
    figures: Annotated[Path, typer.Option(help="A front.csv.")] = Path("docs/front.csv"),
    out: Annotated[Path, typer.Option(help="Folder of the tables, CSV and pictures.")] = Path("runs/work"),
) -> None:
    """The rows of a front.csv with what a client's part in each takes, counted from settings; nothing is played."""
    from experiments import front
    from experiments.figures import read_csv

    kept = read_csv(figures)
    names = list(dict.fromkeys(point.testbed for point in kept))
    points = front.with_passes(kept, front.entries([testbed_folder(), TESTBEDS], names, range(1), out, []))
    out.mkdir(parents=True, exist_ok=True)
    leave(points, out)
    screen.print(cell(f"{len(points)} rows in {out}"))


@app.command()
def tune_real(
    testbed: Annotated[str, typer.Option(help="A testbed of front.toml.")] = "wordnet",
    rates: Annotated[str, typer.Option(help="Learning rates to try.")] = "1e-3,2e-3,4e-3,8e-3",
    only: Annotated[str, typer.Option(help="Entries of these methods or budgets alone: loom,1%.")] = "",
    methods: Annotated[
        list[str] | None, typer.Option(help="Variants in place of front.toml's; see fedloom compare.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of a run; the testbed's if left out.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of every rate.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first; not one that final scores are taken with.")] = 100,
    jobs: Jobs = 1,
    sets: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; complete runs in it are kept.")] = Path(
        "runs/tune-real"
    ),
) -> None:
    """The learning rate of every entry of front.toml, or of other variants, tried on the validation split; a table in
    Markdown.
    """
    from experiments import front, tuning
    from fedloom.report import tables as table
    from fedloom.studies.compare import parse_variants

    short = [] if rounds is None else [f"federation.num_rounds={rounds}"]
    bed = front.read_bed(testbed, [testbed_folder(), TESTBEDS], [*short, *(sets or [])])
    tried = range(first_seed, first_seed + seeds)
    variants = tuning.listed(bed, split_words(only), parse_variants(methods or []))
    made = tuning.searches(bed.config, variants, split_words(rates), tried, out / testbed)
    play_all([run for search in made for run in search.made], jobs, lambda run: testbed)
    found = table.to_markdown(tuning.rows(made))
    (out / f"{testbed}.md").write_text(found, encoding="utf-8")
    print(found)


@app.command()
def sending(
    testbeds: Annotated[str, typer.Option(help="Testbeds of front.toml.")] = "demo,many,wordnet,docstrings",
    sets: Set = None,
) -> None:
    """What it takes to send the data once instead, compressed or coded by the base model: lines of the picture.

    A testbed is weighed again only after its base model has changed.
    """
    from experiments import front
    from experiments.sending import read_sending, weigh, write_sending

    found = read_sending()
    for name in split_words(testbeds):
        bed = front.read_bed(name, [testbed_folder(), TESTBEDS], sets or [])
        found[name] = weigh(bed.config, found.get(name))
        told = found[name]
        screen.print(cell(f"{name}: xz {told.xz:,.0f} B a client, coded {told.coded:,.0f} B, {told.clients} clients"))
        write_sending(found)


@app.command()
def free(
    testbed: Annotated[str, typer.Option(help="A testbed of front.toml.")] = "wordnet",
    only: Annotated[str, typer.Option(help="Entries of these methods or budgets alone: loom,1%.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of every entry.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The first.")] = 300,
    out: Annotated[Path, typer.Option(help="Folder of the front's runs.")] = Path("runs/front"),
) -> None:
    """What the complete runs of a front write, by chrF and ROUGE-L: a table in Markdown."""
    from experiments import free, front
    from fedloom.report import tables as table

    tried = range(first_seed, first_seed + seeds)
    made = front.entries([testbed_folder(), TESTBEDS], [testbed], tried, out, [])
    dense, chosen = front.references(made), front.selected(made, split_words(only))
    if not free.complete(dense):
        raise ConfigError(
            f"{out / testbed} has no complete run of dense FedIT, which the others are compared with: play it with "
            f"python -m experiments front --testbeds {testbed}"
        )
    found = free.complete([*dense, *chosen])
    data = TESTBEDS / free.FREE[testbed] if testbed in free.FREE else None
    print(table.to_markdown(free.rows(found, free.Scores.read(out / f"{testbed}-free.json"), data)))


@app.command()
def width(
    bases: Annotated[str, typer.Option(help="WIDTH=FOLDER of base models, joined by commas: 128=a,512=b.")],
    testbed: Annotated[str, typer.Option(help="A testbed of front.toml.")] = "wordnet",
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Variants; the first is the one whose gain is the whole. See fedloom compare."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of every variant.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first.")] = 300,
    jobs: Jobs = 1,
    sets: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; complete runs in it are kept.")] = Path("runs/width"),
) -> None:
    """The same data, rounds and seeds on base models of several widths; a table in Markdown."""
    from experiments import front, width
    from fedloom.report import tables as table
    from fedloom.studies.compare import parse_variants

    bed = front.read_bed(testbed, [testbed_folder(), TESTBEDS], sets or [])
    variants = parse_variants(methods) if methods else list(width.VARIANTS)
    tried = range(first_seed, first_seed + seeds)
    made = width.plan(bed.config, width.parse_bases(bases), variants, tried, out)
    play_all([run for base in made for run in base.made], jobs, lambda run: run.config.model.path)
    found = table.to_markdown(width.rows(made, variants))
    (out / "width.md").write_text(found, encoding="utf-8")
    print(found)


@app.command()
def privacy(
    testbed: Annotated[str, typer.Option(help="A testbed of front.toml.")] = "demo",
    epsilons: Annotated[str, typer.Option(help="Values of ε; inf is without noise.")] = "1,3,8,inf",
    levels: Annotated[str, typer.Option(help="Levels: example, site, noise (that of site, where nobody trains).")] = (
        "example,site,noise"
    ),
    method: Annotated[
        str | None, typer.Option(help="The variant that is played at every level; see fedloom compare.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Example level: examples that a step draws.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Example level: steps a round.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.0, help="Example level: the learning rate.")] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Example level: rounds that a client is in at most.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of every ε.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first.")] = 300,
    jobs: Jobs = 1,
    sets: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; complete runs in it are kept.")] = Path("runs/privacy"),
) -> None:
    """Score and bytes under several ε, for single examples and for whole sites; a table in Markdown."""
    from experiments import front, privacy
    from fedloom.report import tables as table

    names = split_words(levels)
    if unknown := set(names) - set(privacy.METHODS):
        raise ConfigError(f"--levels: {min(unknown)!r} is none; expected {' or '.join(privacy.METHODS)}")
    bed = front.read_bed(testbed, [testbed_folder(), TESTBEDS], sets or [])
    methods = {level: method or privacy.METHODS[level] for level in names}
    tried = range(first_seed, first_seed + seeds)
    given = privacy.STEPS.get(testbed, privacy.STEPS["demo"])
    trained = privacy.Steps(
        batch or given.batch, steps or given.count, rate or given.learning_rate, turns or given.turns
    )
    made = privacy.plan(bed.config, privacy.parse_epsilons(epsilons), methods, trained, tried, out / testbed)
    play_all([run for one in made for run in one.made], jobs, lambda run: run.label.partition(":")[0])
    found = table.to_markdown(privacy.rows(made))
    (out / testbed).mkdir(parents=True, exist_ok=True)
    (out / testbed / "privacy.md").write_text(found, encoding="utf-8")
    print(found)


@app.command()
def overlap(
    work: Annotated[Path, typer.Option(help="Work folder of the base model, with its corpus.")] = Path("runs/base"),
    testbeds: Annotated[str, typer.Option(help="Testbeds whose texts are looked for.")] = "wordnet,docstrings",
) -> None:
    """How much of the held-out and validation texts the base model has been trained on, and its bits a byte."""
    from experiments.pretrain import corpus, overlap

    names = split_words(testbeds)
    texts = {(name, split): overlap.read_texts(TESTBEDS / name, split) for name in names for split in overlap.SPLITS}
    documents = corpus.stored(work / "corpus.jsonl.zst", "train")
    for (name, split), (seen, whole) in overlap.shares(texts, documents).items():
        share = f"{100 * seen / whole:.2f} %" if whole else "no text"
        screen.print(cell(f"{name}, {split}: {seen:,} of {whole:,} runs of {overlap.GRAM} words seen, {share}"))
    if (work / "log.jsonl").exists():
        from experiments.pretrain.base import bits_a_byte

        screen.print(f"base: {bits_a_byte(work):.3f} bits a byte of held-out text")


@app.command()
def data(
    testbed: Annotated[str, typer.Argument(help="wordnet or docstrings.")],
    source: Annotated[
        Path, typer.Option(help="For wordnet: the folder of WordNet 3.0's data files (Debian: wordnet-base).")
    ] = Path("/usr/share/wordnet"),
    out: Annotated[Path, typer.Option(help="Folder that the testbed's folder is written into.")] = TESTBEDS,
) -> None:
    """Write the data of a real-text testbed anew; those of wordnet are in the repository already."""
    from experiments import docstrings, wordnet

    writers = {
        "docstrings": lambda: docstrings.write_data(out / "docstrings"),
        "wordnet": lambda: wordnet.write_data(source, out / "wordnet"),
    }
    if testbed not in writers:
        raise ConfigError(f"there is no testbed {testbed!r} to write data for: expected {' or '.join(writers)}")
    counts = writers[testbed]()
    screen.print(f"{sum(counts.values()):,} examples of {len(counts)} clients in {cell(str(out / testbed))}")


@app.command()
def base(
    work: Annotated[
        Path, typer.Option(help="Work folder: packages, corpus, checkpoints. A sitting goes on from what is there.")
    ] = Path("runs/base"),
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of 8,192 tokens in all; may be raised until the last fifth.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    width: Annotated[int, typer.Option(min=64, help="Hidden size, a multiple of 64; shipped is 512.")] = 512,
) -> None:
    """Pre-train the base model of the real-text testbeds, or go on; Ctrl-C loses at most a hundred steps."""
    import torch

    from experiments.pretrain.base import bits_a_byte, make_base

    torch.set_num_threads(threads)
    folder = make_base(work, steps, seed, lambda line: screen.print(cell(line)), width)
    screen.print(f"{cell(str(folder))}: {bits_a_byte(work, width):.3f} bits a byte of held-out text")


@app.command()
def rebase(
    figures: Annotated[Path, typer.Option(help="A front.csv, of now or of before the baseline was changed.")] = Path(
        "docs/front.csv"
    ),
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed of its runs.")] = 300,
    out: Annotated[Path, typer.Option(help="Folder of the table, CSV and picture.")] = Path("runs/rebase"),
) -> None:
    """The same runs against today's baseline: attendance is played, nothing is trained; says what changed."""
    from experiments.rebase import changed, rebased
    from fedloom.report import tables as table

    found = rebased(figures, testbed_folder(), first_seed)
    out.mkdir(parents=True, exist_ok=True)
    leave([point for _, point in found], out)
    lines = changed(found)
    (out / "changed.md").write_text(table.to_markdown(lines), encoding="utf-8")
    screen.print(table.comparison_table(lines))


def leave(points: Sequence[Point], out: Path, kept: Sequence[Point] | None = None) -> None:
    """Tables and pictures of the front, against bytes and a client's work; its figures with those kept beside."""
    from experiments import figures, picture
    from experiments.sending import read_sending

    (out / "front.md").write_text(figures.write_markdown(points), encoding="utf-8")
    (out / "grid.md").write_text(figures.write_grids(points), encoding="utf-8")
    (out / "work.md").write_text(figures.write_work(points), encoding="utf-8")
    (out / "front.csv").write_text(figures.write_csv(points if kept is None else kept), encoding="utf-8")
    picture.front(points, out / "front.png", sending=read_sending())
    worked = [point for point in points if math.isfinite(point.work.passes)]
    picture.front(worked, out / "front-work.png", axis=picture.WORK)


if __name__ == "__main__":
    run_app(app, "python -m experiments")
