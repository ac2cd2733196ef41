"""Fuzz tests of the parsers of untrusted bytes: ``python -m fuzz``."""
