"""`fedloom node`: the process around the node, its signals and how it ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedloom.cli.funnel import complaints
from fedloom.errors import SiteError
from fedloom.records.text import LONG, to_printable

NEEDS_SOMEBODY = 77
"""Exit code where starting the node again changes nothing; the systemd unit has it in RestartPreventExitStatus."""


def run_node(site: Path) -> None:
    """Serve until the process is told to end. 2: a mistake or a line that is broken; 77: the SuperLink refuses this
    site.
    """
    from fedloom.flower.node.refusals import NotLetInError
    from fedloom.flower.node.service import serve_node
    from fedloom.site.config import load_site_config

    code = 0
    try:
        serve_node(load_site_config(site))
    except SiteError as error:
        complaints.print(
            f"error: {to_printable(str(error), LONG)}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        code = NEEDS_SOMEBODY if isinstance(error, NotLetInError) else 2
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of Flower's client may still wait for an answer, for half a minute: nobody needs it any more.
    os._exit(code)
