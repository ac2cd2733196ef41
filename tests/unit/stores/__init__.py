"""Tests of ssvm_worker.stores."""
