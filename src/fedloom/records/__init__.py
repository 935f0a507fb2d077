"""Settings in, rows out: what a run is told and what it records. Loads no torch."""
