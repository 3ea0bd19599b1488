"""Benchmarks: everything side by side, in one run (docs/benchmarks.md)."""
