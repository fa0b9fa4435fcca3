"""Benchmarks: each measures both sides in one run, interleaved, and writes the ratios."""
