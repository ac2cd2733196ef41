"""Fuzz the parsers of bytes from outside: ``python -m fuzz``."""
