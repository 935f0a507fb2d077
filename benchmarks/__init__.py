"""Measurements that can be repeated: each file proves a claim of docs/benchmarks. Not part of the wheel."""
