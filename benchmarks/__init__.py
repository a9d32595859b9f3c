"""Benchmarks: `python -m benchmarks.run` measures, `python -m benchmarks.report` draws what was measured."""
