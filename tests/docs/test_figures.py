"""Figures in the documentation are those of front.csv, and front.csv is what its runs are by today's baseline."""

import csv
import io
import re
from pathlib import Path

import pytest
from experiments.figures import figures, rows
from experiments.rebase import changed, rebased

from fedloom import testbeds
from fedloom.errors import DataError
from fedloom.report.tables import to_csv, to_markdown

ROOT = Path(__file__).parents[2]
FRONT = ROOT / "docs" / "front.csv"
CLAIMS = {
    "README.md": ("budget and five fresh seeds", "[docs/benchmarks]"),
    "docs/benchmarks/front.md": ("- **The demo: loom", "Before, settings by hand"),
}
"""Page → where the sentences begin and end that have nothing but figures of the front."""


@pytest.fixture(scope="module")
def known():
    with FRONT.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def again():
    return rebased(FRONT, testbeds.testbed_folder(), 300)


def test_the_shares_are_those_of_todays_baseline(again, known):
    points = [point for _, point in again]
    scored = [row for row in known if row["metric"] == "exact_match"]
    made = list(csv.DictReader(io.StringIO(to_csv(figures(points)))))
    # Bytes are made again from a turn's, which stand rounded in the file.
    rounded = ("bytes_client", "share_of_dense")
    for one, row in zip(made, scored, strict=True):
        assert {head: row[head] for head in one if head not in rounded} == {
            head: text for head, text in one.items() if head not in rounded
        }
        assert [float(one[head]) for head in rounded] == pytest.approx([float(row[head]) for head in rounded], rel=1e-3)
    assert to_markdown(rows(points)) in (ROOT / "docs" / "benchmarks" / "front.md").read_text(encoding="utf-8")


def test_the_log_has_both_baselines_side_by_side(again):
    log = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
    # The demo's dense rows stand as they were; the others have been played again since.
    lines = [line for line in to_markdown(changed(again)).splitlines() if line.startswith("| demo |")]
    dense = [line for line in lines if "fedit" in line or "florist" in line]
    assert len(dense) > 7 and all(line in log for line in dense)
    assert "| 106.52 % | 67.71 % |" in log
    shares = [(old, point.share) for old, point in again if point.testbed == "many"]
    assert [new / old for old, new in shares] == pytest.approx([67.71 / 106.52] * len(shares), rel=1e-3)


@pytest.mark.parametrize("page", sorted(CLAIMS))
def test_what_is_said_stands_in_the_figures(page, known):
    begin, end = CLAIMS[page]
    text = (ROOT / page).read_text(encoding="utf-8")
    said = text[text.index(begin) : text.index(end, text.index(begin))]
    scores, shares = re.findall(r"\d+\.\d ± \d+\.\d", said), re.findall(r"\d+\.\d\d(?= %)", said)
    assert len(scores) >= 4 and len(shares) >= 2
    assert set(scores) <= {row["end %"] for row in known}
    assert set(shares) <= {row["of dense fp32, rank 16"].split(" ")[0] for row in known}


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="is no table of `python -m experiments front`"):
        rebased(tmp_path / "x.csv", testbeds.testbed_folder(), 300)
