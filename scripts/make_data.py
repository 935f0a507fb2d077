"""Write the testbed's client data: four private domains of instruction/response pairs.

Each domain is a party that would not share its records - a clinic, a bank, a lab, a depot - and rests on one
skill that the base model already has under other prompts (maximum, addition, reversal, sorting; see
`make_base_model.py`). What is new to the base model, and differs from party to party, is the wording of the
requests, the house format of the answers, and what has to be carried over from the request into the answer.

    python scripts/make_data.py    # rewrites src/fedloom/testbeds/data/<domain>/{train,validation,heldout}.jsonl

Equal seeds give identical files. `validation` is for tuning; `heldout` is for final scores only.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "fedloom" / "testbeds" / "data"
SPLITS = {"train": 1800, "validation": 150, "heldout": 300}


@dataclass(frozen=True, slots=True)
class Case:
    """One drawn problem: what fills a request's blanks, the answer, and what makes the problem itself."""

    blanks: dict[str, str]
    answer: str
    content: tuple[str, ...]  # equal for problems that have the same solution steps; splits are disjoint in it


@dataclass(frozen=True, slots=True)
class Domain:
    """A party: how it draws problems, and the ways it words a request."""

    draw: Callable[[random.Random], Case]
    wordings: tuple[str, ...]


def draw_clinic(rng: random.Random) -> Case:
    """Maximum: the highest pulse of a bed, in the clinic's shorthand."""
    pulses = [str(rng.randint(40, 99)) for _ in range(rng.randint(3, 4))]
    bed = rng.choice(string.ascii_uppercase)
    return Case({"bed": bed, "list": " ".join(pulses)}, f"{bed}: peak {max(pulses)} bpm", tuple(sorted(pulses)))


def draw_bank(rng: random.Random) -> Case:
    """Addition: a balance after a deposit, as the bank books it."""
    held, paid = rng.randint(10, 99), rng.randint(10, 99)
    account = "".join(rng.sample(string.ascii_uppercase, 2))
    blanks = {"account": account, "held": str(held), "paid": str(paid)}
    return Case(blanks, f"{account} = {held + paid}.00", tuple(sorted((str(held), str(paid)))))


def draw_lab(rng: random.Random) -> Case:
    """Reversal: a strand read from its other end, with the ends marked."""
    strand = "".join(rng.choice("ACGT") for _ in range(rng.randint(5, 7)))
    # A strand and its mirror image count as one problem, else one split would hold another's answers.
    return Case({"strand": strand}, f"3'{strand[::-1]}5'", (min(strand, strand[::-1]),))


def draw_depot(rng: random.Random) -> Case:
    """Sorting: the aisles of an order in walking order, chained by arrows, with the gate to end at."""
    aisles = rng.sample(string.ascii_uppercase, rng.randint(4, 5))
    gate = str(rng.randint(1, 9))
    answer = ">".join(sorted(aisles)) + f" gate {gate}"
    return Case({"aisles": "".join(aisles), "gate": gate}, answer, tuple(sorted(aisles)))


DOMAINS = {
    "clinic": Domain(
        draw_clinic,
        (
            "Peak pulse of bed {bed}: {list}",
            "bed {bed} pulse log {list}",
            "Nurse saw {list} at bed {bed}, chart it",
            "ward monitor {list}, bed {bed}",
            "Worst of {list} for patient {bed}?",
        ),
    ),
    "bank": Domain(
        draw_bank,
        (
            "Book {paid} to {account}, balance {held}",
            "Account {account} holds {held}, deposit {paid}",
            "client {account} had {held} and was paid {paid}",
            "credit {paid} on {account}, now {held}",
            "Statement {account}: {held}, then {paid}",
        ),
    ),
    "lab": Domain(
        draw_lab,
        (
            "Mirror strand {strand}",
            "primer {strand}, from the other end",
            "Sample {strand} was read wrong, turn it",
            "enter {strand} mirrored in the lab book",
            "Read {strand} end first",
        ),
    ),
    "depot": Domain(
        draw_depot,
        (
            "Cart to gate {gate} from aisles {aisles}",
            "aisles {aisles}, gate {gate}. Route?",
            "Truck at gate {gate}, crates in {aisles}",
            "plan the walk {aisles}, leave by {gate}",
            "Order {aisles} for gate {gate}",
        ),
    ),
}


def make_rows(name: str, count: int, rng: random.Random) -> list[tuple[Case, dict[str, str]]]:
    """Draw `count` rows of a domain, no two with the same content."""
    domain = DOMAINS[name]
    rows: dict[tuple[str, ...], tuple[Case, dict[str, str]]] = {}
    while len(rows) < count:
        case = domain.draw(rng)
        instruction = rng.choice(domain.wordings).format(**case.blanks)
        rows.setdefault(case.content, (case, {"instruction": instruction, "output": case.answer, "domain": name}))
    # The later a row is drawn, the likelier it is of a roomy kind; shuffling makes the splits alike in kind.
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def split_rows(rows: list[tuple[Case, dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Cut a domain's rows into the splits, making sure that none shares content with another."""
    splits: dict[str, list[dict[str, str]]] = {}
    seen: set[tuple[str, ...]] = set()
    for split, count in SPLITS.items():
        part, rows = rows[:count], rows[count:]
        contents = {case.content for case, _ in part}
        assert len(part) == len(contents) == count and not contents & seen, f"{split} shares content"
        seen |= contents
        splits[split] = [row for _, row in part]
    return splits


def write_domain(name: str, out: Path, seed: int) -> int:
    """Write one domain's files below `out` and return their size in bytes."""
    rng = random.Random(f"{seed}/{name}")  # seeded by text, so that a new domain leaves the others' files as they are
    (out / name).mkdir(parents=True, exist_ok=True)
    size = 0
    for split, rows in split_rows(make_rows(name, sum(SPLITS.values()), rng)).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / name / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        size += len(text.encode())
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the testbed's client data.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the domains (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default: %(default)s)")
    args = parser.parse_args()
    for name in DOMAINS:
        size = write_domain(name, args.out, args.seed)
        print(f"{name}: {' '.join(f'{split} {count}' for split, count in SPLITS.items())}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
