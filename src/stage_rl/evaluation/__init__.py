"""Benchmarks, and what their scores say."""
