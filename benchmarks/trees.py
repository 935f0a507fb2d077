"""Two versions of the code under one measurement: the code of a commit, beside the code as it is.

The measurement is always that of today's `benchmarks/`; what differs is which `fedloom` it imports. So a measurement
that compares may use nothing of fedloom that only one of the two has.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedloom.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
COMPILES = ("aggregate", "--preset", "tinyllama", "--rank", "4", "--modules", "k_proj", "--repeats", "1")
"""A measurement of seconds for which a fresh tree has to compile its kernels, which it keeps beside its files."""


@dataclass(frozen=True, slots=True)
class Tree:
    """One version: its name, the folder that holds `fedloom`, and the one that holds `benchmarks`."""

    name: str
    source: Path
    measurements: Path = REPOSITORY


@dataclass(frozen=True, slots=True)
class Measured:
    """What a measurement printed; seconds of processor time of its whole process, and its peak memory in MiB."""

    result: Mapping[str, Any]
    cpu_s: float
    peak_mib: float


def tree_of_today() -> Tree:
    """The code as it lies here, whether it is committed or not."""
    return Tree("new", REPOSITORY / "src")


@contextmanager
def tree_of(ref: str, *, own: bool = False) -> Iterator[Tree]:
    """The code of a commit, in a folder that is thrown away. own: with the measurements of that day.

    Raises ConfigError for what git does not know.
    """
    wanted = ["src", *(["benchmarks"] if own else [])]
    command = ["git", "-C", str(REPOSITORY), "archive", "--format=tar", ref, *wanted]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError(f"git has no code of {ref!r} ({said[-1] if said else 'it says nothing'}): give a commit")
    with tempfile.TemporaryDirectory(prefix="fedloom-then-") as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Tree("old", Path(folder) / "src", Path(folder) if own else REPOSITORY)


def settle(tree: Tree) -> None:
    """Make sure that a process takes this tree's fedloom, and have its kernels compiled before anything is timed."""
    told = _call(tree, ["-c", "import fedloom; print(fedloom.__file__)"])[0].strip()
    if not Path(told).is_relative_to(tree.source):
        raise ConfigError(f"fedloom is imported from {told}, not from {tree.source}: unset what puts it first")
    with suppress(ConfigError):  # code that is too old for it may be able to play what is asked for
        measure(tree, COMPILES)


def measure(tree: Tree, words: Sequence[str]) -> Measured:
    """One call of `python -m benchmarks WORDS --json` on one thread, unless OMP_NUM_THREADS says otherwise.

    Raises ConfigError where it fails, with the last line that it said.
    """
    said, used = _call(tree, ["-m", "benchmarks", *words, *([] if "--json" in words else ["--json"])])
    try:
        result = json.loads(said[said.index("{") :])
    except ValueError:
        raise ConfigError(f"`{' '.join(words)}` prints no JSON with the {tree.name} code") from None
    return Measured(result, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def _call(tree: Tree, arguments: Sequence[str]) -> tuple[str, Any]:
    """(what a Python with this tree's code prints, the resources that it used)."""
    path = os.pathsep.join([str(tree.source), str(tree.measurements)])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=tree.measurements, env=environment, stdout=out, stderr=complaints
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)  # it is known: nobody waits for it again
        texts = [_content(file) for file in (out, complaints)]
    if process.returncode:
        raise ConfigError(f"`{' '.join(arguments)}` fails with the {tree.name} code: {_reason(texts[1])}")
    return texts[0], used


def _reason(complaint: str) -> str:
    """The last line, or what stands in typer's frame around a mistake."""
    lines = [line for line in complaint.splitlines() if any(map(str.isalnum, line))]
    framed = [line.strip(" │") for line in lines if line.startswith("│")]
    return " ".join(framed) or (lines[-1].strip() if lines else "it says nothing")


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
