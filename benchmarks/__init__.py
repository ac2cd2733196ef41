"""Compare our jobs with other programs, side by side: ``python -m benchmarks``."""
