"""Kinds of files: tables, packed files, shards, and what `datasets` saves."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import ConfigError, DataError
from fedloom.model import datafiles
from fedloom.model.datafiles import READERS, iterate_rows
from fedloom.model.sources import client_sources, load_examples
from fedloom.records.config import DataSettings
from written_data import PACKED, arrow, lines, parquet, table, written

ROWS = [
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"instruction": 'greet "her",\nthen; him', "input": "", "output": "hei, døgn ☃"},
]
SKIPPING = DataSettings(skip_bad_rows=True)


def expected() -> list[tuple[str, str, str]]:
    return [(row["instruction"], row["input"], row["output"]) for row in ROWS]


def texts(source: Path, *given: object) -> list[tuple[str, str, str]]:
    return [(example.instruction, example.input, example.output) for example in load_examples(source, *given)]


@pytest.mark.parametrize("kind", READERS)
def test_every_kind_of_file_says_the_same(tmp_path, kind):
    for name in (f"a{kind}", f"A{kind.upper()}"):
        (tmp_path / name).write_bytes(written(kind, ROWS))
        assert texts(tmp_path / name) == expected()
    (tmp_path / f"train{kind.upper()}").write_bytes(written(kind, ROWS))
    assert texts(tmp_path) == expected(), "as a split of a folder"


def test_clients_are_named_without_the_ending(tmp_path):
    for name in ("ada.jsonl.gz", "bob.CSV", "cyd.parquet", "notes.txt", "dan.v2.ndjson"):
        (tmp_path / name).touch()
    assert list(client_sources(tmp_path)) == ["ada", "bob", "cyd", "dan.v2"]
    (tmp_path / "ada.csv").touch()
    with pytest.raises(DataError, match=r"client 'ada' has two files, ada\.csv and ada\.jsonl\.gz"):
        client_sources(tmp_path)


def test_a_json_file_with_one_object_a_line(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + lines(ROWS))
    assert texts(tmp_path / "a.json") == expected()


def test_tables_of_spreadsheets(tmp_path):
    for name, data in {
        "bom.csv": b"\xef\xbb\xbf" + table(ROWS),
        "semicolons.csv": table(ROWS, ";"),
        "lines.csv": table(ROWS).replace(b"\r\n", b"\n"),
        "blank.csv": table(ROWS).replace(b"3\r\n", b"3\r\n\r\n\r\n"),
        "spaces.csv": table(ROWS).replace(b"instruction,", b"instruction ,"),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert texts(tmp_path / name) == expected(), name


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"a,b\n1,2\n", "line 2: columns a, b make no example"),
        (b'instruction,output\n"x\ny",1\nz\n', "line 4: 1 fields under 2 names of the header row"),
        (b'instruction,output\n"x"y,1\n', "line 2: not valid CSV"),
        (b"instruction,output\nx,\xff\n", "line 2: not UTF-8 text"),
        (b"instruction,output\na,b\nc,d,e\n", "line 3: 3 fields under 2 names"),
        (b'instruction,output\na,b\nc,"d\ne,f\n', "line 3: a quote is opened and never closed"),
        (b'instruction,"output\na,b\n', "line 1: a quote is opened and never closed"),
        (b'"instruction"x,output\na,b\n', "line 1: not a header row"),
        (b"output,instruction,output\na,b,c\n", "the header row names 'output' twice"),
        ("instruction,output\na,b\n".encode("utf-16"), "not UTF-8 text, but UTF-16"),
        (b"instruction,output\n", "holds no examples"),
        (b"", "holds no examples"),
    ],
)
def test_a_table_that_is_none(tmp_path, data, reason):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        load_examples(tmp_path / "a.csv")
    assert str(tmp_path / "a.csv") in str(caught.value) and "\n" not in str(caught.value)


def test_bad_rows_of_a_table_are_skipped_but_not_its_rest(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'instruction,output\na,b\n"x"y,1\nc\n\xff,e\ng,h\n')
    notes: list[str] = []
    assert [example.output for example in load_examples(path, "train", SKIPPING, notes.append)] == ["b", "h"]
    assert len(notes) == 1 and "3 of 5 rows left out; the first, line 3: not valid CSV" in notes[0]
    path.write_bytes(b'instruction,output\na,b\nc,"d\ne,f\n')
    with pytest.raises(DataError, match="line 3: a quote is opened and never closed"):
        load_examples(path, "train", SKIPPING)


def test_packed_files_that_are_damaged(tmp_path):
    for end in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{end}"
        whole = PACKED[end](lines(ROWS * 50))
        for data in (whole[: len(whole) // 2], whole[:-1], b"no packed file at all"):
            path.write_bytes(data)
            for chosen in (DataSettings(), SKIPPING):
                with pytest.raises(DataError, match=r"a\.jsonl\.\w+ cannot be read \(") as caught:
                    load_examples(path, "train", chosen)
                assert "\n" not in str(caught.value)


def test_a_line_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(datafiles, "LONGEST_LINE", 2**20)
    bomb = b'{"instruction": "' + b"a" * 2**24
    for end, pack in PACKED.items():
        for kind in (".jsonl", ".csv"):
            path = tmp_path / f"a{kind}{end}"
            path.write_bytes(pack(bomb))
            with pytest.raises(DataError, match=f"{path.name}: line 1 has more than 1 MiB"):
                load_examples(path, "train", SKIPPING)
    monkeypatch.setattr(datafiles, "LARGEST_JSON", 2**20)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(bomb))
    with pytest.raises(DataError, match=r"holds more than 0 GiB: make it \.jsonl"):
        load_examples(tmp_path / "a.json.gz")


def test_a_row_of_a_table_file_that_is_no_text(tmp_path):
    raw = pyarrow.array([b"fine", b"\xff\xfe", b"too"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: .*utf-8"):
        load_examples(tmp_path / "a.parquet")
    assert [example.output for example in load_examples(tmp_path / "a.parquet", "train", SKIPPING)] == ["fine", "too"]


def test_a_large_file_is_read_row_by_row(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([{"text": str(number)} for number in range(3000)]))
    places = iterate_rows(tmp_path / "a.parquet")
    assert next(places) == ("row 1", {"text": "0"})
    assert [example.output for example in load_examples(tmp_path / "a.parquet")] == [str(n) for n in range(3000)]


def test_shards_of_a_split(tmp_path):
    for kind in (".parquet", ".jsonl", ".csv.gz"):
        folder = tmp_path / kind.strip(".")
        folder.mkdir()
        for index in range(2):
            (folder / f"train-{index:05d}-of-00002{kind}").write_bytes(written(kind, ROWS[index : index + 1]))
        (folder / f"test-00000-of-00001-0123abcd{kind}").write_bytes(written(kind, ROWS[:1]))
        assert texts(folder) == expected()
        assert texts(folder, "test") == expected()[:1]
        (folder / f"train-00000-of-00002{kind}").unlink()
        with pytest.raises(DataError, match=rf"train-00000-of-00002{kind} is missing, of 2 shards 1 are there"):
            load_examples(folder)
        (folder / f"train-00000-of-00003{kind}").touch()
        with pytest.raises(DataError, match=r"shards of 'train' of \[2, 3\]"):
            load_examples(folder)


def test_what_datasets_saves_is_read_without_it(tmp_path, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "dict")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert texts(tmp_path / "one") == texts(tmp_path / "dict") == expected()
    assert texts(tmp_path / "dict", "test") == expected()[1:]
    for folder, split, reason in (
        ("dict", "heldout", "no split 'heldout': it has train, test"),
        ("one", "test", r"one data set \(save_to_disk\) and has no split 'test'"),
    ):
        with pytest.raises(DataError, match=reason):
            load_examples(tmp_path / folder, split)
        with pytest.raises(DataError, match=r"is one data set \(save_to_disk\).*set data\.partitioner"):
            client_sources(tmp_path / folder)
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is missing, which .*state\.json names"):
        load_examples(tmp_path / "one")
    for broken in ("{", "[]", '{"_data_files": 3}', '{"_data_files": [3]}'):
        (tmp_path / "one" / "state.json").write_text(broken)
        with pytest.raises(DataError, match=r"state\.json is not what datasets' save_to_disk writes"):
            load_examples(tmp_path / "one")


def test_arrow_in_its_other_format_and_arrow_that_is_none(tmp_path):
    data = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, data.schema) as file:
        file.write_table(data)
    assert texts(tmp_path / "a.arrow") == expected()
    for content in (b"", b"ARROW1", arrow(ROWS)[:100], b"nothing of that kind"):
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.arrow: not a readable Arrow file \(.+\)") as caught:
            load_examples(tmp_path / "a.arrow")
        assert "\n" not in str(caught.value)


def test_a_configuration_of_a_hub_data_set(monkeypatch):
    def load(name: str, subset: str | None, split: str) -> list[dict[str, str]]:
        if subset is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['de', 'en']\nor so"
            )
        return [{"Frage": f"{name} {subset} {split}", "Antwort": "a"}]

    monkeypatch.setattr("datasets.load_dataset", load)
    named = {"instruction": "Frage", "output": "Antwort"}
    found = load_examples("owner/name", "test", DataSettings(subset="de", columns=named))
    assert [(example.instruction, example.output) for example in found] == [("owner/name de test", "a")]
    with pytest.raises(DataError, match=r"available configs: \['de', 'en'\] Set data\.subset to one of them"):
        load_examples("owner/name", "test")


def test_one_source_with_the_default_partitioner(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    for source, what in ((tmp_path / "a.jsonl", "is one file"), ("owner/name", "is not a folder")):
        with pytest.raises(DataError, match=f"{what}: .*set data.partitioner"):
            client_sources(source)


def test_one_file_has_no_other_split(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(DataError, match=r"a\.jsonl is one file and has no split 'heldout'"):
        load_examples(tmp_path / "a.jsonl", "heldout")


@given(st.lists(st.fixed_dictionaries({"instruction": st.text(), "output": st.text()}), min_size=1, max_size=5))
@settings(max_examples=60)
def test_any_text_survives_a_table(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(table(rows))
    assert [(example.instruction, example.output) for example in load_examples(path)] == [
        (row["instruction"], row["output"]) for row in rows
    ]


@given(st.binary(max_size=200), st.sampled_from(sorted(READERS)))
@settings(max_examples=150)
def test_any_bytes_are_rows_or_one_line_of_error(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    path.write_bytes(data)
    try:
        found = load_examples(path)
    except (DataError, ConfigError) as error:
        assert str(path) in str(error)
    else:
        assert found
