"""Take the pictures of docs/page.md and README: `python -m scripts.make_screenshots`, some minutes.

The runs are real: the demo's model, sites and data, with fewer steps, rounds and held-out examples. One is shown
while it is played, and again when it is over; five methods, each with two seeds, are shown side by side. With the same
--runs folder the five are played once; what is there is kept.
"""

import argparse
import io
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from scripts.browser import DESKTOP, PHONE, start_browser

from fedloom.testbeds import testbed_folder
from fedloom.web.serving import Service

OUT = Path(__file__).parents[1] / "docs" / "pictures"
METHODS = "fedit,ffa,fedsrd,florist,loom"
SEEDS = 2
ROUNDS, SHOWN = 12, 7
"""Rounds of a run, and the round in which it is shown in progress."""
SETTINGS = {
    "federation.num_rounds": ROUNDS,
    "federation.eval_every": 1,
    "training.max_steps": 6,
    "training.learning_rate": 4e-3,
}
HELDOUT = 50
"""Examples of every site that are scored."""
COLOURS = 96
"""Of a picture: flat colours and text lose nothing that is seen, and three quarters of the bytes."""


def make_data(folder):
    """The demo's data with fewer held-out examples; the pattern that names them."""
    whole = testbed_folder() / "data"
    for site in sorted(path.name for path in whole.iterdir() if path.is_dir()):
        (folder / site).mkdir(parents=True, exist_ok=True)
        lines = (whole / site / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / site / "heldout.jsonl").write_text("".join(lines[:HELDOUT]), encoding="utf-8")
        for name in ("train.jsonl", "validation.jsonl"):
            (folder / site / name).write_bytes((whole / site / name).read_bytes())
    return folder / "{client}"


def command(name, *words, data):
    """A command of fedloom on the demo's settings, with those of the pictures over them."""
    sets = [f"{key}={value}" for key, value in {**SETTINGS, "data.source": data}.items()]
    given = [word for text in sets for word in ("--set", text)]
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
def played(words):
    """A command that goes on meanwhile; waited for in the end, unless something went wrong."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
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
    small = picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    OUT.mkdir(exist_ok=True)
    small.save(OUT / f"{name}.png", optimize=True)
    print(f"{name}.png  {picture.width} × {picture.height}  {(OUT / f'{name}.png').stat().st_size / 1024:.0f} KiB")


def show_run(browser, folder, data):
    """A run in progress, and the same when it is over."""
    with played(command("run", "--out", str(folder), "--force", data=data)):
        while not (folder / "ledger.jsonl").exists() or "session" not in (folder / "ledger.jsonl").read_text("utf-8"):
            threading.Event().wait(0.5)
        with served(folder) as url, browser.open(url) as tab:
            tab.patience = 1800
            status = "document.querySelector('.status')?.textContent"
            tab.wait(f"{status}?.includes('round {SHOWN} of')")
            take(tab, "running-desktop", DESKTOP)
            take(tab, "running-phone-dark", PHONE, dark=True, scale=2)
            tab.wait(f"{status} === 'finished'")
            take(tab, "finished-desktop-dark", DESKTOP, dark=True)
            take(tab, "finished-bytes", DESKTOP, at="#bytes")
            take(tab, "finished-phone", PHONE, scale=2)


def show_methods(browser, folder, data):
    """Five methods side by side."""
    words = ("--methods", METHODS, "--seeds", str(SEEDS), "--out", str(folder))
    with played(command("compare", *words, data=data)):
        pass
    with served(folder) as url, browser.open(url) as tab:
        take(tab, "methods-desktop", DESKTOP)
        take(tab, "methods-desktop-dark", DESKTOP, dark=True)
        take(tab, "methods-phone", PHONE, scale=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/pictures"), help="where the runs are played")
    folder = parser.parse_args().runs.absolute()
    data = make_data(folder / "data")
    with start_browser() as browser:
        show_run(browser, folder / "demo", data)
        show_methods(browser, folder / "methods", data)
    print(f"in all {sum(path.stat().st_size for path in OUT.glob('*.png')) / 1024:.0f} KiB in {OUT}")


if __name__ == "__main__":
    main()
