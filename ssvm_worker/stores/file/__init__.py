"""Store objects in a directory."""
