"""Texts of ``--help`` that several commands share."""

from __future__ import annotations


def examples(*commands: str) -> str:
    """Return the examples of a command as the end of its help."""
    return "\n".join(["examples:", *(f"  ssvm {each}" for each in commands)])
