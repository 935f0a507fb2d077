"""The bench of merging tells true errors, and PEFT's refusals as such."""

import pytest

from benchmarks import merge
from fedloom.errors import ConfigError


def test_rows_of_unequal_ranks():
    result = merge.run(ranks=(4, 2), modules=["k_proj"], against=["cat", "linear"])
    rows = {row["way"]: row for row in result["rows"]}
    for exact in ("florist, energy 1", "flora", "PEFT cat"):
        assert rows[exact]["error"] < 1e-6 and rows[exact]["rank"] == 6 and rows[exact]["seconds"] > 0
    assert rows["flexlora, the largest rank"]["rank"] == 4
    assert 1e-3 < rows["flexlora, the largest rank"]["error"] < rows["fedit"]["error"]
    assert rows["PEFT linear"]["seconds"] is None
    assert [str(cell) for cell in merge.tables(result)[0].columns[1].cells][-1] == "–"


def test_ours_alone_need_no_base_and_wrong_requests_are_refused():
    assert len(merge.run(ranks=(2,), modules=["k_proj"], against=[])["rows"]) == len(merge.OURS)
    for wrong in ({"ranks": ()}, {"ranks": (0,)}, {"against": ["ties"]}, {"preset": "gpt"}):
        with pytest.raises(ConfigError):
            merge.run(**wrong)
