"""Benchmarks of our jobs and of other programs, side by side: ``python -m benchmarks``."""
