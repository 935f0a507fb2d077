"""Programs of fedloom's own collect garbage rarely; a library that is imported leaves that to its program."""

import subprocess
import sys


def said(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_command_collects_rarely_and_an_import_does_not():
    plain = int(said("import gc; print(gc.get_threshold()[0])"))
    imported = int(said("import fedloom.rounds.turns, gc; print(gc.get_threshold()[0])"))
    assert imported == plain
    command = (
        "import atexit, gc, sys; atexit.register(lambda: print('at the end', gc.get_threshold()[0])); "
        "sys.argv = ['fedloom', '--version']; from fedloom.cli.main import main; main()"
    )
    assert int(said(command).rpartition(" ")[2]) > 10 * plain


def test_most_of_what_importing_costs_the_collector_is_spared():
    """Full collections are counted, not seconds."""
    count = (
        "import gc; full = []; gc.callbacks.append(lambda phase, info: info['generation'] == 2 and full.append(1)); "
        "{}import torch, transformers.trainer; print(len(full))"
    )
    assert int(said(count.format("from fedloom.garbage import collect_rarely; collect_rarely(); "))) == 0
    assert int(said(count.format(""))) > 0
