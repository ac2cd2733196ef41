"""Describe stored artifacts: their keys, manifests and checksums."""
