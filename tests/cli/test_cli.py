"""The command line: what it prints, how it fails, what it passes on. A stand-in for the engine keeps its contract."""

import io
import json
import shlex
import shutil
import sys
import types
from contextlib import nullcontext

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedloom.cli import funnel
from fedloom.cli import main as cli
from fedloom.cli import studies as commands
from fedloom.errors import ConfigError, DataError, FedloomError
from fedloom.records.config import Config
from fedloom.records.configfile import load_config, parse
from fedloom.records.events import RunFacts, RunSummary
from fedloom.records.ledger import Evaluation, Ledger, RunRow, Training, Transfer
from fedloom.report.live import LineView, LiveView, watch

CLIENTS = ("ada", "bob")


class Engine:
    """Plays `rounds` rounds of events and writes their ledger; `failure` is raised in round 2."""

    def __init__(self):
        self.calls = []
        self.failure = None
        self.reason, self.notes = "", ()
        self.writes_settings = False

    def run(self, config, out, *, resume, force, observer, nursery=None):
        self.calls.append((config, out, resume))
        self.forced, self.nursery = force, nursery
        out.mkdir(parents=True)
        if self.writes_settings:
            (out / "config.toml").touch()
        rounds = config.federation.num_rounds
        observer.run_started(RunFacts(config.method.name, config.model.path, CLIENTS, rounds, 1000, out))
        with Ledger(out / "ledger.jsonl") as ledger:
            ledger.append(RunRow(config.method.name, config.model.path, CLIENTS, rounds, 1000, config.federation.seed))
            ledger.append(Evaluation(0, "bank", 0.25, 1.0))
            observer.round_finished(0, rounds, scored(0, bank=0.25), 0, 0, 0.1)
            for round in range(1, rounds + 1):
                if self.failure and round == 2:
                    raise self.failure
                self.play(round, rounds, ledger, observer)
        (out / "report.html").touch()
        summary = RunSummary(out, config.method.name, rounds, failure=self.reason, notes=self.notes)
        observer.run_finished(summary)
        return summary

    def play(self, round, rounds, ledger, observer):
        for client in CLIENTS:
            observer.client_started(round, client)
            ledger.append(Training(round, client, 1.5, 10, 100))
            ledger.append(Transfer(round, client, "up", "update", 2048))
            observer.client_finished(round, client, 1.5, 2048, 0)
        ledger.append(Evaluation(round, "bank", 0.75, 1.0))
        observer.round_finished(round, rounds, scored(round, bank=0.75), 4096, 0, 1.25)


def scored(round, **exact_match):
    return {domain: Evaluation(round, domain, value, 1.0) for domain, value in exact_match.items()}


@pytest.fixture
def engine(monkeypatch, tmp_path):
    engine = Engine()
    module = types.ModuleType("fedloom.server.local")
    module.run_local = engine.run
    monkeypatch.setitem(sys.modules, "fedloom.server.local", module)
    monkeypatch.setattr("fedloom.server.local", module, raising=False)
    monkeypatch.chdir(tmp_path)
    return engine


@pytest.fixture
def call(monkeypatch):
    """Run the command line in-process; returns (exit code, stdout, stderr)."""

    def call(*arguments, width=200):
        screen, complaints = io.StringIO(), io.StringIO()
        for module in (cli, commands):
            monkeypatch.setattr(module, "screen", Console(file=screen, width=width))
        monkeypatch.setattr(funnel, "complaints", Console(file=complaints, width=width))
        monkeypatch.setattr(cli, "complaints", funnel.complaints)
        result = CliRunner().invoke(cli.app, list(map(str, arguments)))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, screen.getvalue() + result.stdout, complaints.getvalue() + result.stderr

    return call


def settings_file(folder, text="[federation]\nnum_rounds = 3\n"):
    (folder / "try.toml").write_text(text, encoding="utf-8")
    return folder / "try.toml"


def test_version_and_help(call):
    code, out, _ = call("--version")
    assert (code, out.split()[0]) == (0, "fedloom")
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in ("demo", "run", "methods", "inspect", "init", "compare"))


def test_init_writes_a_file_that_loads_to_the_defaults(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("init")
    assert (code, out) == (0, "wrote fedloom.toml; next: fedloom run fedloom.toml\n")
    config = load_config(tmp_path / "fedloom.toml")
    assert config.lora == Config().lora
    code, _, err = call("init")
    assert (code, err.count("\n")) == (2, 1)
    assert "fedloom.toml exists already" in err


def test_init_fills_in_what_it_is_told(call, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows").mkdir()
    for name in ("rows/bank.jsonl", "rows/my lab.jsonl.gz", "test.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    both = ("--data", "rows/bank.jsonl", "--data", "rows/my lab.jsonl.gz")
    code, out, _ = call("init", "a.toml", "--model", "model", *both, "--heldout", "test.jsonl")
    assert (code, out) == (0, "wrote a.toml; next: fedloom preview a.toml\n")
    config = load_config(tmp_path / "a.toml")
    assert (config.model.path, config.data.heldout) == (str(tmp_path / "model"), str(tmp_path / "test.jsonl"))
    found = {name: [one.source for one in sources] for name, sources in config.data.sources.items()}
    assert found == {
        "bank": [str(tmp_path / "rows" / "bank.jsonl")],
        "my lab": [str(tmp_path / "rows" / "my lab.jsonl.gz")],
    }
    # From another folder, and with names of the Hub, which stay as they are.
    assert call("init", "rows/b.toml", "--model", "owner/name-1.5B", "--data", "rows")[0] == 0
    config = load_config(tmp_path / "rows" / "b.toml")
    assert (config.model.path, config.data.source) == ("owner/name-1.5B", str(tmp_path / "rows"))
    assert call("init", "c.toml", "--data", "test.jsonl", "--heldout", "validation")[0] == 0
    config = load_config(tmp_path / "c.toml")
    assert (config.data.partitioner, config.federation.num_clients, config.data.heldout) == ("iid", 2, "validation")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "nowhere"), "--model nowhere: no such file or folder, and no name on the Hub"),
        (("--data", "rows/lap.jsonl"), "--data rows/lap.jsonl: no such file or folder"),
        (("--data", "rows/lab.jsonl", "--data", "more/lab.csv"), "would be sites of the same name"),
    ],
)
def test_init_writes_nothing_where_something_is_missing(call, tmp_path, monkeypatch, words, said):
    for name in ("rows/lab.jsonl", "more/lab.csv"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    code, _, err = call("init", "a.toml", *words)
    assert code == 2 and said in " ".join(err.split())
    assert not (tmp_path / "a.toml").exists()


def test_a_run_prints_one_plain_line_a_round_and_closes_with_tables(call, engine, tmp_path):
    code, out, err = call("run", settings_file(tmp_path), "--set", "lora.r=4")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "fedsrd: 2 clients, 3 rounds, 1,000 values, in runs/try"
    assert (
        lines[2]
        == "round 1/3  training loss 1.500  up 4.0 KiB, down 0 B  exact match 75.0 %  loss 1.000 nats a token  1.2 s"
    )
    assert len([line for line in lines if line.startswith("round ")]) == 4
    assert "51.2 % of the 23.4 KiB that dense fp32 FedIT of the largest rank" in " ".join(out.split())
    assert lines[-1] == "in runs/try: report.html, ledger.jsonl (every payload)"
    config, folder, resume = engine.calls[0]
    assert (config.lora.r, folder.as_posix(), resume) == (4, "runs/try", False)


def test_the_folder_comes_from_out_then_the_settings_then_the_file_name(call, engine, tmp_path):
    file = settings_file(tmp_path, '[output]\ndir = "./chosen"\n')
    call("run", file)
    call("run", file, "--out", tmp_path / "other", "--resume")
    assert [(folder, resume) for _, folder, resume in engine.calls] == [
        (tmp_path / "chosen", False),
        (tmp_path / "other", True),
    ]


def test_demo_uses_the_built_in_file_with_what_is_asked(call, engine):
    assert call("demo", "--method", "fedit", "--rounds", 2, "--seed", 7)[0] == 0
    assert call("demo", "--rounds", 1)[0] == 0
    config, folder, _ = engine.calls[0]
    assert (config.method.name, config.federation.num_rounds, config.federation.seed) == ("fedit", 2, 7)
    assert (config.model.path.endswith("/testbeds/model"), config.lora.r) == (True, 16)
    assert [folder.as_posix() for _, folder, _ in engine.calls] == ["runs/demo", "runs/demo-2"]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            DataError("client 'bob': data.jsonl holds no examples"),
            "error: client 'bob': data.jsonl holds no examples\n",
        ),
        (NotADirectoryError(20, "Not a directory", "x"), "error: [Errno 20] Not a directory: 'x'\n"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(call, engine, tmp_path, failure, message):
    engine.failure = failure
    code, _, err = call("run", settings_file(tmp_path))
    assert (code, err) == (2, message)


def test_debug_keeps_the_traceback(call, engine, tmp_path):
    engine.failure = DataError("no")
    with pytest.raises(DataError):
        call("--debug", "run", settings_file(tmp_path))


def test_a_bug_is_not_dressed_up_as_a_mistake(call, engine, tmp_path):
    engine.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        call("run", settings_file(tmp_path))


def test_an_interrupted_run_says_how_to_go_on(call, engine, tmp_path):
    engine.failure = KeyboardInterrupt()
    assert call("run", settings_file(tmp_path), "--out", "early")[2] == "interrupted before the run began\n"
    engine.writes_settings = True
    code, _, err = call("run", settings_file(tmp_path), "--out", "my run")
    assert code == 130
    file = settings_file(tmp_path)
    assert err == f"interrupted; go on with: fedloom run {file} --out 'my run' --resume\n"


def test_the_command_that_an_interruption_prints_is_the_same_run_word_for_word(call, engine, tmp_path):
    """With its settings, its folder and its engine, so that a shell and fedloom take it as it is."""
    engine.failure, engine.writes_settings = KeyboardInterrupt(), True
    sets = ["federation.participants=['ada', 'bob']", "data.source=./it's/{client}", "lora.r=4"]
    chosen = [word for text in sets for word in ("--set", text)]
    err = call("run", settings_file(tmp_path), *chosen, "--force")[2]
    words = shlex.split(err.partition("go on with: fedloom ")[2])
    assert words[0] == "run" and words[-1] == "--resume" and "--force" not in words
    engine.failure = None
    shutil.rmtree(tmp_path / "runs")
    assert call(*words)[0] == 0
    (first, folder, _), (again, same, resumed) = engine.calls
    assert (first, folder, True) == (again, same, resumed)


def test_the_command_names_the_engine(call, monkeypatch, tmp_path):
    def interrupted(settings, folder, command, **options):
        raise ConfigError(command)

    monkeypatch.setattr(cli, "simulate", interrupted)
    err = call("run", settings_file(tmp_path), "--engine", "flower-sim", "--out", tmp_path / "x")[2]
    assert "--engine flower-sim --resume" in err


def test_workers_and_devices_are_settings_of_this_run_alone(call, engine, monkeypatch, tmp_path):
    monkeypatch.setattr("fedloom.server.nursery_process.begin_nursery", lambda config: nullcontext("begun"))
    file = settings_file(tmp_path)
    assert call("run", file, "--workers", 8, "--devices", "cuda:0, cuda:1")[0] == 0
    assert call("demo", "--workers", 2)[0] == 0
    (both, _, _), (demo, _, _) = engine.calls
    assert (both.local.workers, both.local.devices, both.local.count) == (8, ("cuda:0", "cuda:1"), 8)
    assert (demo.local.workers, demo.local.count, Config().local.count) == (2, 2, 0)
    assert parse({"local": {"devices": ["cuda:0", "cuda:1"]}}, "here").local.count == 2
    assert engine.nursery == "begun"
    code, _, err = call("run", file, "--workers", 8, "--engine", "flower-sim")
    assert (code, err.count("\n")) == (2, 1) and "flower-sim has flower.sim_cpus" in err


def test_a_run_that_came_to_nothing_is_an_error_and_shows_no_scores(call, engine, tmp_path):
    engine.reason = "training diverged; lower training.learning_rate"
    code, out, err = call("run", settings_file(tmp_path))
    assert code == 2
    assert err == "error: the run in runs/try failed: training diverged; lower training.learning_rate\n"
    assert "Held-out" not in out and out.splitlines()[-1].startswith("in runs/try: report.html")


def test_what_should_be_known_of_the_end_is_said_before_the_folder(call, engine, tmp_path):
    engine.notes = ("held-out loss rose from 1.000 to 2.000",)
    code, out, _ = call("run", settings_file(tmp_path), "--force")
    assert code == 0 and engine.forced
    assert out.splitlines()[-2] == "note: held-out loss rose from 1.000 to 2.000"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.toml"), "none.toml: no such file"),
        (
            ("run", "try.toml", "--set", "lora.lora_alph=1"),
            "unknown key 'lora.lora_alph' in --set; did you mean 'lora.lora_alpha'?",
        ),
        (("run", "try.toml", "--set", "lora.r=0"), "lora.r is 0; expected at least 1"),
        (("inspect", "none"), "none: no such file or folder; expected a payload"),
        (("inspect", "."), "not a PEFT adapter folder"),
        (("inspect", "try.toml"), "error: "),
    ],
)
def test_mistakes_on_the_command_line(call, engine, tmp_path, arguments, message):
    settings_file(tmp_path)
    code, _, err = call(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: ")
    assert message in err


def test_inspect_shows_a_run(call, engine, tmp_path):
    call("run", settings_file(tmp_path), "--out", "r")
    code, out, _ = call("inspect", "r")
    assert code == 0
    assert "Held-out scores" in out and "exact match %" in out
    assert "12.0 KiB in all" in out


def test_inspect_shows_an_adapter(call, tmp_path):
    torch = pytest.importorskip("torch")
    from fedloom.adapters.settings import AdapterSettings, save_adapter
    from fedloom.lora.pair import LoraPair, LoraState

    modules = ("layers.0.q_proj", "layers.1.q_proj")
    state = LoraState({module: LoraPair(torch.ones(2, 3), torch.ones(5, 2)) for module in modules})
    save_adapter(state, "base", AdapterSettings(r=2, lora_alpha=32), tmp_path)
    code, out, _ = call("inspect", tmp_path)
    assert code == 0
    row = next(line.split() for line in out.splitlines() if "q_proj" in line)
    assert row == ["q_proj", "2", "5", "×", "3", "2", "32", f"{2 * 15**0.5:.4g}"]


def test_inspect_shows_a_payload(call, tmp_path):
    torch = pytest.importorskip("torch")
    from fedloom.compress.entries import Sparse, dense_entry
    from fedloom.wire import Header, Message, encode

    sparse = Sparse((5, 4), torch.tensor([1, 7]), torch.ones(2))
    entries = {
        "layers.0.q_proj/A": dense_entry(torch.ones(4, 3)),
        "layers.0.q_proj/B": sparse,
        "layers.1.q_proj/B": sparse,
    }
    payload = encode(Message(Header("update", "fedsrd", 3, 2, "0" * 32, num_examples=9), entries))
    (tmp_path / "x.fedloom").write_bytes(payload)
    code, out, _ = call("inspect", tmp_path / "x.fedloom")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert f"payload of {len(payload):,} bytes" in out
    assert ["method", "fedsrd"] in lines
    rows = {line[0]: line for line in lines if line}
    assert rows["q_proj/A"][1:4] == ["dense", "fp32,", "none"]
    assert rows["q_proj/A"][4:8] == ["1", "12", "100.00", "%"]
    assert rows["q_proj/B"][1:4] == ["sparse", "fp32,", "gaps"]
    assert rows["q_proj/B"][4:8] == ["2", "4", "10.00", "%"]
    sizes = [int(rows[part][1].replace(",", "")) for part in ("index", "positions", "values")]
    assert sum(sizes) + int(rows["header"][1]) + int(lines[-2][1]) == len(payload)


def test_methods_are_listed_with_their_settings(call):
    from fedloom.methods.table import METHODS

    code, out, _ = call("methods", "--json")
    rows = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert [row["name"] for row in rows] == list(METHODS)
    assert {"paper", "exact", "unequal_ranks", "sends", "receives", "keeps", "settings", "presets"} <= set(rows[0])
    code, out, _ = call("methods")
    assert code == 0
    assert all(name in out for name in METHODS)


def test_methods_are_compared_over_seeds(call, monkeypatch, tmp_path):
    from fedloom.studies import compare

    def play(made, jobs, finished):
        for run in made:
            run.folder.mkdir(parents=True)
            (run.folder / compare.FINISHED).touch()
            with Ledger(run.folder / "ledger.jsonl") as ledger:
                ledger.append(RunRow(run.config.method.name, "m", CLIENTS, 1, 1000, run.seed))
                ledger.append(Evaluation(0, "bank", 0.1, 1.0))
                ledger.append(Training(1, "ada", 1.0, 10, 100, 0.5))
                ledger.append(Transfer(1, "ada", "up", "update", 4000))
                ledger.append(Evaluation(1, "bank", 0.5 + 0.1 * run.seed, 1.0))
            finished(run, 60.0)

    monkeypatch.setattr(compare, "play_runs", play)
    monkeypatch.setattr(compare, "expected_seconds", lambda made, jobs, alike: 30.0 * len(made) / jobs)
    monkeypatch.chdir(tmp_path)
    variants = ("--methods", "fedit,florist:tau=1.0,client_init=warm")
    code, out, _ = call("compare", *variants, "--seeds", 3, "--out", "c")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == ["6 runs, 6 left; a trial of each first", "stated: 3.0 min for 6 runs, 1 at a time"]
    assert lines[2] == "fedit, seed 0: 60 s; about 5 min left"
    assert "taken: 0.0 min, where 3.0 were stated" in lines
    assert len([line for line in lines if "min left" in line]) == 6
    scores, costs = (line.split()[1:] for line in lines if line.strip().startswith("florist:tau=1.0,client_init=warm "))
    paired = "+0.0 ± 0.0 100.0 %"  # the same scores as FedIT's, seed by seed
    assert scores == f"3 10.0 ± 0.0 60.0 ± 24.8 1.000 ± 0.000 {paired}".split()
    assert costs == ["3.9", "KiB", "0", "B", "100.00", "%", "0.50", "0.000"]
    assert (
        "| florist:tau=1.0,client_init=warm | 3 | 10.0 ± 0.0 | 60.0 ± 24.8 |" in (tmp_path / "c/compare.md").read_text()
    )
    assert (tmp_path / "c" / "compare.png").stat().st_size > 10_000
    out = call("compare", *variants, "--seeds", 3, "--out", "c", width=80)[1]
    assert out.splitlines()[0] == "6 runs, all of them complete: nothing is played" and "stated" not in out
    assert {"florist:tau=1.0,", "client_init=warm"} <= set(out.split()), "a long label breaks at its signs"


def test_an_estimate_prints_tables_or_json(call):
    options = (
        "estimate",
        "--preset",
        "tinyllama",
        "--modules",
        "k_proj",
        "--ranks",
        "4,2",
        "--methods",
        "florist:tau=0.9",
    )
    code, out, _ = call(*options, "--json")
    assert code == 0
    result = json.loads(out, parse_constant=pytest.fail)
    assert [row["method"] for row in result["rows"]] == ["florist:tau=0.9"]
    assert result["case"]["clients"] == 2 and result["case"]["ranks"] == [2, 4]
    code, out, _ = call(*options)
    assert code == 0 and "flor" in out and "MiB of one client" in out
    code, out, _ = call(*options[:-1], "fedsrd,FedAvg,fed-sb", "--json")
    assert code == 0 and [row["method"] for row in json.loads(out)["rows"]] == ["fedsrd", "FedAvg", "fed-sb"]


def played(observer, rounds=4):
    """A run that stands in its second round."""
    observer.run_started(RunFacts("fedsrd", "model", CLIENTS, rounds, 1000, "runs/x", warnings=("ada has little",)))
    observer.round_finished(0, rounds, scored(0, bank=0.1, lab=0.3), 0, 0, 0.5)
    for round in (1, 2):
        observer.client_started(round, "ada")
        observer.client_finished(round, "ada", 2.0 / round, 1024, 512)
        observer.client_started(round, "bob")
        if round == 1:
            observer.client_finished(round, "bob", 1.0, 1024, 512)
            observer.round_finished(1, rounds, scored(1, bank=0.5, lab=0.7), 2048, 1024, 10.0)


def test_the_live_view_shows_round_client_loss_bytes_and_time_left():
    view = LiveView()
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    console.print(view)
    assert "loading" in console.file.getvalue()
    played(view)
    console.file.truncate(0)
    console.print(view)
    text = console.file.getvalue()
    assert "round 2/4" in text
    assert "▸ bob" in text
    assert "0:30 left" in text
    assert "exact match 60.0 % (at first 20.0 %)" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert rows["ada"] == ["ada", "1.000", "2.0", "KiB", "1.0", "KiB"]
    assert rows["all"] == ["all", "3.0", "KiB", "1.5", "KiB"]


@pytest.mark.parametrize("kind", [LiveView, LineView])
def test_on_free_text_the_loss_is_shown_first(kind):
    console = Console(file=io.StringIO(), width=120)
    view = kind(console) if kind is LineView else kind()
    view.run_started(RunFacts("fedsrd", "model", CLIENTS, 1, 1000, "runs/x"))
    for round, loss in enumerate((6.36, 4.74)):
        row = Evaluation(round, "bank", 0.0, loss, examples=9, tokens=90, bytes=300, metrics={"chrf": 0.125})
        view.round_finished(round, 1, {"bank": row}, 0, 0, 1.0)
    if kind is LiveView:
        console.print(view)
    text = console.file.getvalue()
    at = [
        text.rindex(words)
        for words in ("loss 4.740 nats a token", "bits a byte 2.052", "chrf 12.5 %", "exact match 0.0 %")
    ]
    assert at == sorted(at)
    if kind is LiveView:
        assert "(at first 6.360 nats a token)" in text and "loss: bank 4.740" in text


def test_notes_stay_above_the_live_view():
    """The view itself is wiped in the end: what is to stay must be no part of it."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    view = LiveView(console)
    played(view)
    for number in range(5):
        view.noted(2, f"client {number} dropped out")
    view.round_finished(2, 4, None, 0, 0, 1.0)
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["fedsrd: 2 clients, 4 rounds, 1,000 values, in runs/x", "note: ada has little"]
    assert lines[2:] == [
        *(f"note, round 2: client {number} dropped out" for number in range(3)),
        "… and 2 more notes on round 2 in the ledger",
    ]


def test_a_terminal_gets_the_live_view_and_a_pipe_gets_lines():
    with watch(Console(file=io.StringIO(), force_terminal=True)) as observer:
        assert isinstance(observer, LiveView)
    console = Console(file=io.StringIO())
    with watch(console) as observer:
        assert isinstance(observer, LineView)
        played(observer)
    first, second, *rounds = console.file.getvalue().splitlines()
    assert first.startswith("fedsrd: ") and second == "note: ada has little"
    assert [line.split()[1] for line in rounds] == ["0/4", "1/4"]


def test_every_error_of_the_library_is_caught():
    import fedloom.errors as errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, FedloomError) for kind in kinds)
