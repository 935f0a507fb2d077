"""The runs of `fedloom attack --as site`: every attack with and without the defence, beside the same all honest."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError
from fedloom.records.config import Config
from fedloom.records.text import file_name
from fedloom.studies.compare import Trial, apply_overrides, client_names

if TYPE_CHECKING:
    from fedloom.studies.attack.malicious import Attack

HONEST = ""
"""The attack of runs in which nobody is malicious."""
PUBLIC = 16
"""Examples of each client's validation split that make up the public set of a study, where no other is named."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table: the attack of so many sites, with the defence or without. trials: one a seed.

    rank: of the adapters, where the study tries several.
    """

    attack: str
    defended: bool
    sites: tuple[str, ...]
    trials: tuple[Trial, ...] = field(repr=False)
    rank: int | None = None


def parse_attack(text: str) -> Attack:
    """The attack that "sign_flip" or "sign_flip:2.5" names, with its strength. Raises ConfigError."""
    from fedloom.studies.attack.malicious import ATTACKS, Attack

    name, _, given = text.partition(":")
    if name not in ATTACKS:
        raise ConfigError(f"--attacks {text}: expected one of {', '.join(ATTACKS)}, each perhaps with :STRENGTH")
    try:
        return Attack(name, float(given) if given else ATTACKS[name])
    except ValueError:
        raise ConfigError(f"--attacks {text}: {given!r} is no strength; expected a number, as in {name}:2") from None


def plan_cases(
    config: Config,
    attacks: Sequence[str],
    malicious: int,
    defence: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    ranks: Sequence[int] = (),
    *,
    undefended: bool = True,
) -> list[Case]:
    """All cases. attacks: as for `parse_attack`; malicious: how many sites; defence: overrides of the settings.

    ranks: backdoors are tried at each of these; the first case at every rank is the honest one. undefended: whether
    attacks are played without the defence as well. What nobody attacks always is, and sites that are absent never are
    with it.
    Raises ConfigError for a number of sites, an attack or a setting that there is not.
    """
    from fedloom.studies.attack.malicious import ABSENT, RESULT, Attack, Infiltration, last_names

    if config.training.dp is not None:
        raise ConfigError(
            "training.dp does not go with fedloom attack --as site: malicious sites train in their own way, which "
            "clips no example's gradient. Take training.dp out"
        )
    sites = last_names(client_names(config), malicious)
    plain = apply_overrides(config, ["local.workers=null", "local.devices=[]"])
    cases = []
    tried: Sequence[int | None] = ranks or [None]
    for rank in tried:
        base = plain if rank is None else apply_overrides(plain, [f"lora.r={rank}", f"lora.lora_alpha={2.0 * rank}"])
        for text in [HONEST, *attacks]:
            attack = parse_attack(text) if text else Attack()
            wanted = {HONEST: (False, True), ABSENT: (False,)}.get(attack.name, (False, True)[not undefended :])
            for defended in wanted:
                settings = apply_overrides(base, defence) if defended else base
                label = "-".join(
                    [text.replace(":", "-") or "honest", *([f"r{rank}"] if rank else []), *(["robust"] * defended)]
                )
                trials = tuple(
                    Trial(
                        label,
                        seed,
                        apply_overrides(settings, [f"federation.seed={seed}"]),
                        out / file_name(label) / f"seed-{seed}",
                        player=Infiltration(attack, sites),
                        last=RESULT,
                    )
                    for seed in seeds
                )
                cases.append(Case(text, defended, sites, trials, rank))
    return cases


def write_public(config: Config, out: Path, count: int = PUBLIC) -> Path:
    """A public set in the folder `out`: the first `count` examples of each client's validation split.

    Raises ConfigError where there is no such split.
    """
    from fedloom.workspace.data import read_split

    split = config.data.validation
    if split is None:
        raise ConfigError("data.validation is missing: name a public set with --public, or a split to make it of")
    if split == config.data.heldout:
        raise ConfigError(f"data.validation and data.heldout are both {split!r}: the defence would see what is scored")
    path = out / "public.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    held = [one for examples in read_split(config.data, split).values() for one in examples[:count]]
    lines = [json.dumps({"instruction": one.instruction, "input": one.input, "output": one.output}) for one in held]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def usual_defence(public: Path) -> list[str]:
    """The overrides that make a run robust: influence bounded, and who does harm by a public set refused."""
    return ["federation.robust=clip", f"federation.public={json.dumps(str(public.absolute()))}"]


def honest_domains(domains: Collection[str], sites: Collection[str]) -> list[str]:
    """Domains that are scored: without those that malicious sites alone have examples of, by name, which nobody else
    could teach.
    """
    return [domain for domain in domains if domain not in sites]
