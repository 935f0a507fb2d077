"""Headless Chromium, driven through its DevTools protocol: for tests of pages and for pictures of them."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from websockets.sync.client import connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # the only pages are ours, and containers have no user namespaces for it
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-features=Translate,MediaRouter,OptimizationHints",
    "--disable-sync",
    "--mute-audio",
    "--no-first-run",
    "--force-color-profile=srgb",
    "--font-render-hinting=none",
    "--remote-debugging-port=0",
    # Nothing but this machine can be reached, whatever a page or the browser itself may ask for.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
PATIENCE = 30.0
"""Seconds within which the browser starts, and a page does what is waited for."""
PHONE = (360, 740)
DESKTOP = (1280, 900)


def find_program():
    """The path of a Chromium or Chrome, or None. The environment variable CHROMIUM names another."""
    return next(filter(None, map(shutil.which, [os.environ.get("CHROMIUM", ""), *PROGRAMS])), None)


class Browser:
    """A browser's process. Made by `start_browser`."""

    def __init__(self, port):
        self._port = port

    @contextmanager
    def open(self, url, *, size=DESKTOP, dark=False, scale=1):
        """A tab with a page that has been loaded; it is closed afterwards."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new", method="PUT")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            address = json.load(answer)["webSocketDebuggerUrl"]
        with connect(address, max_size=None, open_timeout=PATIENCE, ping_interval=None) as line:
            tab = Tab(line)
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.call(f"{domain}.enable")
            tab.shape(size, dark=dark, scale=scale)
            tab.go(url)
            yield tab
            tab.call("Page.close")


@contextmanager
def start_browser():
    """A browser with a profile of its own, which is gone afterwards. Raises OSError where none is installed."""
    program = find_program()
    if program is None:
        raise OSError(f"no browser here: none of {', '.join(PROGRAMS)} is on the path")
    with tempfile.TemporaryDirectory(prefix="fedloom-browser-", ignore_cleanup_errors=True) as profile:
        # A home of its own too: what a browser leaves behind is not for the user's.
        environment = {**os.environ, "HOME": profile, "XDG_CONFIG_HOME": profile, "XDG_CACHE_HOME": profile}
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            yield Browser(_read_port(Path(profile) / "DevToolsActivePort", process))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _read_port(file, process):
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            raise OSError(f"the browser ended at once, with code {process.returncode}")
        with suppress(OSError, IndexError, ValueError):
            return int(file.read_text(encoding="utf-8").splitlines()[0])
        time.sleep(0.05)
    raise OSError(f"the browser did not start within {PATIENCE:.0f} s")


class Tab:
    """One page. problems: what it complained of so far: errors and warnings of its console, and what was refused.

    patience: seconds for which `wait` waits.
    """

    def __init__(self, line):
        self._line = line
        self._calls = 0
        self._events = []
        self.problems = []
        self.patience = PATIENCE

    def call(self, method, **parameters):
        """One call of the DevTools protocol; its result."""
        self._calls += 1
        self._line.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._line.recv(timeout=PATIENCE))
            if message.get("id") == self._calls:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._take(message)

    def _take(self, event):
        kind, told = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(one.get("value", one.get("description"))) for one in told["args"]))
        elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{told['entry']['text']} {told['entry'].get('url', '')}".strip())
        self._events.append(kind)

    def shape(self, size, *, dark=False, scale=1):
        """Make it so many CSS pixels wide and high, light or dark; a narrow one is a phone that is touched."""
        phone = size[0] < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=scale, mobile=phone
        )
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme, motion])

    def go(self, url):
        """Load a page, and wait until it has been."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        until = time.monotonic() + PATIENCE
        while "Page.loadEventFired" not in self._events:
            if time.monotonic() > until:
                raise TimeoutError(f"{url} was not loaded within {PATIENCE:.0f} s")
            with suppress(TimeoutError):
                self._take(json.loads(self._line.recv(timeout=1)))

    def ask(self, expression):
        """The value of a JavaScript expression, which may be a promise."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            details = told["exceptionDetails"]
            raise RuntimeError(f"{expression}: {details.get('exception', {}).get('description') or details['text']}")
        return told["result"].get("value")

    def wait(self, expression):
        """The first value of a JavaScript expression that is true; within `patience` seconds."""
        until = time.monotonic() + self.patience
        while not (value := self.ask(expression)):
            if time.monotonic() > until:
                raise TimeoutError(f"not within {self.patience:.0f} s: {expression}")
            time.sleep(0.1)
        return value

    def hover(self, x, y):
        """Move the mouse to a place of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key, *, code=0, shift=False):
        """Press a key: Tab, Enter, ArrowRight, a letter. code: its number, where the page or the browser needs it."""
        number = code or {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowLeft": 37}.get(key, 0)
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        told = {"key": key, "windowsVirtualKeyCode": number, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **told, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def picture(self, *, whole=False, clip=None):
        """A PNG of the window, of the whole page, or of a part (x, y, width, height) of the page."""
        area = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = (0, 0, size["width"], size["height"])
        if clip is not None:
            area = {"clip": {**dict(zip(("x", "y", "width", "height"), clip, strict=True)), "scale": 1}}
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=bool(area), **area)
        return base64.b64decode(told["data"])
