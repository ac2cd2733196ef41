"""Examine, measure and scale a running system."""
