"""`python -m benchmarks`: every measurement that the docs quote."""

from benchmarks.commands import app
from fedloom.cli.funnel import run_app

run_app(app, "python -m benchmarks")
