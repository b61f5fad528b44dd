"""What `tools/benchmark.py` measures: speed, beside what one would use instead, in the same run."""
