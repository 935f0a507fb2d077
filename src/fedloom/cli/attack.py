"""`fedloom attack`: read arguments, call the study, print."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import AsJson, Jobs, Set, print_result, split_numbers, split_words
from fedloom.errors import ConfigError
from fedloom.testbeds import testbed_folder


class Attacker(StrEnum):
    """Who attacks."""

    site = "site"
    server = "server"


USUAL = "sign_flip,gaussian,same_value,lie,fall,label_flip,backdoor"


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
    public: Annotated[
        Path | None, typer.Option(help="site: the server's public examples; some of data.validation if left out.")
    ] = None,
    ranks: Annotated[str, typer.Option(help="site: play everything at each of these ranks: 4,16.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of the seeds.")] = 0,
    jobs: Jobs = 1,
    sets: Set = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; complete runs in it are kept.")] = Path("runs/attack"),
    as_json: AsJson = False,
) -> None:
    """Play attacks on a testbed, with and without federation.robust, and say what they cost."""
    from fedloom.records.configfile import load_config

    settings = load_config(config or testbed_folder() / "demo.toml", sets or [])
    tried = range(first_seed, first_seed + seeds)
    if attacker is Attacker.server:
        raise ConfigError("--as server: what a curious server can read is not part of this version")
    from fedloom.cli.studies import play_all
    from fedloom.studies.attack import plan, table
    from fedloom.studies.compare import client_names, play_here

    chosen = defence or plan.usual_defence(public or plan.write_public(settings, out))
    names = split_words(attacks)
    cases = plan.plan_cases(settings, names, malicious, chosen, tried, out, split_numbers(ranks, "--ranks"))
    made = [trial for case in cases for trial in case.trials]
    if as_json:
        play_here(made, lambda run, seconds: None)
    else:
        play_all(made, jobs)
    result = table.as_json(table.read_outcomes(cases), cases[0].sites, len(client_names(settings)))
    print_result(result, table.outcome_tables, as_json)
