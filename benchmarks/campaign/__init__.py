"""The stages of `benchmarks/faults.py`: ends of a run, damaged files, absurd numbers, memory against its plan."""
