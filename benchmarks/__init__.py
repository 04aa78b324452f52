"""Benchmarks and comparisons with other trainers; run `python -m benchmarks.NAME`."""
