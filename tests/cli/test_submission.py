"""`fedloom run --engine flower` at a terminal: what it shows, how it is left, how every end is told; no SuperLink."""

from __future__ import annotations

import io
import shlex
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("flwr", reason="the extra `flower` is not installed: pip install 'fedloom[flower]'")

from fedloom.cli import funnel, submission
from fedloom.cli import main as cli
from fedloom.errors import RoundError
from fedloom.flower import launch
from fedloom.flower.control import keep_number, read_number
from fedloom.flower.launch import RAISED, SILENT, RunState
from fedloom.records.configfile import dump_file, load_config
from fedloom.records.ledger import Aggregation, Ledger, Roll, Row, RunRow, Training, Transfer
from fedloom.records.lock import take_lock
from fedloom.records.session import End, Session

RUN = RunRow(method="fedsrd", model="m", clients=("ada", "bob"), num_rounds=2, adapter_values=1000, seed=0)
ROUND = [
    Training(1, "ada", 0.5, 3, 10),
    Transfer(1, "ada", "up", "update", 2048),
    Roll(1, ("ada", "bob"), seconds=3.0),
    Aggregation(1, {}, 0.5),
]
SETTINGS = '[federation]\nparticipants = ["ada", "bob"]\nnum_rounds = 2\n[flower]\ninsecure = true\n'


def state(status: str = "running", ended: str = "", details: str = "") -> RunState:
    return RunState(status, ended, details, 0, 0)


class SuperLink:
    """Takes a run and plays a script: at each look what its server app writes, and what it says of the run.

    A step is (rows to write, the run's state); a step may be an error or KeyboardInterrupt, which is raised.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.script, self.stopped = folder, [], []
        self.lock = None

    @contextmanager
    def open(self, config):
        yield self

    def submit(self, client, config, out, resume, force) -> int:
        self.config, self.asked = config, (out, resume, force)
        return 17

    def wait_for_end(self, client, number, look) -> RunState:
        for rows, told in self.script:
            if isinstance(rows, BaseException):
                raise rows
            self.write(rows)
            look(told)
        return told

    def write(self, rows: list[Row]) -> None:
        if not rows:
            return
        if self.lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = take_lock(self.folder)
            (self.folder / "config.toml").write_text(dump_file(self.config))
            (self.folder / "job").write_text("0123456789abcdef")
            keep_number(self.folder, 17)
        with Ledger(self.folder / "ledger.jsonl") as ledger:
            for row in rows:
                ledger.append(row)
        if isinstance(rows[-1], End):
            self.die()

    def die(self) -> None:
        """The server app's process is gone."""
        if self.lock:
            self.lock.close()

    def stop(self, client, number) -> None:
        self.stopped.append(number)
        self.die()


@pytest.fixture
def link(monkeypatch, tmp_path):
    link = SuperLink(tmp_path / "runs" / "try")
    for name, made in (("open_control", link.open), ("submit", link.submit), ("wait_for_end", link.wait_for_end)):
        monkeypatch.setattr(launch, name, made)
    monkeypatch.setattr(launch, "stop", link.stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "try.toml").write_text(SETTINGS)
    yield link
    link.die()


@pytest.fixture
def call(monkeypatch):
    """The command line as a pipe sees it; returns (exit code, lines on stdout, lines on stderr)."""

    def call(*words):
        screen, complaints = io.StringIO(), io.StringIO()
        monkeypatch.setattr(cli, "screen", Console(file=screen, width=200))
        monkeypatch.setattr(funnel, "complaints", Console(file=complaints, width=200))
        done = CliRunner().invoke(cli.app, list(words))
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, screen.getvalue().splitlines(), complaints.getvalue().splitlines()

    return call


RUNNING = ("run", "try.toml", "--set", "training.max_steps=3", "--engine", "flower")
AGAIN = "fedloom run try.toml --set training.max_steps=3 --out runs/try --engine flower --resume"
BEGUN = ([RUN, Session(0, "now", "")], state())


def test_a_run_is_shown_from_its_ledger_and_closes_like_a_local_one(link, call):
    link.script = [
        ([], state("pending")),
        BEGUN,
        (ROUND, state()),
        ([End(2, "finished")], state("finished", "completed")),
    ]
    code, out, err = call(*RUNNING)
    assert (code, err) == (0, [])
    assert out[:3] == [
        "run 17 is submitted",
        "fedsrd: 2 clients, 2 rounds, 1,000 values, in runs/try",
        "round 1/2  training loss 0.500  up 2.0 KiB, down 0 B  3.5 s",
    ]
    assert out[-1].startswith("in runs/try: ledger.jsonl")
    assert link.asked == (Path("runs/try"), False, False) and link.config.training.max_steps == 3


LOST = "the SuperLink hears nothing of the server's app any more"
FULL = "No space left on device"
ENDS = {
    "failed": ([End(1, "failed", "too few sites")], "failed", RAISED + "x", "failed", "too few sites"),
    "killed": ([], "failed", SILENT, "failed", LOST),
    "superlink killed": ([End(1, "interrupted")], "failed", SILENT, "was interrupted", LOST),
    "disk full": ([], "failed", RAISED + FULL, "failed", FULL),
    "stopped": ([End(1, "interrupted")], "stopped", "", "was interrupted", "it was stopped by"),
}
"""What happens → rows that the server's app still writes, Flower's sub-status and details, what is said."""


@pytest.mark.parametrize("end", ENDS)
def test_every_end_is_told_in_words_with_the_command_that_goes_on(link, call, end):
    rows, ended, details, how, why = ENDS[end]
    link.script = [BEGUN, (ROUND, state()), (rows, state("finished", ended, details))]
    code, _, err = call(*RUNNING)
    assert code == 2 and len(err) == 2
    assert err[0].startswith(f"error: run 17 in runs/try {how} after round 1 of 2: {why}")
    assert err[1] == f"go on with: {AGAIN}"


@pytest.mark.parametrize("said", [AGAIN, "fedloom run runs/try/config.toml --out runs/try --engine flower --resume"])
def test_the_command_that_goes_on_is_taken_word_for_word(link, call, said):
    """Both of them: the one that the terminal prints, and the one that `fedloom status` makes of the folder alone."""
    link.script = [BEGUN, (ROUND, state()), ([End(1, "failed", "x")], state("finished", "failed"))]
    call(*RUNNING)
    told = " ".join(call("status", "runs/try", "--once")[1])
    assert "go on with: fedloom run runs/try/config.toml --out runs/try --engine flower --resume" in told
    link.script = [([], state("finished", "failed", RAISED + "no"))]
    code, _, err = call(*shlex.split(said)[1:])
    assert (code, err[0]) == (2, "error: run 17 in runs/try failed before it began: no")
    assert link.asked == (Path("runs/try"), True, False)


def test_what_differs_is_named_before_anything_is_submitted(link, call):
    link.script = [BEGUN, (ROUND, state()), ([End(1, "failed", "x")], state("finished", "failed"))]
    call(*RUNNING)
    link.asked = None
    code, _, err = call("run", "try.toml", "--engine", "flower", "--resume")
    assert code == 2 and "training.max_steps was 3 and is" in err[0] and link.asked is None
    assert "holds another run" in call(*RUNNING)[2][0]


def test_a_folder_in_which_a_run_is_going_on_is_refused_with_what_can_be_done(link, call):
    link.script = [BEGUN, (KeyboardInterrupt(), None)]
    call(*RUNNING)
    code, _, err = call(*RUNNING, "--resume")
    assert code == 2 and "`fedloom status runs/try`" in err[0] and "`fedloom stop runs/try`" in err[0]


def test_ctrl_c_leaves_the_run_and_says_what_can_be_done(link, call):
    link.script = [BEGUN, (KeyboardInterrupt(), None)]
    code, out, _ = call(*RUNNING)
    ways = [line.split(": ", 1)[1].strip() for line in out[-3:]]
    assert code == 130 and out[-4] == "detached: run 17 goes on at the SuperLink"
    assert ways == ["fedloom status runs/try", "fedloom stop runs/try", AGAIN]
    code, out, _ = call(*shlex.split(ways[1])[1:])
    assert (code, link.stopped) == (0, [17]) and out[-1].startswith(
        "run 17 is stopped; go on with: fedloom run runs/try/"
    )


def test_detached_it_returns_once_the_run_is_submitted(link, call):
    code, out, _ = call(*RUNNING, "--detach")
    assert code == 0 and out[1] == "detached: run 17 goes on at the SuperLink"
    stop = next(line for line in out if "stop it" in line).split(": ", 1)[1]
    assert shlex.split(stop) == ["fedloom", "stop", "try.toml", "--set", "training.max_steps=3", "--run", "17"]
    assert call(*shlex.split(stop)[1:])[0] == 0 and link.stopped == [17]
    assert call("run", "try.toml", "--detach")[0] == 2


def test_ctrl_c_before_anything_is_submitted(link, call, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "submit", interrupted)
    assert call(*RUNNING)[:2] == (130, ["interrupted before the run was submitted"])


def test_a_folder_that_is_elsewhere_is_said_once_and_the_state_followed(link, call, monkeypatch):
    monkeypatch.setattr(submission, "START_SECONDS", -1.0)
    link.script = [([], state()), ([], state()), ([], state("finished", "completed"))]
    code, out, _ = call(*RUNNING)
    assert code == 0 and out[1].startswith("nothing of run 17 is to be seen in ") and len(out) == 3
    assert out[2].endswith("runs/try on the SuperLink's machine")
    link.script = [([], state()), ([], state("finished", "failed", RAISED + "no data"))]
    code, _, err = call(*RUNNING)
    assert (code, err) == (2, ["error: run 17 in runs/try failed: no data"])


def test_a_superlink_that_is_lost_is_said_with_what_is_known_of_the_run(link, call):
    gone = RoundError("the SuperLink at here cannot be reached")
    link.script = [BEGUN, (ROUND, state()), ([], None), (gone, None)]
    code, out, err = call(*RUNNING)
    assert code == 2 and "the SuperLink does not answer" in out
    assert "may go on without it being seen from here: look with `fedloom status runs/try`" in err[0]
    assert err[1] == f"if it has ended, go on with: {AGAIN}"


def test_a_superlink_that_takes_its_server_app_with_it_is_not_waited_for(link, call):
    class Dying(list):
        """Rows during whose writing the server app dies."""

        def __bool__(self):
            link.die()
            return False

    link.script = [BEGUN, (ROUND, state()), (Dying(), None), (AssertionError("it waits"), None)]
    code, _, err = call(*RUNNING)
    assert code == 2 and err[1] == f"go on with: {AGAIN}"
    assert "failed after round 1 of 2" in err[0] and "the server's app has ended" in err[0]


def test_who_refuses_is_told_in_one_line(monkeypatch):
    import httpx

    config = load_config(Path(__file__).parents[2] / "src/fedloom/testbeds/demo.toml", ["flower.insecure=true"])
    client = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr("flwr.cli.utils.init_http_client_from_connection", lambda connection: client)
    answer = httpx.Response(409, text='{"code": 7, "detail": "Run is already\\n finished."}')
    with pytest.raises(RoundError, match=r"refused: Run is already finished\.$"), launch.open_control(config):
        raise httpx.HTTPStatusError("409", request=httpx.Request("POST", "http://x"), response=answer)


def test_a_number_is_kept_in_the_folder(tmp_path):
    keep_number(tmp_path, None)
    with pytest.raises(Exception, match="holds no run of a SuperLink"):
        read_number(tmp_path)
    keep_number(tmp_path, 2**63)
    assert read_number(tmp_path) == 2**63
