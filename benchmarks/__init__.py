"""Benchmarks: one file a claim, run by ``python -m benchmarks NAME --json FILE``."""
