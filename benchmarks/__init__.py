"""What `tools/benchmark.py` measures: speed, next to the alternatives, in the same run."""
