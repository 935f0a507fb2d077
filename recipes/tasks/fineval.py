"""FinEval's questions as the harness takes them, from its files <subject>_val.csv in the folder FinEval beside this."""

from __future__ import annotations

import csv
from pathlib import Path

from datasets import Dataset

FOLDER = Path(__file__).parent / "FinEval"
NEEDED = ("question", "A", "B", "C", "D", "answer")


def load_questions(**given: object) -> dict[str, Dataset]:
    """{"validation": all subjects, one after the other}, every value a text: some subjects have numbers for answers.

    Raises FileNotFoundError that says how to get the files. given: what the harness says of the task, not used.
    """
    rows = []
    for path in sorted(FOLDER.rglob("*_val.csv")):
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows += [{name: row[name] for name in NEEDED} for row in csv.DictReader(file)]
    if not rows:
        raise FileNotFoundError(f"{FOLDER} holds no *_val.csv: fineval.yaml beside it says how to get FinEval")
    return {"validation": Dataset.from_list(rows)}
