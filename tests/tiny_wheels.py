"""Wheels of a few lines, and a stand-in for pip that hands them out and writes down what it was asked for."""

import json
import sys
import zipfile
from importlib import metadata

VERSION = metadata.version("fedloom")
COMMAND = """
import os, sys

def main():
    print("doctor asked:", *sys.argv[1:])
    sys.exit(int(os.environ.get("DOCTOR", 0)))
"""
"""What stands for the fedloom command: it says how it was called."""

PIP = """
import json, pathlib, re, shutil, sys
here = pathlib.Path(__file__).parent
told = json.loads((here / "told.json").read_text())
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if told["stderr"]:
    print(told["stderr"], file=sys.stderr)
    sys.exit(1)
into = pathlib.Path(sys.argv[sys.argv.index("--wheel-dir" if sys.argv[1] == "wheel" else "--dest") + 1])
into.mkdir(parents=True, exist_ok=True)
for wheel in map(pathlib.Path, told["wheels"]):
    name = wheel.name.partition("-")[0]
    asked = ["fedloom"] if sys.argv[1] == "wheel" else sys.argv
    if any(re.match(name + "(?![a-z])", word) for word in asked):
        shutil.copy(wheel, into)
"""


def make_wheel(folder, name, version="1", requires=(), tag="py3-none-any", code="", entry=""):
    """A wheel with one module."""
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        "Provides-Extra: fast",
        "Provides-Extra: flower",
    ]
    files = {
        f"{name}/__init__.py": code,
        f"{info}/METADATA": "\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires), ""]),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if entry:
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{entry}\n"
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as opened:
        for file, content in files.items():
            opened.writestr(zipfile.ZipInfo(file, (1980, 1, 1, 0, 0, 0)), content)
    return path


def make_fedloom(folder, requires=()):
    """What stands for fedloom: its command alone."""
    return make_wheel(folder, "fedloom", VERSION, requires, code=COMMAND, entry="fedloom = fedloom:main")


class StandIn:
    """pip for `wheelhouse.PIP`: hands out those of `wheels` that it is asked for, or fails with words."""

    def __init__(self, folder, wheels=(), stderr=""):
        folder.mkdir(exist_ok=True)
        self.folder, self.command = folder, (sys.executable, "-S", str(folder / "pip.py"))
        (folder / "pip.py").write_text(PIP)
        told = {"wheels": list(map(str, wheels)), "stderr": stderr}
        (folder / "told.json").write_text(json.dumps(told))

    def calls(self, kind):
        """The arguments of all its calls of this kind."""
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [arguments for arguments in map(json.loads, lines) if arguments[0] == kind]
