"""Where errors end: whatever a command raises as a `FedloomError` becomes one line and exit code 2, here alone."""

from __future__ import annotations

import os

import typer
from click import Context
from rich.console import Console
from typer.core import TyperGroup

from fedloom.errors import FedloomError
from fedloom.garbage import collect_rarely
from fedloom.records.text import to_printable

complaints = Console(stderr=True)


class Funnel(TyperGroup):
    """The group of commands; turns errors into one line on stderr and an exit code."""

    def invoke(self, ctx: Context) -> object:
        """Run a command. 2: the user's own mistake, 130: interrupted; with --debug errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (FedloomError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            complaints.print(_in_lines(f"error: {error}"), style="red", markup=False, highlight=False, soft_wrap=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            complaints.print("interrupted", style="red")
            ctx.exit(130)


def _in_lines(text: str) -> str:
    """A message that may quote names, keys and errors of others, its own line breaks kept."""
    return "\n".join(to_printable(line, 20_000) for line in text.split("\n")[:50])


def run_app(app: typer.Typer, name: str | None = None) -> None:
    """Run a group of commands as a program, with the chatter of the libraries below switched off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    collect_rarely()
    app(prog_name=name)
