"""Benchmarks that ship: `stage bench NAME`."""
