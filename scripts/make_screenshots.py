"""Take the pictures of docs/page.md and README: `python -m scripts.make_screenshots`, some minutes.

The runs are real: the demo's model, sites and data, with fewer steps, rounds and held-out examples. One is shown
while it is played, and again when it is over; five methods are shown side by side. With the same --runs folder the
five are played once; what is there is kept.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from scripts.browser import DESKTOP, PHONE, start_browser

import fedloom
from fedloom.testbeds import testbed_folder
from fedloom.web.serving import Service

OUT = Path(__file__).parents[1] / "docs" / "pictures"
METHODS = "fedit,ffa,fedsrd,florist,loom"
SEEDS = 1
ROUNDS, SHOWN = 12, 9
"""Rounds of a run, and the round in which it is shown in progress."""
MODEL = "demo-model"
SETTINGS = {
    # As names in the working folder: pictures show no path of whoever took them.
    "model.path": MODEL,
    "data.source": "data/{client}",
    "federation.num_rounds": ROUNDS,
    "federation.eval_every": 1,
    "training.max_steps": 6,
    "training.learning_rate": 4e-3,
}
HELDOUT = 50
"""Examples of every site that are scored."""
COLOURS = 256
"""Of a picture: flat colours and text lose nothing that is seen, and half of the bytes."""


def make_testbed(folder):
    """The demo's model and data in a folder, with fewer held-out examples."""
    whole = testbed_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MODEL).exists():
        (folder / MODEL).symlink_to(whole / "model")
    for path in whole.glob("data/*/*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        copy = folder / path.relative_to(whole)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(lines[: HELDOUT if path.stem == "heldout" else None]), encoding="utf-8")


def command(name, *words):
    """A command of fedloom on the demo's settings, with those of the pictures over them."""
    given = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "fedloom", name, str(testbed_folder() / "demo.toml"), *words, *given]


@contextmanager
def served(folder):
    """The address of a server for the runs in a folder."""
    service = Service([folder], port=0)
    thread = threading.Thread(target=service.serve)
    thread.start()
    try:
        yield service.url
    finally:
        service.stop()
        thread.join()


@contextmanager
def played(folder, *words):
    """A command of fedloom that goes on meanwhile; waited for in the end, unless something went wrong."""
    source = Path(fedloom.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, cwd=folder, env=environment)
    try:
        yield
        if process.wait():
            raise SystemExit(f"{' '.join(words)} ended with code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def take(tab, name, size, *, dark=False, at="", scale=1):
    """A picture of the window, scrolled to an element; says its size."""
    tab.shape(size, dark=dark, scale=scale)
    tab.ask("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    tab.ask(f"document.querySelector({at!r}).scrollIntoView()" if at else "scrollTo(0, 0)")
    tab.ask("new Promise((done) => setTimeout(done, 300))")
    picture = Image.open(io.BytesIO(tab.picture())).convert("RGB")
    # By the colours' spread, not by how often they are: thin lines keep theirs.
    small = picture.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    OUT.mkdir(exist_ok=True)
    small.save(OUT / f"{name}.png", optimize=True)
    print(f"{name}.png  {picture.width} × {picture.height}  {(OUT / f'{name}.png').stat().st_size / 1024:.0f} KiB")


def show_run(browser, folder):
    """A run in progress, and the same when it is over."""
    (folder / "one").mkdir(exist_ok=True)
    shutil.rmtree(folder / "one" / "demo", ignore_errors=True)
    with played(folder, "run", "--out", "one/demo"), served(folder / "one") as url, browser.open(url) as tab:
        tab.patience = 1800
        status = "document.querySelector('.status')?.textContent"
        tab.wait(f"{status}?.includes('round {SHOWN} of')")
        take(tab, "running-desktop", DESKTOP)
        take(tab, "running-phone-dark", PHONE, dark=True, scale=2)
        tab.wait(f"{status} === 'finished'")
        take(tab, "finished-desktop-dark", DESKTOP, dark=True)
        take(tab, "finished-bytes", DESKTOP, at="#bytes")
        take(tab, "finished-phone", PHONE, scale=2)


def show_methods(browser, folder):
    """Five methods side by side."""
    with played(folder, "compare", "--methods", METHODS, "--seeds", str(SEEDS), "--out", "methods"):
        pass
    with served(folder / "methods") as url, browser.open(url) as tab:
        take(tab, "methods-desktop", DESKTOP)
        take(tab, "methods-learning-dark", DESKTOP, dark=True, at="#learning")
        take(tab, "methods-phone", PHONE, scale=2, at="#front")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/pictures"), help="where the runs are played")
    folder = parser.parse_args().runs.absolute()
    make_testbed(folder)
    with start_browser() as browser:
        show_run(browser, folder)
        show_methods(browser, folder)
    print(f"in all {sum(path.stat().st_size for path in OUT.glob('*.png')) / 1024:.0f} KiB in {OUT}")


if __name__ == "__main__":
    main()
