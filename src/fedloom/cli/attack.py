"""`fedloom attack`: read arguments, call the study, print."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.options import AsJson, Jobs, Set, print_result, say, split_numbers, split_words
from fedloom.testbeds import testbed_folder

if TYPE_CHECKING:
    from fedloom.records.config import Config


class Attacker(StrEnum):
    """Who attacks."""

    site = "site"
    server = "server"


USUAL = "absent,sign_flip,gaussian,same_value,lie,fall,label_flip,backdoor"


READ = "fedit:wire.values=fp32,fedsrd,loom"


def attack(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings; the demo's if left out.")
    ] = None,
    attacker: Annotated[
        Attacker, typer.Option("--as", help="Who attacks: a site that lies, or a server that is curious.")
    ] = Attacker.site,
    attacks: Annotated[
        str, typer.Option(help="site: what it does, joined by commas; each perhaps with its strength, as in lie:0.5.")
    ] = USUAL,
    malicious: Annotated[int, typer.Option(min=1, help="site: how many are malicious, the last by name.")] = 1,
    defence: Annotated[
        list[str] | None,
        typer.Option(
            "--defence", metavar="KEY=VALUE", help="site: settings of the defended runs, in place of clip and --public."
        ),
    ] = None,
    undefended: Annotated[bool, typer.Option(help="site: play every attack without the defence, too.")] = True,
    public: Annotated[
        Path | None, typer.Option(help="site: the server's public examples; some of data.validation if left out.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="server: variants, as in compare.", show_default=READ)
    ] = None,
    examples: Annotated[str, typer.Option(help="server: examples that an update rests on, each tried.")] = "1,4",
    sites: Annotated[int, typer.Option(min=2, help="server: how many sites are read, the first by name.")] = 4,
    ranks: Annotated[str, typer.Option(help="Play everything at each of these ranks: 4,16.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of the seeds.")] = 0,
    jobs: Jobs = 1,
    sets: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; complete runs in it are kept.")] = Path("runs/attack"),
    as_json: AsJson = False,
) -> None:
    """Play attacks on a testbed: what liars cost with and without federation.robust, what a curious server reads."""
    from fedloom.records.configfile import load_config

    settings = load_config(config or testbed_folder() / "demo.toml", sets or [])
    tried = range(first_seed, first_seed + seeds)
    if attacker is Attacker.server:
        tried_ranks = split_numbers(ranks, "--ranks") or [settings.lora.r]
        _read(settings, methods or [READ], split_numbers(examples, "--examples"), sites, tried_ranks, as_json)
        return
    from fedloom.cli.studies import play_all
    from fedloom.studies.attack import plan, table
    from fedloom.studies.compare import client_names, play_here

    chosen = defence or plan.usual_defence(public or plan.write_public(settings, out))
    names, rank_list = split_words(attacks), split_numbers(ranks, "--ranks")
    cases = plan.plan_cases(settings, names, malicious, chosen, tried, out, rank_list, undefended=undefended)
    made = [trial for case in cases for trial in case.trials]
    if as_json:
        play_here(made, lambda run, seconds: None)
    else:
        play_all(made, jobs)
    result = table.as_json(table.read_outcomes(cases), cases[0].sites, len(client_names(settings)))
    print_result(result, table.outcome_tables, as_json)


def _read(
    settings: Config, methods: list[str], examples: list[int], sites: int, ranks: list[int], as_json: bool
) -> None:
    """What a curious server reads, line by line."""
    from fedloom.studies.attack import curious, readings
    from fedloom.studies.compare import parse_variants, variant_overrides

    found = []
    for rank in ranks:
        for variant in parse_variants(methods):
            # The scale of the change of weight stays what the settings say.
            scale = [f"lora.r={rank}", f"lora.lora_alpha={settings.lora.lora_alpha * rank / settings.lora.r}"]
            sets = [*scale, *variant_overrides(variant)]
            found += curious.read_variant(settings, variant, sets, examples, sites, silent if as_json else say)
    print_result(readings.as_json(found), readings.reading_tables, as_json)


def silent(line: str) -> None:
    """Nothing is said beside JSON."""
