"""Measurements that can be repeated: each file proves a claim of docs/BENCHMARKS.md. Not part of the wheel."""
