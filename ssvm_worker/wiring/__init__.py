"""Create objects from settings; only this package names concrete classes."""
