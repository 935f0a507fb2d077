"""Runs in a browser: their page served on this machine, read-only and kept up to date."""
