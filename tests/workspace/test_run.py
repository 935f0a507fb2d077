"""Whole runs on the shipped model: what they leave behind, kill and resume, attendance."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedloom.errors import CheckpointError
from fedloom.lora.pair import digest
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.records.ledger import Evaluation, Note, Training, Transfer, read_rows, totals
from fedloom.records.sections.training import count_steps
from fedloom.server.local import LocalSites, run_local
from fedloom.server.loop import Rounds
from fedloom.workspace.assemble import load_setup
from fedloom.workspace.folder import RunFolder
from small_testbed import small_testbed

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
SHORT = ["federation.num_rounds=3", "training.max_steps=2", "federation.eval_every=0", "output.keep_payloads=true"]
no_picture = pytest.mark.usefixtures("no_picture")
TWO = ["federation.participants=['bank', 'lab']"]


Settings = Callable[..., Config]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed with six examples in every file: nothing here is about how many there are."""
    return small_testbed(tmp_path_factory.mktemp("testbed"))


@pytest.fixture(scope="module")
def settings(small: Path) -> Settings:
    return lambda *overrides: load_config(small / "demo.toml", [*SHORT, *overrides])


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two sites that is looked at, and copied, by several tests."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_local(settings(*TWO), folder)
    return folder


def finished(folder: Path) -> tuple[bytes, object, list[float]]:
    """What must not depend on interruptions: the adapter's bytes, the sums of bytes, the losses and scores."""
    rows = read_rows(folder / "ledger.jsonl")
    losses = [row.loss for row in rows if isinstance(row, Training | Evaluation)]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), totals(rows), losses


OPENED_BY_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
run, data = sys.argv[1:]
base = json.load(open(f"{run}/adapter/adapter_config.json"))["base_model_name_or_path"]
tokenizer = AutoTokenizer.from_pretrained(f"{run}/adapter", padding_side="left")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), f"{run}/adapter").eval()
rows = [json.loads(line) for line in open(data)]
hits = 0
for start in range(0, len(rows), 100):
    some = rows[start:start + 100]
    prompts = tokenizer([row["instruction"] + "\\n" for row in some], return_tensors="pt", padding=True)
    prompts.pop("token_type_ids", None)
    with torch.no_grad():
        out = model.generate(**prompts, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    for row, ids in zip(some, out[:, prompts["input_ids"].shape[1]:].tolist()):
        ended = tokenizer.eos_token_id in ids
        text = tokenizer.decode(ids[:ids.index(tokenizer.eos_token_id)] if ended else ids)
        hits += ended and text == row["output"]
print(hits / len(rows))
"""


def test_the_adapter_opened_by_plain_peft_scores_what_the_run_said(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "depot").symlink_to(TESTBED / "data" / "depot")
    longer = [*SHORT, f"data.source={tmp_path}/data/{{client}}", "training.max_steps=12", "method.name=fedit"]
    config = load_config(TESTBED / "demo.toml", longer)
    summary = run_local(config, tmp_path / "run")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= {"adapter", "checkpoints", "config.toml", "curve.png", "ledger.jsonl", "report.html"}
    assert {path.name for path in (tmp_path / "run" / "adapter").iterdir()} >= {"README.md", "tokenizer.json"}
    assert summary.after["depot"] > summary.before["depot"] + 0.1
    told = subprocess.run(
        [sys.executable, "-c", OPENED_BY_PEFT, str(tmp_path / "run"), str(TESTBED / "data/depot/heldout.jsonl")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert float(told.stdout) == pytest.approx(summary.after["depot"], abs=1 / 300 + 1e-9)


@no_picture
@pytest.mark.parametrize("method", ["fedsrd", "florist"])
def test_everybody_ends_with_the_servers_bits_whoever_was_sampled(tmp_path: Path, method: str, settings: Settings):
    config = settings("federation.fraction_train=0.5", "federation.drop_out=0.3", f"method.name={method}")
    with RunFolder.open(tmp_path / "run", config, resume=False) as folder:
        setup = load_setup(config)
        simulation = Rounds(setup, folder, Silent(), LocalSites(setup))
        simulation.play(resume=False)
    for client, state in simulation.sites.states.items():
        assert state.version == simulation.server.version, client
        assert digest(state.adapter) == digest(simulation.server.adapter), client
        assert digest(state.frozen) == digest(simulation.server.frozen), client


def test_the_ledger_counts_the_bytes_that_were_kept(whole: Path):
    rows = [row for row in read_rows(whole / "ledger.jsonl") if isinstance(row, Transfer)]
    kept = sum(path.stat().st_size for path in (whole / "payloads").iterdir())
    assert kept == sum(row.bytes for row in rows) == totals(rows).bytes
    assert all(sum(row.parts.values()) == row.bytes for row in rows)
    assert sum(row.direction == "up" for row in rows) == sum(row.direction == "down" for row in rows) == 6


@no_picture
def test_a_round_without_answers_is_noted_and_the_run_goes_on(tmp_path: Path, settings: Settings):
    run_local(settings(*TWO, "federation.drop_out=0.9", "federation.seed=1"), tmp_path / "run")
    notes = [row.text for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Note)]
    assert any("nobody answered" in text for text in notes)


class Crash(Exception):
    """Stands for a power cut."""


SLOW = pytest.mark.slow


@no_picture
@pytest.mark.parametrize(
    ("moment", "call"),
    [
        ("transfer", 1),
        pytest.param("save", 4, marks=SLOW),
        pytest.param("transfer", 4, marks=SLOW),
        pytest.param("save", 1, marks=SLOW),
    ],
)
def test_a_run_resumed_after_a_crash_ends_the_same(
    tmp_path: Path, moment: str, call: int, monkeypatch, settings: Settings, whole: Path
):
    config = settings(*TWO)
    original, count = getattr(RunFolder, moment), iter(range(1, 1000))

    def crash(self: RunFolder, *args: object, **more: object) -> None:
        if next(count) == call:
            raise Crash
        original(self, *args, **more)

    monkeypatch.setattr(RunFolder, moment, crash)
    with pytest.raises(Crash):
        run_local(config, tmp_path / "broken")
    monkeypatch.undo()
    run_local(config, tmp_path / "broken", resume=True)
    assert finished(tmp_path / "broken") == finished(whole)


def test_a_run_killed_by_the_system_resumes_to_the_same_bytes(tmp_path: Path, small: Path, settings: Settings):
    rounds = "federation.num_rounds=8"  # so that the kill comes before the end, however late
    run_local(settings(*TWO, rounds), tmp_path / "whole")
    overrides = [part for text in [*SHORT, *TWO, rounds] for part in ("--set", text)]
    command = [sys.executable, "-m", "fedloom", "run", str(small / "demo.toml"), *overrides, "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "round-00001.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "killed" / "adapter").exists()
    resumed = [*command, str(tmp_path / "killed"), "--resume"]
    told = subprocess.run(resumed, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "exact match" in told.stdout.lower()
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")


def test_a_folder_is_never_overwritten(tmp_path: Path, settings: Settings):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.docx").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other files"):
        run_local(settings(), tmp_path / "run")


def test_a_resumed_run_must_be_the_same_run(whole: Path, settings: Settings):
    with pytest.raises(CheckpointError, match="--resume"):
        run_local(settings(*TWO), whole)
    with pytest.raises(CheckpointError, match="differs from the settings"):
        run_local(settings(*TWO, "training.learning_rate=0.001"), whole, resume=True)


def test_a_truncated_checkpoint_is_named(tmp_path: Path, whole: Path, settings: Settings):
    copy = Path(shutil.copytree(whole, tmp_path / "run"))
    newest = sorted((copy / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=newest.name):
        run_local(settings(*TWO), copy, resume=True)


@no_picture
def test_merging_methods_export_one_adapter_of_capped_rank(tmp_path: Path, settings: Settings):
    config = settings(*TWO, "method.name=florist", "method.preset=paper", "output.max_rank=6")
    summary = run_local(config, tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert max(t.shape[0] for name, t in tensors.items() if "lora_A" in name) <= 6
    assert 0 < summary.lost_energy < 1
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] <= 6


@no_picture
@pytest.mark.parametrize("method", ["florist", "fed-sb"])
def test_clients_of_unequal_rank_and_alpha_run_to_the_end(tmp_path: Path, method: str, settings: Settings):
    config = settings(*TWO, f"method.name={method}", "clients.lab.r=4", "clients.bank.lora_alpha=8")
    summary = run_local(config, tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Transfer)]
    up = {
        client: sum(r.bytes for r in rows if r.client == client and r.direction == "up") for client in ("bank", "lab")
    }
    assert up["lab"] < up["bank"] / 3 and summary.lost_energy == 0.0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@no_picture
def test_epochs_and_a_clients_own_settings_reach_its_training(tmp_path: Path, small: Path, settings: Settings):
    """A client with a rate of its own sends what it would send if all had that rate; the other one does not."""
    epochs = ["training.max_steps=null", "training.num_train_epochs=1.2", "federation.num_rounds=1"]
    common = [*TWO, *epochs, "clients.bank.max_steps=1", "data.heldout=null"]
    run_local(settings(*common, "clients.lab.learning_rate=1e-3"), tmp_path / "own")
    run_local(settings(*common, "training.learning_rate=1e-3"), tmp_path / "all")
    files = [sorted((tmp_path / out / "payloads").glob("*-up-*")) for out in ("own", "all")]
    same = {a.name.split("-")[1]: a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True)}
    assert same == {"bank": False, "lab": True}
    steps = {row.client: row.steps for row in read_rows(tmp_path / "own/ledger.jsonl") if isinstance(row, Training)}
    held = len((small / "data/lab/train.jsonl").read_text(encoding="utf-8").splitlines())
    assert steps == {"bank": 1, "lab": count_steps(1.2, held, 2)} and steps["lab"] > 3  # of three steps is an epoch
