"""Tests of ssvm_worker.net."""
