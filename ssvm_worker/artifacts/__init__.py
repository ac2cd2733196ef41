"""Describe what is stored: keys, manifests and checksums."""
