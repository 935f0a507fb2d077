"""Experiments that make a figure of the docs: many runs, one script each. Not part of the wheel."""
