"""`fedloom.run` and its result: where it lives, what it says, how it goes on, and what is refused."""

import gc
import os
import shutil

import pytest

import fedloom
from fedloom.errors import CheckpointError, ConfigError, RoundError
from fedloom.records.ledger import Transfer, read_rows
from fedloom.server import local

DOMAINS = {"bank", "clinic", "depot", "lab"}


@pytest.fixture(scope="module")
def played(small, tmp_path_factory):
    """One run that is looked at by several tests."""
    config = fedloom.load(small / "demo.toml", {"lora.r": 2, "federation.eval_every": 1})
    return fedloom.run(config, method="fedsrd", num_rounds=2, out=tmp_path_factory.mktemp("runs") / "run")


def test_a_run_without_a_folder_vanishes_with_its_result(bed):
    run = fedloom.run(bed, num_rounds=1)
    folder = run.folder
    assert (folder / "report.html").is_file() and len(run.payloads) == 8
    del run
    gc.collect()
    assert not folder.exists() and not folder.parent.exists()


def test_scores_and_losses_are_there_by_round_and_domain(played):
    assert set(played.scores) == set(played.heldout_losses) == {*DOMAINS, "mean"}
    assert list(played.scores_by_round) == list(played.heldout_losses_by_round) == [0, 1, 2]
    assert played.scores_by_round[2] == played.scores
    assert played.heldout_losses_by_round[2] == played.heldout_losses
    losses = played.heldout_losses
    assert losses["mean"] == pytest.approx(sum(losses[domain] for domain in DOMAINS) / 4) and losses["mean"] > 0
    assert set(played.losses) == DOMAINS and all(len(losses) == 2 for losses in played.losses.values())


def test_bytes_are_those_of_the_payloads(played):
    sizes = [row.bytes for row in read_rows(played.folder / "ledger.jsonl") if isinstance(row, Transfer)]
    assert [len(payload) for payload in played.payloads] == sizes
    assert played.bytes == sum(sizes) == played.bytes_up + played.bytes_down
    assert [len(payload) for payload in played.payloads[-2:]] == sizes[-2:]


def test_payloads_keep_their_order_in_a_copy(played, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(played.folder, copy)
    for number, path in enumerate(sorted((copy / "payloads").iterdir(), reverse=True)):
        os.utime(path, (number, number))
    assert list(fedloom.Run.open(copy).payloads) == list(played.payloads)
    headers = [fedloom.describe(payload).header for payload in played.payloads]
    kinds = [(header.kind, header.round) for header in headers]
    assert kinds[:4] == [("update", 1)] * 4
    assert kinds[4:12] == [("change", 1), ("update", 2)] * 4
    assert kinds[12:] == [("change", 2)] * 4


def test_missed_broadcasts_are_in_the_order_of_their_versions(bed):
    settings = {"federation.fraction_train": 0.5, "federation.num_rounds": 12}
    run = fedloom.run(bed, method="fed-dare", settings=settings)
    held = dict.fromkeys(DOMAINS, 0)
    rows = [row for row in read_rows(run.folder / "ledger.jsonl") if isinstance(row, Transfer)]
    for row, payload in zip(rows, run.payloads, strict=True):
        header = fedloom.describe(payload).header
        assert (row.kind, row.bytes) == (header.kind, len(payload))
        if header.kind == "change":
            assert header.base_version == held[row.client]
            held[row.client] += 1
        elif header.kind == "state":
            held[row.client] = header.base_version
    assert set(held.values()) == {12}


def test_the_adapter_is_the_one_that_peft_opens(played):
    adapter = played.adapter
    assert isinstance(adapter, fedloom.LoraState)
    assert "model.layers.0.self_attn.q_proj" in adapter
    assert (played.adapter_folder / "adapter_config.json").is_file()


def test_a_run_shows_itself(played, tmp_path):
    assert repr(played).startswith("Run(fedsrd, 2 rounds, loss 8.")
    html = played._repr_html_()
    assert all(f"<td>{domain}</td>" in html for domain in (*DOMAINS, "mean")) and "KiB up" in html
    picture = played.plot()
    assert picture._repr_png_().startswith(b"\x89PNG") and len(repr(picture)) < 80
    assert picture.save(tmp_path / "curve.png").read_bytes() == picture.png


def test_a_run_that_was_not_evaluated_shows_itself(bed):
    run = fedloom.run(bed, num_rounds=1)
    assert run.scores == run.heldout_losses == {} and "score" not in repr(run)
    assert run._repr_html_().startswith("<p>fedsrd, 1 rounds") and "<table>" not in run._repr_html_()


def test_a_folder_is_opened_again(played):
    again = fedloom.Run.open(str(played.folder))
    assert (again.scores, again.bytes, again.losses) == (played.scores, played.bytes, played.losses)
    assert list(again.payloads) == list(played.payloads)
    with pytest.raises(ConfigError, match=r"holds no run: expected a folder with a ledger\.jsonl"):
        fedloom.Run.open(played.folder / "adapter")


def test_a_settings_file_is_taken_by_its_path(small):
    settings = {"data.heldout": None, "lora.r": 2}
    run = fedloom.run(str(small / "demo.toml"), method="florist:tau=0.9", num_rounds=1, settings=settings)
    assert run.report.run.method == "florist"
    assert "tau = 0.9" in (run.folder / "config.toml").read_text()


def interrupted(bed, out, monkeypatch, method):
    """A run that was stopped in the middle of its second round."""
    calls = []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return turn(*arguments)

    turn = local.client_turn
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(local, "client_turn", stopping)
        fedloom.run(bed, method=method, out=out)


def test_an_interrupted_run_is_resumed_to_the_same_bytes(bed, tmp_path, monkeypatch, halves):
    interrupted(bed, tmp_path / "run", monkeypatch, halves(keep=0.25))
    resumed = fedloom.run(bed, method=halves(keep=0.25), out=tmp_path / "run", resume=True)
    assert list(resumed.payloads) == list(fedloom.run(bed, method=halves(keep=0.25)).payloads)


def test_a_run_is_not_resumed_with_another_method(bed, tmp_path, monkeypatch, halves):
    interrupted(bed, tmp_path / "run", monkeypatch, halves(keep=0.25))
    named = fedloom.replace(halves(keep=0.25), name="others")
    for other in ("fedit", halves(keep=0.5), named):
        with pytest.raises(CheckpointError, match=r"config\.toml differs from the settings given"):
            fedloom.run(bed, method=other, out=tmp_path / "run", resume=True)


def test_resuming_needs_a_folder_and_a_fresh_run_an_empty_one(bed, played):
    with pytest.raises(ConfigError, match="resume needs out="):
        fedloom.run(bed, resume=True)
    with pytest.raises(ConfigError, match="force needs out="):
        fedloom.run(bed, force=True)
    with pytest.raises(CheckpointError, match="holds another run"):
        fedloom.run(bed, out=played.folder)


def test_a_run_that_came_to_nothing_raises_and_the_next_one_takes_its_place(bed, tmp_path):
    with pytest.raises(RoundError, match=r"run failed: .* lower training\.learning_rate"):
        fedloom.run(bed, num_rounds=1, settings={"training.learning_rate": 1e30}, out=tmp_path / "run")
    assert fedloom.Run.open(tmp_path / "run").report.facts.end.status == "failed"
    assert fedloom.run(bed, num_rounds=1, out=tmp_path / "run").adapter
    forced = fedloom.run(bed, num_rounds=1, seed=7, out=tmp_path / "run", force=True)
    assert forced.report.run.seed == 7 and fedloom.Run.open(tmp_path / "run-old").report.run.seed == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "fedsdr"}, "method.name 'fedsdr' is unknown; did you mean 'feds"),
        ({"method": "fedsrd:papr"}, "method.preset 'papr' is unknown; did you mean 'paper'"),
        ({"method": "nowhere.methods:mine"}, "there is no module 'nowhere'"),
        ({"num_rounds": 0}, "federation.num_rounds is 0; expected at least 1"),
        ({"settings": {"training.max_step": 3}}, "training.max_step"),
        ({"settings": {"lora.r": "many"}}, 'lora.r is "many"'),
        ({"settings": {"method.kep": 1}}, "key 'kep' is unknown"),
    ],
)
def test_wrong_settings_are_named(bed, arguments, words):
    with pytest.raises(ConfigError, match=words):
        fedloom.run(bed, **arguments)


def test_a_method_that_is_built_takes_no_settings(bed, halves):
    with pytest.raises(ConfigError, match=r"'halves' is built already: give method\.keep to its builder"):
        fedloom.run(bed, method=halves(), settings={"method.keep": 0.1})


def test_a_testbed_or_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no testbed 'demos': expected one of demo, many"):
        fedloom.testbed("demos")
    with pytest.raises(ConfigError, match=r"missing\.toml: no such file"):
        fedloom.run(tmp_path / "missing.toml")
