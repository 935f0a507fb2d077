"""Examples from hostile files, and partitions that are partitions."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import DataError
from fedloom.model.examples import Example
from fedloom.model.partition import PARTITIONERS, Manifest, data_digest, load_manifest, partition, save_manifest
from fedloom.model.sources import client_sources, load_examples
from fedloom.records.config import DataSettings, FederationSettings

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"

ROWS = [
    {"instruction": "add", "input": "1 2", "output": "3", "topic": "sums"},
    {"instruction": "greet", "input": None, "output": "hei, døgn ☃", "topic": "talk"},
]


def write(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_the_three_forms(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    path = write(tmp_path / "a.jsonl", [*ROWS, {"prompt": "p", "completion": "c"}, {"messages": turns}])
    alpaca, unpaired, prompt, chat = load_examples(path)
    assert (alpaca.instruction, alpaca.input, alpaca.output) == ("add", "1 2", "3")
    assert (unpaired.input, unpaired.output, unpaired.columns["topic"]) == ("", "hei, døgn ☃", "talk")
    assert (prompt.instruction, prompt.output) == ("p", "c")
    assert (chat.instruction, chat.output) == ("u", "a")
    assert chat.history == (("system", "s"), ("user", "u"), ("assistant", "a"))


def test_the_kinds_of_files_agree(tmp_path: Path) -> None:
    expected = load_examples(write(tmp_path / "a.jsonl", ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in ROWS)
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for name in ("b.json", "c.jsonl", "d.parquet"):
        assert load_examples(tmp_path / name) == expected


def test_conversations_in_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_examples(tmp_path / "a.parquet") == load_examples(write(tmp_path / "a.jsonl", rows))


def test_folders_hold_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "heldout.jsonl", ROWS[:1])
    assert len(load_examples(tmp_path)) == 2
    assert load_examples(tmp_path, "heldout") == load_examples(tmp_path, "heldout.jsonl")
    with pytest.raises(DataError, match=r"no split 'test'.*test\.jsonl.*found heldout\.jsonl, train\.jsonl"):
        load_examples(tmp_path, "test")


BAD_LINES = {
    b'{"instruction": "a", "output": "b"': "not valid JSON",
    b'["a", "b"]': "a list, expected an object",
    b"3": "a int, expected an object",
    b"null": "expected an object",
    b"{}": r"columns \(none\) make no example",
    b'{"frage": "a", "antwort": "b"}': "columns antwort, frage make no example: expected instruction and output",
    b'{"instruction": "a", "output": 3}': "column output is int, not text",
    b'{"instruction": null, "output": "b"}': "column instruction is NoneType, not text",
    b'{"prompt": "a", "completion": ["b"]}': "column completion is list",
    b'{"instruction": "a", "output": "\xff"}': "not UTF-8",
    b'{"messages": "hello"}': "messages must be a list",
    b'{"messages": []}': "must end with a user's and then the assistant's, found roles: none",
    b'{"messages": [{"role": "assistant", "content": "a"}]}': "found roles: assistant",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}': "column content is missing",
    b"[" * 100_000: "not valid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=BAD_LINES[line]) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    def refused(source: str | Path, reason: str) -> None:
        with pytest.raises(DataError, match=reason) as caught:
            load_examples(source)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "missing.jsonl", r"no data at .*missing\.jsonl")
    refused("data/missing.jsonl", "no data at data/missing.jsonl")
    refused(write(tmp_path / "empty.jsonl", []), "holds no examples")
    refused(write(tmp_path / "table.xlsx", []), "unknown kind of file; expected .jsonl")
    (tmp_path / "object.json").write_text("{}")
    refused(tmp_path / "object.json", "holds a dict, expected a list")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    refused(tmp_path / "bad.parquet", "not a readable Parquet file")
    (tmp_path / "wide.jsonl").write_bytes(json.dumps(ROWS[0]).encode("utf-16"))
    refused(tmp_path / "wide.jsonl", "not UTF-8 text, but UTF-16")


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset, split: ROWS if split == "train" else [])
    assert [example.output for example in load_examples("owner/name")] == [row["output"] for row in ROWS]
    with pytest.raises(DataError, match="owner/name, split 'test', holds no examples"):
        load_examples("owner/name", "test")

    def offline(name: str, subset: None, split: str) -> None:
        raise ConnectionError("cannot reach the Hub\nwith details")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(
        DataError, match=r"no file or folder owner/name, and no split 'train'.*\(cannot reach the Hub\)$"
    ):
        load_examples("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"no file or folder owner/name; .* pip install 'fedloom\[hub\]'"):
        load_examples("owner/name")


def test_clients_of_a_folder(tmp_path: Path) -> None:
    for name in ("bob", "ada"):
        write(tmp_path / "folders" / name / "train.jsonl", ROWS)
        write(tmp_path / "files" / f"{name}.jsonl", ROWS)
        write(tmp_path / "named" / f"site-{name}.jsonl", ROWS)
        write(tmp_path / "deep" / name / "own" / "data.jsonl", ROWS)
    (tmp_path / "folders" / ".cache").mkdir()
    (tmp_path / "files" / "notes.txt").touch()
    (tmp_path / "deep" / "cyd").mkdir()
    for source, end in (
        ("folders", "folders/ada"),
        ("folders/{client}", "folders/ada"),
        ("files", "files/ada.jsonl"),
        ("files/{client}.jsonl", "files/ada.jsonl"),
        ("named/site-{client}.jsonl", "named/site-ada.jsonl"),
        ("deep/{client}/own/data.jsonl", "deep/ada/own/data.jsonl"),
    ):
        found = client_sources(f"{tmp_path}/{source}")
        assert list(found) == ["ada", "bob"], source
        assert found["ada"] == tmp_path / end
        assert len(load_examples(found["bob"])) == 2
    for source, reason in (
        ("nowhere", "is not a folder"),
        ("nowhere/{client}", "no client"),
        ("deep/cyd", "no client"),
    ):
        with pytest.raises(DataError, match=reason):
            client_sources(f"{tmp_path}/{source}")


def examples(count: int, labels: int = 5) -> list[Example]:
    return [Example(f"question {i}", f"answer {i}", columns={"topic": f"t{i % labels}"}) for i in range(count)]


def parting(
    kind: str, num_clients: int, seed: int = 0, *, column: str | None = "topic", alpha: float = 0.5
) -> tuple[DataSettings, FederationSettings]:
    """[data] and [federation] of a split."""
    data = DataSettings(partitioner=kind, dirichlet_alpha=alpha, label_column=column, id_column=column)
    return data, FederationSettings(num_clients=num_clients, seed=seed)


@given(
    count=st.integers(1, 200),
    labels=st.integers(1, 8),
    num_clients=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    kind=st.sampled_from(sorted(PARTITIONERS)),
    alpha=st.floats(0.01, 100),
)
@settings(max_examples=150)
def test_every_example_has_exactly_one_client(
    count: int, labels: int, num_clients: int, seed: int, kind: str, alpha: float
) -> None:
    data = examples(count, labels)
    chosen = parting(kind, num_clients, seed, alpha=alpha)
    try:
        split = partition(data, *chosen)
    except DataError as error:
        assert "gets no examples" in str(error) or count < num_clients
        assert kind != "iid" or count < num_clients
        return
    assert sorted(index for held in split.clients.values() for index in held) == list(range(count))
    assert all(split.clients.values())
    assert partition(data, *chosen) == split


def test_each_partitioner_does_what_it_says() -> None:
    data = examples(1000)

    def topics(kind: str, **changes: object) -> list[set[str]]:
        split = partition(data, *parting(kind, 5, 7, **changes))
        return [{str(data[index].columns["topic"]) for index in held} for held in split.clients.values()]

    sizes = [len(held) for held in partition(data, *parting("iid", 3)).clients.values()]
    assert sorted(sizes) == [333, 333, 334]
    first = partition(data, *parting("iid", 3)).clients["client-00"]
    assert first != sorted(first), "shuffled first"
    assert partition(data, *parting("iid", 3, 1)).clients["client-00"] != first
    assert all(len(held) <= 2 for held in topics("shards"))
    assert topics("natural") == [{f"t{i}"} for i in range(5)]
    assert all(len(held) == 5 for held in topics("dirichlet", alpha=100.0))
    shares = [
        sorted(len(held) for held in partition(data, *parting("dirichlet", 5, seed, alpha=alpha)).clients.values())
        for seed, alpha in ((1, 0.5), (1, 100.0))
    ]
    assert shares[0][-1] - shares[0][0] > 5 * (shares[1][-1] - shares[1][0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_clients": 11}, "10 examples cannot be split among 11"),
        ({"kind": "dirichlet", "column": None}, "needs the name of a column"),
        ({"kind": "natural", "column": "site"}, "no label or id in column 'site'.*has columns topic"),
        ({"kind": "shards", "num_clients": 9}, "client 'client-.*' gets no examples"),
    ],
)
def test_partitions_that_cannot_be_made(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        partition(examples(10), *parting(**{"kind": "iid", "num_clients": 2, **changes}))


def test_the_demo_data_can_be_split_among_a_thousand_clients() -> None:
    found = [load_examples(path / "train.jsonl") for path in sorted((TESTBED / "data").iterdir())]
    data = [example for some in found for example in some]
    for kind, fewest, most, domains in (("iid", 7, 8, 3.0), ("shards", 6, 8, 1.5), ("dirichlet", 1, 80, 2.0)):
        held = partition(data, *parting(kind, 1000, 0, column="domain")).clients.values()
        sizes = [len(own) for own in held]
        assert len(held) == 1000 and sum(sizes) == len(data) == 7200
        assert fewest <= min(sizes) and max(sizes) <= most, kind
        mean = sum(len({data[index].columns["domain"] for index in own}) for own in held) / 1000
        assert mean >= domains if kind == "iid" else mean < 3.0, kind


def test_a_manifest_holds_only_for_its_data(tmp_path: Path) -> None:
    data, path = examples(40), tmp_path / "split.json"
    split = partition(data, *parting("dirichlet", 4, 1, alpha=5.0))
    save_manifest(path, split)
    assert load_manifest(path, data) == split
    for changed in (data[:-1], data[::-1], [replace(data[0], output="other"), *data[1:]]):
        with pytest.raises(DataError, match="made from other data"):
            load_manifest(path, changed)
    save_manifest(path, Manifest(split.settings, data_digest(data), {**split.clients, "extra": [0]}))
    with pytest.raises(DataError, match="exactly one client"):
        load_manifest(path, data)
    for broken in ("", "{}", '{"clients": 3}', path.read_text()[:-30]):
        path.write_text(broken)
        with pytest.raises(DataError, match="not a readable split manifest"):
            load_manifest(path, data)
