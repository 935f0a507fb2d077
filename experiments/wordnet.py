"""The wordnet testbed's data: WordNet 3.0's glosses, one client a lexicographer file, from Debian's wordnet-base.

Every synset is one example, in one of two directions: its gloss asks for the headword, or the headword for the gloss.
Which direction and which split it is in follows from its number alone. The two directions are the domains of the score.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.jsonl import write_rows
from fedloom.errors import DataError

FILES = (
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute"),
    *("noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group"),
    *("noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant"),
    *("noun.possession", "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state"),
    *("noun.substance", "noun.time", "verb.body", "verb.change", "verb.cognition", "verb.communication"),
    *("verb.competition", "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl"),
)
"""Lexicographer files by their number in the data files (lexnames(5WN))."""
TRAIN, VALIDATION, HELD_OUT = 400, 6, 12
"""Examples of a file at most: of training in all, of the other two in each direction."""
LONGEST = 160
"""Characters of a gloss."""


@dataclass(frozen=True, slots=True)
class Synset:
    """One meaning: its lexicographer file, its first word and what the word means."""

    file: str
    word: str
    gloss: str

    @property
    def draw(self) -> int:
        """A number that stands for chance: the same for this synset everywhere and always."""
        return int.from_bytes(hashlib.blake2b(f"{self.word}|{self.gloss}".encode(), digest_size=8).digest(), "big")

    @property
    def direction(self) -> str:
        """word: the gloss asks for the headword. gloss: the other way."""
        return ("word", "gloss")[self.draw % 2]

    def example(self) -> dict[str, str]:
        """The row of a data file."""
        if self.direction == "word":
            return {"prompt": f"{self.gloss}\nword:", "completion": f" {self.word}"}
        return {"prompt": f"{self.word} ({self.file.partition('.')[0]})\nmeaning:", "completion": f" {self.gloss}"}


def synsets(folder: Path) -> Iterator[Synset]:
    """The synsets of WordNet's data files that are short enough; the examples that follow a gloss are left out.

    Raises DataError where the folder has no such files.
    """
    if not (folder / "data.noun").is_file():
        raise DataError(f"{folder} holds no data.noun: give --source, or install Debian's package wordnet-base")
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            facts, _, text = line.partition(" | ")
            fields = facts.split()
            word = re.sub(r"\((a|p|ip)\)$", "", fields[4]).replace("_", " ")
            gloss = re.split(r';\s*["`]', text.strip())[0].strip().strip(";")
            if 0 < len(gloss) <= LONGEST:
                yield Synset(FILES[int(fields[1])], word, gloss)


def write_data(wordnet: Path, target: Path) -> dict[str, int]:
    """Write <target>/data/<file>/train.jsonl and the two domains of heldout/ and validation/; returns examples by file.

    A synset is in one split only: of each file and direction the first by chance are held out, the next validate.
    """
    by_file: dict[str, list[Synset]] = {name: [] for name in sorted(FILES)}
    for synset in synsets(wordnet):
        by_file[synset.file].append(synset)
    apart: dict[tuple[str, str], list[Synset]] = {}
    counts = {}
    for name, found in by_file.items():
        left = sorted(found, key=lambda synset: synset.draw)
        for direction in ("word", "gloss"):
            # A small file gives a tenth at most, so that it keeps most of what it has.
            those = [synset for synset in left if synset.direction == direction]
            held, checked = min(HELD_OUT, len(those) // 10), min(VALIDATION, len(those) // 10)
            apart.setdefault(("heldout", direction), []).extend(those[:held])
            apart.setdefault(("validation", direction), []).extend(those[held : held + checked])
            taken = set(those[: held + checked])
            left = [synset for synset in left if synset not in taken]
        write_rows(target / "data" / name / "train.jsonl", (synset.example() for synset in left[:TRAIN]))
        counts[name] = len(left[:TRAIN])
    for (split, direction), those in apart.items():
        write_rows(target / split / f"{direction}.jsonl", (synset.example() for synset in those))
    return counts
